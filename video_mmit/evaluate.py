"""Evaluate a run, a release file, a score file or an ensemble of score files.

    python -m video_mmit.evaluate run_dir=DIR                          the run's own test set
    python -m video_mmit.evaluate run_dir=DIR eval.spatial_crops=3 eval.temporal_clips=10
    python -m video_mmit.evaluate checkpoint=FILE data=mmit data.root=DIR
    python -m video_mmit.evaluate predictions=scores.npz annotations=list.txt
    python -m video_mmit.evaluate annotations=list.txt ensemble.members=[a.npz,b.npz]

Prints a table, writes `metrics.json` and the scores (`scores.npz`) into `out`.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from common import dist, rundir
from common.log import InputError, exit_on_bad_input, get_logger, setup_logging
from video_mmit.data.lists import read_list
from video_mmit.data.video_data import VideoData
from video_mmit.engine import Views, score_videos
from video_mmit.ensemble import Ensemble, combine
from video_mmit.metrics import evaluate_scores
from video_mmit.score_file import ScoreFile
from video_mmit.weights import Trained, load_trained, refuse_foreign_loader

PRIMARY = {True: "mmit_mAP", False: "top1"}


@dataclass
class ViewConfig:
    """How a video is looked at; see `video_mmit.engine.Views`."""

    spatial_crops: int = 1  # 1, 3, 5 or 10
    temporal_clips: int = 1
    fuse: str = "logit"  # logit | prob
    scale_size: int | None = None  # short side in pixels; the run's own when null
    input_size: int | None = None  # side of the crop; the run's own when null
    shuffle_seed: int | None = None  # control: the frames of every clip in a random order


@dataclass
class EnsembleConfig:
    """Which score files are fused, and how; see `video_mmit.ensemble`."""

    members: list[str] = field(default_factory=list)
    weights: Any = None  # one number a member; all the same when null
    domain: str = "logit"  # logit | prob | rank
    tune: bool = False  # choose the weights on these very labels; the cross-fitted figure stands by
    step: float = 0.05
    seed: int = 0  # of the two halves of the cross-fitted figure


@dataclass
class EvalConfig:
    """Schema of configs/eval.yaml."""

    run_dir: str | None = None
    checkpoint: str | None = None
    predictions: str | None = None
    annotations: str | None = None  # list of videos with their labels, for score files
    train_annotations: str | None = None  # list that tells how frequent the classes are
    format: str = "xtemporal"  # of the lists: xtemporal | mmaction_video | mmaction_frames
    multi_label: bool | None = None  # for score files; null: as soon as a video has two labels
    ignore_empty: bool = False  # leave out videos without a label instead of stopping
    out: str = "runs/mmit/evaluation"
    data: Any = None  # data set to test on; the run's own when null
    eval: ViewConfig = field(default_factory=ViewConfig)
    ensemble: EnsembleConfig = field(default_factory=EnsembleConfig)
    batch: int = 16  # clips at once
    workers: int = 4
    precision: str = "float32"
    device: str = "auto"


ConfigStore.instance().store("mmit_eval_schema", EvalConfig)


class Truth(NamedTuple):
    """What the scores are compared with: ids (N,), target (N, K) bool, training counts (K,)."""

    ids: list[str]
    target: np.ndarray
    multi_label: bool
    counts: np.ndarray | None


def evaluate(cfg: EvalConfig) -> dict[str, Any]:
    """Score what `cfg` names; returns what `metrics.json` holds.

    Raises:
        InputError: nothing to evaluate, an unknown name, or bad content; the message names it.
    """
    names = ("run_dir", "checkpoint", "predictions")
    given = [name for name in names if getattr(cfg, name)]
    given += ["ensemble.members"] if cfg.ensemble.members else []
    if len(given) != 1:
        asked = "run_dir, checkpoint, predictions, ensemble.members"
        raise InputError(asked, "give exactly one of them", given)
    world, start = dist.init(cfg.device), time.perf_counter()
    if given[0] in ("run_dir", "checkpoint"):
        scored, truth, facts = _score_model(cfg, world)
    else:
        scored, truth, facts = _score_files(cfg)
    result: dict[str, Any] = measure(scored, truth, cfg.ignore_empty)
    here = rundir.environment()
    result |= facts | {
        "metric": PRIMARY[truth.multi_label],
        "seconds": round(time.perf_counter() - start, 3),
        "device": str(world.device) if world.device.type == "cpu" else here["device"],
        "commit": here["git"]["revision"],
        "versions": here["versions"],
    }
    if world.main:
        out = Path(cfg.out)
        out.mkdir(parents=True, exist_ok=True)
        scored.save(out / "scores.npz")
        write_json(out / "metrics.json", result)
    return result


def measure(scored: ScoreFile, truth: Truth, ignore_empty: bool = False) -> dict[str, Any]:
    """Every figure of the data set's kind for scores in the order of the truth."""
    return dict(
        evaluate_scores(
            scored.rows(truth.ids), truth.target, truth.multi_label, truth.counts,
            ids=truth.ids, ignore_empty=ignore_empty,
        )
    )  # fmt: skip


