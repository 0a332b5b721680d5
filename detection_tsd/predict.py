"""What a detector finds in pictures and videos.

    python -m detection_tsd.predict checkpoint=FILE input=PATH out=DIR
    python -m detection_tsd.predict run_dir=DIR input=FOLDER out=DIR score_threshold=0.5

`input` is a picture, a video, or a folder of such things. For each of them `<name>.json` holds the
boxes (xyxy in pixels of the picture, width = x2 - x1), scores, classes and, of Mask R-CNN, masks as
COCO's run-length codes; `<name>.png`, or `<name>.mp4`, shows them. `predictions.json` lists all.

A detector without an RPN, such as those of experiment=synth/*, needs proposals: `proposals=FILE`,
or a file that lies with the pictures (`proposals.npz` in their folder, or `proposals_<folder>.npz`
beside it), or else a dense grid of boxes, see `detection_tsd.proposals.Grid`. In a grid there are
more boxes beside objects than such a detector was trained with: expect more false detections.

Letters: H W rows and columns, M proposals, B pictures of a batch, D detections.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from common import dist
from common.log import InputError, exit_on_bad_input, get_logger, progress, setup_logging
from common.rundir import write_text
from detection_tsd.data.transforms import read_rgb
from detection_tsd.drawing import draw_detections
from detection_tsd.engine import Found, autocast
from detection_tsd.inputs import Film, FilmWriter, Source, find_sources
from detection_tsd.looking import Looking, above, listed, look
from detection_tsd.proposals import Grid, find_file, from_file, usual_sides
from detection_tsd.weights import Trained, load_trained, open_trained

LISTED = 20  # inputs printed


@dataclass
class GridConfig:
    """The dense grid of proposals; see `detection_tsd.proposals.Grid`."""

    # Pixels of the network's input; null: what the detector's pyramid levels are for.
    sides: list[float] | None = None
    ratios: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])  # height over width
    step: float = 0.25  # from a box to the next, in widths and heights of the box
    limit: int = 5000  # boxes of a picture


@dataclass
class PredictConfig:
    """Schema of configs/predict.yaml."""

    input: str = MISSING
    out: str = MISSING
    run_dir: str | None = None
    checkpoint: str | None = None  # release file or step_XXXXXXXX folder
    score_threshold: float = 0.3  # detections that score more are written and drawn
    post: dict[str, Any] = field(default_factory=dict)  # replaces arguments of PostProcess
    proposals: str | None = None  # npz file; detectors without an RPN only
    grid: GridConfig = field(default_factory=GridConfig)
    every: int = 1  # of a video, the first frame of so many is looked at
    batch: int = 1  # frames of a video that go through the network at once
    precision: str = "float32"
    device: str = "auto"
    skip_bad: bool = False  # list unreadable files of a folder instead of stopping
    pictures: int | None = None  # pictures and films drawn at most; all when null


ConfigStore.instance().store("tsd_predict_schema", PredictConfig)


def detect_pictures(
    model: Trained | Path | str,
    images: Sequence[Path | str],
    device: torch.device | str = "cpu",
    proposals: Sequence[np.ndarray] | None = None,
) -> list[Found]:
    """Detections of pictures, in their pixels, best first.

    As many as the detector's own post-processing leaves: with its score threshold of 0 usually 100
    for every picture.

    Args:
        model: a path for `weights.open_trained`, or what it returned, to look more than once.
        images: pictures of any size and type.
        device: where the detector runs; a loaded one stays where it is.
        proposals: float32 (M, 4) of each picture, in its pixels, for a detector without an RPN;
            None is a dense grid.

    Raises:
        InputError: the path cannot be loaded, a picture cannot be read.
        ValueError: one path in the place of a sequence; another number of proposals than images, or
            proposals for a detector that proposes itself.
    """
    if isinstance(images, str | Path):
        raise ValueError(f"images={images!r}: need a sequence of paths")
    trained = model if isinstance(model, Trained) else open_trained(model, device)
    how = Looking(trained, next(trained.model.parameters()).device, _grid(trained, GridConfig()))
    if proposals is not None and (how.grid is None or len(proposals) != len(images)):
        what = "only for a detector without an RPN, one for each of the images"
        raise ValueError(f"{len(proposals)} proposals for {len(images)} images: {what}")
    given = [None] * len(images) if proposals is None else proposals
    return [
        look(how, [read_rgb(path)], [box_M4], row)[0]
        for row, (path, box_M4) in enumerate(zip(images, given, strict=True))
    ]


def _grid(trained: Trained, cfg: GridConfig) -> Grid | None:
    """The grid for a detector that needs one."""
    model: Any = trained.model
    if model.rpn is not None:
        return None
    sides = usual_sides(model) if cfg.sides is None else tuple(cfg.sides)
    return Grid(sides, tuple(cfg.ratios), cfg.step, cfg.limit)


def run(cfg: PredictConfig) -> dict[str, Any]:
    """Predict what `cfg` names and write all files; returns what `predictions.json` holds.

    Raises:
        InputError: nothing to load or to look at, or unusable content; the message names it.
    """
    _check(cfg)
    world = dist.init(cfg.device)
    autocast(world.device, cfg.precision)
    post = {**cfg.post, "score_threshold": cfg.score_threshold}
    trained = load_trained(cfg.run_dir, cfg.checkpoint, world.device, **post)
    _check_installed("pycocotools" if getattr(trained.model, "mask", None) else "cv2")
    try:
        how = Looking(trained, world.device, _grid(trained, cfg.grid), cfg.precision)
    except (ValueError, TypeError) as error:
        raise InputError("grid", "is not accepted", error) from error
    sources = find_sources(Path(cfg.input), leave_out=Path(cfg.out))
    file, given = _proposals(cfg, how, sources)
    result = _describe(cfg, how, file) | {"inputs": [], "skipped": []}
    with progress() as bar:
        task = bar.add_task("predict", total=len(sources))
        for source, box_M4 in zip(sources, given, strict=True):
            drawn = cfg.pictures is None or len(result["inputs"]) < cfg.pictures
            try:
                result["inputs"].append(_look_and_write(cfg, how, source, box_M4, drawn, bar))
            except InputError as error:
                if not cfg.skip_bad:
                    raise
                get_logger(__name__).warning("skipped: %s", error)
                result["skipped"].append({"id": source.id, "error": str(error)})
            bar.advance(task)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    write_text(Path(cfg.out) / "predictions.json", json.dumps(result, indent=1) + "\n")
    return result


def _check(cfg: PredictConfig) -> None:
    _check_installed("cv2")
    for name in ("every", "batch"):
        if getattr(cfg, name) < 1:
            raise InputError(name, "must be at least 1", getattr(cfg, name))
    if not 0 <= cfg.score_threshold < 1:
        raise InputError("score_threshold", "must be in [0, 1)", cfg.score_threshold)
    if cfg.pictures is not None and cfg.pictures < 0:
        raise InputError("pictures", "must not be negative", cfg.pictures)
    if Path(cfg.input).is_dir() and Path(cfg.input).resolve() == Path(cfg.out).resolve():
        raise InputError("out", "must not be the folder of the pictures", cfg.out)


def _check_installed(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise InputError(name, "not installed: pip install 'vision-tasks[tsd]'")


def _proposals(
    cfg: PredictConfig, how: Looking, sources: Sequence[Source]
) -> tuple[Path | None, Sequence[np.ndarray | None]]:
    """The proposal file that is used, and the proposals of each source."""
    none = [None] * len(sources)
    if how.grid is None:
        if cfg.proposals is not None:
            raise InputError("proposals", "this detector proposes itself", cfg.proposals)
        return None, none
    if cfg.proposals is not None:
        return Path(cfg.proposals), from_file(Path(cfg.proposals), sources)
    found = find_file(Path(cfg.input))
    if found is None or any(source.is_video for source in sources):
        return None, none
    return found, from_file(found, sources)


def _look_and_write(
    cfg: PredictConfig,
    how: Looking,
    source: Source,
    box_M4: np.ndarray | None,
    drawn: bool,
    bar: Progress,
) -> dict[str, Any]:
    """Look at one file and write its JSON and picture; returns its entry of `predictions.json`."""
    start, out = time.perf_counter(), Path(cfg.out)
    picture = f"{source.id}.{'mp4' if source.is_video else 'png'}" if drawn else None
    path = None if picture is None else out / picture
    if source.is_video:
        content = _look_at_video(cfg, how, source, path, bar)
        count = sum(len(frame["detections"]) for frame in content["frames"])
    else:
        content = _look_at_picture(cfg, how, source, box_M4, path)
        count = len(content["detections"])
    text = json.dumps({"id": source.id, "path": str(source.path), **content}, indent=1)
    (out / source.id).parent.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{source.id}.json", text + "\n")
    return {
        "id": source.id,
        "path": str(source.path),
        "kind": "video" if source.is_video else "picture",
        "height": content["height"],
        "width": content["width"],
        "detections": count,
        "json": f"{source.id}.json",
        "picture": picture,
        "seconds": round(time.perf_counter() - start, 4),
    }


def _look_at_picture(
    cfg: PredictConfig,
    how: Looking,
    source: Source,
    box_M4: np.ndarray | None,
    path: Path | None,
) -> dict[str, Any]:
    image_HW3 = read_rgb(source.path)
    found = above(look(how, [image_HW3], [box_M4])[0], cfg.score_threshold)
    if path is not None:
        _save_picture(_drawn(how, image_HW3, found), path)
    height, width = found.size
    return {"height": height, "width": width, "detections": listed(found, how.trained)}


def _look_at_video(
    cfg: PredictConfig, how: Looking, source: Source, path: Path | None, bar: Progress
) -> dict[str, Any]:
    frames: list[dict[str, Any]] = []
    with Film(source.path) as film:
        rate = None if film.rate is None else film.rate / cfg.every
        total = None if film.stated is None else -(-film.stated // cfg.every)
        task = bar.add_task(source.id, total=total)
        with nullcontext() if path is None else FilmWriter(path, rate) as writer:
            for first, images in _batches(islice(film, 0, None, cfg.every), cfg.batch):
                found_B = look(how, images, [None] * len(images), first)
                for image_HW3, one in zip(images, found_B, strict=True):
                    found = above(one, cfg.score_threshold)
                    number = found.row * cfg.every
                    time_s = None if film.rate is None else round(number / film.rate, 4)
                    entry = {"frame": number, "time": time_s}
                    frames.append(entry | {"detections": listed(found, how.trained)})
                    if writer is not None:
                        writer.write(_drawn(how, image_HW3, found))
                bar.advance(task, len(images))
    height, width = found.size
    bar.remove_task(task)
    return {"height": height, "width": width, "rate": film.rate, "frames": frames}


def _batches(frames: Iterator[np.ndarray], size: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Number of the first frame, and the frames, of every batch."""
    first = 0
    while images := list(islice(frames, size)):
        yield first, images
        first += len(images)


