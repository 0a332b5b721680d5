"""Evaluate a run, a release file, or a feature file under a named protocol.

    python -m reid_rqen.evaluate run_dir=DIR                        the run's own data set
    python -m reid_rqen.evaluate run_dir=DIR train=ilidsvid eval=prid2011    across data sets
    python -m reid_rqen.evaluate checkpoint=FILE eval=mars rerank=true metric=xqda
    python -m reid_rqen.evaluate run_dir=DIR metric=xqda +metric_options.pairing=two_cameras
    python -m reid_rqen.evaluate features=f.npz protocol=mars_official

Prints a table, writes `metrics.json` (and `features.npz`) into `out`.
"""

import json
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common import dist, rundir
from common.log import InputError, exit_on_bad_input, get_logger, setup_logging
from reid_rqen.data.boundaries import load_boundaries
from reid_rqen.data.tracklet import ReidData, Tracklet
from reid_rqen.engine import Extracted, Extraction, extract
from reid_rqen.feature_file import Features, load
from reid_rqen.metrics import LEARNED_METRICS, Learner, RankEvaluator, evaluate_features
from reid_rqen.ops.rerank import KReciprocal
from reid_rqen.weights import Trained, load_trained, refuse_foreign_loader


@dataclass
class EvalConfig:
    """Schema of configs/eval.yaml."""

    run_dir: str | None = None
    checkpoint: str | None = None
    features: str | None = None
    out: str = "runs/rqen/evaluation"
    protocol: str | None = None  # the data set's own when null
    train: str | None = None  # name of the data set the weights must come from
    eval: Any = None  # data set to test on; the run's own when null
    metric: str | None = None  # cosine | euclid | xqda | kissme; the model's own when null
    metric_options: dict[str, Any] = field(default_factory=dict)  # of xqda or kissme, e.g. ridge
    rerank: bool = False
    k1: int = 20
    k2: int = 6
    lambda_value: float = 0.3
    fixed_scores: bool = False  # count every frame as 1
    use_regions: Any = None  # e.g. [0] for the upper region alone
    max_frames: int | None = None  # of a tracklet; all when null
    boundaries: str | None = None
    batch: int = 256
    workers: int = 4
    precision: str = "float32"
    device: str = "auto"
    chunk: int = 256
    save_features: bool = False


ConfigStore.instance().store("rqen_eval_schema", EvalConfig)


class Embedded(NamedTuple):
    """A data set as a model sees it, with the quality of every query and gallery frame."""

    features: Features
    query: Extracted
    gallery: Extracted


def evaluate(cfg: EvalConfig) -> dict[str, Any]:
    """Score what `cfg` names; returns what `metrics.json` holds.

    Raises:
        InputError: nothing to evaluate, an unknown name, or bad content; the message names it.
    """
    given = [name for name in ("run_dir", "checkpoint", "features") if getattr(cfg, name)]
    if len(given) != 1:
        raise InputError("run_dir, checkpoint, features", "give exactly one of them", given)
    world, start = dist.init(cfg.device), time.perf_counter()
    if cfg.features:
        if cfg.protocol is None:
            raise InputError("protocol", "a feature file needs it")
        result = score(load(Path(cfg.features)), cfg.protocol, cfg, cfg.metric or "cosine")
        facts: dict[str, Any] = {"features": cfg.features}
    else:
        result, facts = evaluate_model(cfg, world)
    here = rundir.environment()
    result |= facts | {
        "splits_averaged": 1,
        "seconds": round(time.perf_counter() - start, 3),
        "device": str(world.device) if world.device.type == "cpu" else here["device"],
        "commit": here["git"]["revision"],
        "versions": here["versions"],
    }
    if world.main:
        out = Path(cfg.out)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "metrics.json", result)
    return result


def evaluate_model(cfg: EvalConfig, world: dist.World) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores of a trained model, and the facts a report must state beside them."""
    options: dict[str, Any] = {"fixed_scores": True} if cfg.fixed_scores else {}
    if cfg.use_regions is not None:
        options["use_regions"] = list(cfg.use_regions)
    trained = load_trained(cfg.run_dir, cfg.checkpoint, world.device, **options)
    source = trained.config.get("data") or {}
    trained_on = trained.config.get("train_set")
    if cfg.train is not None and trained_on != cfg.train:
        raise InputError(
            "train", f"{trained.source} was trained on {trained_on}, not on", cfg.train
        )
    node: Any = source if cfg.eval is None else OmegaConf.to_container(cfg.eval, resolve=True)
    if "_target_" not in node:
        raise InputError("eval", "a release file does not know where its data is; name a data set")
    if cfg.eval is None:
        refuse_foreign_loader(node, trained.source)
    _check_split(source, node)
    data: ReidData = instantiate(node)
    protocol = cfg.protocol or data.protocol
    table = load_boundaries(cfg.boundaries, node["root"]) if cfg.boundaries else None
    how = Extraction(
        trained.transform, world, cfg.batch, cfg.workers, cfg.precision, cfg.max_frames, table
    )
    facts = {
        "trained_on": trained_on,
        "evaluated_on": data.name,
        "split": node.get("split"),
        "step": trained.step,
        "seed": trained.config.get("seed"),
        "source": str(trained.source),
        "max_frames": cfg.max_frames,
        "fixed_scores": cfg.fixed_scores,
        "data_skipped": data.skipped,
    }
    if hasattr(trained.model, "pair_distance"):
        if cfg.metric or cfg.rerank:
            what = "the model compares pairs with a distance of its own, without"
            raise InputError("metric, rerank", what, cfg.metric or "rerank")
        result, frames = score_pairs(trained, data, how, protocol)
        return result, facts | {"frames": frames}
    metric = cfg.metric or str(getattr(trained.model, "metric", "cosine"))
    embedded = embed(trained, data, how, with_train=metric in LEARNED_METRICS)
    if world.main and cfg.save_features:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        embedded.features.save(Path(cfg.out) / "features.npz")
    facts["frames"] = embedded.query.frames + embedded.gallery.frames
    return score(embedded.features, protocol, cfg, metric), facts


def _check_split(trained: dict[str, Any], tested: dict[str, Any]) -> None:
    """Another split of the training set has the training's persons in its test half."""
    same_set = trained.get("_target_") == tested["_target_"]
    if same_set and trained.get("split") != tested.get("split"):
        what = f"the run was trained on split {trained.get('split')} of the same data, not on"
        raise InputError("eval.split", what, tested.get("split"))


