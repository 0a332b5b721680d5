"""Train one row: `python -m face_lfr.train experiment=<row> data=<set> run_dir=DIR`.

Resumes by itself when `run_dir` holds a complete checkpoint. Under torchrun the ranks share the
global batch and the classes of the classifier; a run that is stopped and started again, also on
another number of ranks, sees the same images in the same order.

A row that names a `teacher` trains a quality network: the teacher, a finished recogniser, stays as
it is and says how well it recognises degraded copies of the training images.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
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
from face_lfr.data.face_data import FaceData
from face_lfr.engine import Embedding, autocast, check_fits, train_step
from face_lfr.flops import require
from face_lfr.models.norm import use_sync_bn
from face_lfr.optim import ShardScaler
from face_lfr.teacher import anchor_classes, prepare_proxy
from face_lfr.weights import Trainee, load_initial


@dataclass
class TrainConfig:
    """Schema of configs/train.yaml; a misspelt key fails when the configuration is composed."""

    run_dir: str = MISSING
    seed: int = 0
    device: str = "auto"
    steps: int | None = None  # exactly one of steps and epochs
    epochs: float | None = None
    global_batch: int = 512  # images of a step over all ranks
    accumulate: int = 1  # parts in which a rank's share of the batch is computed
    init: str | None = None  # run folder or release to start from; the classifier stays new
    anchor: bool = False  # start from the class means of the features instead of random centres
    frozen_steps: int = 0  # first steps that train the classifier alone
    max_gflops: float | None = None  # of the network, counted as the challenge's organisers do
    teacher: str | None = None  # run folder or release of a recogniser, for a quality network
    copies: int = 2  # degraded copies of every image that the teacher looks at
    batch_norm: str = "local"  # local | sync
    clip_norm: float | None = None  # of the network's gradient, without the classifier's
    precision: str = "float32"  # float32 | bfloat16 | float16
    channels_last: bool = False
    compile: bool = False
    workers: int = 4
    log_every: int = 20
    save_every: int = 500
    keep: int = 3  # checkpoints
    tensorboard: bool = True
    data: Any = MISSING
    model: Any = MISSING
    margin: Any = None
    objective: Any = MISSING
    draws: Any = MISSING
    transform: Any = MISSING
    optim: Any = MISSING
    schedule: Any = MISSING


ConfigStore.instance().store("lfr_train_schema", TrainConfig)


def train(cfg: TrainConfig) -> dict[str, float]:
    """Run, or continue, the training described by `cfg`; returns the last logged metrics.

    Raises:
        InputError: the data or a setting is not usable; the message names it.
        FloatingPointError: the loss is no number; the last checkpoint is from before.
    """
    world = dist.init(cfg.device)
    _check(cfg, world)
    data: FaceData = instantiate(cfg.data)
    transform = _instantiate(cfg, "transform")
    seed_everything(cfg.seed)  # every rank builds the same model
    model = _model(cfg, world)
    check_fits(model, transform)
    draws = _draws(cfg, data, transform, world)
    steps = cfg.steps or math.ceil(float(cfg.epochs or 0) * draws.epoch_length / cfg.global_batch)
    objective = _objective(cfg, model, data.num_classes, world)
    optimizer = _call(cfg, "optim", model, objective)
    schedule = _call(cfg, "schedule", optimizer, steps)
    seed_everything(cfg.seed, world.rank)  # and then draws its own dropout
    sampler = ResumableSampler(
        len(draws), seed=cfg.seed, rank=world.rank, world=world.size, shuffle=False
    )
    scaler = ShardScaler(world.device.type, enabled=cfg.precision == "float16")
    checkpoint = Checkpointer(
        Path(cfg.run_dir) / "checkpoints", Trainee(model, objective), optimizer, keep=cfg.keep,
        sampler=sampler, schedule=schedule, scaler=scaler,
    )  # fmt: skip
    start = checkpoint.resume()
    if start == 0 and cfg.anchor:
        how = Embedding(transform, world, workers=cfg.workers, precision=cfg.precision)
        anchor_classes(model, objective, data, how)
    loader = iter(_loader(cfg, draws, sampler, world))
    wrapped = _distributed(model, world)
    compute = _Step(cfg, wrapped, transform, objective, world, scaler)
    speed, last = Throughput(), {}
    with (
        MetricLogger(Path(cfg.run_dir), world.main, cfg.tensorboard) as log,
        progress(world.main) as bar,
    ):
        rundir.prepare(Path(cfg.run_dir), _described(cfg, model, data, steps), world.main)
        task = bar.add_task(Path(cfg.run_dir).name, total=steps, completed=start)
        for step in range(start + 1, steps + 1):
            optimizer.zero_grad(set_to_none=True)
            loss = compute(loader, frozen=step <= cfg.frozen_steps)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm or math.inf)
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            sampler.consumed += cfg.global_batch
            speed.update(cfg.global_batch)
            bar.advance(task)
            # Agreeing over ranks costs a synchronisation: several ask every few steps.
            ask = world.size == 1 or step % cfg.log_every == 0
            stop = ask and checkpoint.stop_requested
            save = step % cfg.save_every == 0 or step == steps or stop
            if step % cfg.log_every == 0 or save:
                last = _measure(step, loss, norm, optimizer, draws, speed)
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
    for name in ("global_batch", "accumulate", "copies", "log_every", "save_every", "keep"):
        if getattr(cfg, name) < 1:
            raise InputError(name, "must be at least 1", getattr(cfg, name))
    if cfg.steps is not None and cfg.steps < 1:
        raise InputError("steps", "must be at least 1", cfg.steps)
    if cfg.frozen_steps < 0:
        raise InputError("frozen_steps", "must not be negative", cfg.frozen_steps)
    if cfg.anchor and cfg.init is None:
        raise InputError("anchor", "needs trained weights to take class means with", "init=null")
    if cfg.global_batch % (world.size * cfg.accumulate):
        what = f"does not divide over {world.size} ranks times accumulate {cfg.accumulate}"
        raise InputError("global_batch", what, cfg.global_batch)
    if cfg.batch_norm not in ("local", "sync"):
        raise InputError("batch_norm", "must be one of local, sync", cfg.batch_norm)
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
    except InputError:
        raise
    except ValueError as error:
        raise InputError(name, "an argument is not accepted", error) from error


def _instantiate(cfg: TrainConfig, name: str) -> Any:
    """Build a node; arguments that a constructor refuses are the user's."""
    try:
        return instantiate(getattr(cfg, name))
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise InputError(name, "an argument is not accepted", error.__cause__) from error
        raise


