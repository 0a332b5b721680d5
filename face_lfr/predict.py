"""Whether two faces are one person, who is who in a folder, and the feature of one picture.

    python -m face_lfr.predict checkpoint=FILE input=A.png other=B.png out=DIR threshold=0.3
    python -m face_lfr.predict run_dir=DIR input=FOLDER out=DIR calibration=EVALUATION fpr=1e-4
    python -m face_lfr.predict checkpoint=FILE input=PHOTO.jpg landmarks=POINTS.txt out=DIR

Square pictures are taken for aligned faces; others need `landmarks`, see `face_lfr.pictures`. Two
faces are one person when their cosine is above the threshold. It is given as `threshold`, or comes
from the `metrics.json` of an evaluation of this model (`calibration`): with protocol=all_pairs the
threshold at `fpr`, with protocol=verification that of best accuracy. Without a threshold nothing is
decided. Writes `predict.json` and `predict.png` into `out`, and the similarities of a large folder
into `similarities.npy`.

Letters: N pictures, B pictures of a batch, D embedding width.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common import dist
from common.log import InputError, exit_on_bad_input, progress, setup_logging
from common.rundir import write_text
from face_lfr.calibration import Threshold, choose_threshold
from face_lfr.clusters import LINKAGES, similarity_to_mean
from face_lfr.engine import Embedding, autocast, check_fits, features
from face_lfr.pair_drawing import draw_prediction
from face_lfr.pictures import VIDEOS, Faces, Picture, find_pictures, split_video, with_landmarks
from face_lfr.weights import Trained, load_trained, open_trained

IN_JSON = 100  # pictures whose similarities predict.json holds
LISTED = 20  # rows printed
SIMILARITIES, DRAWN = "similarities.npy", "predict.png"


@dataclass
class PredictConfig:
    """Schema of configs/predict.yaml."""

    input: str = MISSING  # picture, folder of pictures, or video of aligned faces
    out: str = MISSING
    other: str | None = None  # a second picture, compared with the first
    run_dir: str | None = None
    checkpoint: str | None = None  # release file or step_XXXXXXXX folder
    landmarks: str | None = None  # text or .json
    quality: str | None = None  # run or release of a quality network
    threshold: float | None = None  # cosine above which two faces are one person
    calibration: str | None = None  # folder of an evaluation of this model
    calibration_set: str | None = None  # which .bin, when a verification scored several
    fpr: float | None = None  # operating point of an all_pairs evaluation
    linkage: str = "average"  # average | connected
    flip: bool = True  # mean of the features of image and mirror image
    batch: int = 64
    precision: str = "float32"
    device: str = "auto"
    rows: int = 12  # groups drawn at most
    columns: int = 10  # pictures of a group drawn at most
    limit: int = 5000  # pictures of a folder at most: memory grows with their square


ConfigStore.instance().store("lfr_predict_schema", PredictConfig)


class Prediction(NamedTuple):
    """Features of N pictures and how alike they are.

    names: paths.
    vector_ND: float64 unit rows.
    similarity_NN: their cosines, symmetric, 1 on the diagonal.
    """

    names: tuple[str, ...]
    vector_ND: np.ndarray
    similarity_NN: np.ndarray


class Looked(NamedTuple):
    """What there is to say about some pictures; `quality_N` without a quality network is None.

    `norm_N` is the length of the features before they became unit rows.
    """

    faces: Faces
    found: Prediction
    norm_N: np.ndarray
    quality_N: np.ndarray | None = None


def predict(
    model: Trained | Path | str,
    images: Sequence[Path | str],
    device: torch.device | str = "cpu",
) -> Prediction:
    """Unit embeddings of aligned faces and their cosine similarities.

    Args:
        model: a path for `weights.open_trained`, or what it returned, to look more than once.
        images: square pictures of aligned faces.
        device: where the model runs; a loaded one stays where it is.

    Raises:
        InputError: the path cannot be loaded or is no recogniser; a picture cannot be read, is not
            square, or has a feature that is 0 or no number.
        ValueError: no pictures, or one path in the place of a sequence.
    """
    if isinstance(images, str | Path) or not len(images):
        raise ValueError(f"images={images!r}: need a sequence of at least one path")
    trained = model if isinstance(model, Trained) else open_trained(model, device)
    require_kind(trained, "embedding", "model")
    check_fits(trained.model, trained.transform)
    place = next(trained.model.parameters()).device
    how = Embedding(trained.transform, dist.World(0, 1, place))
    return look(trained, [Picture(Path(path)) for path in images], how).found


def look(trained: Trained, pictures: Sequence[Picture], how: Embedding) -> Looked:
    """Embed pictures and compare each with each.

    Raises:
        InputError: a picture cannot be used, or its feature is 0 or no number.
    """
    faces = Faces(pictures, trained.transform)
    feature_ND = outputs(trained, faces, how, "feature")
    norm_N = np.linalg.norm(feature_ND, axis=1)
    if not norm_N.all():
        path = pictures[int(norm_N.argmin())].path
        raise InputError(path, "feature is 0, it has no direction to compare", 0)
    vector_ND = feature_ND / norm_N[:, None]
    similarity_NN = np.clip(vector_ND @ vector_ND.T, -1, 1)
    similarity_NN = (similarity_NN + similarity_NN.T) / 2  # BLAS need not be symmetric
    np.fill_diagonal(similarity_NN, 1.0)
    names = tuple(str(picture.path) for picture in pictures)
    return Looked(faces, Prediction(names, vector_ND, similarity_NN), norm_N)


def rate(scorer: Trained, pictures: Sequence[Picture], how: Embedding) -> np.ndarray:
    """Score (N,) of each picture by a quality network, without mirror images.

    Raises:
        InputError: a picture cannot be used, or its score is no number.
    """
    how = how._replace(transform=scorer.transform, flip=False)
    return outputs(scorer, Faces(pictures, scorer.transform), how, "quality")[:, 0]


def outputs(trained: Trained, faces: Faces, how: Embedding, what: str) -> np.ndarray:
    """What a network says about each face, float64 (N, D) or (N, 1).

    Raises:
        InputError: a picture cannot be used, or `what` is no number for it; names the picture.
    """
    parts = []
    with torch.inference_mode(), progress() as bar:
        task = bar.add_task(what, total=len(faces))
        for start in range(0, len(faces), how.batch):
            batch = [faces.ready(k) for k in range(start, min(start + how.batch, len(faces)))]
            part_BD = features(trained.model, torch.stack(batch), how).double().cpu().numpy()
            bad = np.flatnonzero(~np.isfinite(part_BD).all(axis=1))
            if bad.size:
                path = faces.pictures[start + int(bad[0])].path
                raise InputError(path, f"{what} is no number", part_BD[bad[0]].tolist()[:4])
            parts.append(part_BD)
            bar.advance(task, len(batch))
    return np.concatenate(parts)


def mirror_cosine(trained: Trained, faces: Faces, how: Embedding) -> float:
    """Cosine between the features of the first face and of its mirror image."""
    x_BCHW = how.transform.normalize(faces.ready(0)[None].to(how.world.device))
    model: Any = trained.model
    with torch.inference_mode(), autocast(how.world.device, how.precision):
        pair_2D = model.embed(torch.cat([x_BCHW, x_BCHW.flip(-1)])).double()
    return float(torch.nn.functional.cosine_similarity(pair_2D[0], pair_2D[1], dim=0))


def require_kind(trained: Trained, kind: str, key: str) -> None:
    """Raise `InputError` for a quality network in the place of a recogniser, or the reverse."""
    if trained.kind != kind:
        wanted = "recogniser" if kind == "embedding" else "quality network"
        raise InputError(key, f"{trained.source} is no {wanted}, its kind is", trained.kind)


def run(cfg: PredictConfig) -> dict[str, Any]:
    """Predict what `cfg` names and write all files; returns what `predict.json` holds.

    Raises:
        InputError: nothing to load or to look at, or unusable content; the message names it.
    """
    _check(cfg)
    world = dist.init(cfg.device)
    trained = load_trained(cfg.run_dir, cfg.checkpoint, world.device)
    require_kind(trained, "embedding", "run_dir" if cfg.run_dir else "checkpoint")
    check_fits(trained.model, trained.transform)
    threshold = choose_threshold(cfg, trained)
    pictures = gather(cfg)
    how = Embedding(trained.transform, world, cfg.flip, cfg.batch, 0, cfg.precision)
    autocast(world.device, cfg.precision)
    looked = look(trained, pictures, how)
    if cfg.quality is not None:
        scorer = open_trained(cfg.quality, world.device)
        require_kind(scorer, "quality", "quality")
        check_fits(scorer.model, scorer.transform)
        looked = looked._replace(quality_N=rate(scorer, pictures, how))
    result = describe(cfg, trained, looked, threshold)
    if result["mode"] == "single":
        result["embedding"]["mirror_cosine"] = mirror_cosine(trained, looked.faces, how)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    if result["similarities_file"] is not None:
        np.save(out / SIMILARITIES, looked.found.similarity_NN)
    most = cfg.rows, cfg.columns
    draw_prediction(looked.faces, looked.found.vector_ND, result, out / DRAWN, *most)
    write_text(out / "predict.json", json.dumps(result, indent=1) + "\n")
    return result


def _check(cfg: PredictConfig) -> None:
    for name in ("batch", "rows", "columns", "limit"):
        if getattr(cfg, name) < 1:
            raise InputError(name, "must be at least 1", getattr(cfg, name))
    if cfg.linkage not in LINKAGES:
        raise InputError("linkage", f"must be one of {', '.join(LINKAGES)}", cfg.linkage)


def gather(cfg: PredictConfig) -> list[Picture]:
    """The pictures that `cfg` names, with their landmarks.

    Raises:
        InputError: nothing there, a folder that is to be compared, or more pictures than `limit`.
    """
    source, out = Path(cfg.input), Path(cfg.out)
    if source.is_file() and source.suffix.lower() in VIDEOS:
        paths = split_video(source, out / "frames", cfg.limit)
    else:
        paths = find_pictures(source, leave_out=out)
    if source.is_dir() and out.resolve() == source.resolve():
        raise InputError("out", "must not be the folder of the pictures", out)
    if cfg.other is not None:
        for key, path in (("input", source), ("other", Path(cfg.other))):
            if path.is_dir():
                what = "two pictures are compared, a folder is grouped without `other`"
                raise InputError(key, what, path)
        paths += find_pictures(Path(cfg.other))
    if len(paths) > cfg.limit:
        raise InputError(source, f"has more pictures than limit={cfg.limit}", len(paths))
    return with_landmarks(paths, None if cfg.landmarks is None else Path(cfg.landmarks))


def describe(
    cfg: PredictConfig, trained: Trained, looked: Looked, threshold: Threshold
) -> dict[str, Any]:
    """Content of `predict.json`."""
    found, single = looked.found, cfg.other is None and not Path(cfg.input).is_dir()
    mode = "pair" if cfg.other is not None else "single" if single else "folder"
    label_N = None
    if mode == "folder" and threshold.value is not None:
        label_N = LINKAGES[cfg.linkage](found.similarity_NN, threshold.value)
    in_json = len(found.names) <= IN_JSON
    result = {
        "mode": mode,
        "source": str(trained.source),
        "step": trained.step,
        "trained_on": trained.config["train_set"],
        "colour": trained.transform.colour,
        "flip": cfg.flip,
        "threshold": threshold.value,
        "threshold_source": threshold.source,
        "fpr": threshold.fpr,
        "verdict": None,
        "pictures": _pictures(looked, label_N),
        "similarities": found.similarity_NN.tolist() if in_json else None,
        "similarities_file": None if in_json else SIMILARITIES,
        "picture": DRAWN,
    }
    if mode == "pair":
        similarity = float(found.similarity_NN[0, 1])
        return result | {"similarity": similarity, "verdict": threshold.verdict(similarity)}
    if mode == "single":
        return result | {"embedding": _statistics(looked)}
    clusters = None if label_N is None else _clusters(found.names, label_N)
    said = "no threshold: not grouped" if clusters is None else _count(clusters)
    return result | {"linkage": cfg.linkage, "clusters": clusters, "verdict": said}


def _pictures(looked: Looked, label_N: np.ndarray | None) -> list[dict[str, Any]]:
    found, quality_N = looked.found, looked.quality_N
    cosine_N = None if label_N is None else similarity_to_mean(found.vector_ND, label_N)
    other_NN = found.similarity_NN.copy()
    np.fill_diagonal(other_NN, -np.inf)
    near_N = other_NN.argmax(axis=1)
    rows: list[dict[str, Any]] = []
    for row, picture in enumerate(looked.faces.pictures):
        near = int(near_N[row])
        rows.append({
            "path": str(picture.path),
            "aligned_by": None if picture.point_52 is None else picture.point_52.tolist(),
            "norm": float(looked.norm_N[row]),
            "quality": None if quality_N is None else float(quality_N[row]),
            "cluster": None if label_N is None else int(label_N[row]),
            "similarity_to_mean": None if cosine_N is None else float(cosine_N[row]),
            "nearest": None if near == row else found.names[near],
            "nearest_similarity": None if near == row else float(other_NN[row, near]),
        })  # fmt: skip
    return rows


def _statistics(looked: Looked) -> dict[str, Any]:
    vector_D = looked.found.vector_ND[0]
    return {
        "width": len(vector_D),
        "norm": float(looked.norm_N[0]),
        "mean": float(vector_D.mean()),
        "std": float(vector_D.std()),
        "min": float(vector_D.min()),
        "max": float(vector_D.max()),
        "vector": vector_D.tolist(),
    }


def _clusters(names: Sequence[str], label_N: np.ndarray) -> list[list[str]]:
    return [
        [names[int(row)] for row in np.flatnonzero(label_N == label)]
        for label in range(int(label_N.max()) + 1)
    ]


def _count(clusters: Sequence[Sequence[str]]) -> str:
    def several(count: int, what: str) -> str:
        return f"{count} {what}{'s' * (count != 1)}"

    pictures, alone = sum(map(len, clusters)), sum(len(names) == 1 for names in clusters)
    said = f"{several(len(clusters), 'person')} in {several(pictures, 'picture')}"
    return said + (f", {alone} in a single one" if alone else "")


def show(result: dict[str, Any]) -> None:
    """Print what was found; of a folder the largest groups, or the most similar pictures."""
    console = Console()
    if result["mode"] == "pair":
        console.print(f"cosine similarity {result['similarity']:.4f}: {result['verdict']}")
    elif result["mode"] == "single":
        table = Table("embedding", "value")
        for name, value in result["embedding"].items():
            if name != "vector":
                table.add_row(name, f"{value:.5g}")
        console.print(table)
    elif result["clusters"] is not None:
        console.print(_group_table(result))
    else:
        console.print(result["verdict"])
    console.print(escape(f"threshold: {result['threshold_source']}"), soft_wrap=True)


def _group_table(result: dict[str, Any]) -> Table:
    table = Table(title=result["verdict"])
    table.add_column("person", justify="right")
    table.add_column("pictures", justify="right")
    table.add_column("first picture", overflow="fold")
    groups = sorted(enumerate(result["clusters"]), key=lambda group: -len(group[1]))
    for label, names in groups[:LISTED]:
        table.add_row(str(label), str(len(names)), escape(names[0]))
    if len(groups) > LISTED:
        table.caption = f"and {len(groups) - LISTED} more"
    return table


class _Callable(ModuleType):
    """Importing this module hides the function `face_lfr.predict`, so the module is callable."""

    def __call__(self, *args: Any, **named: Any) -> Prediction:
        return predict(*args, **named)


sys.modules[__name__].__class__ = _Callable


@hydra.main(version_base=None, config_path="configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    show(run(cfg))  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
