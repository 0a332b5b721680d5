"""Train one row: `python -m detection_tsd.train experiment=<row> data=<set> run_dir=DIR`.

Resumes by itself when `run_dir` holds a complete checkpoint. Under torchrun the ranks share the
global batch; a run that is stopped and started again, also on another number of ranks, sees the
same images in the same order and samples the same regions of them.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from common import dist, rundir
from common.checkpoint import Checkpointer
from common.log import (
    InputError,
    MetricLogger,
    Throughput,
    exit_on_bad_input,
    progress,
    setup_logging,
)
from common.samplers import ResumableSampler
from common.seed import seed_everything, worker_init
from detection_tsd.data.batch import collate
from detection_tsd.data.detection_data import DetectionData
from detection_tsd.data.draws import DetectionDraws
from detection_tsd.engine import autocast, train_step
from detection_tsd.models.norm import use_sync_bn
from detection_tsd.weights import Trainee, load_initial


@dataclass
class TrainConfig:
    """Schema of configs/train.yaml; a misspelt key fails when the configuration is composed."""

    run_dir: str = MISSING
    seed: int = 0
    device: str = "auto"
    steps: int | None = None  # exactly one of steps and epochs
    epochs: float | None = None
    global_batch: int = 32  # images of a step over all ranks
    accumulate: int = 1  # parts in which a rank's share of the batch is computed
    grouped: bool = True  # the images of a step are all upright or all lying: less padding
    class_aware: bool = False  # draw a class first, then an image of it
    max_bad_items: int = 0  # unreadable images replaced before the run stops
    cache: bool = False  # keep decoded images in memory; for small data sets
    init: str | None = None  # release or run folder to start from; heads of other classes stay new
    batch_norm: str = "local"  # local | sync, of norms that are not frozen
    clip_norm: float | None = 35.0
    ema: float | None = None  # decay of an average of the weights, which evaluation then uses
    precision: str = "float32"  # float32 | bfloat16 | float16
    compile: bool = False
    workers: int = 4
    log_every: int = 20
    save_every: int = 1000
    keep: int = 3  # checkpoints
    tensorboard: bool = True
    num_classes: int = 80
    data: Any = MISSING
    backbone: Any = MISSING
    rpn: Any = None
    head: Any = MISSING
    sampler: Any = MISSING
    post: Any = MISSING
    model: Any = MISSING
    transform: Any = MISSING
    optim: Any = MISSING
    schedule: Any = MISSING


ConfigStore.instance().store("tsd_train_schema", TrainConfig)


def train(cfg: TrainConfig) -> dict[str, float]:
    """Run, or continue, the training described by `cfg`; returns the last logged metrics.

    Raises:
        InputError: the data or a setting is not usable; the message names it.
        FloatingPointError: the loss is no number; the last checkpoint is from before.
    """
    world = dist.init(cfg.device)
    _check(cfg, world)
    data: DetectionData = instantiate(cfg.data.train)
    if data.num_classes != cfg.num_classes:
        what = f"differs from {data.num_classes} of the data"
        raise InputError("num_classes", what, cfg.num_classes)
    transform = _instantiate(cfg, "transform")
    draws = DetectionDraws(
        data, transform, cfg.seed, cfg.max_bad_items, cfg.cache,
        group=cfg.global_batch if cfg.grouped else 1, class_aware=cfg.class_aware,
    )  # fmt: skip
    steps = cfg.steps or math.ceil(float(cfg.epochs or 0) * draws.epoch_length / cfg.global_batch)
    seed_everything(cfg.seed)  # every rank builds the same model
    trainee = Trainee(_model(cfg, world), cfg.ema)
    model = trainee.model
    optimizer = _call(cfg, "optim", model)
    schedule = _call(cfg, "schedule", optimizer, steps)
    seed_everything(cfg.seed, world.rank)
    sampler = ResumableSampler(
        len(draws), seed=cfg.seed, rank=world.rank, world=world.size, shuffle=False
    )
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.precision == "float16")
    checkpoint = Checkpointer(
        Path(cfg.run_dir) / "checkpoints", trainee, optimizer, keep=cfg.keep,
        sampler=sampler, schedule=schedule, scaler=scaler,
    )  # fmt: skip
    start = checkpoint.resume()
    loader = iter(_loader(cfg, draws, transform.divisor, sampler, world))
    wrapped = _distributed(model, world).train()
    compute = _Step(cfg, wrapped, transform, world, scaler)
    speed, last = Throughput(), {}
    with (
        MetricLogger(Path(cfg.run_dir), world.main, cfg.tensorboard) as log,
        progress(world.main) as bar,
    ):
        rundir.prepare(Path(cfg.run_dir), _described(cfg, data, steps), world.main)
        task = bar.add_task(Path(cfg.run_dir).name, total=steps, completed=start)
        for step in range(start + 1, steps + 1):
            optimizer.zero_grad(set_to_none=True)
            parts = compute(loader)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm or math.inf)
            scaler.step(optimizer)
            scaler.update()
            trainee.update_average()
            schedule.step()
            sampler.consumed += cfg.global_batch
            speed.update(cfg.global_batch)
            bar.advance(task)
            # Agreeing over ranks costs a synchronisation: several ask every few steps.
            ask = world.size == 1 or step % cfg.log_every == 0
            stop = ask and checkpoint.stop_requested
            save = step % cfg.save_every == 0 or step == steps or stop
            if step % cfg.log_every == 0 or save:
                last = _measure(step, parts, norm, optimizer, draws.bad_items, speed)
                log.log(step, **last)
            if save:
                checkpoint.save(step)
            if stop:
                break
    dist.shutdown()
    return last


def _check(cfg: TrainConfig, world: dist.World) -> None:
    if (cfg.steps is None) == (cfg.epochs is None):
        raise InputError("steps, epochs", "give exactly one of them", (cfg.steps, cfg.epochs))
    if cfg.epochs is not None and not 0 < cfg.epochs < math.inf:
        raise InputError("epochs", "must be above 0", cfg.epochs)
    for name in ("global_batch", "accumulate", "log_every", "save_every", "keep"):
        if getattr(cfg, name) < 1:
            raise InputError(name, "must be at least 1", getattr(cfg, name))
    if cfg.steps is not None and cfg.steps < 1:
        raise InputError("steps", "must be at least 1", cfg.steps)
    if cfg.global_batch % (world.size * cfg.accumulate):
        what = f"does not divide over {world.size} ranks times accumulate {cfg.accumulate}"
        raise InputError("global_batch", what, cfg.global_batch)
    if cfg.class_aware and cfg.grouped:
        raise InputError("class_aware", "draws its own order: grouped=false goes with it", True)
    if cfg.batch_norm not in ("local", "sync"):
        raise InputError("batch_norm", "must be one of local, sync", cfg.batch_norm)
    if cfg.ema is not None and not 0 < cfg.ema < 1:
        raise InputError("ema", "must be above 0 and below 1", cfg.ema)
    autocast(world.device, cfg.precision)


def _call(cfg: TrainConfig, name: str, *args: Any, **named: Any) -> Any:
    """Call a `_partial_` node; arguments that it refuses are the user's."""
    partial = _instantiate(cfg, name)
    try:
        inspect.signature(partial).bind(*args, **named)
    except (TypeError, ValueError) as error:
        raise InputError(name, "does not take these arguments", error) from error
    try:
        return partial(*args, **named)
    except ValueError as error:
        raise InputError(name, "an argument is not accepted", error) from error