def _model(cfg: TrainConfig, world: dist.World) -> nn.Module:
    model: nn.Module = _instantiate(cfg, "model")
    if cfg.max_gflops is not None:
        require(model, cfg.max_gflops, model.input_size)  # type: ignore[arg-type]
    if cfg.init is not None:
        load_initial(model, Path(cfg.init))
    if cfg.batch_norm == "sync":
        model = use_sync_bn(model, world.device)
    model.to(world.device)
    if cfg.channels_last:
        model.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.compile()
    return model


def _objective(cfg: TrainConfig, model: Any, num_classes: int, world: dist.World) -> nn.Module:
    """The classifier of a recogniser, or what a quality network learns."""
    if cfg.teacher is not None:
        quality: nn.Module = _instantiate(cfg, "objective")
        return quality.to(world.device)
    named = {"features": model.features, "num_classes": num_classes, "world": world}
    objective: nn.Module = _call(cfg, "objective", **named)
    return objective.to(world.device)


def _draws(cfg: TrainConfig, data: FaceData, transform: Any, world: dist.World) -> Any:
    if cfg.teacher is None:
        return _call(cfg, "draws", data, transform, seed=cfg.seed)
    proxy = prepare_proxy(
        Path(cfg.teacher), Path(cfg.run_dir) / "proxy.npz", data, cfg.copies, cfg.seed,
        world, cfg.precision, cfg.workers,
    )  # fmt: skip
    return _call(cfg, "draws", data, transform, proxy, seed=cfg.seed)


def _distributed(model: nn.Module, world: dist.World) -> nn.Module:
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    skips = bool(getattr(model, "skips_parameters", False))
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=skips)


def _loader(
    cfg: TrainConfig, draws: Any, sampler: ResumableSampler, world: dist.World
) -> DataLoader[Any]:
    return DataLoader(
        draws,
        batch_size=cfg.global_batch // world.size // cfg.accumulate,
        sampler=sampler,
        num_workers=cfg.workers,
        worker_init_fn=worker_init,
        pin_memory=world.device.type == "cuda",
        # Its own generator: starting a loader must not move the stream that dropout draws from.
        generator=torch.Generator().manual_seed(cfg.seed),
    )


class _Step:
    """Gradients of one step: the mean loss over the parts of this rank's share of the batch."""

    def __init__(
        self,
        cfg: TrainConfig,
        model: nn.Module,
        transform: Any,
        objective: nn.Module,
        world: dist.World,
        scaler: torch.amp.GradScaler,
    ):
        self.parts, self.precision, self.device = cfg.accumulate, cfg.precision, world.device
        self.model, self.transform, self.objective = model, transform, objective
        self.scaler = scaler

    def __call__(self, loader: Iterator[Any], frozen: bool) -> Tensor:
        self.model.train(not frozen)
        total = torch.zeros((), device=self.device)
        for part in range(self.parts):
            with self._gradients_stay_here(part + 1 < self.parts):
                loss = train_step(
                    self.model, next(loader), self.transform, self.objective,
                    self.device, self.precision, frozen,
                )  # fmt: skip
                self.scaler.scale(loss / self.parts).backward()
            total += loss.detach() / self.parts
        return total

    def _gradients_stay_here(self, wanted: bool) -> contextlib.AbstractContextManager:
        """The ranks exchange gradients once a step, with the last part."""
        if wanted and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()


def _described(cfg: TrainConfig, model: nn.Module, data: FaceData, steps: int) -> dict[str, Any]:
    """The configuration of the run, with what an evaluation must know of it."""
    described: Any = OmegaConf.to_container(cfg, resolve=True)
    return described | {
        "total_steps": steps,
        "train_set": data.name,
        "num_classes": data.num_classes,
        "kind": "embedding" if hasattr(model, "embed") else "quality",
        "train_images": data.epoch_length,
        "skipped": dict(data.skipped),
    }


def _measure(
    step: int,
    loss: Tensor,
    norm: Tensor,
    optimizer: torch.optim.Optimizer,
    draws: Any,
    speed: Throughput,
) -> dict[str, float]:
    """Means over the ranks; stops a run whose loss is no number before it is saved."""
    values = dist.mean_over_ranks({"loss": loss.item(), "grad_norm": norm.item()})
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"loss is {values['loss']} at step {step}")
    values["lr"] = optimizer.param_groups[0]["lr"]
    values["images_per_s"] = speed.rate()
    if draws.bad_items:
        values["bad_items"] = draws.bad_items
    return values


@hydra.main(version_base=None, config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    setup_logging(dist.init(cfg.device).rank)
    train(cfg)  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
