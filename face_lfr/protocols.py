"""The four protocols of `evaluate`, each from a recogniser or from features of any other system.

Letters: N images or frames, P pairs, V videos, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common import dist
from common.log import InputError
from face_lfr.all_pairs import AllPairs
from face_lfr.all_pairs import all_pairs as score_all_pairs
from face_lfr.data.bins import load_bin
from face_lfr.data.challenge import Videos, load_deepglint, load_iqiyi
from face_lfr.data.draws import ImageRows
from face_lfr.data.ijb import load_ijb
from face_lfr.data.matrix_file import write_matrix
from face_lfr.engine import Embedding, embed_images
from face_lfr.metrics import OperatingPoint
from face_lfr.template import (
    Mode,
    mean_search,
    search_templates,
    template_vectors,
    verify_templates,
)
from face_lfr.verification import unit_rows, verify
from face_lfr.video import (
    VideoFrames,
    embed_videos,
    load_video_files,
    read_label_file,
    score_videos,
)
from face_lfr.weights import Trained, load_trained, open_trained

if TYPE_CHECKING:
    from face_lfr.evaluate import EvalConfig

IMAGE_FPR, VIDEO_FPR = (1e-8,), (1e-4,)


def all_pairs(cfg: EvalConfig, world: dist.World) -> dict[str, Any]:
    """Every image against every other: the image track of the 2019 challenge."""
    if cfg.features is not None:
        feature_ND = read_features(Path(cfg.features))
        labels_N = read_label_file(_need(cfg.labels, "labels", "features need"), len(feature_ND))
        facts = {"features": cfg.features}
    else:
        trained = _recogniser(cfg, world)
        images = load_deepglint(_need(cfg.images, "images", "a recogniser needs the folder"))
        feature_ND = _embed(cfg, world, trained, images, "features.npy")
        _submit(cfg, world, feature_ND, len(images))
        if images.labels_N is None:
            raise InputError(images.root, "has no labels.txt to score its images by", cfg.images)
        labels_N, facts = images.labels_N, _facts(cfg, trained)
    found = score_all_pairs(
        feature_ND, labels_N, _fprs(cfg, IMAGE_FPR), pairs=cfg.pairs, device=world.device,
        world=world,
    )  # fmt: skip
    return facts | summary(found)


def verification(cfg: EvalConfig, world: dist.World) -> dict[str, Any]:
    """Ten-fold accuracy on pairs of images, for one or several `.bin` sets."""
    if cfg.features is not None:
        path = _need(cfg.annotations, "annotations", "features need the .bin file")
        found = verify(read_features(Path(cfg.features)), load_bin(path).same_P, where=cfg.features)
        return {"features": cfg.features, **found.metrics()}
    trained = _recogniser(cfg, world)
    result: dict[str, Any] = _facts(cfg, trained)
    for path in _bins(cfg, trained):
        pairs = load_bin(path)
        feature_ND = _embed(cfg, world, trained, pairs.images, f"{pairs.name}.npy")
        metrics = verify(feature_ND, pairs.same_P, where=str(path)).metrics()
        result |= {f"{pairs.name}/{name}": value for name, value in metrics.items()}
    return result


def template(cfg: EvalConfig, world: dist.World) -> dict[str, Any]:
    """IJB-B and IJB-C: listed pairs of templates, and search in galleries."""
    data = load_ijb(_need(cfg.annotations, "annotations", "needs the IJB folder"), cfg.ijb)
    if cfg.features is not None:
        feature_ND = read_features(Path(cfg.features))
        facts: dict[str, Any] = {"features": cfg.features}
    else:
        trained = _recogniser(cfg, world)
        size = int(trained.transform.size)
        feature_ND = _embed(cfg, world, trained, data.images(size), "features.npy")
        facts = _facts(cfg, trained)
    mode = Mode(cfg.keep_norm, cfg.detector_score, cfg.flip)
    vectors = template_vectors(feature_ND, data, mode, cfg.concatenated)
    facts |= {"mode": str(mode), **verify_templates(vectors, data).metrics()}
    if data.probes is None:  # the files of the search protocol are not always there
        return facts
    found = search_templates(vectors, data)
    each = {f"{g}/{name}": x for g, part in found.items() for name, x in part.metrics().items()}
    return facts | mean_search(found) | each


def video(cfg: EvalConfig, world: dist.World) -> dict[str, Any]:
    """Every video against every other, from the features and qualities of their frames."""
    if cfg.features is not None:
        frames = load_video_files(
            Path(cfg.features),
            _need(cfg.images, "images", "features need the list of frames"),
            _need(cfg.annotations, "annotations", "features need the list of videos"),
            _need(cfg.labels, "labels", "features need"),
            None if cfg.quality is None else Path(cfg.quality),
        )
        facts: dict[str, Any] = {"features": cfg.features}
    else:
        trained = _recogniser(cfg, world)
        folder = _need(cfg.images, "images", "a recogniser needs the folder of videos")
        frames = embed_track(cfg, world, trained, load_iqiyi(folder))
        facts = _facts(cfg, trained)
    found = score_videos(
        frames, cfg.method, _fprs(cfg, VIDEO_FPR), frame_norm=cfg.frame_norm, pairs=cfg.pairs,
        world=world,
    )  # fmt: skip
    _submit(cfg, world, found.vector_VD, len(frames.videos.videos))
    facts |= {"method": cfg.method, "videos": len(frames.videos.videos)}
    return facts | {"frames": len(frames.feature_ND)} | summary(found.pairs)


def embed_track(
    cfg: EvalConfig, world: dist.World, trained: Trained, videos: Videos
) -> VideoFrames:
    """Features of all frames, and their qualities when `quality` names a network."""
    how = embedding(cfg, world, trained)
    out = Path(cfg.out) / "frames"
    if cfg.quality is None:
        return embed_videos(videos, trained.model, how, None, None, out)
    scorer = open_trained(cfg.quality, world.device)
    if scorer.kind != "quality":
        raise InputError("quality", "must be a quality network, not", scorer.kind)
    return embed_videos(
        videos, trained.model, how, scorer.model, embedding(cfg, world, scorer), out
    )


def summary(found: AllPairs) -> dict[str, Any]:
    """What `metrics.json` holds of an all-pairs result."""
    rates = {f"tpr@{point.fpr:g}": point.tpr for point in found.points}
    return rates | {
        "positives": found.positives,
        "negatives": found.negatives,
        "points": [_plain(point) for point in found.points],
    }


def _plain(point: OperatingPoint) -> dict[str, Any]:
    """A point as JSON takes it, which has no word for the threshold that accepts every pair."""
    known = asdict(point)
    return known | {"threshold": point.threshold if np.isfinite(point.threshold) else None}


def read_features(path: Path) -> np.ndarray:
    """Rows of a `.npy` file (N, D), mapped and not read.

    Raises:
        InputError: no such file, or not a matrix of floats.
    """
    if not path.is_file():
        raise InputError(path, "no such file")
    try:
        found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(path, "is not a whole .npy file of numbers", error) from error
    if found.ndim != 2 or found.dtype.kind != "f":
        raise InputError(path, "must be rows of floats (N, D)", f"{found.dtype} {found.shape}")
    return found


def embedding(cfg: EvalConfig, world: dist.World, trained: Trained) -> Embedding:
    """How the images of a trained network are turned into features."""
    return Embedding(trained.transform, world, cfg.flip, cfg.batch, cfg.workers, cfg.precision)


def _recogniser(cfg: EvalConfig, world: dist.World) -> Trained:
    trained = load_trained(cfg.run_dir, cfg.checkpoint, world.device)
    if trained.kind != "embedding":
        raise InputError(trained.source, "must be a recogniser, not", trained.kind)
    return trained


def _embed(
    cfg: EvalConfig, world: dist.World, trained: Trained, images: Any, name: str
) -> np.ndarray:
    rows: Any = ImageRows(images, trained.transform)
    how = embedding(cfg, world, trained)
    return embed_images(trained.model, rows, how, Path(cfg.out) / name)


def _facts(cfg: EvalConfig, trained: Trained) -> dict[str, Any]:
    """What a report must state beside the figures of a model."""
    return {
        "trained_on": trained.config["train_set"],
        "step": trained.step,
        "seed": trained.config["seed"],
        "source": str(trained.source),
        "colour": trained.config["transform"].get("colour"),
        "flip": cfg.flip,
    }


def _bins(cfg: EvalConfig, trained: Trained) -> Sequence[Path]:
    """The `.bin` files that are named, else those beside the data of the run."""
    if cfg.annotations is not None:
        given = [cfg.annotations] if isinstance(cfg.annotations, str) else list(cfg.annotations)
        return [Path(str(path)) for path in given]
    data = trained.config.get("data")
    root = Path(str(data.get("root"))) if isinstance(data, Mapping) else None
    found = sorted(root.glob("*.bin")) if root else []
    if not found:
        what = "name .bin files: there are none beside the training data"
        raise InputError("annotations", what, root)
    return found


def _fprs(cfg: EvalConfig, usual: Sequence[float]) -> list[float]:
    if cfg.fpr is None:
        return list(usual)
    try:
        return [float(rate) for rate in (cfg.fpr if isinstance(cfg.fpr, Sequence) else [cfg.fpr])]
    except (TypeError, ValueError) as error:
        raise InputError("fpr", "must be numbers", cfg.fpr) from error


def _need(value: Any, key: str, why: str) -> Path:
    if value is None or not isinstance(value, str | Path):
        raise InputError(key, f"{why} this key", value)
    return Path(value)


def _submit(cfg: EvalConfig, world: dist.World, feature_ND: np.ndarray, rows: int) -> None:
    """Unit rows, as the organisers' own script wrote them."""
    if cfg.submission and world.main:
        unit_ND = unit_rows(feature_ND).astype(np.float32)
        write_matrix(Path(cfg.out) / "submission.bin", unit_ND, rows)
