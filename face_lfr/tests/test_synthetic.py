"""The synthetic set: real formats, a function of the seed, complete or absent."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.log import InputError
from face_lfr.data.bins import load_bin
from face_lfr.data.challenge import load_deepglint, load_iqiyi, read_image
from face_lfr.data.recordio import RecordFile, unpack
from face_lfr.data.synthetic import PAIR, SUFFIXES, generate, load_synthetic, person

SMALL = {
    "train_ids": 4, "train_images": 3, "glint_ids": 3, "glint_images": 2, "distractors": 5,
    "video_ids": 2, "videos": 2, "frames": 4, "fold_pairs": 1,
}  # fmt: skip


def contents(root: Path) -> dict[str, bytes]:
    paths = [path for path in root.rglob("*") if path.suffix in SUFFIXES]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("synthetic") / "small", seed=3, **SMALL)


def test_records_follow_the_conventions(small: Path) -> None:
    records = RecordFile(small / "train.rec")
    assert list(records.keys) == list(range(1 + 12 + 4))
    head = unpack(records.read(0))
    assert head.flag == 2
    assert head.label_L.tolist() == [13, 17]
    assert not head.image
    for key in range(1, 13):
        record = unpack(records.read(key))
        assert record.flag == 0
        assert record.label_L.tolist() == [(key - 1) // 3]
        assert record.image[:2] == b"\xff\xd8"
        assert record.id == key
    ranges = [unpack(records.read(key)).label_L.tolist() for key in range(13, 17)]
    assert ranges == [[1, 4], [4, 7], [7, 10], [10, 13]]
    assert (small / "property").read_text() == "4,112,112\n"


def test_the_training_part_loads(small: Path) -> None:
    data = load_synthetic(small, seed=3, **SMALL)
    assert (data.name, data.num_classes, data.epoch_length) == ("synthetic", 4, 12)
    assert data.labels_N.tolist() == np.repeat(np.arange(4), 3).tolist()
    assert data.images.read(0).shape == (112, 112, 3)


def test_label_noise_changes_labels_and_no_image(small: Path) -> None:
    clean = load_synthetic(small, seed=3, **SMALL)
    noisy = load_synthetic(small, seed=3, noise=1.0, noise_seed=1, **SMALL)
    assert (noisy.labels_N != clean.labels_N).any()
    assert np.array_equal(noisy.images.read(5), clean.images.read(5))


def test_pairs_come_in_ten_folds_of_strangers(small: Path) -> None:
    pairs = load_bin(small / "syn.bin")
    assert np.asarray(pairs.same_P).tolist() == [True, False] * 10
    assert len(pairs.images) == 40
    assert person(3, PAIR, 0) != person(3, PAIR, 2)
    image = pairs.images.read(0)
    assert image.shape == (112, 112, 3)
    assert not np.array_equal(image, pairs.images.read(1))


def test_the_image_track_has_labels_and_distractors(small: Path) -> None:
    images = load_deepglint(small / "glint_syn")
    assert images.labels_N is not None
    assert len(images) == 11
    assert images.labels_N.tolist() == [0, 0, 1, 1, 2, 2, -1, -1, -1, -1, -1]
    assert all(images.read(row).shape == (112, 112, 3) for row in range(11))


def test_quality_says_which_frames_are_degraded(small: Path) -> None:
    videos = load_iqiyi(small / "iqiyi_syn")
    assert videos.labels_V is not None
    assert videos.labels_V.tolist() == [0, 0, 1, 1]
    lines = (small / "iqiyi_syn/quality.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == list(videos.frames.names)
    assert list(load_iqiyi(small / "iqiyi_clean").frames.names) == list(videos.frames.names)
    quality_N = np.array([float(line.split()[1]) for line in lines])
    assert 0 < (quality_N < 1).sum() < 16
    assert quality_N[quality_N < 1].max() <= 0.5
    for name, quality in zip(videos.frames.names, quality_N, strict=True):
        bad, clean = (small / folder / name for folder in ("iqiyi_syn", "iqiyi_clean"))
        assert (bad.read_bytes() == clean.read_bytes()) == (quality == 1)
    worst = videos.frames.names[int(quality_N.argmin())]
    bad, clean = (read_image(small / folder / worst) for folder in ("iqiyi_syn", "iqiyi_clean"))
    assert np.abs(bad.astype(float) - clean).mean() > 5


def test_the_seed_decides_everything(small: Path, tmp_path: Path) -> None:
    assert contents(generate(tmp_path / "again", seed=3, **SMALL)) == contents(small)
    other = contents(generate(tmp_path / "other", seed=4, **SMALL))
    changed = [name for name, content in contents(small).items() if other[name] != content]
    assert {Path(name).suffix for name in changed} == set(SUFFIXES)
    assert len(changed) > 40


def test_a_larger_set_contains_the_smaller(small: Path, tmp_path: Path) -> None:
    more = SMALL | {"glint_ids": 4, "distractors": 6, "video_ids": 3}
    large, few = contents(generate(tmp_path / "large", seed=3, **more)), contents(small)
    for name in (name for name in few if name.endswith(".jpg")):
        assert large[name] == few[name], name


def test_no_person_is_in_two_parts() -> None:
    people = [person(0, part, number) for part in range(5) for number in range(40)]
    assert len(set(people)) == 200


def test_a_complete_set_is_reused_and_a_damaged_one_made_anew(tmp_path: Path) -> None:
    out = generate(tmp_path / "set", seed=3, **SMALL)
    before, made = contents(out), os.stat(out / "synthetic.json").st_mtime_ns
    (out / "train.labels.npy").write_bytes(b"a cache of the loader")
    generate(out, seed=3, **SMALL)
    assert os.stat(out / "synthetic.json").st_mtime_ns == made
    (out / "iqiyi_syn/video_0001_1/2.jpg").unlink()
    generate(out, seed=3, **SMALL)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_foreign_folders_and_other_settings_are_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seed=3 not 4"):
        generate(small, seed=4, **SMALL)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="holds no complete synthetic data set"):
        generate(tmp_path, seed=3, **SMALL)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    "change", [{"train_ids": 1}, {"frames": 0}, {"degraded": 1.5}, {"strength": -1.0},
               {"distractors": -1}]
)  # fmt: skip
def test_bad_settings_are_named(change: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=next(iter(change))):
        generate(tmp_path / "set", seed=0, **SMALL | change)
    with pytest.raises(InputError, match="seed"):
        generate(tmp_path / "set", seed=-1, **SMALL)
    assert not (tmp_path / "set").exists()


@pytest.mark.slow
def test_the_command_writes_the_set(small: Path, tmp_path: Path) -> None:
    changes = [f"{name}={value}" for name, value in SMALL.items()]
    command = [sys.executable, "-m", "face_lfr.data.synthetic", f"out={tmp_path / 'set'}", "seed=3"]
    subprocess.run([*command, *changes], check=True, cwd=tmp_path)
    assert contents(tmp_path / "set") == contents(small)
    command.append("strength=2.0")
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "strength" in failed.stderr
