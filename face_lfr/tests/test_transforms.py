"""What a network sees: channel order, crop, resize, scale; augmentation by one generator."""

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision

from common.log import InputError
from face_lfr.data.transforms import FaceTransform, decode_rgb, read_rgb

POLYFACE: dict[str, Any] = {"colour": "bgr", "crop_first": True, "scale": 79.6875}


def face(side: int = 112, seed: int = 0) -> np.ndarray:
    """A smooth random picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def reference_input(image_rgb: np.ndarray, size: int) -> np.ndarray:
    """A picture as trojans-face-recognizer prepares it, (3, size, size), by its own steps."""
    blue_first = image_rgb[..., ::-1]
    cropped = np.ascontiguousarray(blue_first[1:, 1:])
    resized = cv2.resize(cropped, (size, size), interpolation=cv2.INTER_LINEAR)
    return resized.transpose(2, 0, 1).astype(np.float64) * 3.2 / 255 - 1.6


def bilinear(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Half-pixel centres, edges repeated, float64: from the definition."""
    side = image_HWC.shape[0]
    place = (np.arange(size) + 0.5) * side / size - 0.5
    weight = np.maximum(0, 1 - np.abs(place.clip(0, side - 1)[:, None] - np.arange(side)))
    rows = np.einsum("ya,abc->ybc", weight, image_HWC.astype(np.float64))
    return np.einsum("xb,ybc->yxc", weight, rows)


@pytest.mark.parametrize("size", [75, 112, 235])
def test_uint8_mode_is_the_reference_bit_for_bit(size: int) -> None:
    transform = FaceTransform(resize=size, resize_mode="cv2_uint8", **POLYFACE)
    images = [face(seed=seed) for seed in range(3)]
    x = transform.normalize(torch.stack([transform.test(image) for image in images]))
    assert x.dtype == torch.float32
    assert x.shape == (3, 3, size, size)
    assert transform.input_size == size
    for got, image in zip(x.numpy(), images, strict=True):
        expected = reference_input(image, size)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-7)
        levels = got.astype(np.float64) * 79.6875 + 127.5
        np.testing.assert_allclose(levels, np.round(levels), atol=2e-5)


@pytest.mark.parametrize("size", [75, 112, 235])
def test_torch_mode_is_the_definition(size: int) -> None:
    """And within a grey level of the reference, which rounds."""
    transform = FaceTransform(resize=size, **POLYFACE)
    image = face()
    got = transform.normalize(transform.test(image)[None])[0].numpy().astype(np.float64)
    exact = bilinear(image[1:, 1:, ::-1], size).transpose(2, 0, 1) * 3.2 / 255 - 1.6
    np.testing.assert_allclose(got, exact, rtol=0, atol=1e-5)
    assert np.abs(got - reference_input(image, size)).max() * 79.6875 < 1


def test_insightface_input() -> None:
    """RGB, (v / 255 - 0.5) / 0.5, nothing cropped."""
    transform, image = FaceTransform(), face()
    x = transform.normalize(transform.test(image)[None])[0].numpy()
    np.testing.assert_allclose(x, (image.transpose(2, 0, 1) / 255 - 0.5) / 0.5, atol=1e-7)
    assert transform.input_size == 112
    assert FaceTransform(crop_first=True).input_size == 111
    cropped = FaceTransform(crop_first=True).normalize(transform.test(image)[None])[0]
    np.testing.assert_array_equal(cropped.numpy(), x[:, 1:, 1:])


def test_channel_order() -> None:
    image = np.zeros((112, 112, 3), np.uint8)
    image[..., 0] = 200
    for colour, red in (("rgb", 0), ("bgr", 2)):
        transform = FaceTransform(colour=colour, flip=0)
        for x in (transform.test(image), transform.train(image, np.random.default_rng(0))):
            assert x.dtype == torch.uint8
            assert x.is_contiguous()
            assert [int(plane.max()) for plane in x] == [200 * (c == red) for c in range(3)]