def _score_model(cfg: EvalConfig, world: dist.World) -> tuple[ScoreFile, Truth, dict[str, Any]]:
    """Scores of a trained model, and the facts a report must state beside them."""
    view = cfg.eval
    sizes = {"scale_size": view.scale_size, "input_size": view.input_size}
    options = {name: value for name, value in sizes.items() if value is not None}
    trained = load_trained(cfg.run_dir, cfg.checkpoint, world.device, **options)
    data = open_data(trained, cfg.data)
    how = Views(
        trained.transform, world, view.spatial_crops, view.temporal_clips, view.fuse,
        cfg.batch, cfg.workers, cfg.precision, view.shuffle_seed,
    )  # fmt: skip
    found = score_videos(trained.model, data.test, data, how)
    ids = [video.id for video in data.test]
    scored = ScoreFile(np.array(ids), found.scores, found.kind)
    facts = {
        "trained_on": trained.config["train_set"],
        "evaluated_on": data.name,
        "step": trained.step,
        "seed": trained.config["seed"],
        "source": str(trained.source),
        "spatial_crops": view.spatial_crops,
        "temporal_clips": view.temporal_clips,
        "fuse": view.fuse,
        "shuffle_seed": view.shuffle_seed,
        "data_skipped": dict(data.skipped),
        "frame_count_mismatches": found.mismatched,
    }
    return scored, truth_of(data), facts


def open_data(trained: Trained, node: Any = None) -> VideoData:
    """The data set to test on: `node`, or the one of the run.

    Raises:
        InputError: a release does not say where its data is; other classes than the model's.
    """
    if node is None:
        node = trained.config.get("data")
        if not isinstance(node, Mapping):
            what = "a release file does not know where its data is; name a data set"
            raise InputError("data", what)
        refuse_foreign_loader(node, trained.source)
    else:
        node = OmegaConf.to_container(node, resolve=True)
        if "sampler" in node:  # a model is tested on clips as long as those it was trained on
            node["sampler"] = trained.config["sampler"]
    data: VideoData = instantiate(node)
    if data.classes != trained.classes:
        pairs = enumerate(zip(data.classes, trained.classes, strict=False))
        spot = next(
            (i for i, (a, b) in pairs if a != b), min(len(data.classes), len(trained.classes))
        )
        what = f"its {len(data.classes)} classes are not the {len(trained.classes)} of the model, "
        raise InputError(data.name, what + "first difference at label", spot)
    return data


def truth_of(data: VideoData) -> Truth:
    """Labels of the test videos of a data set."""
    target_NK = np.zeros((len(data.test), data.num_classes), dtype=bool)
    for row, video in enumerate(data.test):
        target_NK[row, list(video.labels)] = True
    ids = [video.id for video in data.test]
    return Truth(ids, target_NK, data.multi_label, data.class_counts().numpy())


def _score_files(cfg: EvalConfig) -> tuple[ScoreFile, Truth, dict[str, Any]]:
    """One score file, or several as an ensemble, against a list."""
    if cfg.annotations is None:
        raise InputError("annotations", "score files need the list of their videos")
    paths = [Path(name) for name in cfg.ensemble.members or [str(cfg.predictions)]]
    files = [ScoreFile.load(path) for path in paths]
    shapes = {path.name: file.scores.shape[1] for path, file in zip(paths, files, strict=True)}
    if len(set(shapes.values())) > 1:
        raise InputError("ensemble.members", "have different numbers of classes", shapes)
    truth = read_truth(cfg, files[0].scores.shape[1])
    if not cfg.ensemble.members:
        return files[0], truth, {"predictions": str(paths[0])}
    options = cfg.ensemble
    weights = None if options.weights in (None, "uniform") else [float(w) for w in options.weights]
    how = Ensemble(options.domain, weights, options.tune, options.step, options.seed)
    scored, facts = combine(files, truth.ids, truth.target, truth.multi_label, how)
    names = [str(path) for path in paths]
    single = [measure(file, truth, cfg.ignore_empty)[PRIMARY[truth.multi_label]] for file in files]
    return scored, truth, facts | {"members": dict(zip(names, single, strict=True))}


def read_truth(cfg: EvalConfig, num_classes: int) -> Truth:
    """Ids and labels of a list, and the counts of the training list when there is one."""
    videos = read_list(Path(str(cfg.annotations)), cfg.format, num_classes)
    target_NK = np.zeros((len(videos), num_classes), dtype=bool)
    for row, video in enumerate(videos):
        target_NK[row, list(video.labels)] = True
    multi_label = cfg.multi_label
    if multi_label is None:
        multi_label = bool((target_NK.sum(axis=1) > 1).any())
    counts_K = None
    if cfg.train_annotations is not None:
        train = read_list(Path(cfg.train_annotations), cfg.format, num_classes)
        labels = [label for video in train for label in video.labels]
        counts_K = np.bincount(labels, minlength=num_classes)
    return Truth([video.path for video in videos], target_NK, multi_label, counts_K)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=_plain))
    temporary.replace(path)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def show(result: dict[str, Any]) -> None:
    """Print the scores with the counts they stand on."""
    table, console = Table(), Console()
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in result.items():
        if isinstance(value, float) and (name.endswith("mAP") or name in SHARES):
            table.add_row(name, f"{100 * value:.2f} %")
    for name in ("videos", "ignored_empty", "classes_without_positive", "frame_count_mismatches"):
        if name in result:
            table.add_row(name, str(result[name]))
    console.print(table)
    if "cross_fitted" in result:
        shown = f"{100 * result['cross_fitted']:.2f} %"
        console.print(f"weights tuned on these labels; cross-fitted over two halves: {shown}")
    if result.get("frame_count_mismatches"):
        get_logger(__name__).warning(
            "%d videos have other frame counts than the list: the decoder's were used",
            result["frame_count_mismatches"],
        )


SHARES = ("hit@1", "hit@5", "top1", "top5", "mean_class_accuracy")


@hydra.main(version_base=None, config_path="configs", config_name="eval")
def main(cfg: DictConfig) -> None:
    world = dist.init(cfg.device)
    setup_logging(world.rank)
    result = evaluate(cfg)  # type: ignore[arg-type]
    if world.main:
        show(result)
    dist.shutdown()


if __name__ == "__main__":
    exit_on_bad_input(main)
