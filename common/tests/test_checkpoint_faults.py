"""Damaged, hostile and unwritable checkpoints."""

import errno
import io
import json
import logging
import os
import pickle
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from common import checkpoint, rundir
from common.checkpoint import Checkpointer, load_model, newest
from common.log import InputError
from common.tests.test_checkpoint import names, saved

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("file", [SHARD, "state.json", "rank_00000.json", "manifest.json"])
@pytest.mark.parametrize("damage", [flip, shorten, Path.unlink])
def test_damage_is_named_and_passed_over(
    tmp_path: Path, caplog, file: str, damage: Callable[[Path], None]
) -> None:
    model = saved(tmp_path, 1, 2, 3)
    damage(tmp_path / "step_00000003" / file)
    with caplog.at_level(logging.WARNING):
        assert Checkpointer(tmp_path, model).resume() == 2
    assert model.weight.tolist() == [[2, 2]]
    (warning,) = [record.message for record in caplog.records if record.name.startswith("common")]
    assert f"step_00000003/{file} " in warning
    with pytest.raises(InputError, match=f"step_00000003/{file}: "):
        load_model(tmp_path / "step_00000003", model)
    for step in (1, 2):
        damage(tmp_path / f"step_0000000{step}" / file)
    with pytest.raises(InputError, match="no checkpoint is intact") as caught:
        Checkpointer(tmp_path, model).resume()
    assert all(f"step_0000000{step}/{file}" in str(caught.value) for step in (1, 2, 3))


def test_any_flipped_bit_of_the_shard_is_found(tmp_path: Path) -> None:
    model = saved(tmp_path, 1)
    path = tmp_path / "step_00000001" / SHARD
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(InputError, match=SHARD):
            Checkpointer(tmp_path, model).resume()


def test_a_broken_one_does_not_push_a_good_one_out(tmp_path: Path) -> None:
    model = saved(tmp_path, 1, 5)
    flip(tmp_path / "step_00000005" / SHARD)
    saver = Checkpointer(tmp_path, model, keep=1)
    assert saver.resume() == 1
    saver.save(3)
    assert names(tmp_path) == ["step_00000003", "step_00000005"]
    assert Checkpointer(tmp_path, model).resume() == 3
    saver.save(5)
    assert names(tmp_path) == ["step_00000005"]
    assert Checkpointer(tmp_path, model).resume() == 5


def test_a_folder_without_a_manifest_is_not_a_checkpoint(tmp_path: Path) -> None:
    model = saved(tmp_path, 1)
    (tmp_path / "step_00000002").mkdir()
    found = newest(tmp_path)
    assert found is not None
    assert found.name == "step_00000001"
    assert Checkpointer(tmp_path, model).resume() == 1
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000004")
    with pytest.raises(InputError, match=r"manifest\.json was changed"):
        Checkpointer(tmp_path, model).resume()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def plant(path: Path, mark: Path, kind: str) -> None:
    if kind == "torch":
        content = io.BytesIO()  # torch.save refuses some of the file names
        torch.save({"weight": Payload(mark)}, content)
        path.write_bytes(content.getvalue())
    else:
        path.write_bytes(pickle.dumps(Payload(mark), protocol=int(kind)))


def forge(folder: Path) -> None:
    """A manifest that agrees with the files."""
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    listing = {path.name: rundir.fingerprint(path) for path in files}
    content = {"step": 1, "world": 1, "files": listing}
    whole = {"content": content, "sha256": checkpoint._digest(content)}
    (folder / "manifest.json").write_text(json.dumps(whole))


@pytest.mark.parametrize("kind", ["0", "1", "2", "4", "5", "torch"])
@pytest.mark.parametrize(
    "file", [".metadata", "__0_0.distcp", SHARD, "state.json", "rank_00000.json", "manifest.json"]
)
def test_a_pickle_is_refused_and_does_not_run(tmp_path: Path, file: str, kind: str) -> None:
    model = saved(tmp_path / "checkpoints", 1)
    folder, mark = tmp_path / "checkpoints" / "step_00000001", tmp_path / "executed"
    for forged in (False, True):
        plant(folder / file, mark, kind)
        if forged and file != "manifest.json":
            forge(folder)
        with pytest.raises(InputError, match=f"{file}: is a pickle"):
            Checkpointer(folder.parent, model).resume()
        with pytest.raises(InputError, match=f"{file}: is a pickle"):
            load_model(folder, model)
    assert not mark.exists()
    content = io.BytesIO((folder / file).read_bytes())
    torch.load(content, weights_only=False) if kind == "torch" else pickle.load(content)
    assert mark.exists()  # it would have run


def test_the_checkpoint_of_another_program_is_refused(tmp_path: Path) -> None:
    """The native format of torch.distributed.checkpoint has a pickled index."""
    torch.distributed.checkpoint.save(
        {"a": torch.ones(2)}, checkpoint_id=tmp_path / "step_00000001"
    )
    with pytest.raises(InputError, match=r"__0_0\.distcp: is a pickle"):
        Checkpointer(tmp_path, nn.Linear(1, 1)).resume()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB, where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True)
    except OSError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("mounting is not permitted")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_loses_nothing(small_disk: Path) -> None:
    model = nn.Linear(300, 300)
    saver = Checkpointer(small_disk, model, keep=1)
    saver.save(1)
    expected = model.weight.tolist()
    with torch.no_grad():
        model.weight.zero_()
    big = Checkpointer(small_disk, model, keep=1, more=nn.Linear(400, 400))
    with pytest.raises(OSError, match="No space left") as caught:
        big.save(2)
    assert caught.value.errno == errno.ENOSPC
    assert names(small_disk) == ["step_00000001"]
    assert saver.resume() == 1
    assert model.weight.tolist() == expected


@pytest.mark.parametrize("call", range(1, 9))
def test_an_error_at_any_flush_loses_nothing(tmp_path: Path, monkeypatch, call: int) -> None:
    model = saved(tmp_path, 1)
    real, count = os.fsync, [0]

    def fsync(handle: int) -> None:
        count[0] += 1
        if count[0] == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    saver = Checkpointer(tmp_path, model, keep=1)
    if call <= 7:
        with pytest.raises(OSError, match="No space left"):
            saver.save(2)
        assert names(tmp_path) == ["step_00000001"]
    monkeypatch.undo()
    saver.save(2)
    assert names(tmp_path) == ["step_00000002"]