def _drawn(how: Looking, image_HW3: np.ndarray, found: Found) -> np.ndarray:
    return draw_detections(image_HW3, found, how.trained.classes, least_score=0.0)


def _save_picture(image_HW3: np.ndarray, path: Path) -> None:
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), np.ascontiguousarray(image_HW3[..., ::-1])):
        raise InputError(path, "cannot be written")


def _describe(cfg: PredictConfig, how: Looking, file: Path | None) -> dict[str, Any]:
    """What `predictions.json` says about the detector and the way of looking."""
    trained, grid = how.trained, how.grid
    proposals: Any = "of the detector"
    if grid is not None:
        proposals = json.loads(json.dumps(asdict(grid))) if file is None else str(file)
    return {
        "source": str(trained.source),
        "step": trained.step,
        "trained_on": trained.config["train_set"],
        "classes": list(trained.classes),
        "class_ids": list(trained.class_ids),
        "score_threshold": cfg.score_threshold,
        "proposals": proposals,
        "precision": how.precision,
        "device": str(how.device),
    }


def show(result: dict[str, Any]) -> None:
    """Print how many objects were found in every file."""
    inputs, console = result["inputs"], Console()
    table = Table(title=f"{len(inputs)} files" if len(inputs) > 1 else None)
    table.add_column("file", overflow="fold")
    for name in ("size", "detections", "seconds"):
        table.add_column(name, justify="right")
    for entry in inputs[:LISTED]:
        size = f"{entry['width']} x {entry['height']}"
        row = (entry["id"], size, str(entry["detections"]), f"{entry['seconds']:.2f}")
        table.add_row(*map(escape, row))
    console.print(table)
    if len(inputs) > LISTED:
        console.print(f"and {len(inputs) - LISTED} more")
    if result["skipped"]:
        console.print(f"{len(result['skipped'])} unreadable, skipped")


class _Callable(ModuleType):
    """Importing this module hides the function `detection_tsd.predict`: the module is callable."""

    def __call__(self, *args: Any, **named: Any) -> list[Found]:
        return detect_pictures(*args, **named)


sys.modules[__name__].__class__ = _Callable


@hydra.main(version_base=None, config_path="configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    show(run(cfg))  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
