"""Crops, mirrors and normalisation of clips, against slow references."""

from collections import Counter

import cv2
import numpy as np
import pytest
import torch

from video_mmit.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Box,
    GroupTransform,
    crop_places,
    crop_shapes,
    fixed_places,
    resize_short_side,
)

SCALES = (1, 0.875, 0.75, 0.66)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(frames: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return rng(frames).integers(0, 256, (frames, height, width, channels), dtype=np.uint8)


def test_crop_shapes_at_256() -> None:
    sides = [256, 224, 192, 168]
    shapes = crop_shapes(256, 340, SCALES, 224)
    assert shapes == [(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides)
                      if abs(i - j) <= 1]  # fmt: skip
    assert len(shapes) == 10


def test_crop_shapes_snap_to_the_input() -> None:
    """Within less than 3 pixels of the input size a side becomes the input size."""
    sides = {side for shape in crop_shapes(258, 340, SCALES, 224) for side in shape}
    assert sides == {258, 224, 193, 170}  # int(258 * 0.875) = 225
    assert {a for a, _ in crop_shapes(256, 340, SCALES, 227)} == {256, 224, 192, 168}
    # Snapping up must not leave the picture.
    assert max(max(shape) for shape in crop_shapes(222, 300, SCALES, 224)) == 222
    assert crop_shapes(1, 1, SCALES, 224) == [(1, 1)] * 10


def test_the_13_places() -> None:
    """Corners, centre, middles of the edges and quarter points on a grid of (W - w) // 4."""
    places = fixed_places(256, 340, 224, 168)
    right, down = (340 - 168) // 4, (256 - 224) // 4
    columns = [left // right for _, left in places]
    rows = [top // down for top, _ in places]
    corners = {(0, 0), (0, 4), (4, 0), (4, 4)}
    middles = {(0, 2), (2, 0), (2, 4), (4, 2)}
    quarters = {(1, 1), (1, 3), (3, 1), (3, 3)}
    assert set(zip(rows, columns, strict=True)) == corners | middles | quarters | {(2, 2)}
    assert places == [(r * down, c * right) for r, c in zip(rows, columns, strict=True)]
    assert len(places) == 13


def test_training_boxes_are_uniform() -> None:
    """Every one of the 10 sizes and, for a size, of the 13 places is drawn equally often."""
    transform, generator = GroupTransform(224, 256), rng()
    draws = 13_000
    boxes = Counter(transform.draw_box(256, 340, generator) for _ in range(draws))
    expected = [
        Box(top, left, *shape)
        for shape in crop_shapes(256, 340, SCALES, 224)
        for top, left in fixed_places(256, 340, *shape)
    ]
    # Where a side fills the picture, several places are the same.
    share = Counter(expected)
    assert set(boxes) == set(share)
    for box, times in share.items():
        mean = draws * times / 130
        assert abs(boxes[box] - mean) < 5 * mean**0.5


def test_training_view_is_the_same_box_in_all_frames() -> None:
    """Crop, bilinear resize and mirror, frame by frame."""
    frames = noise(6, 50, 70)
    transform = GroupTransform(32, 40, length=2)
    for seed in range(20):
        generator = rng(seed)
        box = transform.draw_box(50, 70, generator)
        flipped = generator.random() < 0.5
        got = transform.train(frames, rng(seed))
        assert got.shape == (3, 6, 32, 32)
        assert got.dtype == torch.uint8
        for number, frame in enumerate(frames):
            part = frame[box.top : box.top + box.height, box.left : box.left + box.width]
            part = cv2.resize(np.ascontiguousarray(part), (32, 32), interpolation=cv2.INTER_LINEAR)
            part = part[:, ::-1] if flipped else part
            colours = got[number // 2, 3 * (number % 2) : 3 * (number % 2) + 3]
            np.testing.assert_array_equal(colours.permute(1, 2, 0).numpy(), part)


def test_flip_is_an_option() -> None:
    """Half of the views are mirrored with `flip`, none without."""
    frames = noise(1, 32, 32)
    plain = torch.from_numpy(frames[0]).permute(2, 0, 1)[None]
    for flip in (True, False):
        transform = GroupTransform(32, 32, flip=flip, scales=[1])
        views = [transform.train(frames, rng(seed)) for seed in range(400)]
        mirrored = sum(torch.equal(view, plain.flip(-1)) for view in views)
        assert sum(torch.equal(view, plain) for view in views) == 400 - mirrored
        assert 150 < mirrored < 250 if flip else mirrored == 0


def test_resize_before_the_crop() -> None:
    frames = noise(2, 60, 90)
    resized = GroupTransform(24, 32, train_scale=40).train(frames, rng(1))
    by_hand = GroupTransform(24, 32).train(resize_short_side(frames, 40), rng(1))
    assert torch.equal(resized, by_hand)
    assert not torch.equal(resized, GroupTransform(24, 32).train(frames, rng(1)))


def test_scale_jitter() -> None:
    """Short side uniform in 32..40, then a crop of the input size anywhere: never a resize."""
    transform = GroupTransform(28, 32, train_scale=[32, 40], flip=False)
    frames = noise(2, 60, 90)
    sizes = set()
    for seed in range(200):
        generator = rng(seed)
        size = int(generator.integers(32, 41))
        scaled = resize_short_side(frames, size)
        top, left = (int(generator.integers(room - 28 + 1)) for room in scaled.shape[1:3])
        expected = scaled[:, top : top + 28, left : left + 28].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(transform.train(frames, rng(seed)).numpy(), expected)
        sizes.add(size)
    assert sizes == set(range(32, 41))


def test_jitter_reaches_every_place() -> None:
    transform, generator = GroupTransform(4, 4, train_scale=(6, 6)), rng()
    boxes = Counter(transform.draw_box(6, 7, generator) for _ in range(2400))
    assert set(boxes) == {Box(top, left, 4, 4) for top in range(3) for left in range(4)}
    assert min(boxes.values()) > 130


def test_three_crops_of_340_by_256() -> None:
    """(top, left) in the order left, right, centre."""
    assert crop_places(256, 340, 224, 3) == [(16, 0), (16, 116), (16, 58)]
    assert crop_places(256, 340, 224, 1) == [(16, 58)]
    assert crop_places(256, 340, 224, 5) == [(0, 0), (0, 116), (32, 0), (32, 116), (16, 58)]
    assert crop_places(256, 340, 256, 3) == [(0, 0), (0, 84), (0, 42)]


def test_three_crops_of_a_portrait_picture() -> None:
    """Top, bottom, centre."""
    assert crop_places(340, 256, 224, 3) == [(0, 16), (116, 16), (58, 16)]
    assert crop_places(340, 256, 224, 5) == [(0, 0), (0, 32), (116, 0), (116, 32), (58, 16)]
    views = GroupTransform(24, 32).test(noise(1, 80, 32), crops=3)
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[1], views[2])


@pytest.mark.parametrize("crops", [1, 3, 5, 10])
@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (32, 32), (13, 17)])
def test_test_views(shape: tuple[int, int], crops: int) -> None:
    """Short side resized, then cut, then mirrored for the last five of ten."""
    frames = noise(4, *shape)
    views = GroupTransform(24, 32).test(frames, crops)
    assert views.shape == (crops, 4, 3, 24, 24)
    scaled = resize_short_side(frames, 32)
    assert min(scaled.shape[1:3]) == 32
    places = crop_places(scaled.shape[1], scaled.shape[2], 24, min(crops, 5))
    for view, (top, left) in zip(views, places, strict=False):
        cut = scaled[:, top : top + 24, left : left + 24].transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(view.numpy(), cut)
    if crops == 10:
        assert torch.equal(views[5:], views[:5].flip(-1))


def test_short_side_resize() -> None:
    assert resize_short_side(noise(1, 240, 320), 256).shape == (1, 256, 341, 3)
    assert resize_short_side(noise(1, 320, 240), 256).shape == (1, 341, 256, 3)
    same = noise(1, 256, 300)
    assert resize_short_side(same, 256) is same


def test_flow_mirror_inverts_x_only() -> None:
    """A motion to the right becomes one to the left; the vertical component only moves along."""
    flow = noise(10, 32, 32, 2)
    transform = GroupTransform(32, 32, modality="flow", length=5, scales=[1])
    expected = flow[:, :, ::-1].astype(int)
    expected[..., 0] = 255 - expected[..., 0]
    expected = expected.transpose(0, 3, 1, 2).reshape(2, 10, 32, 32)
    plain = flow.transpose(0, 3, 1, 2).reshape(2, 10, 32, 32)
    seen = set()
    for seed in range(10):
        view = transform.train(flow, rng(seed)).numpy()
        assert view.shape == (2, 10, 32, 32)
        mirrored = bool((view == expected).all())
        assert mirrored or (view == plain).all()
        seen.add(mirrored)
    assert seen == {True, False}
    np.testing.assert_array_equal(transform.test(flow, 10)[5].numpy(), expected)


def test_normalize_rgb() -> None:
    """(x / 255 - mean) / std, every channel its own, also with several frames a position."""
    transform = GroupTransform(8, 8, length=2)
    x = torch.from_numpy(noise(6, 8, 8, 6)).permute(0, 3, 1, 2)
    mean = torch.tensor(IMAGENET_MEAN * 2)[:, None, None]
    std = torch.tensor(IMAGENET_STD * 2)[:, None, None]
    got = transform.normalize(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, (x / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    five = transform.normalize(x.reshape(2, 3, 6, 8, 8))
    torch.testing.assert_close(five.reshape(6, 6, 8, 8), got)
    assert transform.channels == 6


def test_normalize_flow() -> None:
    transform = GroupTransform(8, 8, modality="flow", length=5)
    x = torch.from_numpy(noise(2, 8, 8, 10)).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        transform.normalize(x), (x / 255 - 0.5) / 0.226, atol=1e-5, rtol=1e-5
    )
    assert transform.channels == 10


def test_normalize_rgb_difference() -> None:
    """Six frames become five differences of normalised frames."""
    frames = noise(12, 8, 8)
    transform = GroupTransform(8, 8, modality="rgbdiff", length=6, scales=[1], flip=False)
    view = transform.train(frames, rng())
    assert view.shape == (2, 18, 8, 8)
    got = transform.normalize(view)
    assert got.shape == (2, transform.channels, 8, 8) == (2, 15, 8, 8)
    for position in range(2):
        for step in range(5):
            first = frames[6 * position + step].astype(float)
            after = frames[6 * position + step + 1].astype(float)
            expected = ((after - first) / 255 / IMAGENET_STD).transpose(2, 0, 1)
            part = got[position, 3 * step : 3 * step + 3].numpy()
            np.testing.assert_allclose(part, expected, atol=1e-5)


def test_own_mean_and_std() -> None:
    transform = GroupTransform(4, 4, mean=[0.5], std=[0.25, 0.5, 1.0])
    x = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    assert transform.normalize(x)[0, :, 0, 0].tolist() == pytest.approx([2, 1, 0.5])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_normalize_on_the_device() -> None:
    transform = GroupTransform(8, 8)
    x = torch.from_numpy(noise(2, 8, 8)).permute(0, 3, 1, 2)
    got = transform.normalize(x.cuda())
    assert got.is_cuda
    torch.testing.assert_close(got.cpu(), transform.normalize(x))


def test_views_do_not_share_memory_with_the_frames() -> None:
    frames = noise(2, 8, 8)
    kept = frames.copy()
    transform = GroupTransform(8, 8, scales=[1])
    for view in (transform.train(frames, rng()), transform.test(frames, 10)):
        assert view.is_contiguous()
        view.zero_()
    np.testing.assert_array_equal(frames, kept)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"modality": "depth"}, "accepted: rgb, flow, rgbdiff"),
        ({"modality": "rgbdiff"}, "length=1"),
        ({"length": 0}, "length=0"),
        ({"input_size": 300}, "input_size=300"),
        ({"scales": (1, 1.2)}, "scales="),
        ({"train_scale": (200, 256)}, "train_scale="),
        ({"train_scale": (256, 250)}, "train_scale="),
        ({"train_scale": 0}, "train_scale=0"),
        ({"mean": (0.5, 0.5)}, "mean="),
        ({"modality": "flow", "length": 5, "std": IMAGENET_STD}, "std="),
    ],
)
def test_arguments_are_checked(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GroupTransform(**arguments)


def test_inputs_are_checked() -> None:
    transform = GroupTransform(8, 8, length=2, flip=False)
    for shape in ((3, 8, 8, 3), (2, 8, 8, 2), (8, 8, 3), (0, 8, 8, 3)):
        with pytest.raises(ValueError, match="frames of shape"):
            transform.train(np.zeros(shape, np.uint8), rng())
    frames = noise(2, 8, 8)
    with pytest.raises(ValueError, match="crops=2; accepted: 1, 3, 5, 10"):
        transform.test(frames, 2)
    with pytest.raises(ValueError, match="flip=false forbids"):
        transform.test(frames, 10)
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 6, H, W\)"):
        transform.normalize(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
