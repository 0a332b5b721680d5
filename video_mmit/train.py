"""Train one row: `python -m video_mmit.train experiment=<row> data=<set> run_dir=DIR`.

Resumes by itself when `run_dir` holds a complete checkpoint. Under torchrun the ranks share the
global batch; a run that is stopped and started again, also on another number of ranks, sees the
same clips in the same order.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
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
from video_mmit.data.clips import TrainClips
from video_mmit.data.video_data import VideoData
from video_mmit.engine import autocast, check_fits, train_step
from video_mmit.models.norm import use_sync_bn
from video_mmit.weights import load_initial


@dataclass
class TrainConfig:
    """Schema of configs/train.yaml; a misspelt key fails when the configuration is composed."""

    run_dir: str = MISSING
    seed: int = 0
    device: str = "auto"
    steps: int | None = None  # exactly one of steps and epochs
    epochs: float | None = None
    global_batch: int = 64  # clips of a step over all ranks
    accumulate: int = 1  # parts in which a rank's share of the batch is computed
    init: str | None = None  # safetensors to start from; a classifier of other classes stays new
    batch_norm: str = "local"  # local | sync
    clip_norm: float | None = None
    precision: str = "float32"  # float32 | bfloat16 | float16
    channels_last: bool = False
    compile: bool = False
    workers: int = 4
    cache: bool = False  # keep decoded frames in memory; for small data sets
    log_every: int = 20
    save_every: int = 500
    keep: int = 3  # checkpoints
    tensorboard: bool = True
    max_bad_items: int = 0  # unreadable videos replaced before the run stops
    data: Any = MISSING
    model: Any = MISSING
    transform: Any = MISSING
    loss: Any = MISSING
    optim: Any = MISSING
    schedule: Any = MISSING


ConfigStore.instance().store("mmit_train_schema", TrainConfig)

Loss = Callable[[Tensor, Tensor], Tensor]


def train(cfg: TrainConfig) -> dict[str, float]:
    """Run, or continue, the training described by `cfg`; returns the last logged metrics.

    Raises:
        InputError: the data or a setting is not usable; the message names it.
        FloatingPointError: the loss is no number; the last checkpoint is from before.
    """
    world = dist.init(cfg.device)
    _check(cfg, world)
    data: VideoData = instantiate(cfg.data)
    transform = instantiate(cfg.transform)
    clips = TrainClips(data, transform, cfg.seed, cfg.max_bad_items, cfg.cache)
    steps = cfg.steps or math.ceil(float(cfg.epochs or 0) * clips.epoch_length / cfg.global_batch)
    seed_everything(cfg.seed)  # every rank builds the same model
    model = _model(cfg, data.num_classes, world)
    check_fits(model, data.sampler, transform)
    objective: Loss = _call(cfg, "loss", counts_K=data.class_counts()).to(world.device)
    optimizer = _call(cfg, "optim", model)
    schedule = _call(cfg, "schedule", optimizer, steps)
    seed_everything(cfg.seed, world.rank)  # and then draws its own dropout
    sampler = ResumableSampler(
        len(clips), seed=cfg.seed, rank=world.rank, world=world.size, shuffle=False
    )
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.precision == "float16")
    checkpoint = Checkpointer(
        Path(cfg.run_dir) / "checkpoints", model, optimizer, keep=cfg.keep,
        sampler=sampler, schedule=schedule, scaler=scaler,
    )  # fmt: skip
    start = checkpoint.resume()
    loader = iter(_loader(cfg, clips, sampler, world))
    wrapped = _distributed(model, world).train()
    compute = _Step(cfg, wrapped, transform, objective, world, scaler)
    speed, last = Throughput(), {}
    with (
        MetricLogger(Path(cfg.run_dir), world.main, cfg.tensorboard) as log,
        progress(world.main) as bar,
    ):
        rundir.prepare(Path(cfg.run_dir), _described(cfg, data, steps), world.main)
        task = bar.add_task(Path(cfg.run_dir).name, total=steps, completed=start)
        for step in range(start + 1, steps + 1):
            optimizer.zero_grad(set_to_none=True)
            loss = compute(loader)
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
                last = _measure(step, loss, norm, optimizer, clips, speed)
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
    if cfg.batch_norm not in ("local", "sync"):
        raise InputError("batch_norm", "must be one of local, sync", cfg.batch_norm)
    autocast(world.device, cfg.precision)


def _call(cfg: TrainConfig, name: str, *args: Any, **named: Any) -> Any:
    """Call a `_partial_` node; arguments that it refuses are the user's."""
    partial = instantiate(getattr(cfg, name))
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


def _model(cfg: TrainConfig, num_classes: int, world: dist.World) -> nn.Module:
    model: nn.Module = _call(cfg, "model", num_classes=num_classes)
    if cfg.init is not None:
        load_initial(model, Path(cfg.init))
    if cfg.batch_norm == "sync":
        model = use_sync_bn(model, world.device)
    model.to(world.device)
    if cfg.channels_last:
        _channels_last(model)
    if cfg.compile:
        model.compile()
    return model


def _channels_last(model: nn.Module) -> None:
    """Weights of 2D and 3D convolutions in the layout that tensor cores read."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
        elif isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)


def _distributed(model: nn.Module, world: dist.World) -> nn.Module:
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def _loader(
    cfg: TrainConfig, clips: TrainClips, sampler: ResumableSampler, world: dist.World
) -> DataLoader[Any]:
    return DataLoader(
        clips,
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
        objective: Loss,
        world: dist.World,
        scaler: torch.amp.GradScaler,
    ):
        self.parts, self.precision, self.device = cfg.accumulate, cfg.precision, world.device
        self.model, self.transform, self.objective = model, transform, objective
        self.scaler = scaler

    def __call__(self, loader: Iterator[Any]) -> Tensor:
        total = torch.zeros((), device=self.device)
        for part in range(self.parts):
            with self._gradients_stay_here(part + 1 < self.parts):
                loss = train_step(
                    self.model, next(loader), self.transform, self.objective,
                    self.device, self.precision,
                )  # fmt: skip
                self.scaler.scale(loss / self.parts).backward()
            total += loss.detach() / self.parts
        return total

    def _gradients_stay_here(self, wanted: bool) -> contextlib.AbstractContextManager:
        """The ranks exchange gradients once a step, with the last part."""
        if wanted and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()


def _described(cfg: TrainConfig, data: VideoData, steps: int) -> dict[str, Any]:
    """The configuration of the run, with what an evaluation must know of its data."""
    described: Any = OmegaConf.to_container(cfg, resolve=True)
    return described | {
        "total_steps": steps,
        "train_set": data.name,
        "num_classes": data.num_classes,
        "classes": list(data.classes),
        "multi_label": data.multi_label,
        "train_videos": len(data.train),
        "skipped": dict(data.skipped),
    }


def _measure(
    step: int,
    loss: Tensor,
    norm: Tensor,
    optimizer: torch.optim.Optimizer,
    clips: TrainClips,
    speed: Throughput,
) -> dict[str, float]:
    """Means over the ranks; stops a run whose loss is no number before it is saved."""
    values = dist.mean_over_ranks({"loss": loss.item(), "grad_norm": norm.item()})
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"loss is {values['loss']} at step {step}")
    values["lr"] = optimizer.param_groups[0]["lr"]
    values["clips_per_s"] = speed.rate()
    for name in ("bad_items", "mismatched"):
        if getattr(clips, name):
            values[name] = getattr(clips, name)
    return values


@hydra.main(version_base=None, config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    setup_logging(dist.init(cfg.device).rank)
    train(cfg)  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
