"""Resizing, normalisation and augmentation of frames; the five-channel flow input."""

import math
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.log import InputError
from reid_rqen.data.transforms import FlowTransform, FrameTransform, read_bgr, resize


def photo(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with sharp edges and some noise: (rows, columns, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :columns] / 16
    waves = np.stack([np.sin(x + k) * np.cos(y * (k + 1)) for k in range(3)], axis=-1)
    image = 128 + 90 * waves + rng.normal(0, 8, waves.shape)
    image[rows // 3 : rows // 2, columns // 4 : columns // 2] = (250, 5, 120)
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture
def frames(tmp_path: Path) -> list[Path]:
    """Three PNG frames, one of another size."""
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        cv2.imwrite(str(path), photo(*((128, 64) if n else (140, 60)), seed=n))
    return paths


def imresize_weights(old: int, new: int) -> np.ndarray:
    """(new, old) weights of Matlab's imresize along one axis: cubic kernel, mirrored border."""
    scale = new / old
    shrink = min(scale, 1.0)
    weights = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) / scale - 0.5
        for tap in range(math.floor(centre - 2 / shrink), math.ceil(centre + 2 / shrink) + 1):
            x = abs(shrink * (centre - tap))
            inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            place = tap % (2 * old)
            place = min(place, 2 * old - 1 - place)
            weights[row, place] += inner if x <= 1 else outer if x < 2 else 0
    return weights / weights.sum(axis=1, keepdims=True)


def imresize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Matlab's imresize on uint8: smaller scale first, every pass rounded."""
    out = image.astype(float)
    for _, axis in sorted((size[axis] / image.shape[axis], axis) for axis in (0, 1)):
        weights = imresize_weights(image.shape[axis], size[axis])
        out = np.moveaxis(np.tensordot(weights, out, axes=(1, axis)), 0, axis)
        out = np.floor(out.clip(0, 255) + 0.5)
    return out


@pytest.mark.parametrize("source", [(128, 64), (256, 128), (500, 400), (224, 224), (128, 300)])
def test_resize_is_matlab_imresize(source: tuple[int, int]) -> None:
    image = photo(*source)
    got = resize(torch.from_numpy(image).permute(2, 0, 1), (224, 224)).permute(1, 2, 0).numpy()
    gap = np.abs(got - imresize(image, (224, 224)))
    assert got.dtype == np.uint8
    assert gap[8:-8, 8:-8].max() <= 2
    assert gap.max() <= 3
    assert gap.mean() < 0.05


@pytest.mark.parametrize("source", [(500, 400), (128, 300), (224, 300)])
def test_resize_is_pillow_bicubic_when_it_shrinks(source: tuple[int, int]) -> None:
    image = photo(*source)
    wanted = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
    got = resize(torch.from_numpy(image).permute(2, 0, 1), (224, 224)).permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - wanted.astype(int)).max() <= 1


def test_opencv_bicubic_would_not_do() -> None:
    """The checks above can fail: another bicubic filter is many grey levels away."""
    image = photo(500, 400)
    ours = resize(torch.from_numpy(image).permute(2, 0, 1), (224, 224)).permute(1, 2, 0).numpy()
    theirs = cv2.resize(image, (224, 224), interpolation=cv2.INTER_CUBIC)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() > 10


def test_caffe_input(frames: list[Path]) -> None:
    """224 x 224 without keeping the aspect ratio, blue first, minus the means, not scaled."""
    transform = FrameTransform()
    image = transform.load(frames)
    assert image.shape == (3, 3, 224, 224)
    assert image.dtype == torch.uint8
    red = np.zeros((64, 32, 3), np.uint8)
    red[..., 2] = 200
    cv2.imwrite(str(frames[0]), red)
    got = transform.normalize(transform.load(frames[:1]))
    assert got.dtype == torch.float32
    assert got[0, :, 100, 100].tolist() == [-104.0, -117.0, 200.0 - 123.0]
    rgb = FrameTransform(mean=(0, 0, 0), scale=1 / 255, order="rgb")
    assert rgb.normalize(rgb.load(frames[:1]))[0, 0].mean().item() == pytest.approx(200 / 255)


def test_normalize_takes_any_batch_shape() -> None:
    image = torch.randint(0, 256, (2, 3, 4, 3, 8, 6), dtype=torch.uint8)
    got = FrameTransform(size=(8, 6), mean=(1, 2, 3), scale=0.5).normalize(image)
    torch.testing.assert_close(got[..., 2, :, :], (image[..., 2, :, :].float() - 3) / 2)


def test_no_augmentation_by_default(frames: list[Path]) -> None:
    transform = FrameTransform(size=(56, 28))
    torch.testing.assert_close(
        transform.load(frames, np.random.default_rng(0)), transform.load(frames)
    )


@pytest.mark.parametrize("setting", [{"flip": 0.5}, {"crop": 0.25}, {"erase": 1.0}])
def test_augmentation_needs_a_generator_and_depends_on_it(
    frames: list[Path], setting: dict[str, float]
) -> None:
    transform = FrameTransform(size=(56, 28), **setting)
    plain = FrameTransform(size=(56, 28)).load(frames)
    torch.testing.assert_close(transform.load(frames), plain)
    runs = [transform.load(frames, np.random.default_rng(seed)) for seed in range(8)]
    assert any(not torch.equal(run, plain) for run in runs)
    torch.testing.assert_close(transform.load(frames, np.random.default_rng(3)), runs[3])
    assert all(run.shape == plain.shape for run in runs)


