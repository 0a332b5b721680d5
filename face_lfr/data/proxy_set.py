"""The proxy set: degraded copies of the training images, and what a finished recogniser says.

Every training image has `copies` degraded versions. How much a copy is degraded, and how, is a
function of (seed, row, copy) alone: the images are never stored, they are made again whenever a
draw needs one. Stored are the recogniser's features f (the mean of image and mirror image), the
similarity a to the centre of the own class and the greatest similarity h to another one.

Letters: N images, M proxy images, C classes, D embedding width, B images of a batch, H rows, W
columns.
"""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from common import dist
from common.log import InputError, get_logger, progress
from common.samplers import EvalSampler
from common.seed import worker_init
from face_lfr.data.degrade import degrade
from face_lfr.data.face_data import FaceData
from face_lfr.engine import Embedding, check_fits, features
from face_lfr.quality import own_and_other

FORMAT = 1  # of the file and of the degradation: a higher number refuses older files
CLEAN = 0.1  # share of the copies that are not degraded at all
CENTRES_CLOSE = 5e-3  # centres that are means over a data set come out anew with other roundings


@dataclass(frozen=True)
class Proxy:
    """A proxy set of M images.

    Attributes:
        number_M: int64; image row and copy of each, row * copies + copy, ascending.
        label_M: int64 class.
        own_M, other_M: float32; a and h.
        feature_MD: float32, not normalised.
        copies, seed: what the degraded copies depend on.
    """

    number_M: np.ndarray
    label_M: np.ndarray
    own_M: np.ndarray
    other_M: np.ndarray
    feature_MD: np.ndarray
    copies: int
    seed: int

    def __len__(self) -> int:
        return len(self.number_M)

    def image(self, data: FaceData, index: int) -> np.ndarray:
        """The degraded image uint8 (H, W, 3) of entry `index`."""
        return proxy_image(data, int(self.number_M[index]), self.copies, self.seed)


def proxy_level(number: int, copies: int, seed: int) -> float:
    """Level of a degraded copy, in [0, 1]: the copies of one image spread over the range."""
    share = (number % copies + _rng(number, seed).random()) / copies
    return max(0.0, (share - CLEAN) / (1 - CLEAN))


