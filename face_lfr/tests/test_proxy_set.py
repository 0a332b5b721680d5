"""The proxy set against a loop over its equations, and its file.

Letters: N images, M proxy images, C classes, D embedding width.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import dist
from common.log import InputError
from face_lfr.data import proxy_set
from face_lfr.data.proxy_set import (
    Proxy,
    build_proxy,
    fingerprint,
    load_proxy,
    proxy_image,
    proxy_level,
)
from face_lfr.data.transforms import FaceTransform
from face_lfr.quality import class_means, targets
from face_lfr.tests.proxy_faces import (
    ALONE,
    CLASSES,
    COPIES,
    SEED,
    SIDE,
    Recogniser,
    a_transform,
    faces,
    some_centres,
)


@pytest.fixture
def transform() -> FaceTransform:
    return a_transform()


@pytest.fixture
def centres() -> Tensor:
    return some_centres()


@pytest.fixture
def proxy(tmp_path: Path, transform: FaceTransform, centres: Tensor) -> Proxy:
    args = (faces(), transform, Recogniser(), centres, COPIES, SEED, ALONE)
    return build_proxy(tmp_path / "proxy.npz", *args, batch=4)


def test_level_is_a_function_of_its_numbers_and_spreads_over_the_range() -> None:
    levels = np.array([proxy_level(k, 4, 0) for k in range(4000)])
    assert ((levels >= 0) & (levels <= 1)).all()
    assert np.mean(levels == 0) == pytest.approx(proxy_set.CLEAN, abs=0.02)
    assert np.mean(levels > 0.5) == pytest.approx(0.45, abs=0.02)
    assert (np.diff(levels.reshape(-1, 4), axis=1) > 0).all()  # each copy has its own quarter
    assert [proxy_level(k, 4, 0) for k in (9, 9)] == [levels[9]] * 2
    assert proxy_level(9, 4, 1) != levels[9]


def test_image_is_a_function_of_its_numbers() -> None:
    data = faces()
    first, again = (proxy_image(data, 7, COPIES, SEED) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, proxy_image(data, 7, COPIES, SEED + 1))
    assert not np.array_equal(first, proxy_image(data, 8, COPIES, SEED))
    clean = next(k for k in range(0, 33, COPIES) if proxy_level(k, COPIES, SEED) == 0)
    assert np.array_equal(proxy_image(data, clean, COPIES, SEED), data.images.read(clean // COPIES))


def test_proxy_equals_a_loop(proxy: Proxy, transform: FaceTransform, centres: Tensor) -> None:
    data, model = faces(), Recogniser()
    assert proxy.number_M.tolist() == list(range(len(data.images) * COPIES))
    for number in proxy.number_M.tolist():
        image = torch.from_numpy(proxy_image(data, number, COPIES, SEED)[1:, 1:, ::-1].copy())
        x = ((image.double() - 127.5) / 79.6875).permute(2, 0, 1)
        weight = model.project.detach().double()
        feature = (weight @ x.flatten() + weight @ x.flip(-1).flatten()) / 2
        np.testing.assert_allclose(proxy.feature_MD[number], feature, atol=2e-5)
        cosine = [F.cosine_similarity(feature, c.double(), dim=0).item() for c in centres]
        label = data.images.label(number // COPIES)
        assert proxy.label_M[number] == label
        assert proxy.own_M[number] == pytest.approx(cosine.pop(label), abs=1e-6)
        assert proxy.other_M[number] == pytest.approx(max(cosine), abs=1e-6)


def test_targets_fall_with_the_level(tmp_path: Path, transform: FaceTransform) -> None:
    data, model = faces(tuple(range(CLASSES)) * 8), Recogniser()
    clean = torch.stack([transform.test(data.images.read(k)) for k in range(40)])
    feature_ND = model.embed(transform.normalize(clean)).detach().numpy()
    centres_CD = class_means(feature_ND, data.labels_N, CLASSES)
    args = (data, transform, model, centres_CD, COPIES, SEED, ALONE)
    proxy = build_proxy(tmp_path / "proxy.npz", *args)
    level_M = np.array([proxy_level(k, COPIES, SEED) for k in proxy.number_M.tolist()])
    for name in ("ddl_ratio", "ddl_diff", "own_cos"):
        target_M = targets(proxy.own_M, proxy.other_M, name)
        ranks = [values.argsort().argsort() for values in (target_M, level_M)]
        assert np.corrcoef(ranks)[0, 1] < -0.25, name


def test_file_is_reused(
    tmp_path: Path, transform: FaceTransform, centres: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (faces(), transform, Recogniser(), centres, COPIES, SEED, ALONE)
    path = tmp_path / "new" / "proxy.npz"
    first = build_proxy(path, *args)
    written = path.stat().st_mtime_ns
    monkeypatch.setattr(proxy_set, "_recognise", None)
    again = build_proxy(path, *args)
    assert path.stat().st_mtime_ns == written
    assert os.listdir(path.parent) == ["proxy.npz"]
    for name in ("number_M", "label_M", "own_M", "other_M", "feature_MD"):
        assert np.array_equal(getattr(again, name), getattr(first, name))
    assert (again.copies, again.seed) == (COPIES, SEED)


def test_rounding_of_the_centres_is_no_other_input(
    tmp_path: Path, transform: FaceTransform, centres: Tensor, proxy: Proxy
) -> None:
    args = (COPIES, SEED, ALONE)
    near = 2 * centres * (1 + 1e-5)
    build_proxy(tmp_path / "proxy.npz", faces(), transform, Recogniser(), near, *args)
    with pytest.raises(InputError, match="class centres differ"):
        build_proxy(tmp_path / "proxy.npz", faces(), transform, Recogniser(), -centres, *args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copies": 4}, "copies 3 there, 4 wanted"),
        ({"seed": 12}, "seed 11 there, 12 wanted"),
        ({"data": faces((0, 0, 1, 2, 3, 4))}, "images 11 there, 6 wanted"),
        ({"data": faces((1, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4))}, "labels .* wanted"),
        ({"transform": FaceTransform(size=SIDE, crop_first=True)}, "transform .* wanted"),
        ({"trained_model": Recogniser(seed=1)}, "teacher .* wanted"),
    ],
)
def test_file_of_other_inputs_is_refused(
    tmp_path: Path, transform: FaceTransform, centres: Tensor, proxy: Proxy, changes: dict,
    message: str,
) -> None:  # fmt: skip
    named = {
        "data": faces(), "transform": transform, "trained_model": Recogniser(),
        "centres_CD": centres, "copies": COPIES, "seed": SEED, "world": ALONE,
    }  # fmt: skip
    with pytest.raises(InputError, match=f"proxy.npz: is the proxy set of other inputs.*{message}"):
        build_proxy(tmp_path / "proxy.npz", **(named | changes))


def test_damaged_file_is_named(
    tmp_path: Path, transform: FaceTransform, centres: Tensor, proxy: Proxy
) -> None:
    path = tmp_path / "proxy.npz"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", whole[:100] + whole[200:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not a whole proxy file"):
            build_proxy(path, faces(), transform, Recogniser(), centres, COPIES, SEED, ALONE)
    np.savez(path, own_M=np.ones(3))
    with pytest.raises(InputError, match="is not a whole proxy file"):
        load_proxy(path)
    with pytest.raises(InputError, match="no such file"):
        load_proxy(tmp_path / "absent.npz")


def test_a_stopped_write_leaves_no_file(
    tmp_path: Path, transform: FaceTransform, centres: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise OSError(28, "No space left on device", "proxy.npz.tmp")

    monkeypatch.setattr(proxy_set.os, "replace", stopped)
    args = (faces(), transform, Recogniser(), centres, COPIES, SEED, ALONE)
    with pytest.raises(OSError, match="No space left"):
        build_proxy(tmp_path / "proxy.npz", *args)
    assert not (tmp_path / "proxy.npz").exists()
    monkeypatch.undo()
    assert len(build_proxy(tmp_path / "proxy.npz", *args)) == 33


@pytest.mark.parametrize("batch", [2, 64])
def test_unreadable_images_are_counted(
    tmp_path: Path, transform: FaceTransform, centres: Tensor, batch: int
) -> None:
    data = faces(bad=(0, 4))
    args = (data, transform, Recogniser(), centres, COPIES, SEED, ALONE)
    with pytest.raises(InputError, match="more than max_bad_items=5 images cannot be read"):
        build_proxy(tmp_path / "proxy.npz", *args, batch=batch, max_bad_items=5)
    got = build_proxy(tmp_path / "proxy.npz", *args, batch=batch, max_bad_items=6)
    readable = [k for k in range(33) if k // COPIES not in (0, 4)]
    assert got.number_M.tolist() == readable
    assert np.array_equal(got.label_M, data.labels_N[np.array(readable) // COPIES])


def test_arguments_are_checked(tmp_path: Path, transform: FaceTransform, centres: Tensor) -> None:
    path, model = tmp_path / "proxy.npz", Recogniser()
    for numbers in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="need at least 1, and no negative number"):
            build_proxy(path, faces(), transform, model, centres, *numbers, ALONE)
    with pytest.raises(ValueError, match=r"need \(5, D\)"):
        build_proxy(path, faces(), transform, model, centres[:4], COPIES, SEED, ALONE)
    with pytest.raises(ValueError, match="centres must be finite"):
        build_proxy(path, faces(), transform, model, centres / 0, COPIES, SEED, ALONE)
    other = FaceTransform(size=SIDE)
    with pytest.raises(InputError, match="the model takes 23 px"):
        build_proxy(path, faces(), other, model, centres, COPIES, SEED, ALONE)
    model.project.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="its feature is no number"):
        build_proxy(path, faces(), transform, model, centres, COPIES, SEED, ALONE)


def test_fingerprint_sees_values_names_and_types() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    same = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    same.load_state_dict(model.state_dict())
    assert fingerprint(same) == fingerprint(model)
    assert fingerprint(same.double()) != fingerprint(model)
    model[1].running_var[1] += 1e-6
    assert fingerprint(model) != fingerprint(same.float())
    assert fingerprint(model.bfloat16()) != fingerprint(same)


def _rank(rank: int, folder: str, centres: Tensor, bad: tuple) -> None:
    torch.set_num_threads(1)  # a forked child must not use the threads of its parent
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    transform = a_transform()
    world = dist.World(rank, 2, torch.device("cpu"))
    args = (faces(bad=bad), transform, Recogniser(), centres, COPIES, SEED, world)
    try:
        proxy = build_proxy(Path(folder) / "proxy.npz", *args, batch=4)
        np.save(f"{folder}/{rank}.npy", proxy.feature_MD)
    except InputError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    finally:
        dist.shutdown()
    os._exit(0)  # threads of gloo can abort an interpreter that is torn down


@pytest.mark.parametrize("bad", [(), (9,)])
def test_two_ranks_equal_one(tmp_path: Path, centres: Tensor, proxy: Proxy, bad: tuple) -> None:
    folder = tmp_path / "two"
    folder.mkdir()
    torch.multiprocessing.start_processes(
        _rank, (str(folder), centres, bad), nprocs=2, start_method="fork"
    )
    if bad:  # only the second rank meets it: both stop, and none waits
        for rank in range(2):
            assert "cannot be read" in (folder / f"{rank}.txt").read_text()
        assert not (folder / "proxy.npz").exists()
        return
    got = load_proxy(folder / "proxy.npz")
    for name in ("number_M", "label_M"):
        assert np.array_equal(getattr(got, name), getattr(proxy, name))
    for name in ("own_M", "other_M", "feature_MD"):
        np.testing.assert_allclose(getattr(got, name), getattr(proxy, name), atol=1e-6)
    for rank in range(2):
        assert np.array_equal(np.load(folder / f"{rank}.npy"), got.feature_MD)