def _instantiate(cfg: TrainConfig, name: str) -> Any:
    """Build a node; arguments that a constructor refuses are the user's."""
    try:
        return instantiate(getattr(cfg, name))
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError) and not isinstance(error.__cause__, InputError):
            raise InputError(name, "an argument is not accepted", error.__cause__) from error
        raise


def _model(cfg: TrainConfig, world: dist.World) -> nn.Module:
    model: nn.Module = _instantiate(cfg, "model")
    if cfg.init is not None:
        load_initial(model, Path(cfg.init))
    if cfg.batch_norm == "sync":
        model = use_sync_bn(model, world.device)
    model.to(world.device).to(memory_format=torch.channels_last)
    if cfg.compile:
        model.backbone.compile()  # type: ignore[union-attr]
    return model


def _distributed(model: nn.Module, world: dist.World) -> nn.Module:
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def _loader(
    cfg: TrainConfig,
    draws: DetectionDraws,
    divisor: int,
    sampler: ResumableSampler,
    world: dist.World,
) -> DataLoader[Any]:
    return DataLoader(
        draws,
        batch_size=cfg.global_batch // world.size // cfg.accumulate,
        sampler=sampler,
        num_workers=cfg.workers,
        worker_init_fn=worker_init,
        collate_fn=partial(collate, divisor=divisor),
        pin_memory=world.device.type == "cuda",
        # Its own generator: starting a loader must not move the stream of anything else.
        generator=torch.Generator().manual_seed(cfg.seed),
    )


class _Step:
    """Gradients of one step: the mean loss over the parts of this rank's share of the batch."""

    def __init__(
        self,
        cfg: TrainConfig,
        model: nn.Module,
        transform: Any,
        world: dist.World,
        scaler: torch.amp.GradScaler,
    ):
        self.count, self.precision, self.device = cfg.accumulate, cfg.precision, world.device
        self.model, self.transform, self.scaler = model, transform, scaler

    def __call__(self, loader: Iterator[Any]) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for number in range(self.count):
            with self._gradients_stay_here(number + 1 < self.count):
                loss, parts = train_step(
                    self.model, next(loader), self.transform, self.device, self.precision
                )
                self.scaler.scale(loss / self.count).backward()
            for name, value in {"loss": loss, **parts}.items():
                total[name] = total.get(name, 0.0) + value.detach() / self.count
        return total

    def _gradients_stay_here(self, wanted: bool) -> contextlib.AbstractContextManager:
        """The ranks exchange gradients once a step, with the last part."""
        if wanted and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()


def _described(cfg: TrainConfig, data: DetectionData, steps: int) -> dict[str, Any]:
    """The configuration of the run, with what an evaluation must know of it."""
    described: Any = OmegaConf.to_container(cfg, resolve=True)
    return described | {
        "total_steps": steps,
        "train_set": data.name,
        "train_images": len(data),
        "classes": list(data.classes),
        "class_ids": list(data.class_ids),
        "skipped": dict(data.skipped),
    }


def _measure(
    step: int,
    parts: dict[str, Tensor],
    norm: Tensor,
    optimizer: torch.optim.Optimizer,
    bad_items: int,
    speed: Throughput,
) -> dict[str, float]:
    """Means over the ranks; stops a run whose loss is no number before it is saved."""
    values = {name: value.item() for name, value in parts.items()} | {"grad_norm": norm.item()}
    values = dist.mean_over_ranks(values)
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"loss is {values['loss']} at step {step}; parts: {values}")
    values["lr"] = optimizer.param_groups[0]["lr"]
    values["images_per_s"] = speed.rate()
    if bad_items:
        values["bad_items"] = bad_items
    return values


@hydra.main(version_base=None, config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    setup_logging(dist.init(cfg.device).rank)
    train(cfg)  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
