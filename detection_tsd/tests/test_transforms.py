"""Pictures and boxes on their way to the network."""

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from common.log import InputError
from detection_tsd.data.detection_data import Annotation
from detection_tsd.data.transforms import DetectionTransform, decode_rgb, read_rgb, resized

CONFIGS = Path(__file__).parents[1] / "configs" / "transform"
NONE_04 = np.empty((0, 4), np.float32)
COLOUR = np.full((20, 30, 3), (200, 100, 0), np.uint8)
GREY = np.full((20, 30), 200, np.uint8)


def encode(image: np.ndarray, kind: str, mode: str | None = None, **options: Any) -> bytes:
    stream, picture = io.BytesIO(), Image.fromarray(image)
    (picture.convert(mode) if mode else picture).save(stream, kind, **options)
    return stream.getvalue()


def annotation(*boxes: tuple[float, ...], segments: list[Any] | None = None) -> Annotation:
    box_G4 = np.array(boxes, np.float32).reshape(-1, 4)
    return Annotation(box_G4, np.arange(1, len(boxes) + 1), NONE_04, segments)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (encode(COLOUR, "PNG"), (200, 100, 0)),
        (encode(COLOUR, "JPEG", quality=95), (200, 100, 0)),
        (encode(COLOUR, "JPEG", mode="CMYK", quality=95), (200, 100, 0)),
        (encode(np.dstack([COLOUR, GREY // 4]), "PNG"), (200, 100, 0)),
        (encode(COLOUR, "PNG", mode="P"), (200, 100, 0)),
        (encode(GREY, "PNG"), (200, 200, 200)),
        (encode(GREY, "JPEG"), (200, 200, 200)),
        (encode(GREY, "PNG", mode="LA"), (200, 200, 200)),
        (encode(GREY.astype(np.uint16) * 256, "PNG"), (200, 200, 200)),
        (encode(COLOUR, "WEBP", lossless=True), (200, 100, 0)),
    ],
)
def test_every_kind_of_picture_is_rgb(data: bytes, colour: tuple[int, ...]) -> None:
    image = decode_rgb(data, "x")
    assert image.shape == (20, 30, 3)
    assert image.dtype == np.uint8
    assert abs(image.reshape(-1, 3).mean(axis=0) - colour).max() < 5


@pytest.mark.parametrize("turn", range(1, 9))
def test_the_orientation_in_exif_turns_nothing(turn: int) -> None:
    exif = Image.Exif()
    exif[0x112] = turn
    image = picture(20, 30)
    image[:, :15] = 0
    got = decode_rgb(encode(image, "JPEG", quality=95, exif=exif), "x")
    assert got.shape == (20, 30, 3)
    assert got[:, :13].mean() < 20 < 60 < got[:, 17:].mean()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("cut", [1, 2, 10, 1000, 0.5, 0.99, 1.0])
def test_a_truncated_picture_is_refused(tmp_path: Path, kind: str, cut: float) -> None:
    """Also by a byte: decoders that fill the rest with grey would train on it."""
    data = encode(picture(60, 80), kind)
    path = tmp_path / "short.jpg"
    path.write_bytes(
        data[: len(data) - int(cut if cut > 1 or type(cut) is int else cut * len(data))]
    )
    with pytest.raises(InputError, match=r"short\.jpg: picture cannot be decoded: \d+ bytes$"):
        read_rgb(path)


def test_a_truncated_progressive_jpeg_with_a_thumbnail_is_refused() -> None:
    """The thumbnail ends as a whole JPEG does."""
    exif = encode(COLOUR, "JPEG")
    data = encode(picture(60, 80), "JPEG", progressive=True, exif=b"Exif\0\0" + exif)
    assert decode_rgb(data, "x").shape == (60, 80, 3)
    with pytest.raises(InputError):
        decode_rgb(data[: len(data) // 2], "x")


def test_bytes_after_the_end_are_harmless() -> None:
    data = encode(picture(60, 80), "JPEG")
    assert np.array_equal(decode_rgb(data + b"\0junk\n" * 20, "x"), decode_rgb(data, "x"))


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for name, what in (("text.png", "cannot be decoded"), ("gone.png", "cannot be read: No such")):
        with pytest.raises(InputError, match=f"{name}: picture {what}"):
            read_rgb(tmp_path / name)
    with pytest.raises(InputError, match="picture cannot be read: Is a directory"):
        read_rgb(tmp_path)


@pytest.mark.parametrize(
    ("size", "new"),
    [
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((800, 1333), (800, 1333)),
        ((300, 1000), (400, 1333)),
        ((1, 5000), (1, 1333)),
        ((1, 1), (800, 800)),
    ],
)
def test_resized(size: tuple[int, int], new: tuple[int, int]) -> None:
    assert resized(size, 800, 1333) == new


def test_resizing_is_that_of_opencv_and_boxes_follow_each_side() -> None:
    image = picture(48, 64)
    view = DetectionTransform(80, 133, flip=0).train(image, annotation((3, 5, 64, 48)), None, rng())
    assert view.image.shape == (3, 80, 107)
    assert np.array_equal(view.image.permute(1, 2, 0).numpy(), cv2.resize(image, (107, 80)))
    assert view.scale == (107 / 64, 80 / 48)
    expected = [3 * 107 / 64, 5 * 80 / 48, 107, 80]
    assert view.target.box_G4[0].tolist() == pytest.approx(expected, rel=1e-6)
    assert view.target.box_G4[0, 2] <= 107
    assert view.target.label_G.tolist() == [1]


def test_a_mirror_moves_pictures_boxes_proposals_and_crowds_alike() -> None:
    """The bright rectangle is where its boxes are, before and after."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:20, 5:25] = 255
    box = np.array([[5, 10, 25, 20]], np.float32)
    given = Annotation(box, np.array([3]), box.copy(), [[[5, 10, 25, 10, 25, 20, 5, 20]]])
    for flip in (0.0, 1.0):
        view = DetectionTransform(80, 200, flip=flip).train(image, given, box.copy(), rng())
        x1, y1, x2, y2 = view.target.box_G4[0].int().tolist()
        assert (x1, x2) == ((10, 50) if flip == 0 else (70, 110))
        inside = view.image[:, y1:y2, x1:x2]
        assert inside[:, 2:-2, 2:-2].min() == 255
        assert view.image.sum() < inside.numel() * 255 * 1.1
        assert view.proposals is not None
        assert torch.equal(view.proposals, view.target.box_G4)
        assert torch.equal(view.target.crowd_I4, view.target.box_G4)
        mask_HW = view.target.mask_GHW[0]  # type: ignore[index]
        assert mask_HW[y1:y2, x1:x2].all()
        assert mask_HW.sum() == (y2 - y1) * (x2 - x1)


def test_mirroring_twice_is_nothing() -> None:
    boxes = np.random.default_rng(0).uniform(0, 40, (9, 4)).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    transform = DetectionTransform(keep_size=True)
    once = transform.test(picture(90, 90), boxes, flip=True)
    assert once.proposals is not None
    twice = transform.test(
        np.ascontiguousarray(once.image.permute(1, 2, 0).numpy()), once.proposals.numpy(), flip=True
    )
    assert torch.equal(twice.image.permute(1, 2, 0), torch.from_numpy(picture(90, 90)))
    torch.testing.assert_close(twice.proposals, torch.from_numpy(boxes))


def test_arguments_are_not_changed_and_not_shared() -> None:
    image, boxes = picture(40, 60), np.array([[1, 2, 30, 40]], np.float32)
    kept = image.copy()
    for transform in (DetectionTransform(keep_size=True, flip=0), DetectionTransform(80, flip=1)):
        given = annotation((5, 10, 25, 20))
        view = transform.train(image, given, boxes, rng())
        for part in (view.image, view.target.box_G4, view.target.label_G, view.proposals):
            assert part is not None
            part.fill_(7)
        assert np.array_equal(image, kept)
        assert given.box_G4.tolist() == [[5, 10, 25, 20]]
        assert given.label_G.tolist() == [1]
        assert boxes.tolist() == [[1, 2, 30, 40]]


def test_masks_are_those_of_pycocotools_resized_to_the_nearest_centre() -> None:
    from pycocotools import mask as codec

    polygon = [3.3, 4.1, 50.2, 8.8, 33.9, 36.5, 7.0, 30.0]
    whole = codec.decode(codec.merge(codec.frPyObjects([polygon], 40, 60)))
    code = codec.encode(np.asfortranarray(whole))
    runs = {"size": [40, 60], "counts": [40 * 50, 40 * 10]}  # the last ten columns
    segments = [[polygon], {"size": [40, 60], "counts": code["counts"].decode()}, runs, []]
    given = annotation(*[(0, 0, 10, 10)] * 4, segments=segments)
    same = DetectionTransform(keep_size=True, flip=0).train(picture(40, 60), given, None, rng())
    mask_GHW = same.target.mask_GHW
    assert mask_GHW is not None
    assert mask_GHW.dtype == torch.uint8
    assert np.array_equal(mask_GHW[0], whole)
    assert np.array_equal(mask_GHW[1], whole)
    assert mask_GHW[2, :, 50:].all()
    assert not mask_GHW[2, :, :50].any()
    assert not mask_GHW[3].any()
    larger = DetectionTransform(80, 200, flip=0).train(picture(40, 60), given, None, rng())
    assert np.array_equal(larger.target.mask_GHW[0], whole.repeat(2, axis=0).repeat(2, axis=1))  # type: ignore[index]
    uneven = DetectionTransform(48, 200, flip=0).train(picture(40, 60), given, None, rng())
    rows, columns = (
        np.floor((np.arange(new) + 0.5) * old / new).astype(int)
        for old, new in ((40, 48), (60, 72))
    )
    assert np.array_equal(uneven.target.mask_GHW[0], whole[rows][:, columns])  # type: ignore[index]
    none = DetectionTransform(80, 200).train(picture(40, 60), annotation(segments=[]), None, rng())
    assert none.target.mask_GHW.shape == (0, 80, 120)  # type: ignore[union-attr]


def test_a_code_of_another_size_is_refused() -> None:
    given = annotation((0, 0, 9, 9), segments=[{"size": [40, 61], "counts": [2440]}])
    with pytest.raises(ValueError, match=r"size=\[40, 61\] of a code, need \[40, 60\]"):
        DetectionTransform().train(picture(40, 60), given, None, rng())


def test_no_boxes() -> None:
    view = DetectionTransform(80).train(picture(40, 60), annotation(), NONE_04, rng())
    assert view.target.box_G4.shape == view.target.crowd_I4.shape == (0, 4)
    assert view.target.label_G.dtype == torch.int64
    assert view.proposals is not None
    assert view.proposals.shape == (0, 4)


def test_the_short_side_is_drawn_from_all_integers_of_the_range() -> None:
    transform = DetectionTransform(short_range=(30, 33), long=100, flip=0)
    seen = [min(transform.train(picture(20, 24), annotation(), None, rng(k)).image.shape[1:])
            for k in range(60)]  # fmt: skip
    assert set(seen) == {30, 31, 32, 33}
    choices = DetectionTransform([30, 50], 100, test_short=40)
    seen = [min(choices.train(picture(20, 24), annotation(), None, rng(k)).image.shape[1:])
            for k in range(60)]  # fmt: skip
    assert set(seen) == {30, 50}
    assert choices.test(picture(20, 24)).image.shape == (3, 40, 48)
    assert choices.test(picture(20, 24), short=20, long=20).image.shape == (3, 17, 20)
    assert DetectionTransform([30, 50], 100).test(picture(20, 24)).image.shape == (3, 50, 60)


def test_equal_generators_give_equal_views() -> None:
    transform = DetectionTransform(short_range=(30, 90), long=100)
    views = [
        transform.train(picture(40, 60), annotation((1, 2, 30, 30)), None, rng(k))
        for k in (5, 5, 6)
    ]
    assert torch.equal(views[0].image, views[1].image)
    assert torch.equal(views[0].target.box_G4, views[1].target.box_G4)
    assert views[0].image.shape != views[2].image.shape
    flips = [bool(rng(k).random() < 0.5) for k in range(200)]
    assert 60 < sum(flips) < 140


def test_normalize_against_the_equation() -> None:
    transform = DetectionTransform()
    image = torch.randint(0, 256, (2, 3, 8, 16), dtype=torch.uint8)
    size = torch.tensor([[8, 10], [5, 16]])
    got = transform.normalize(image, size)
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    for b, (height, width) in enumerate(size.tolist()):
        for c in range(3):
            whole = (image[b, c].double() - transform.mean[c]) / transform.std[c]
            whole[height:], whole[:, width:] = 0, 0
            torch.testing.assert_close(got[b, c].double(), whole, rtol=0, atol=1e-6)
        assert (got[b, :, height:] == 0).all()
        assert (got[b, :, :, width:] == 0).all()
    assert image.dtype == torch.uint8


@pytest.mark.parametrize(
    ("image", "size", "match"),
    [
        (torch.zeros(1, 3, 4, 4), torch.ones(1, 2), "need torch.uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.ones(1, 2), "need torch.uint8"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.ones(1, 2), r"size_B2 is \(1, 2\)"),
    ],
)
def test_normalize_refuses(image: torch.Tensor, size: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DetectionTransform().normalize(image, size)


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 4), (3, 20, 30)])
def test_pictures_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"need uint8 \(H, W, 3\)"):
        DetectionTransform().test(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    "options",
    [
        {"short": 0},
        {"short": []},
        {"long": 0},
        {"flip": 1.5},
        {"flip": -0.1},
        {"divisor": 0},
        {"std": (1, 0, 1)},
        {"mean": (1, 1)},
        {"short_range": (5, 3)},
        {"short_range": (5,)},
        {"short_range": (3, 5), "keep_size": True},
        {"short_range": (3, 5), "short": [3, 5]},
    ],
)
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DetectionTransform(**options)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs(path: Path) -> None:
    transform = instantiate(OmegaConf.load(path))
    view = transform.train(picture(120, 160), annotation((1, 2, 30, 30)), None, rng())
    assert view.image.shape[0] == 3
    sizes = {"openimages_1024": (768, 1024), "keep": (120, 160), "small": (128, 171)}
    expected = sizes.get(path.stem, (800, 1067))
    assert tuple(transform.test(picture(120, 160)).image.shape[1:]) == expected
    assert transform.contract()["keep_size"] == (path.stem == "keep")
