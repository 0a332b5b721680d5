import json
import shutil
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common import rundir
from common.log import InputError


def test_the_first_start_and_the_restarts_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    config = OmegaConf.create({"lr": 0.1, "twice": "${lr}", "nested": {"none": None, "x": [1, 2]}})
    rundir.prepare(folder, config, main=False)
    assert not folder.exists()
    for _ in range(3):
        rundir.prepare(folder, config, main=True)
    assert OmegaConf.load(folder / "config.yaml") == {**config, "twice": 0.1}
    assert "${" not in (folder / "config.yaml").read_text()
    run = json.loads((folder / "run.json").read_text())
    assert {"git", "versions", "host", "device", "argv", "time"} < run.keys()
    assert run["versions"]["torch"]
    assert len(run["restarts"]) == 2
    assert run["restarts"][0].keys() == run.keys() - {"restarts"}
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "run.json"]


def test_a_plain_mapping_is_a_config(tmp_path: Path) -> None:
    rundir.prepare(tmp_path, {"model": {"width": 3}})
    assert OmegaConf.load(tmp_path / "config.yaml") == {"model": {"width": 3}}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"restarts": 3}'])
def test_a_foreign_run_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json: is not the run\.json"):
        rundir.prepare(tmp_path, {})
    assert (tmp_path / "run.json").read_text() == text


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="taken: cannot be written"):
        rundir.prepare(tmp_path / "taken", {})


def test_a_failed_write_keeps_the_old_text(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    rundir.write_text(path, "old")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rundir.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        rundir.write_text(path, "new")
    assert path.read_text() == "old"


def test_revision_of_a_checkout_and_of_an_installed_copy(tmp_path: Path, monkeypatch) -> None:
    copy = tmp_path / "common" / "rundir.py"
    copy.parent.mkdir()
    shutil.copy(rundir.__file__, copy)
    monkeypatch.setattr(rundir, "__file__", str(copy))
    assert rundir.environment()["git"] == {"revision": None, "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    clean = rundir.environment()["git"]
    assert len(clean["revision"]) == 40
    assert clean["dirty"] is False
    copy.write_text("changed")
    assert rundir.environment()["git"] == {**clean, "dirty": True}