@pytest.mark.parametrize("setting", [{"flip": 0.5}, {"crop": 0.25}, {"erase": 1.0}])
def test_augmentation_is_one_choice_per_set(frames: list[Path], setting: dict[str, float]) -> None:
    transform = FrameTransform(size=(56, 28), **setting)
    for seed in range(8):
        same = transform.load([frames[0]] * 3, np.random.default_rng(seed))
        assert torch.equal(same[0], same[1])
        assert torch.equal(same[0], same[2])


def test_flip_is_a_mirror(frames: list[Path]) -> None:
    plain = FrameTransform(size=(56, 28)).load(frames)
    got = FrameTransform(size=(56, 28), flip=1.0).load(frames, np.random.default_rng(0))
    torch.testing.assert_close(got, plain.flip(-1))


def test_erase_fills_a_rectangle_with_the_means(frames: list[Path]) -> None:
    plain = FrameTransform(size=(56, 28)).load(frames)
    got = FrameTransform(size=(56, 28), erase=1.0).load(frames, np.random.default_rng(0))
    changed = (got != plain).any(dim=1).any(dim=0)
    assert 0.01 < changed.float().mean() < 0.3
    assert got.permute(1, 0, 2, 3)[:, :, changed].unique(dim=-1).tolist()[0][0] == [104]


def test_cache_keeps_frames_by_path(frames: list[Path]) -> None:
    transform, cache = FrameTransform(size=(56, 28)), {}
    first = transform.load(frames, cache=cache)
    for path in frames:
        path.unlink()
    torch.testing.assert_close(transform.load(frames, cache=cache), first)
    assert set(cache) == set(frames)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xd8\xff no image"])
def test_check_12_unreadable_image_is_named(frames: list[Path], content: bytes | None) -> None:
    frames[1].unlink()
    if content is not None:
        frames[1].write_bytes(content)
    for transform in (FrameTransform(), FlowTransform()):
        with pytest.raises(InputError, match=r"1\.png: image cannot be"):
            transform.load(frames)


@pytest.mark.parametrize(
    "setting", [{"order": "gbr"}, {"flip": 1.5}, {"crop": -0.1}, {"erase": -1.0}]
)
def test_bad_arguments(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        FrameTransform(**setting)  # type: ignore[arg-type]


def test_transforms_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(FrameTransform(size=[8, 6]))).size == (8, 6)
    assert pickle.loads(pickle.dumps(FlowTransform())).crop == (56, 40)


def cnn_size(rows: int, columns: int) -> torch.Size:
    image: Tensor = torch.zeros(1, 5, rows, columns)
    for channels in (16, 32, 32):
        weight = torch.zeros(channels, image.shape[1], 5, 5)
        image = F.max_pool2d(F.conv2d(image, weight, padding=4), 2)
    return image.shape


def test_flow_crop_fits_the_recurrent_network(frames: list[Path]) -> None:
    """56 rows x 40 columns end in 32*10*8 features; the transposed crop would not."""
    image = FlowTransform().load(frames)
    assert image.shape == (3, 5, 56, 40)
    assert cnn_size(*image.shape[-2:]) == (1, 32, 10, 8)
    assert cnn_size(40, 56) != (1, 32, 10, 8)


def test_flow_channels_have_zero_mean(frames: list[Path]) -> None:
    image = FlowTransform().sequence(frames)
    assert image.shape == (3, 5, 64, 48)
    assert image.mean(dim=(-2, -1)).abs().max() < 1e-4
    assert image[0, 3:].abs().max() == 0  # nothing comes before the first frame
    assert (image[1:].std(dim=(-2, -1)) > 0.01).all()


def test_yuv_is_normalised_per_frame(frames: list[Path]) -> None:
    """Luma of the middle frame from the BT.601 weights, over the root of its deviation."""
    bgr = torch.from_numpy(read_bgr(frames[1])).float() / 255
    luma = bgr @ torch.tensor([0.114, 0.587, 0.299])
    small = F.interpolate(luma[None, None], size=(64, 48), mode="bilinear", antialias=True)[0, 0]
    wanted = (small - small.mean()) / small.std().sqrt()
    torch.testing.assert_close(FlowTransform().sequence(frames)[1, 0], wanted, atol=1e-4, rtol=1e-4)


def test_flow_follows_the_motion(tmp_path: Path) -> None:
    """Half of the picture moves right, half moves down."""
    texture = cv2.GaussianBlur(photo(160, 90, seed=5), (0, 0), 2)
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    for step, path in enumerate(paths):
        top = texture[10:74, 10 - 2 * step : 74 - 2 * step]
        down = texture[84 - 2 * step : 148 - 2 * step, 10:74]
        cv2.imwrite(str(path), np.concatenate([top, down]))
    vertical, horizontal = FlowTransform().sequence(paths)[1, 3:]
    assert vertical[36:].mean() > vertical[:28].mean() + 0.03
    assert horizontal[:28].mean() > horizontal[36:].mean() + 0.03


def test_flow_augmentation_and_views(frames: list[Path]) -> None:
    transform = FlowTransform()
    whole = transform.sequence(frames)
    plain = transform.load(frames)
    centre = whole[..., 4:60, 4:44]
    torch.testing.assert_close(plain, centre - centre.mean(dim=(1, 2, 3), keepdim=True))
    runs = [transform.load(frames, np.random.default_rng(seed)) for seed in range(6)]
    assert len({run.sum(dim=(0, 1, 2))[:5].numpy().tobytes() for run in runs}) > 3
    views = transform.views(frames)
    assert views.shape == (16, 3, 5, 56, 40)
    torch.testing.assert_close(views[7], plain)  # crop 4 of 1..8, not mirrored
    torch.testing.assert_close(transform.normalize(plain), plain)


def test_flow_bad_crop() -> None:
    with pytest.raises(ValueError, match="crop"):
        FlowTransform(size=(64, 48), crop=(64, 40))
