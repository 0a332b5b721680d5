"""Training sets in RecordIO: which records are images, their labels, and what is refused."""

import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from hydra.utils import instantiate
from torch.utils.data import DataLoader

from common.log import InputError
from face_lfr.benchmarks import peer_recordio
from face_lfr.data import rec
from face_lfr.data.draws import FaceDraws
from face_lfr.data.face_data import FaceData
from face_lfr.data.rec import first_identity, image_keys, load_rec, read_property, write_rec
from face_lfr.data.recordio import RecordFile, RecordWriter, pack
from face_lfr.data.transforms import FaceTransform
from face_lfr.tests.launch import config

LABELS = [0, 0, 0, 1, 2, 2, 3, 3, 3, 3]


def jpeg(number: int, size: int = 16) -> bytes:
    """A picture whose colour tells its number."""
    image = np.full((size, size, 3), (20 * number % 256, 255 - 20 * number % 256, 7), np.uint8)
    return bytes(cv2.imencode(".jpg", image)[1])


def items(labels: list[int] = LABELS) -> Iterator[tuple[bytes, int]]:
    return ((jpeg(number), label) for number, label in enumerate(labels))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_rec(tmp_path, items(), 4, size=16)
    return tmp_path


def write(root: Path, payloads: dict[int, bytes], classes: int | None = None) -> Path:
    with RecordWriter(root / "train") as writer:
        for key, payload in payloads.items():
            writer.write(key, payload)
    if classes is not None:
        (root / "property").write_text(f"{classes},16,16\n")
    return root