@pytest.mark.parametrize("shape", [(112, 112), (64, 64), (200, 150), (112, 96)])
def test_other_sizes_are_resized_by_opencv(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = cv2.resize(image, (112, 112), interpolation=cv2.INTER_LINEAR)
    transform = FaceTransform()
    np.testing.assert_array_equal(transform.fit(image), expected)
    np.testing.assert_array_equal(transform.test(image).numpy(), expected.transpose(2, 0, 1))
    assert transform.fit(expected) is expected


def test_views_of_other_memory(tmp_path: Path) -> None:
    """Mirrored, transposed and strided arrays."""
    image = face()
    for view in (image[:, ::-1], image.transpose(1, 0, 2), face(224)[::2, ::2], image[..., ::-1]):
        got = FaceTransform().test(view)
        np.testing.assert_array_equal(got.numpy(), view.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["torch", "cv2_uint8"])
@pytest.mark.parametrize("crop", [False, True])
def test_a_training_mirror_comes_after_crop_and_resize(crop: bool, mode: str) -> None:
    """As the mirrored pass of the test does, which mirrors the network's input."""
    options = {"crop_first": crop, "resize": 75, "resize_mode": mode}
    image, rng = face(), np.random.default_rng(0)
    plain, mirror = (FaceTransform(flip=flip, **options) for flip in (0.0, 1.0))
    first = plain.normalize(plain.train(image, rng)[None])
    torch.testing.assert_close(first, plain.normalize(plain.test(image)[None]), rtol=0, atol=0)
    second = mirror.normalize(mirror.train(image, rng)[None])
    # OpenCV's whole-number weights need not be symmetric: up to one grey level.
    limit = 1.01 / 127.5 if mode == "cv2_uint8" else 1e-5
    torch.testing.assert_close(second, first.flip(-1), rtol=0, atol=limit)
    assert (second - first).abs().max() > 0.1


def test_half_of_the_views_are_mirrored() -> None:
    transform, image, rng = FaceTransform(), face(), np.random.default_rng(0)
    plain = transform.test(image)
    mirrored = [not torch.equal(transform.train(image, rng), plain) for _ in range(400)]
    assert 160 < sum(mirrored) < 240
    views = {transform.train(image, rng).numpy().tobytes() for _ in range(20)}
    assert views == {plain.numpy().tobytes(), plain.flip(-1).numpy().tobytes()}


def test_everything_random_comes_from_the_generator() -> None:
    """The same generator state gives the same view; global generators play no part."""
    transform = FaceTransform(jitter=0.5, erase=0.5, grey=0.5, blur=0.5, cutout=0.5)
    image = face()
    kept = image.copy()
    first = [transform.train(image, np.random.default_rng(k)) for k in range(30)]
    np.random.seed(1)  # noqa: NPY002 - must not matter
    torch.manual_seed(1)
    for k in reversed(range(30)):
        assert torch.equal(transform.train(image, np.random.default_rng(k)), first[k])
    np.testing.assert_array_equal(image, kept)
    assert len({view.numpy().tobytes() for view in first}) == 30


def test_without_switches_nothing_is_drawn() -> None:
    rng, other = np.random.default_rng(3), np.random.default_rng(3)
    FaceTransform(flip=0).train(face(), rng)
    assert rng.random() == other.random()


def changed(image: np.ndarray, seed: int, **options: float) -> np.ndarray:
    transform = FaceTransform(flip=0, **options)
    return transform.train(image, np.random.default_rng(seed)).permute(1, 2, 0).numpy()


def test_grey() -> None:
    image = face()
    got = changed(image, 0, grey=1)
    luma = image.astype(np.float64) @ [0.299, 0.587, 0.114]
    for channel in range(3):
        np.testing.assert_array_equal(got[..., channel], got[..., 0])
        assert np.abs(got[..., channel] - luma).max() <= 0.51


def test_jitter_is_brightness_contrast_saturation() -> None:
    """Against torchvision, whose factors work on rounded pictures."""
    image = np.full((112, 112, 3), 60, np.uint8) + face() // 3  # away from black and white
    for seed in range(5):
        factors = np.random.default_rng(seed).uniform(0.8, 1.2, 3)
        x = torch.from_numpy(image.transpose(2, 0, 1).copy()).double() / 255
        for name, factor in zip(
            ("brightness", "contrast", "saturation"), factors.tolist(), strict=True
        ):
            adjust = getattr(torchvision.transforms.functional, f"adjust_{name}")
            x = adjust(x, factor)
        expected = x.permute(1, 2, 0).numpy() * 255
        got = changed(image, seed, jitter=0.2)
        assert np.abs(got - expected).max() < 1.0
        assert np.abs(got.astype(int) - image).max() > 2


def test_blur_takes_detail_and_keeps_brightness() -> None:
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    stds = [changed(image, seed, blur=1).astype(float).std() for seed in range(20)]
    assert max(stds) <= image.std()
    assert min(stds) < 0.2 * image.std()
    assert changed(image, 3, blur=1).mean() == pytest.approx(image.mean(), abs=1)


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def test_erase_fills_a_rectangle_with_noise() -> None:
    image = np.full((112, 112, 3), 255, np.uint8)
    for seed in range(50):
        got = changed(image, seed, erase=1)
        top, bottom, left, right = box((got != 255).any(axis=2))
        area, aspect = (bottom - top) * (right - left), (bottom - top) / (right - left)
        assert 0.018 < area / 112**2 < 0.21
        assert 0.25 < aspect < 4
        inside = got[top:bottom, left:right].astype(float)
        assert inside.std() > 50
        got[top:bottom, left:right] = 255
        assert (got == 255).all()


def test_cutout_is_a_square_that_may_leave_the_picture() -> None:
    image, sizes = np.zeros((112, 112, 3), np.uint8), []
    for seed in range(80):
        got = changed(image, seed, cutout=1)
        top, bottom, left, right = box((got != 0).any(axis=2))
        assert (got[top:bottom, left:right] == 128).all()
        assert bottom - top <= 34 >= right - left
        sizes.append((bottom - top) * (right - left))
    assert max(sizes) == 34 * 34
    assert min(sizes) < 0.7 * 34 * 34


@pytest.mark.parametrize("name", ["erase", "grey", "blur", "cutout"])
def test_probabilities(name: str) -> None:
    image = face()
    count = sum((changed(image, seed, **{name: 0.25}) != image).any() for seed in range(300))
    assert 45 < count < 105


def test_decoding(tmp_path: Path) -> None:
    """Red first, as a second decoder sees it; every way to be no image."""
    image_module = pytest.importorskip("PIL.Image")
    image = face(64)
    for suffix in (".png", ".jpg"):
        path = tmp_path / f"a{suffix}"
        cv2.imwrite(str(path), image[..., ::-1])
        data = path.read_bytes()
        got = decode_rgb(memoryview(data), "here")
        np.testing.assert_array_equal(got, read_rgb(path))
        other = np.asarray(image_module.open(io.BytesIO(data)).convert("RGB"))
        gap = np.abs(got.astype(int) - other)
        assert gap.max() <= (0 if suffix == ".png" else 3)
        for wrong in (b"", b"text", data[: len(data) // 2], data[:-30], data[:10]):
            with pytest.raises(InputError, match=f"here: image cannot be decoded: {len(wrong)} b"):
                decode_rgb(wrong, "here")
    grey = cv2.imencode(".jpg", image[..., 0])[1].tobytes()
    assert decode_rgb(grey, "grey").shape == (64, 64, 3)
    with pytest.raises(InputError, match=r"no.jpg: image cannot be read: No such file"):
        read_rgb(tmp_path / "no.jpg")


def test_a_decoder_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise cv2.error("too many pixels")

    monkeypatch.setattr(cv2, "imdecode", refuse)
    with pytest.raises(InputError, match="here: image cannot be decoded: 3 bytes"):
        decode_rgb(b"abc", "here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": "grey"}, "colour='grey'; accepted: rgb, bgr"),
        ({"resize_mode": "pil"}, "resize_mode='pil'; accepted: torch, cv2_uint8"),
        ({"size": 0}, "size=0"),
        ({"size": 1, "crop_first": True}, "size=1"),
        ({"resize": 0}, "resize=0"),
        ({"scale": 0}, "scale=0"),
        ({"flip": 1.1}, r"flip=1.1 must be in \[0, 1\]"),
        ({"jitter": -0.1}, "jitter=-0.1"),
        ({"erase": 2}, "erase=2"),
        ({"grey": float("nan")}, "grey=nan"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaceTransform(**options)


def test_inputs_are_checked() -> None:
    transform = FaceTransform()
    for image in (face().astype(np.float32), face()[..., 0], face()[..., :2]):
        with pytest.raises(ValueError, match=r"image is \w+ \(112, .*, need uint8 \(H, W, 3\)"):
            transform.test(image)
    for x in (
        torch.zeros(2, 3, 112, 112),
        torch.zeros(3, 112, 112, dtype=torch.uint8),
        torch.zeros(2, 3, 112, 111, dtype=torch.uint8),
        torch.zeros(2, 1, 112, 112, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match=r"need torch.uint8 \(B, 3, 112, 112\)"):
            transform.normalize(x)


@pytest.mark.parametrize("mode", ["torch", "cv2_uint8"])
def test_an_empty_batch(mode: str) -> None:
    transform = FaceTransform(resize=75, resize_mode=mode)
    x = transform.normalize(torch.zeros(0, 3, 112, 112, dtype=torch.uint8))
    assert x.shape == (0, 3, 75, 75)


def test_contract() -> None:
    """Everything deterministic and nothing random: it rebuilds the same `normalize`."""
    transform = FaceTransform(resize=235, flip=0.3, **POLYFACE)
    assert transform.contract() == {
        "size": 112, "colour": "bgr", "crop_first": True, "resize": 235, "resize_mode": "torch",
        "centre": 127.5, "scale": 79.6875,
    }  # fmt: skip
    again = FaceTransform(**transform.contract())  # type: ignore[arg-type]
    x = again.test(face())[None]
    assert torch.equal(again.normalize(x), transform.normalize(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["torch", "cv2_uint8"])
def test_on_the_device(mode: str) -> None:
    transform = FaceTransform(resize=235, resize_mode=mode, **POLYFACE)
    x = torch.stack([transform.test(face(seed=seed)) for seed in range(4)])
    got = transform.normalize(x.cuda())
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), transform.normalize(x), rtol=0, atol=1e-5)
