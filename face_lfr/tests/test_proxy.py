"""Endless draws over a proxy set.

Letters: M proxy images, D embedding width, T frames of a set.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.log import InputError
from face_lfr.data.proxy import Proxy, ProxyDraws, SetDraws, build_proxy
from face_lfr.data.proxy_set import proxy_image
from face_lfr.data.transforms import FaceTransform
from face_lfr.quality import targets
from face_lfr.tests.proxy_faces import (
    ALONE,
    COPIES,
    SEED,
    SIDE,
    WIDTH,
    Recogniser,
    a_transform,
    faces,
    some_centres,
)


@pytest.fixture
def transform() -> FaceTransform:
    return a_transform()


@pytest.fixture
def proxy(tmp_path: Path, transform: FaceTransform) -> Proxy:
    args = (faces(), transform, Recogniser(), some_centres(), COPIES, SEED, ALONE)
    return build_proxy(tmp_path / "proxy.npz", *args, batch=4)


def test_draws_take_every_image_once_in_an_epoch(proxy: Proxy, transform: FaceTransform) -> None:
    draws = ProxyDraws(faces(), transform, proxy, seed=3)
    assert draws.epoch_length == 33
    first, second = ([draws.place(e * 33 + k) for k in range(33)] for e in range(2))
    assert sorted(first) == sorted(second) == list(range(33))
    assert first != second
    assert first != [ProxyDraws(faces(), transform, proxy, seed=4).place(k) for k in range(33)]


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_draw_is_the_image_and_its_target(
    proxy: Proxy, transform: FaceTransform, flip: float
) -> None:
    data = faces()
    draws = ProxyDraws(data, transform, proxy, seed=3, target="ddl_diff", flip=flip)
    target_M = targets(proxy.own_M, proxy.other_M, "ddl_diff")
    for number in (0, 5, 40):
        place = draws.place(number)
        item = draws[number]
        assert item.target.dtype == torch.float32
        assert item.target.item() == target_M[place]
        clean = transform.test(proxy_image(data, place, COPIES, SEED))
        got, want = (transform.normalize(x[None]) for x in (item.image, clean))
        assert torch.equal(got, want.flip(-1) if flip else want)


def test_draws_are_the_same_in_workers(proxy: Proxy, transform: FaceTransform) -> None:
    kinds = (
        ProxyDraws(faces(), transform, proxy, seed=3),
        SetDraws(faces(), transform, proxy, seed=3, frames=2),
    )
    for draws in kinds:
        numbers = [7, 2, 100, 33, 8]
        loader = DataLoader(
            draws, 5, sampler=numbers, num_workers=2, multiprocessing_context="fork"
        )
        batch = next(iter(loader))
        for at, number in enumerate(numbers):
            for got, want in zip(batch, draws[number], strict=True):
                assert torch.equal(got[at], want)


def test_half_of_the_draws_are_mirrored(proxy: Proxy, transform: FaceTransform) -> None:
    plain = ProxyDraws(faces(), transform, proxy, seed=3, flip=0.0)
    mirrored = ProxyDraws(faces(), transform, proxy, seed=3)
    count = sum(not torch.equal(plain[k].image, mirrored[k].image) for k in range(200))
    assert 70 < count < 130


def test_sets_are_of_the_right_identities(proxy: Proxy, transform: FaceTransform) -> None:
    data = faces()
    draws = SetDraws(data, transform, proxy, seed=1, frames=2, flip=0.0)
    assert draws.epoch_length == 3  # identities 2 and 4 have a single image
    index_of = {row.tobytes(): m for m, row in enumerate(proxy.feature_MD)}
    seen = []
    for number in range(60):
        item = draws[number]
        assert item.image.shape == (3, 2, 3, SIDE, SIDE)
        assert item.feature.shape == (3, 2, WIDTH)
        index = np.array([[index_of[f.numpy().tobytes()] for f in part] for part in item.feature])
        label = proxy.label_M[index]
        assert (label[0] == label[0, 0]).all()
        assert (label[1] == label[0, 0]).all()
        assert (label[2] == label[2, 0]).all()
        assert label[2, 0] != label[0, 0]
        rows = proxy.number_M[index] // COPIES
        assert not set(rows[0]) & set(rows[1])
        assert all(len(set(part)) == 2 for part in index)  # enough copies: nothing twice
        for part, images in zip(index, item.image, strict=True):
            for m, image in zip(part, images, strict=True):
                assert torch.equal(image, transform.test(proxy_image(data, int(m), COPIES, SEED)))
        seen.append(int(label[0, 0]))
    assert all(sorted(seen[k : k + 3]) == [0, 1, 3] for k in range(0, 60, 3))


def test_a_set_repeats_images_only_where_there_are_too_few(
    proxy: Proxy, transform: FaceTransform
) -> None:
    draws = SetDraws(faces(), transform, proxy, frames=8)
    item = draws[0]
    assert item.image.shape == (3, 8, 3, SIDE, SIDE)
    assert [draws[0].feature.tolist(), draws[1].feature.tolist()] == [
        item.feature.tolist(), SetDraws(faces(), transform, proxy, frames=8)[1].feature.tolist()
    ]  # fmt: skip


def test_unreadable_images_are_replaced_in_draws(proxy: Proxy, transform: FaceTransform) -> None:
    broken = faces(bad=(0,))
    whole = ProxyDraws(faces(), transform, proxy, seed=3)
    draws = ProxyDraws(broken, transform, proxy, seed=3, max_bad_items=3)
    for number in range(33):
        item, lost = draws[number], whole.place(number) < COPIES
        assert lost != torch.equal(item.image, whole[number].image)
    assert draws.bad_items >= 3
    with pytest.raises(InputError, match="faces row 0: cannot be decoded"):
        [draws[number] for number in range(33, 66)]


def test_draws_refuse_what_does_not_fit(proxy: Proxy, transform: FaceTransform) -> None:
    data = faces()
    for wrong in ({"seed": -1}, {"flip": 1.5}, {"max_bad_items": -1}):
        with pytest.raises(ValueError, match="need no negative number, and flip"):
            ProxyDraws(data, transform, proxy, **wrong)
    with pytest.raises(ValueError, match="target='x'"):
        ProxyDraws(data, transform, proxy, target="x")
    with pytest.raises(ValueError, match="empty or of other data"):
        ProxyDraws(faces((0, 1)), transform, proxy)
    with pytest.raises(ValueError, match="frames=0"):
        SetDraws(data, transform, proxy, frames=0)
    with pytest.raises(IndexError):
        ProxyDraws(data, transform, proxy)[-1]
    single = proxy.number_M < COPIES
    few = {n: getattr(proxy, n)[single] for n in ("number_M", "label_M", "own_M", "other_M")}
    with pytest.raises(InputError, match="needs two identities, one of them with two images"):
        SetDraws(data, transform, replace(proxy, feature_MD=proxy.feature_MD[single], **few))
