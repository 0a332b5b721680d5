"""Scores of the regions of person crops, and the distance of two sets of crops.

    python -m reid_rqen.predict checkpoint=FILE input=PATH out=DIR
    python -m reid_rqen.predict run_dir=DIR input=PATH_A other=PATH_B out=DIR

A path is a picture, a folder of crops of one person, a folder of such folders, or a video whose
frames are crops. Writes `predict.json` and `scores.png` into `out`.

Letters: T frames of a set, B frames of a batch, R regions, C channels, H W size, D embedding.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from common import dist
from common.log import InputError, exit_on_bad_input, get_logger, progress, setup_logging
from common.rundir import write_text
from reid_rqen.crops import CropSet, Sample, find_crops
from reid_rqen.data.transforms import FrameTransform, read_bgr, resize
from reid_rqen.drawing import ScoreRow, draw_scores
from reid_rqen.ops.aggregate import StreamingAggregate, score_weights
from reid_rqen.weights import Trained, load_trained

SHOWN = 12  # frames of a strip
LISTED = 20  # pairs printed


@dataclass
class PredictConfig:
    """Schema of configs/predict.yaml."""

    input: str = MISSING
    other: str | None = None  # a second path, compared with the first set by set
    out: str = MISSING
    run_dir: str | None = None
    checkpoint: str | None = None  # release file or step_XXXXXXXX folder
    batch: int = 64
    device: str = "auto"
    strips: int = 16  # sets drawn at most


ConfigStore.instance().store("rqen_predict_schema", PredictConfig)


class Prediction(NamedTuple):
    """What a model says about one set of frames, on the CPU.

    `score_TR` is the quality of each region in (0, 1), `weight_TR` the share of each frame in its
    region (columns sum to 1), `vector_D` the set vector of unit norm, D = R*C.
    """

    score_TR: np.ndarray
    weight_TR: np.ndarray
    vector_D: np.ndarray


class Scored(NamedTuple):
    """A prediction with the names of its frames and some of them to draw: (position, picture)."""

    crops: CropSet
    names: list[str]
    found: Prediction
    shown: list[tuple[int, np.ndarray]]


def open_trained(path: Path | str, device: torch.device | str = "cpu") -> Trained:
    """Load a release file, a `step_XXXXXXXX` folder, or the newest checkpoint of a run folder.

    Raises:
        InputError: it is none of these.
    """
    path = Path(path)
    if path.is_file() or path.name.startswith("step_"):
        return load_trained(checkpoint=path, device=device)
    if not path.is_dir():
        raise InputError(path, "no such file or folder")
    return load_trained(run_dir=path, device=device)


def predict(
    model: nn.Module | Path | str,
    frames: Tensor | Sequence[Path | str | np.ndarray],
    transform: FrameTransform | None = None,
    batch: int = 64,
) -> Prediction:
    """Scores, weights and set vector of the frames of one person.

    Args:
        model: an RQEN (left in evaluation mode), or a path for `open_trained`.
        frames: pictures, as paths or (H, W, 3) uint8 arrays with red first; or normalised network
            input (T, C, H, W) float, for which no transform is needed.
        transform: prepares pictures; that of the path when None.
        batch: frames that go through the network at once.

    Raises:
        InputError: the path cannot be loaded, a picture cannot be read, the model has no scores.
        ValueError: no frames, or pictures without a transform.
    """
    if not isinstance(model, nn.Module):
        trained = open_trained(model)
        check_scores(trained.model, model)
        model, transform = trained.model, transform or trained.transform
    else:
        check_scores(model, type(model).__name__)
    if len(frames) == 0 or batch < 1:
        raise ValueError(f"{len(frames)} frames, batch={batch}: need at least one of each")
    if isinstance(frames, Tensor):
        return predict_batches(model, frames.split(batch))
    if transform is None:
        raise ValueError("transform=None: pictures need the transform the model was trained with")
    ready = (fit(picture(frame), transform) for frame in frames)
    return predict_batches(model, (transform.normalize(part) for part in stacks(ready, batch)))


def check_scores(model: nn.Module, where: object) -> None:
    """Raise `InputError` for a model that gives no score to a frame."""
    if not hasattr(model, "frames"):
        what = "gives no scores to regions (a sequence model), nothing to predict"
        raise InputError(where, what, type(model).__name__)


def predict_batches(model: Any, batches: Iterable[Tensor]) -> Prediction:
    """The same from normalised batches (B, C, H, W); memory does not grow with their number."""
    model.eval()
    device = next(model.parameters()).device
    total = StreamingAggregate(1, model.regions, model.channels, device=device)
    scores = []
    with torch.inference_mode():
        for image_BCHW in batches:
            out = model.frames(image_BCHW.to(device))
            row_B = torch.zeros(len(image_BCHW), dtype=torch.int64, device=device)
            total.update(row_B, out.region_BRC, out.score_BR)
            scores.append(out.score_BR.float().cpu())
        score_TR = torch.cat(scores)
        weight_TR = score_weights(score_TR[None])[0]
        vector_D = total.vectors()[0].cpu()
    return Prediction(score_TR.numpy(), weight_TR.numpy(), vector_D.numpy())


def picture(frame: Path | str | np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, blue first, of a file or of an array with red first."""
    if not isinstance(frame, np.ndarray):
        return read_bgr(Path(frame))
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"a frame is {frame.dtype} {frame.shape}, need uint8 (H, W, 3)")
    return frame[..., ::-1]


