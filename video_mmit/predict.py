"""What a model sees in videos.

    python -m video_mmit.predict checkpoint=FILE input=PATH out=DIR
    python -m video_mmit.predict run_dir=DIR input=FOLDER out=DIR clips=10 crops=3

`input` is a video, a picture, a folder of numbered pictures, or a folder of such things. Writes
`predictions.json` and, for every video, the frames that the model looked at with its best guesses
as `<id>.png` into `out`.

Letters: V views (crops x clips), T frame positions, C channels, H W size, K classes, G offset
groups, J clips of a video.
"""

import json
import sys
import time
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
from torch import Tensor, nn

from common import dist
from common.log import InputError, exit_on_bad_input, get_logger, progress, setup_logging
from common.rundir import write_text
from video_mmit.drawing import FilmRow, OffsetTrack, draw_filmstrip
from video_mmit.engine import FUSIONS, Views, autocast, fuse_views
from video_mmit.inputs import Source, find_videos
from video_mmit.models.tin import TIN, record_offsets
from video_mmit.weights import Trained, load_trained

KEPT = (256, 1280)  # most rows and columns of the frames that are kept for drawing
LISTED = 20  # videos printed


@dataclass
class PredictConfig:
    """Schema of configs/predict.yaml."""

    input: str = MISSING
    out: str = MISSING
    run_dir: str | None = None
    checkpoint: str | None = None  # release file or step_XXXXXXXX folder
    clips: int = 1  # at different times of the video
    crops: int = 1  # of a frame: 1, 3, 5 or 10
    fuse: str = "logit"  # logit | prob: what is averaged over the views
    top_k: int = 5
    backend: str = "decord"  # decord | opencv | pyav
    rate: float | None = None  # frames per second, for the times; what the file states when null
    batch: int = 16  # clips that go through the network at once
    precision: str = "float32"
    device: str = "auto"
    skip_bad: bool = False  # list unreadable videos of a folder instead of stopping
    pictures: int | None = None  # drawn at most; all when null


ConfigStore.instance().store("mmit_predict_schema", PredictConfig)


class Prediction(NamedTuple):
    """What a model says about one video.

    prob_K: probabilities; of each class on its own for multi-label models, else they sum to 1.
    classes: names of the K classes.
    frames: how many frames the video has.
    index_JT: the frames that were looked at, a row for each clip; position-major when a position
        takes several frames.
    offset_VG: for TIN, the learned offsets of each block by its name, a row for each view.
    """

    prob_K: np.ndarray
    classes: tuple[str, ...]
    frames: int
    index_JT: np.ndarray
    offset_VG: dict[str, np.ndarray]

    def top(self, count: int = 5) -> list[tuple[int, float]]:
        """The `count` most probable classes: (label, probability); equal ones in label order."""
        best = np.argsort(-self.prob_K, kind="stable")[:count]
        return [(int(k), float(self.prob_K[k])) for k in best]


class Looked(NamedTuple):
    """A prediction, and the first clip to draw: one (H, W, 3) picture for each position."""

    found: Prediction
    shown: list[np.ndarray]


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
    model: Trained | Path | str,
    video: Path | str,
    clips: int = 1,
    crops: int = 1,
    device: torch.device | str = "cpu",
) -> Prediction:
    """Probabilities of the classes of one video.

    Args:
        model: a path for `open_trained`, or what it returned, to look at several videos.
        video: a video file, a picture, or a folder of numbered pictures.
        clips: temporal views.
        crops: spatial views, 1, 3, 5 or 10.
        device: where the model runs; a loaded one stays where it is.

    Raises:
        InputError: the path cannot be loaded, the video cannot be read, or it is several.
        ValueError: `clips` or `crops` is not accepted.
    """
    trained = model if isinstance(model, Trained) else open_trained(model, device)
    sources = find_videos(Path(video), flow=_flow(trained))
    if len(sources) != 1:
        raise InputError(video, "need one video, found", len(sources))
    place = next(trained.model.parameters()).device
    return look(trained, sources[0], _views(trained, place, crops, clips)).found


def look(trained: Trained, source: Source, how: Views, keep: bool = False) -> Looked:
    """Score one video; with `keep`, its first clip is returned to be drawn.

    One clip at a time is decoded, so that long videos of large frames fit into memory.

    Raises:
        InputError: the video cannot be read.
    """
    views: list[Tensor] = []
    shown: list[np.ndarray] = []
    with source.reader.open(source.video) as clip:
        index_JT = trained.sampler.test(clip.frames, how.clips)
        for row_T in index_JT:
            frames_FHWC = clip.read(row_T)
            views.append(trained.transform.test(frames_FHWC, how.crops))
            if keep and not shown:
                shown = [_small(frame) for frame in frames_FHWC[:: trained.sampler.length]]
        frames = clip.frames
    logit_VK, offsets = _score(trained.model, torch.cat(views), how)
    prob_K = fuse_views(logit_VK[None], how.fuse, trained.multi_label)[0]
    if how.fuse == "logit":
        prob_K = prob_K.sigmoid() if trained.multi_label else prob_K.softmax(dim=0)
    found = Prediction(prob_K.cpu().numpy(), trained.classes, frames, index_JT, offsets)
    return Looked(found, shown)