def proxy_image(data: FaceData, number: int, copies: int, seed: int) -> np.ndarray:
    """Degraded copy uint8 (H, W, 3) with the number row * copies + copy.

    Raises:
        InputError: the image cannot be read.
    """
    rng = _rng(number, seed)
    rng.random()  # the level took it
    return degrade(data.images.read(number // copies), proxy_level(number, copies, seed), rng)


def _rng(number: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, number])


def build_proxy(
    path: Path,
    data: FaceData,
    transform: Any,
    trained_model: nn.Module,
    centres_CD: Tensor,
    copies: int,
    seed: int,
    world: dist.World,
    *,
    batch: int = 128,
    workers: int = 0,
    precision: str = "float32",
    max_bad_items: int = 0,
) -> Proxy:
    """The proxy set of `data`, from `path` when it is there, computed and written otherwise.

    Collective: the ranks share the images without padding, and the file does not depend on how
    many they are (but for rounding where batches differ).

    Args:
        path: `.npz` file on storage that all ranks see; written whole or not at all.
        data: training set; `labels_N` says which centre is an image's own.
        transform: test transform of the recogniser.
        trained_model: recogniser with `embed`, on the device of `world`; set to evaluation.
        centres_CD: class centres of any length, for instance of its classifier.
        copies: degraded copies of every image.
        seed: of the degradation, not negative.
        world: this process and its peers.
        batch: images of a batch of the embedding.
        workers: processes that make images.
        precision: float32, bfloat16 or float16.
        max_bad_items: copies of unreadable images that are left out before it stops; each is
            logged.

    Raises:
        ValueError: a number out of its range, or centres that do not fit.
        InputError: the file is damaged or belongs to other inputs (says which); too many images
            cannot be read; a feature is no number.
    """
    path = Path(path)
    if copies < 1 or seed < 0 or max_bad_items < 0:
        given = f"copies={copies}, seed={seed}, max_bad_items={max_bad_items}"
        raise ValueError(f"{given}: need at least 1, and no negative number")
    centres_CD = _unit_centres(centres_CD, data)
    check_fits(trained_model, transform)
    key = _key(data, transform, trained_model, copies, seed)
    if not dist.together(lambda: _reusable(path, key, centres_CD), main_only=True):
        how = Embedding(transform, world, True, batch, workers, precision)
        images = _ProxyImages(data, transform, copies, seed)
        arrays = _recognise(trained_model, images, centres_CD, how, max_bad_items)
        arrays |= {"key": np.array(json.dumps(key)), "probe": _probe(centres_CD)}
        dist.together(lambda: _write(path, arrays), main_only=True)
    return load_proxy(path)


def load_proxy(path: Path) -> Proxy:
    """Read a proxy file.

    Raises:
        InputError: no such file, or not a whole proxy file.
    """
    arrays = _read(Path(path))
    key = json.loads(str(arrays.pop("key")))
    del arrays["probe"]
    return Proxy(**arrays, copies=int(key["copies"]), seed=int(key["seed"]))


class _ProxyImages(Dataset[tuple[Tensor, int, bool]]):
    """All copies in order: (image, number, whether it could be read)."""

    def __init__(self, data: FaceData, transform: Any, copies: int, seed: int):
        self.data, self.transform, self.copies, self.seed = data, transform, copies, seed

    def __len__(self) -> int:
        return self.data.epoch_length * self.copies

    def __getitem__(self, number: int) -> tuple[Tensor, int, bool]:
        try:
            image_HWC = proxy_image(self.data, number, self.copies, self.seed)
        except InputError as error:
            get_logger(__name__).warning("left out of the proxy set: %s", error)
            side = self.transform.size
            return self.transform.test(np.zeros((side, side, 3), np.uint8)), number, False
        return self.transform.test(image_HWC), number, True


def _recognise(
    model: nn.Module, images: _ProxyImages, centres_CD: Tensor, how: Embedding, max_bad_items: int
) -> dict[str, np.ndarray]:
    """Arrays of the proxy set, whole on every rank."""
    rows: list[tuple[Tensor, ...]] = []
    dist.together(lambda: rows.extend(_share(model, images, centres_CD, how, max_bad_items)))
    width = int(getattr(model, "features", 0))
    empty = (torch.zeros(0, dtype=torch.int64), *[torch.zeros(0)] * 2, torch.zeros(0, width))
    number, own, other, feature = (
        dist.gather_rows(torch.cat(parts)).numpy() for parts in zip(empty, *rows, strict=True)
    )
    bad = len(images) - len(number)
    if bad > max_bad_items or not len(number):
        raise InputError(images.data.root, f"{bad} of {len(images)} copies cannot be read", "")
    label = images.data.labels_N[number // images.copies].astype(np.int64)
    return {
        "number_M": number, "label_M": label, "own_M": own, "other_M": other,
        "feature_MD": feature,
    }  # fmt: skip


def _share(
    model: nn.Module, images: _ProxyImages, centres_CD: Tensor, how: Embedding, max_bad_items: int
) -> Iterator[tuple[Tensor, ...]]:
    """(number, own, other, feature) of this rank's batches."""
    share = EvalSampler(len(images), how.world.rank, how.world.size)
    loader: DataLoader[Any] = DataLoader(
        images, batch_size=how.batch, sampler=share, num_workers=how.workers,
        worker_init_fn=worker_init, pin_memory=how.world.device.type == "cuda",
        generator=torch.Generator(),
    )  # fmt: skip
    model.eval()
    centres_CD, bad = centres_CD.to(how.world.device), 0
    labels_N = torch.from_numpy(images.data.labels_N)
    with torch.inference_mode(), progress(how.world.main) as bar:
        task = bar.add_task("proxy set", total=len(share))
        for image_BCHW, number_B, read_B in loader:
            bad += int((~read_B).sum())
            if bad > max_bad_items:
                what = f"more than max_bad_items={max_bad_items} images cannot be read, first copy"
                raise InputError(images.data.root, what, int(number_B[~read_B][0]))
            bar.advance(task, len(number_B))
            if not bool(read_B.any()):
                continue
            feature_BD = features(model, image_BCHW[read_B], how)
            label_B = labels_N[number_B[read_B] // images.copies].to(feature_BD.device)
            own_B, other_B = own_and_other(feature_BD, label_B, centres_CD)
            if not bool((own_B.isfinite() & other_B.isfinite()).all()):
                raise InputError("teacher", "its feature is no number at copy", int(number_B[0]))
            yield number_B[read_B], own_B.cpu(), other_B.cpu(), feature_BD.cpu()


def _unit_centres(centres_CD: Tensor, data: FaceData) -> Tensor:
    if centres_CD.dim() != 2 or len(centres_CD) != data.num_classes:
        raise ValueError(f"centres {tuple(centres_CD.shape)}: need ({data.num_classes}, D)")
    if not bool(centres_CD.isfinite().all()):
        raise ValueError("centres must be finite")
    return F.normalize(centres_CD.detach().float(), dim=1)


def _key(
    data: FaceData, transform: Any, model: nn.Module, copies: int, seed: int
) -> dict[str, Any]:
    """What the file depends on, as plain values."""
    labels = np.ascontiguousarray(data.labels_N, dtype=np.int64)
    return {
        "format": FORMAT,
        "images": data.epoch_length,
        "classes": data.num_classes,
        "labels": zlib.crc32(labels.tobytes()),
        "copies": copies,
        "seed": seed,
        "transform": transform.contract(),
        "teacher": fingerprint(model),
    }


def fingerprint(model: nn.Module) -> str:
    """Digest of names, types, shapes and bytes of a model's state, wherever it lies."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _probe(centres_CD: Tensor) -> np.ndarray:
    """Some values of some centres; other centres have others."""
    some = np.linspace(0, len(centres_CD) - 1, 16).round().astype(int)
    return centres_CD[torch.from_numpy(some), :64].cpu().numpy()


def _reusable(path: Path, key: dict[str, Any], centres_CD: Tensor) -> bool:
    """Whether the file is there and right; an `InputError` when it is there and wrong."""
    if not path.exists():
        return False
    arrays = _read(path)
    found, what = json.loads(str(arrays["key"])), "is the proxy set of other inputs; move it away"
    for name, value in key.items():
        if found.get(name) != value:
            raise InputError(path, what, f"{name} {found.get(name)} there, {value} wanted")
    probe = _probe(centres_CD)
    if (
        probe.shape != arrays["probe"].shape
        or np.abs(probe - arrays["probe"]).max() > CENTRES_CLOSE
    ):
        raise InputError(path, what, "class centres differ")
    get_logger(__name__).info("proxy set read from %s", path)
    return True


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)


def _read(path: Path) -> dict[str, np.ndarray]:
    names = ("key", "probe", "number_M", "label_M", "own_M", "other_M", "feature_MD")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except FileNotFoundError as error:
        raise InputError(path, "no such file") from error
    except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(path, "is not a whole proxy file", error) from error