def embed(trained: Trained, data: ReidData, how: Extraction, with_train: bool = False) -> Embedded:
    """Set vectors of query and gallery; a tracklet that is in both is embedded once."""
    rows = data.query_index
    if rows is None:
        query = extract(trained.model, data.query, how, "query")
    gallery = extract(trained.model, data.gallery, how, "gallery")
    if rows is not None:
        scores = [gallery.score[i] for i in rows] if gallery.score else []
        query = Extracted(gallery.vector[rows], scores, 0)
    train: dict[str, Any] = {}
    if with_train:
        vector = extract(trained.model, data.train, how, "train").vector
        pid, camid = labels(data.train)
        train = {"train_feat": vector.numpy(), "train_pid": pid, "train_cam": camid}
    query_pid, query_cam = labels(data.query)
    gallery_pid, gallery_cam = labels(data.gallery)
    features = Features(
        query.vector.numpy(), query_pid, query_cam,
        gallery.vector.numpy(), gallery_pid, gallery_cam,
        query_index=data.query_index, **train,
    )  # fmt: skip
    return Embedded(features, query, gallery)


def labels(tracklets: list[Tracklet]) -> tuple[np.ndarray, np.ndarray]:
    """Identity and camera numbers of tracklets, int64."""
    pid = np.array([tracklet.pid for tracklet in tracklets], dtype=np.int64)
    return pid, np.array([tracklet.camid for tracklet in tracklets], dtype=np.int64)


def score(features: Features, protocol: str, cfg: EvalConfig, metric: str) -> dict[str, Any]:
    """Rank set vectors under a protocol with a metric and the re-ranking of `cfg`."""
    settings = KReciprocal(cfg.k1, cfg.k2, cfg.lambda_value) if cfg.rerank else False
    learner: str | Learner = metric
    if cfg.metric_options:
        if metric not in LEARNED_METRICS:
            raise InputError("metric_options", "only xqda and kissme have any, not", metric)
        plain = cast(Any, LEARNED_METRICS[metric])
        accepted = [entry.name for entry in fields(plain)]
        for name in cfg.metric_options:
            if name not in accepted:
                raise InputError(f"metric_options.{name}", f"is none of {', '.join(accepted)}")
        learner = replace(plain, **cfg.metric_options)
    return evaluate_features(features, protocol, cfg.chunk, learner, settings)


def score_pairs(
    trained: Trained, data: ReidData, how: Extraction, protocol: str
) -> tuple[dict[str, Any], int]:
    """Scores of a model whose vectors depend on the pair, and the number of frames used."""
    model: Any = trained.model
    query = extract(model, data.query, how, "query")
    gallery = extract(model, data.gallery, how, "gallery")
    device = how.world.device
    padded = [x.to(device) for part in (query, gallery) for x in pad(part.vector)]
    with torch.inference_mode():
        distance_QG = model.pair_distance(*padded).cpu().numpy()
    evaluator = RankEvaluator(*labels(data.gallery), protocol, data.query_index)
    evaluator.update(distance_QG, *labels(data.query))
    facts = {"protocol": protocol, "metric": "pair", "rerank": False}
    result = facts | evaluator.compute() | {"cmc_curve": evaluator.curve()}
    return result, query.frames + gallery.frames


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences (T, E) of any length as one (N, T, E), and which entries are real (N, T)."""
    length_N = torch.tensor([len(row) for row in rows])
    padded_NTE = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded_NTE, torch.arange(padded_NTE.shape[1]) < length_N[:, None]


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, default=_plain))
    temporary.replace(path)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def show(result: dict[str, Any]) -> None:
    """Print the scores with the protocol and the counts they stand on."""
    table, console = Table(), Console()
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name in ("cmc@1", "cmc@5", "cmc@10", "cmc@20", "mAP", "mINP"):
        if name in result:
            table.add_row(name, f"{100 * result[name]:.2f} %")
    for name in ("queries", "valid", "skipped", "gallery", "junk", "frames"):
        if name in result:
            table.add_row(name, str(result[name]))
    table.add_row("tied", f"{100 * result['tie_fraction']:.2f} %")
    rerank = ", k-reciprocal re-ranking" if result["rerank"] else ""
    console.print(f"protocol {result['protocol']}, metric {result['metric']}{rerank}")
    console.print(table)
    if result["pessimistic_reported"]:
        get_logger(__name__).warning(
            "over 1 %% of the positives are tied: pessimistic values shown"
        )


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