def _views(trained: Trained, device: torch.device, crops: int, clips: int) -> Views:
    """How to look, checked.

    Raises:
        ValueError: `clips` or `crops` is not accepted.
    """
    if clips < 1:
        raise ValueError(f"clips={clips} must be at least 1")
    trained.transform.check_crops(crops)
    return Views(trained.transform, dist.World(0, 1, device), crops, clips)


def _flow(trained: Trained) -> bool:
    return bool(trained.transform.modality == "flow")


@torch.inference_mode()
def _score(
    model: nn.Module, view_VTCHW: Tensor, how: Views
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Logits (V, K) float32 of all views, and the offsets (V, G) of every TIN block."""
    logits = []
    with record_offsets(model) as record:
        for part_VTCHW in view_VTCHW.split(how.batch):
            x_VTCHW = how.transform.normalize(part_VTCHW.to(how.world.device))
            with autocast(how.world.device, how.precision):
                logits.append(model(x_VTCHW).float())
    offsets = {name: torch.cat(parts).float().cpu().numpy() for name, parts in record.items()}
    return torch.cat(logits), offsets


def _small(frame_HWC: np.ndarray) -> np.ndarray:
    """A copy to draw, of at most the size `KEPT`; flow as colours."""
    import cv2

    rows, columns = frame_HWC.shape[:2]
    factor = min(KEPT[0] / rows, KEPT[1] / columns)
    if factor < 1:
        size = (max(1, round(columns * factor)), max(1, round(rows * factor)))
        frame_HWC = cv2.resize(frame_HWC, size, interpolation=cv2.INTER_AREA)
    return frame_HWC.copy() if frame_HWC.shape[2] == 3 else flow_colours(frame_HWC)


def flow_colours(flow_HW2: np.ndarray) -> np.ndarray:
    """Optical flow (x, y) as uint8 around 128: the hue is the direction, the lightness the speed.

    Returns:
        (H, W, 3) uint8, red first.
    """
    import cv2

    x_HW, y_HW = np.moveaxis(flow_HW2.astype(np.float32) - 128, -1, 0)
    hue_HW = np.degrees(np.arctan2(y_HW, x_HW)) % 360
    speed_HW = np.clip(np.hypot(x_HW, y_HW) / 128, 0, 1)
    hsv_HW3 = np.stack([hue_HW, np.ones_like(hue_HW), speed_HW], axis=-1).astype(np.float32)
    colour_HW3 = 255 * cv2.cvtColor(hsv_HW3, cv2.COLOR_HSV2RGB)
    return np.asarray(colour_HW3.round(), dtype=np.uint8)


def run(cfg: PredictConfig) -> dict[str, Any]:
    """Predict what `cfg` names and write all files; returns what `predictions.json` holds.

    Raises:
        InputError: nothing to load or to look at, or unusable content; the message names it.
    """
    _check(cfg)
    world = dist.init(cfg.device)
    autocast(world.device, cfg.precision)
    trained = load_trained(cfg.run_dir, cfg.checkpoint, world.device)
    try:
        how = _views(trained, world.device, cfg.crops, cfg.clips)
    except ValueError as error:
        raise InputError("crops, clips", "not accepted", error) from error
    how = how._replace(fuse=cfg.fuse, batch=cfg.batch, precision=cfg.precision)
    out = Path(cfg.out)
    sources = find_videos(Path(cfg.input), cfg.backend, _flow(trained), leave_out=out)
    result = describe(trained, how) | {"backend": cfg.backend, "videos": [], "skipped": []}
    with progress() as bar:
        for source in bar.track(sources, description="predict"):
            draw = cfg.pictures is None or len(result["videos"]) < cfg.pictures
            start = time.perf_counter()
            try:
                looked = look(trained, source, how, keep=draw)
            except InputError as error:
                if not cfg.skip_bad:
                    raise
                get_logger(__name__).warning("skipped: %s", error)
                result["skipped"].append({"id": source.video.id, "error": str(error)})
                continue
            seconds = round(time.perf_counter() - start, 4)
            entry = _describe_and_draw(cfg, trained, source, looked)
            result["videos"].append(entry | {"seconds": seconds})
    result["skipped_count"] = len(result["skipped"])
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "predictions.json", json.dumps(result, indent=1) + "\n")
    return result


def _check(cfg: PredictConfig) -> None:
    for name in ("clips", "top_k", "batch"):
        if getattr(cfg, name) < 1:
            raise InputError(name, "must be at least 1", getattr(cfg, name))
    if cfg.fuse not in FUSIONS:
        raise InputError("fuse", f"must be one of {', '.join(FUSIONS)}", cfg.fuse)
    if cfg.rate is not None and not 0 < cfg.rate < float("inf"):
        raise InputError("rate", "must be above 0", cfg.rate)
    if cfg.pictures is not None and cfg.pictures < 0:
        raise InputError("pictures", "must not be negative", cfg.pictures)


def _describe_and_draw(
    cfg: PredictConfig, trained: Trained, source: Source, looked: Looked
) -> dict[str, Any]:
    """What `predictions.json` says about one video; its picture is written."""
    found, rate = looked.found, cfg.rate or source.rate()
    picture = f"{source.video.id}.png" if looked.shown else None
    if picture is not None:
        row = film_row(trained, source.video.id, looked, cfg.top_k, rate)
        draw_filmstrip([row], Path(cfg.out) / picture)
    top = [
        {"class": label, "label": found.classes[label], "probability": probability}
        for label, probability in found.top(cfg.top_k)
    ]
    return {
        "id": source.video.id,
        "path": str(source.video.path),
        "frames": found.frames,
        "rate": rate,
        "index": found.index_JT.tolist(),
        "times": None if rate is None else (found.index_JT / rate).round(4).tolist(),
        "top": top,
        "probabilities": found.prob_K.tolist(),
        "offsets": {name: value.mean(axis=0).tolist() for name, value in found.offset_VG.items()},
        "picture": picture,
    }


def film_row(
    trained: Trained,
    caption: str,
    looked: Looked,
    top_k: int = 5,
    rate: float | None = None,
) -> FilmRow:
    """The row of a picture that shows the first clip of a video and its best guesses."""
    found = looked.found
    first_T = found.index_JT[0][:: trained.sampler.length]
    times = None if rate is None else (first_T / rate).tolist()
    length = "" if rate is None else f", {found.frames / rate:.2f} s"
    clips = len(found.index_JT)
    said = f"{caption}  ({found.frames} frames{length}{f'; clip 1 of {clips}' * (clips > 1)})"
    guesses = [(found.classes[label], probability) for label, probability in found.top(top_k)]
    row = FilmRow(looked.shown, said, guesses, numbers=first_T.tolist(), seconds=times)
    blocks = [module for module in trained.model.modules() if isinstance(module, TIN)]
    if not blocks:
        return row
    tracks = [OffsetTrack(name, value_VG) for name, value_VG in found.offset_VG.items()]
    start, limit = blocks[0].offset_init, blocks[0].offset_scale / 2
    return row._replace(tracks=tracks, start=start, limit=limit)


def describe(trained: Trained, how: Views) -> dict[str, Any]:
    """What `predictions.json` says about the model and the way of looking."""
    return {
        "source": str(trained.source),
        "step": trained.step,
        "trained_on": trained.config["train_set"],
        "multi_label": trained.multi_label,
        "clips": how.clips,
        "crops": how.crops,
        "fuse": how.fuse,
        "precision": how.precision,
        "device": str(how.world.device),
        "classes": list(trained.classes),
    }


def show(result: dict[str, Any]) -> None:
    """Print the best guess for every video."""
    videos = result["videos"]
    table = Table(title=f"{len(videos)} videos" if len(videos) > 1 else None)
    table.add_column("video", overflow="fold")
    table.add_column("frames", justify="right")
    table.add_column("most probable", overflow="fold")
    table.add_column("probability", justify="right")
    for video in videos[:LISTED]:
        best = video["top"][0]
        row = (video["id"], str(video["frames"]), best["label"], f"{best['probability']:.3f}")
        table.add_row(*map(escape, row))
    console = Console()
    console.print(table)
    if len(videos) > LISTED:
        console.print(f"and {len(videos) - LISTED} more")
    if result["skipped"]:
        console.print(f"{len(result['skipped'])} unreadable, skipped")


class _Callable(ModuleType):
    """Importing this module hides the function `video_mmit.predict`, so the module is callable."""

    def __call__(self, *args: Any, **named: Any) -> Prediction:
        return predict(*args, **named)


sys.modules[__name__].__class__ = _Callable


@hydra.main(version_base=None, config_path="configs", config_name="predict")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    show(run(cfg))  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
