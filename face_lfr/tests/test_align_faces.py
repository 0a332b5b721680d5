"""The tool that cuts aligned faces: content, stopped runs, faces that fail, bad options."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from common.log import InputError
from face_lfr.data.align import align
from face_lfr.data.ijb import load_ijb
from face_lfr.data.replicas import encode, write_replica
from face_lfr.data.transforms import read_rgb
from face_lfr.tools import align_faces as module
from face_lfr.tools.align_faces import AlignFacesConfig, Tally, align_faces, read_landmarks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def crops(tmp_path: Path) -> dict[str, Path]:
    """Loose crops of the IJB replica, with its own list of landmarks."""
    root = write_replica("ijb", tmp_path / "ijbc")
    landmarks = root / "meta" / "ijbc_name_5pts_score.txt"
    return {"input": root / "loose_crop", "landmarks": landmarks, "out": tmp_path / "out"}


def run(crops: dict[str, Path], **options: Any) -> Tally:
    return align_faces(AlignFacesConfig(**crops, **{"workers": 0, **options}))


def refused(crops: dict[str, Path], complaint: str, **options: Any) -> None:
    with pytest.raises(InputError) as error:
        run(crops, **options)
    assert str(error.value) == complaint


def edit(path: Path, line: int, text: str) -> None:
    lines = path.read_text().split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines))


def stamps(out: Path) -> dict[str, int]:
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.rglob("*.jpg")}


@pytest.mark.parametrize("workers", [0, 2])
def test_faces_of_a_tree(crops: dict[str, Path], workers: int) -> None:
    images = load_ijb(crops["input"].parent).images()
    assert run(crops, workers=workers, suffix=".png") == (20, 0, 0)
    for row in range(20):
        found = read_rgb(crops["out"] / f"{row + 1}.png")
        # the set keeps landmarks in float32
        gap = np.abs(found.astype(int) - images.read(row))
        assert gap.max() <= 2
        assert (gap == 0).mean() > 0.99
    names = {path.name for path in crops["out"].iterdir()}
    assert names == {*(f"{row}.png" for row in range(1, 21)), "settings.json", ".lock"}


def test_folders_68_points_and_sizes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (150, 160, 3), np.uint8)
    point = rng.uniform(20, 130, (68, 2))
    (tmp_path / "in" / "a" / "b").mkdir(parents=True)
    (tmp_path / "in" / "a" / "b" / "x.y.png").write_bytes(encode(image, ".png"))
    words = " ".join(f"{value:.9f}" for value in point.ravel())
    (tmp_path / "l.txt").write_text(f"a/b/x.y.png {words}\n")
    paths = {"input": tmp_path / "in", "landmarks": tmp_path / "l.txt", "out": tmp_path / "out"}
    assert run(paths, size=96, quality=100) == (1, 0, 0)
    found = cv2.imread(str(tmp_path / "out" / "a" / "b" / "x.y.jpg"))[..., ::-1]
    want = align(image, point, 96)
    assert found.shape == (96, 96, 3)
    assert np.abs(found.astype(int) - want).mean() < 6


def test_a_stopped_run_goes_on(crops: dict[str, Path]) -> None:
    run(crops)
    before = stamps(crops["out"])
    for number in (3, 7):
        (crops["out"] / f"{number}.jpg").unlink()
    (crops["out"] / ".7.jpg.tmp").write_bytes(b"torn")
    assert run(crops) == (2, 18, 0)
    after = stamps(crops["out"])
    assert after.keys() == before.keys()
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"3.jpg", "7.jpg"}
    assert not (crops["out"] / ".7.jpg.tmp").exists()
    assert run(crops, workers=2) == (0, 20, 0)
    what = "the folder was begun with other settings; quality is 80 here and: 95"
    refused(crops, f"{crops['out'] / 'settings.json'}: {what}", quality=80)


@pytest.mark.parametrize("workers", [0, 2])
def test_faces_that_fail_are_counted_and_listed(crops: dict[str, Path], workers: int) -> None:
    first, second = (crops["input"] / name for name in ("4.jpg", "9.jpg"))
    first.write_bytes(b"no image")
    second.unlink()
    edit(crops["landmarks"], 5, "5.jpg " + "7 " * 10)
    failed = crops["out"] / "failed.txt"
    what = "lists faces that cannot be aligned, allow_failed=true goes on without them: 3"
    refused(crops, f"{failed}: {what}", workers=workers)
    assert failed.read_text().splitlines() == [
        f"{first}: image cannot be decoded: 8 bytes",
        f"{crops['input'] / '5.jpg'}: cannot be aligned: landmarks lie on one line or in one place",
        f"{second}: image cannot be read: No such file or directory",
    ]
    assert run(crops, workers=workers, allow_failed=True) == (0, 17, 3)
    assert len(stamps(crops["out"])) == 17
    for number in (4, 9):
        (crops["input"] / f"{number}.jpg").write_bytes((crops["input"] / "1.jpg").read_bytes())
    edit(crops["landmarks"], 5, "5.jpg 1 1 9 1 5 5 2 9 8 9")
    assert run(crops, workers=workers) == (3, 17, 0)
    assert not failed.exists()


def test_complaints_about_landmarks(crops: dict[str, Path]) -> None:
    path = crops["landmarks"]
    points = " ".join("123456789") + " 10"
    for text, complaint in {
        "5.jpg 1 2 3": "line is not a path and the coordinates of 5 or 68 points; numbers found: 3",
        "": "line is not a path and the coordinates of 5 or 68 points; numbers found: 0",
        f"../5.jpg {points}": "path does not lie below the input folder: ../5.jpg",
        f"/5.jpg {points}": "path does not lie below the input folder: /5.jpg",
        "5.jpg a 2 3 4 5 6 7 8 9 10": "coordinates cannot be used: could not convert string to "
        "float: 'a'",
        "5.jpg inf 2 3 4 5 6 7 8 9 10": "coordinates cannot be used: landmark holds a coordinate "
        "that is not finite",
        f"2.png {points}": "would be written to the same place as line 2: "
        f"{crops['out'] / '2.jpg'}",
    }.items():
        edit(path, 5, text)
        refused(crops, f"{path}:5: {complaint}")
    path.write_text("")
    refused(crops, f"{path}: is empty")
    path.write_bytes(b"\xff\xfe")
    refused(crops, f"{path}: is no UTF-8 text: invalid start byte")
    path.unlink()
    refused(crops, f"{path}: file is missing")
    assert not crops["out"].exists()


def test_bad_options(crops: dict[str, Path]) -> None:
    refused(crops, "size: must be in 1..4096: 0", size=0)
    refused(crops, "quality: must be in 1..100: 101", quality=101)
    refused(crops, "workers: must be in 0..1024: -1", workers=-1)
    refused(crops, "suffix: accepted: .jpg, .png: .bmp", suffix=".bmp")
    inside = crops["input"] / "out"
    what = f"out: must not lie inside the input folder {crops['input']}: {inside}"
    refused(crops | {"out": inside}, what)
    missing = crops["input"] / "none"
    refused(crops | {"input": missing}, f"{missing}: folder of pictures is missing")


def test_landmarks_are_read_as_they_are(crops: dict[str, Path]) -> None:
    faces = read_landmarks(crops["landmarks"])
    data = load_ijb(crops["input"].parent)
    assert list(faces.names) == list(data.names)
    np.testing.assert_allclose(faces.point_N52, data.landmark_N52, atol=1e-4)
    chunks = list(faces.chunks())
    assert [len(chunk) for chunk in chunks] == [20]
    assert chunks[0][3].name == "4.jpg"


def test_another_run_holds_the_folder(
    crops: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    with module._locked(crops["out"]):
        refused(crops, f"{crops['out']}: another run is writing there")


def command(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "face_lfr.tools.align_faces", *words],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_command_goes_on(crops: dict[str, Path]) -> None:
    count = 1500
    lines = crops["landmarks"].read_text().splitlines()
    for number in range(count):
        (crops["input"] / f"n{number}.jpg").hardlink_to(crops["input"] / f"{number % 20 + 1}.jpg")
    text = [f"n{k}.jpg {lines[k % 20].partition(' ')[2]}\n" for k in range(count)]
    crops["landmarks"].write_text("".join(text))
    words = [f"{name}={path}" for name, path in crops.items()]
    first = command(*words, "workers=2")
    while first.poll() is None and len(stamps(crops["out"])) < 10:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    there = len(stamps(crops["out"]))
    assert there >= 10
    second = command(*words, "workers=2")
    _, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    assert re.search(r" 0 failed$", err, re.MULTILINE), err
    aligned, before = map(int, re.findall(r"(\d+) (?:aligned|before)", err))
    assert before >= there  # a worker may have finished a face while its parent died
    assert aligned + before == count == len(stamps(crops["out"]))
    assert all(read_rgb(path).shape == (112, 112, 3) for path in crops["out"].glob("*.jpg"))
    assert not list(crops["out"].glob(".*.tmp"))