def same_images(data: FaceData, labels: list[int]) -> None:
    assert len(data.images) == data.epoch_length == len(labels)
    assert data.labels_N.dtype == np.int64
    assert data.labels_N.tolist() == labels
    for number, label in enumerate(labels):
        assert data.images.label(number) == label
        blue_first = cv2.imdecode(np.frombuffer(jpeg(number), np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(data.images.read(number), blue_first[..., ::-1])


def test_check_08_identity_records_are_no_images(root: Path) -> None:
    data = load_rec(root, "small")
    same_images(data, LABELS)
    assert (data.name, data.root, data.num_classes) == ("small", root, 4)
    assert data.skipped == {"identity records": 4}
    assert data.images.name(3) == f"{root}/train.rec key 4"
    for row in (-1, 10):
        with pytest.raises(IndexError):
            data.images.read(row)


def test_the_file_is_laid_out_as_insightface_reads_it(root: Path) -> None:
    """Through the port of MXNet's reader: record 0, images, identities with their spans."""
    peer = peer_recordio.IndexedReader(root / "train.idx", root / "train.rec")
    payloads = {key: peer.read_idx(key) for key in peer.idx}
    assert sorted(payloads) == list(range(15))
    assert payloads[0][:24] == struct.pack("<IfQQ", 2, 0.0, 0, 1)
    assert np.frombuffer(payloads[0], "<f4", offset=24).tolist() == [11, 15]
    spans = [np.frombuffer(payloads[key], "<f4", offset=24).tolist() for key in range(11, 15)]
    assert spans == [[1, 4], [4, 5], [5, 7], [7, 11]]
    for number, label in enumerate(LABELS):
        assert peer_recordio.unpack(payloads[number + 1]) == (label, jpeg(number))
    assert (root / "property").read_text() == "4,16,16\n"
    peer.close()


def test_files_of_im2rec(tmp_path: Path) -> None:
    """No record 0, no property, keys from 0 on; several labels, of which the first counts."""
    write_rec(tmp_path, items(), 4, identities=False)
    os.remove(tmp_path / "property")
    data = load_rec(tmp_path)
    same_images(data, LABELS)
    assert (data.num_classes, data.skipped) == (4, {})
    many = {k: pack([label, 9.5], jpeg(k)) for k, label in enumerate(LABELS)}
    same_images(load_rec(write(tmp_path, many)), LABELS)
    from_one = {k + 1: pack(label, jpeg(k)) for k, label in enumerate(LABELS)}
    same_images(load_rec(write(tmp_path, from_one)), LABELS)
    holes = {3 * k: pack(label, jpeg(k)) for k, label in enumerate(LABELS)}
    same_images(load_rec(write(tmp_path, holes)), LABELS)


def test_array_labels_behind_a_record_0(tmp_path: Path) -> None:
    images = {k + 1: pack([label, 0.5, 3], jpeg(k)) for k, label in enumerate(LABELS)}
    head = {0: pack([11, 11])}
    same_images(load_rec(write(tmp_path, images | head, 4)), LABELS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({4: pack(4, jpeg(3))}, r"train.rec key 4: label is not in \[0, 4\), .*property: 4"),
        ({4: pack(1.5, jpeg(3))}, r"train.rec key 4: label is no class number: 1.5"),
        ({4: pack(-1, jpeg(3))}, r"train.rec key 4: label is no class number: -1.0"),
        ({4: pack(float("nan"), jpeg(3))}, r"train.rec key 4: label is no class number: nan"),
        ({4: pack(float("inf"), jpeg(3))}, r"train.rec key 4: label is no class number: inf"),
        ({4: pack(2, jpeg(3))}, r"train.rec: class without an image .*allow_gaps=true.*: 1"),
        ({4: pack([1, 9])}, r"train.rec key 4: record has no image; its label is: 1.0"),
        ({0: pack([13, 15])}, r"train.rec key 11: record has no image"),
        ({0: pack([40, 44])}, r"train.idx: index has no key: 39"),
        ({0: pack([1, 15])}, r"key 0: labels of record 0 are not \[first .*: \[1.0, 15.0\]"),
        ({0: pack([float("nan"), 15])}, r"key 0: labels of record 0 are not"),
        ({0: pack([11.0])}, r"key 0: labels of record 0 are not .*: \[11.0\]"),
        ({4: b"abc"}, r"train.rec key 4: is shorter than an image header"),
    ],
)
def test_contradictions_are_named(root: Path, change: dict[int, bytes], message: str) -> None:
    file = RecordFile(root / "train.rec")
    payloads = {key: bytes(file.read(key)) for key in file.keys}
    write(root, payloads | change)
    with pytest.raises(InputError, match=message):
        load_rec(root)


def test_a_missing_image_key(root: Path) -> None:
    lines = (root / "train.idx").read_text().splitlines(keepends=True)
    (root / "train.idx").write_text("".join(line for line in lines if line[:2] != "6\t"))
    with pytest.raises(InputError, match=r"train.idx: index has no key: 6"):
        load_rec(root)


def test_gaps_are_counted_when_allowed(tmp_path: Path) -> None:
    write_rec(tmp_path, items([0, 0, 3]), 6)
    with pytest.raises(InputError, match=r"class without an image .*: 1 and 3 more"):
        load_rec(tmp_path)
    data = load_rec(tmp_path, allow_gaps=True)
    assert data.num_classes == 6
    assert data.skipped == {"identity records": 2, "classes without an image": 4}


def test_check_08_undecodable_images_are_named(root: Path) -> None:
    """Bytes that are no image, and a JPEG that is cut off."""
    file = RecordFile(root / "train.rec")
    payloads = {key: bytes(file.read(key)) for key in file.keys}
    changed = {2: pack(0, b"no image"), 3: pack(0, jpeg(2, 64)[:-200])}
    data = load_rec(write(root, payloads | changed))
    assert data.images.read(0).shape == (16, 16, 3)
    for row, size in ((1, 8), (2, len(jpeg(2, 64)) - 200)):
        message = rf"train.rec key {row + 1}: image cannot be decoded: {size} bytes"
        with pytest.raises(InputError, match=message):
            data.images.read(row)


def test_check_08_truncated_records(root: Path) -> None:
    os.truncate(root / "train.rec", (root / "train.rec").stat().st_size - 60)
    with pytest.raises(InputError, match=r"train.idx key \d+: offset is no record of a file"):
        load_rec(root)
    write_rec(root, items(), 4, identities=False)
    os.truncate(root / "train.rec", (root / "train.rec").stat().st_size - 60)
    with pytest.raises(InputError, match=r"train.rec key 9: the file ends inside the record"):
        load_rec(root)


def test_labels_are_kept_beside_the_records(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scanned once; anew when records or index change, or the file is damaged."""
    scans: list[int] = []
    real = rec.scan_labels

    def spy(file: RecordFile, first: int, count: int) -> np.ndarray:
        scans.append(count)
        return real(file, first, count)

    monkeypatch.setattr(rec, "scan_labels", spy)
    kept = root / "train.labels.npy"
    for expected in (1, 1):
        same_images(load_rec(root), LABELS)
        assert len(scans) == expected
        assert sorted(path.name for path in root.glob("*labels*")) == [kept.name]
    os.utime(root / "train.rec", ns=(0, 12345))
    same_images(load_rec(root), LABELS)
    assert len(scans) == 2
    for content in (b"", b"\x93NUMPY", kept.read_bytes()[:-8]):
        kept.write_bytes(content)
        same_images(load_rec(root), LABELS)
    assert len(scans) == 5
    write_rec(root, items([0, 1, 2, 3]), 4)
    same_images(load_rec(root), [0, 1, 2, 3])


def test_a_folder_that_cannot_be_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rec.os, "replace", refuse)
    same_images(load_rec(root), LABELS)
    assert not list(root.glob("*labels*"))


def test_property(tmp_path: Path) -> None:
    path = tmp_path / "property"
    assert read_property(path) is None
    for text, number in (("93431,112,112\n", 93431), (" 5 , 112,112", 5), ("7", 7)):
        path.write_text(text)
        assert read_property(path) == number
    for text in ("", "0,112,112", "-3,112", "x,112", "3.5,112", "²,1"):
        path.write_text(text)
        with pytest.raises(InputError, match="property: is not <classes>,<height>,<width>"):
            read_property(path)


def test_the_set_can_be_asked_for_its_size(root: Path) -> None:
    assert load_rec(root, classes=4, images=10).epoch_length == 10
    with pytest.raises(InputError, match=r"rec has 5 classes \(data.classes=null.*found: 4"):
        load_rec(root, classes=5)
    with pytest.raises(InputError, match=r"rec has 9 images \(data.images=null.*found: 10"):
        load_rec(root, images=9)


def test_noise_leaves_the_file_as_it_is(root: Path) -> None:
    noisy = load_rec(root, noise=1.0, noise_seed=1)
    assert noisy.labels_N.tolist() != LABELS
    assert [noisy.images.label(row) for row in range(10)] == LABELS
    assert load_rec(root).labels_N.tolist() == LABELS


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.rec: records cannot be read"):
        load_rec(tmp_path)
    write_rec(tmp_path, items(), 4, file="faces")
    assert load_rec(tmp_path, file="faces").epoch_length == 10


class _Large:
    """A file of 2**24 and more records, of which only some are asked for."""

    rec = Path("large.rec")

    def __init__(self, images: int, identities: int):
        self.images, self.keys = images, range(1 + images + identities)

    def read(self, key: int) -> bytes:
        return pack(1.0, b"image" if 1 <= key <= self.images else b"")


@pytest.mark.parametrize("images", [2**24 - 2, 17_091_657, 42_474_557, 42_474_558, 42_474_559])
@pytest.mark.parametrize("identities", [0, 5])
def test_large_counts_are_no_float32(images: int, identities: int) -> None:
    """Record 0 rounds the first identity key; the records tell the truth."""
    stated = float(np.float32(images + 1))
    found = first_identity(_Large(images, identities), stated)  # type: ignore[arg-type]
    assert found == images + 1


def test_a_large_count_far_off_is_refused() -> None:
    with pytest.raises(InputError, match=r"large.rec: no identity record near .*: 16777218"):
        first_identity(_Large(17_091_657, 5), 16_777_218.0)  # type: ignore[arg-type]


def test_positions_of_images(root: Path) -> None:
    assert image_keys(RecordFile(root / "train.rec")) == (1, 10, {"identity records": 4})


def test_the_writer_checks_the_classes(tmp_path: Path) -> None:
    for labels, message in (([0, 4], "label=4 after 0 of 4"), ([1, 0], "label=0 after 1 of 4")):
        with pytest.raises(ValueError, match=message):
            write_rec(tmp_path, items(labels), 4)
    assert not list(tmp_path.iterdir())
    write_rec(tmp_path, items([1, 0, 1]), 2, identities=False)
    assert load_rec(tmp_path).labels_N.tolist() == [1, 0, 1]


def test_pickles(root: Path) -> None:
    """As a worker that is spawned gets it; also after the file was opened."""
    data = load_rec(root)
    data.images.read(0)
    same_images(pickle.loads(pickle.dumps(data)), LABELS)


def samples(data: FaceData, method: str | None, workers: int) -> list[tuple[int, bytes]]:
    draws = FaceDraws(data, FaceTransform(16, jitter=0.3, blur=0.5), seed=1)
    loader: DataLoader = DataLoader(
        draws, 4, sampler=range(24), num_workers=workers, multiprocessing_context=method
    )
    return [
        (int(label), image.numpy().tobytes())
        for batch in loader
        for image, label in zip(batch.image, batch.label, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "workers", "access"),
    [("fork", 2, "pread"), ("fork", 2, "mmap"), ("spawn", 1, "mmap")],
)
def test_check_08_workers_give_the_same_samples(
    root: Path, method: str, workers: int, access: str
) -> None:
    """The parent has the file open before they start."""
    data = load_rec(root, access=access)
    alone = samples(data, None, 0)
    assert sorted({label for label, _ in alone}) == [0, 1, 2, 3]
    assert samples(data, method, workers) == alone


@pytest.mark.parametrize("name", ["ms1mv3", "ms1mv2", "glint360k", "webface42m"])
def test_configs(root: Path, name: str) -> None:
    """Each set's own size is asked for, and can be waived."""
    words = [f"data={name}", f"data.root={root}"]
    with pytest.raises(Exception, match=rf"{name} has \d+ classes"):
        instantiate(config("train", *words).data)
    data = instantiate(config("train", *words, "data.classes=null", "data.images=null").data)
    assert data.name == name
    same_images(data, LABELS)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: content[:100] + bytes(len(content) - 100),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_never_loads(root: Path, damage: str) -> None:
    path = root / "train.rec"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(InputError, match=r"train\.(rec|idx) key \d+"):
        load_rec(root)
