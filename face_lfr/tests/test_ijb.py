"""Text files of IJB: what is read, aligned crops, and complaints with the line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.log import InputError
from face_lfr.data.ijb import load_ijb
from face_lfr.data.replicas import PERSONS, face, write_ijb, write_replica


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_replica("ijb", tmp_path)


def refused(load: Callable[[], object], complaint: str) -> None:
    with pytest.raises(InputError) as error:
        load()
    assert str(error.value) == complaint


def edit(path: Path, line: int, text: str) -> None:
    lines = path.read_text().split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines))


def test_metadata(root: Path) -> None:
    data = load_ijb(root)
    assert data.name == "ijbc"
    assert len(data.names) == 5 * PERSONS
    assert list(data.names[:2]) == ["1.jpg", "2.jpg"]
    assert data.landmark_N52.shape == (20, 5, 2)
    assert data.landmark_N52.dtype == data.score_N.dtype == np.float32
    words = (root / "meta" / "ijbc_name_5pts_score.txt").read_text().splitlines()[6].split()
    np.testing.assert_allclose(data.landmark_N52[6].ravel(), [float(w) for w in words[1:11]], 1e-6)
    assert data.score_N[6] == pytest.approx(float(words[11]))
    assert data.template_N[:5].tolist() == [11, 11, 11, 12, 12]
    assert data.media_N[:5].tolist() == [1, 2, 2, 3, 3]
    assert data.pair_P2.shape == (16, 2)
    assert data.pair_P2[1].tolist() == [11, 112]
    assert data.same_P.reshape(4, 4).tolist() == np.eye(4, dtype=bool).tolist()
    assert {name: s.template_T.tolist() for name, s in data.galleries.items()} == {
        "G1": [11, 211], "G2": [111, 311],
    }  # fmt: skip
    assert data.galleries["G2"].subject_T.tolist() == [501, 503]
    assert data.probes is not None
    assert data.probes.template_T.tolist() == [12, 112, 212, 312]
    assert data.probes.subject_T.tolist() == [500, 501, 502, 503]


def test_other_folders_and_ijb_b(tmp_path: Path) -> None:
    write_ijb(tmp_path / "IJBB", name="ijbb")
    data = load_ijb(tmp_path, "ijbb")
    assert (data.name, data.root, sorted(data.galleries)) == (
        "ijbb", tmp_path / "IJBB", ["S1", "S2"],
    )  # fmt: skip
    refused(lambda: load_ijb(tmp_path, "ijba"), "name: accepted: ijbb, ijbc: ijba")
    places = f"{tmp_path}/meta or {tmp_path}/IJBC/meta or {tmp_path}/ijbc/meta"
    refused(lambda: load_ijb(tmp_path), f"{tmp_path}: data set not found, there is no: {places}")


def test_images_are_aligned_when_they_are_read(root: Path) -> None:
    images = load_ijb(root).images()
    assert len(images) == 20
    assert images.label(7) == 111
    assert images.name(7) == str(root / "loose_crop" / "8.jpg")
    middle = slice(16, 96)
    for row, person in ((0, 0), (8, 1), (19, 3)):
        found = images.read(row)[middle, middle].astype(float)
        gaps = [np.abs(found - face(p, 0)[middle, middle]).mean() for p in range(PERSONS)]
        assert np.argmin(gaps) == person
        assert min(gaps) < 8
    assert load_ijb(root).images(224).read(0).shape == (224, 224, 3)
    (root / "loose_crop" / "3.jpg").write_bytes(b"torn")
    name = root / "loose_crop" / "3.jpg"
    refused(lambda: images.read(2), f"{name}: image cannot be decoded: 4 bytes")
    images.data.landmark_N52[4] = 50
    what = "cannot be aligned: landmarks lie on one line or in one place"
    refused(lambda: images.read(4), f"{root / 'loose_crop' / '5.jpg'}: {what}")


def test_without_the_search_protocol(root: Path) -> None:
    for path in (root / "meta").glob("*.csv"):
        path.unlink()
    data = load_ijb(root)
    assert data.probes is None
    assert not data.galleries


FACES, OWNERS = "name_5pts_score.txt", "face_tid_mid.txt"
PAIRS, GALLERY = "template_pair_label.txt", "1N_gallery_G1.csv"
POINTS = "3.jpg 1 2 3 4 5 6 7 8 9"


@pytest.mark.parametrize(
    ("file", "line", "text", "complaint"),
    [
        (FACES, 3, "3.jpg 1", "line is not name, five points, score: 12 fields, found: 2"),
        (FACES, 3, f"{POINTS} a 1", "is no number: a"),
        (FACES, 3, f"{POINTS} nan 1", f"a number is not finite: {POINTS} nan 1"),
        (FACES, 3, f"{POINTS} 10 -1", "score is below 0: -1.0"),
        (OWNERS, 2, "2.jpg 11", "line is not name, template, media: 2.jpg 11"),
        (OWNERS, 2, "2.jpg 11 m", "id is no whole number from 0 on: m"),
        (
            OWNERS,
            2,
            "9.jpg 1 2",
            "another image is in this line of the landmarks, 2.jpg, than: 9.jpg",
        ),
        (PAIRS, 5, "11 12", "line is not 3 whole numbers: 11 12"),
        (PAIRS, 5, "11 12 2", "label is neither 0 nor 1: 2"),
        (PAIRS, 5, "11 999 0", "template has no image: 999"),
        (GALLERY, 2, "999,500", "template has no image: 999"),
        (GALLERY, 2, "11", "row does not begin with template and subject: 11"),
        (GALLERY, 2, "11,x,y", "id is no whole number from 0 on: x"),
        (GALLERY, 4, "11,501,y", "template shows subject 500 in a row before and here: 501"),
        ("1N_probe_mixed.csv", 3, "13,501,y", "template has no image: 13"),
    ],
)
def test_complaints_name_the_line(
    root: Path, file: str, line: int, text: str, complaint: str
) -> None:
    path = root / "meta" / f"ijbc_{file}"
    edit(path, line, text)
    refused(lambda: load_ijb(root), f"{path}:{line}: {complaint}")


def test_complaints_about_whole_files(root: Path) -> None:
    meta = root / "meta"
    gallery, probes, owners = (
        meta / f"ijbc_{name}"
        for name in ("1N_gallery_G2.csv", "1N_probe_mixed.csv", "face_tid_mid.txt")
    )
    rows = gallery.read_text()
    gallery.write_text(rows + "11,501,x\n")
    what = "subject has more than one template in the gallery: 501"
    refused(lambda: load_ijb(root), f"{gallery}: {what}")
    gallery.write_text("TEMPLATE_ID,SUBJECT_ID\n")
    refused(lambda: load_ijb(root), f"{gallery}: holds a header and nothing else")
    gallery.unlink()
    refused(lambda: load_ijb(root), f"{gallery}: file is missing")
    gallery.write_text(rows)
    probes.unlink()
    refused(lambda: load_ijb(root), f"{probes}: file is missing")
    owners.write_text(owners.read_text() + "21.jpg 1 1\n")
    refused(lambda: load_ijb(root), f"{owners}: needs 20 lines, one for each image: 21")