def fit(image_HW3: np.ndarray, transform: FrameTransform) -> Tensor:
    """What `transform.load` makes of a file with this content (blue first): uint8 (3, h, w)."""
    image_HW3 = image_HW3[..., ::-1] if transform.order == "rgb" else image_HW3
    image_3HW = torch.from_numpy(np.ascontiguousarray(image_HW3.transpose(2, 0, 1)))
    return resize(image_3HW, transform.size)


def stacks(images: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Stack `size` images at a time; the last stack may be smaller."""
    images = iter(images)
    while part := list(islice(images, size)):
        yield torch.stack(part)


def run(cfg: PredictConfig) -> dict[str, Any]:
    """Predict what `cfg` names and write both files; returns what `predict.json` holds.

    Raises:
        InputError: nothing to load or to look at, or unusable content; the message names it.
    """
    if cfg.batch < 1 or cfg.strips < 1:
        raise InputError("batch, strips", "must be at least 1", (cfg.batch, cfg.strips))
    world = dist.init(cfg.device)
    trained = load_trained(cfg.run_dir, cfg.checkpoint, world.device)
    check_scores(trained.model, trained.source)
    if trained.config.get("boundaries"):
        get_logger(__name__).warning("trained on region borders of each frame, fixed ones are used")
    left = find_crops(Path(cfg.input))
    right = find_crops(Path(cfg.other)) if cfg.other is not None else []
    drawn = max(1, cfg.strips // 2) if right else cfg.strips
    if max(len(left), len(right)) > drawn:
        get_logger(__name__).info("scores.png shows the first %d sets of a path", drawn)
    ours, theirs = look_at_all(trained, [left, right], cfg.batch, drawn)
    result = describe(trained, ours, theirs)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "predict.json", json.dumps(result, indent=1) + "\n")
    rows = [strip(trained.model, scored) for scored in ours[:drawn] + theirs[:drawn]]
    draw_scores(rows, out / "scores.png", headline(result["pairs"]))
    return result


def look_at_all(
    trained: Trained, sides: Sequence[list[CropSet]], batch: int, drawn: int
) -> list[list[Scored]]:
    """Predictions for every set of every side, with pictures for the first `drawn` of each."""
    counts = [len(crops.pictures) for side in sides for crops in side]
    with progress() as bar:
        task = bar.add_task("predict", total=sum(counts) if all(counts) else None)

        def look(crops: CropSet, keep: int) -> Scored:
            names, sample = [], Sample(keep)

            def ready() -> Iterator[Tensor]:
                for position, crop in enumerate(crops.read()):
                    names.append(crop.name)
                    sample.offer(position, crop.image)
                    yield fit(crop.image, trained.transform)
                    bar.advance(task)

            parts = (trained.transform.normalize(part) for part in stacks(ready(), batch))
            return Scored(crops, names, predict_batches(trained.model, parts), sample.chosen())

        return [
            [look(crops, SHOWN if i < drawn else 0) for i, crops in enumerate(side)]
            for side in sides
        ]


def describe(trained: Trained, ours: list[Scored], theirs: list[Scored]) -> dict[str, Any]:
    """Content of `predict.json`."""
    model: Any = trained.model
    edges = (0.0, *model.pool.edges, 1.0)
    return {
        "source": str(trained.source),
        "step": trained.step,
        "trained_on": trained.config.get("train_set"),
        "regions": [{"top": edges[r], "bottom": edges[r + 1]} for r in model.use_regions],
        "input": [_set(scored) for scored in ours],
        "other": [_set(scored) for scored in theirs],
        "pairs": [_pair(a, b) for a in ours for b in theirs],
    }


def _set(scored: Scored) -> dict[str, Any]:
    rows = zip(scored.names, scored.found.score_TR, scored.found.weight_TR, strict=True)
    frames = [{"path": n, "score": s.tolist(), "weight": w.tolist()} for n, s, w in rows]
    return {"path": str(scored.crops.path), "frames": frames}


def _pair(a: Scored, b: Scored) -> dict[str, Any]:
    left_D, right_D = (x.found.vector_D.astype(np.float64) for x in (a, b))
    return {
        "input": str(a.crops.path),
        "other": str(b.crops.path),
        "cosine": float(left_D @ right_D),
        "squared_distance": float(((left_D - right_D) ** 2).sum()),
        "frames": [len(a.names), len(b.names)],
    }


def strip(model: Any, scored: Scored) -> ScoreRow:
    """The strip of a set; regions that are not in the set vector have no score."""
    rows = [position for position, _ in scored.shown]
    score_TR = np.full((len(rows), model.pool.count), np.nan)
    score_TR[:, model.use_regions] = scored.found.score_TR[rows]
    edges, label = (
        (0.0, *model.pool.edges, 1.0),
        f"{scored.crops.path}  ({len(scored.names)} frames)",
    )
    return ScoreRow([image for _, image in scored.shown], score_TR, edges, label)


def headline(pairs: list[dict[str, Any]]) -> str:
    """Title of the picture: the distance, of the nearest pair when there are several."""
    if not pairs:
        return "Quality of the regions"
    near = min(pairs, key=lambda pair: pair["squared_distance"])
    text = f"squared distance {near['squared_distance']:.3f}, cosine {near['cosine']:.3f}"
    if len(pairs) == 1:
        return text
    names = [Path(near[side]).name for side in ("input", "other")]
    return f"nearest of {len(pairs)} pairs: {names[0]} and {names[1]}, {text}"


def show(result: dict[str, Any]) -> None:
    """Print the mean score of each region and the distances."""
    table = Table(title="mean score of each region, top to bottom")
    table.add_column("set", overflow="fold")
    for name in ("frames", *(f"region {r + 1}" for r in range(len(result["regions"])))):
        table.add_column(name, justify="right")
    for found in result["input"] + result["other"]:
        mean_R = np.mean([frame["score"] for frame in found["frames"]], axis=0)
        table.add_row(found["path"], str(len(found["frames"])), *(f"{x:.3f}" for x in mean_R))
    console = Console()
    console.print(table)
    pairs = sorted(result["pairs"], key=lambda pair: pair["squared_distance"])
    if pairs:
        title = f"{min(len(pairs), LISTED)} nearest of {len(pairs)} pairs"
        table = Table("cosine", "squared distance", title=title)
        for name in ("input", "other"):
            table.add_column(name, overflow="fold")
        for pair in pairs[:LISTED]:
            numbers = (f"{pair['cosine']:.4f}", f"{pair['squared_distance']:.4f}")
            table.add_row(*numbers, pair["input"], pair["other"])
        console.print(table)


class _Callable(ModuleType):
    """Importing this module hides the function `reid_rqen.predict`, so the module is callable."""

    def __call__(self, *args: Any, **named: Any) -> Prediction:
        return predict(*args, **named)


sys.modules[__name__].__class__ = _Callable


@hydra.main(version_base=None, config_path="configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    show(run(cfg))  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
