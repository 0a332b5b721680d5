"""Train one row: `python -m reid_rqen.train experiment=<row> data=<set> run_dir=DIR`.

Resumes by itself when `run_dir` holds a complete checkpoint. Under torchrun the ranks share the
global batch; a run that is stopped and started again, also on another number of ranks, sees the
same draws in the same order.
"""

import inspect
import math
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
from reid_rqen.data.boundaries import load_boundaries
from reid_rqen.data.tracklet import ReidData
from reid_rqen.engine import autocast, train_step
from reid_rqen.models.norm import freeze_bn, use_sync_bn
from reid_rqen.weights import load_initial


@dataclass
class TrainConfig:
    """Schema of configs/train.yaml; a misspelt key fails when the configuration is composed."""

    run_dir: str = MISSING
    seed: int = 0
    device: str = "auto"
    steps: int = MISSING
    global_batch: int = 1  # draws of a step over all ranks; one draw is one triplet of sets
    init: str | None = None  # safetensors with weights to start from; classifiers stay new
    batch_norm: str = "local"  # local | sync | frozen
    clip_norm: float | None = None
    precision: str = "float32"  # float32 | bfloat16 | float16
    channels_last: bool = False
    compile: bool = False
    workers: int = 4
    log_every: int = 20
    save_every: int = 500
    keep: int = 3  # checkpoints
    tensorboard: bool = True
    max_bad_items: int = 0  # unreadable draws replaced before the run stops
    boundaries: str | None = None  # region boundaries per frame, from keypoints
    data: Any = MISSING
    model: Any = MISSING
    draws: Any = MISSING
    transform: Any = MISSING
    loss: Any = MISSING
    optim: Any = MISSING
    schedule: Any = MISSING


ConfigStore.instance().store("rqen_train_schema", TrainConfig)


def train(cfg: TrainConfig) -> dict[str, float]:
    """Run, or continue, the training described by `cfg`; returns the last logged metrics.

    Raises:
        InputError: the data or a setting is not usable; the message names it.
        FloatingPointError: the loss is no number; the last checkpoint is from before.
    """
    world = dist.init(cfg.device)
    _check(cfg, world)
    data: ReidData = instantiate(cfg.data)
    transform, objective = instantiate(cfg.transform), instantiate(cfg.loss)
    draws = _draws(cfg, data, transform)
    seed_everything(cfg.seed)  # every rank builds the same model
    model = _model(cfg, data.num_classes, world)
    optimizer = _call(cfg, "optim", model)
    schedule = _call(cfg, "schedule", optimizer)
    seed_everything(cfg.seed, world.rank)  # and then draws its own dropout
    sampler = ResumableSampler(
        len(draws), seed=cfg.seed, rank=world.rank, world=world.size, shuffle=False
    )
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.precision == "float16")
    checkpoint = Checkpointer(
        Path(cfg.run_dir) / "checkpoints", model, optimizer, keep=cfg.keep,
        sampler=sampler, schedule=schedule, scaler=scaler,
    )  # fmt: skip
    start = checkpoint.resume()
    described = OmegaConf.to_container(cfg, resolve=True)
    described |= {"train_set": data.name, "num_classes": data.num_classes}  # type: ignore[operator]
    loader = iter(_loader(cfg, draws, sampler, world))
    wrapped = _distributed(model, world).train()
    speed, last = Throughput(), {}
    with (
        MetricLogger(Path(cfg.run_dir), world.main, cfg.tensorboard) as log,
        progress(world.main) as bar,
    ):
        rundir.prepare(Path(cfg.run_dir), described, world.main)  # type: ignore[arg-type]
        task = bar.add_task(Path(cfg.run_dir).name, total=cfg.steps, completed=start)
        for step in range(start + 1, cfg.steps + 1):
            loss, parts = train_step(
                wrapped, next(loader), transform, objective, world.device, cfg.precision
            )
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
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
            save = step % cfg.save_every == 0 or step == cfg.steps or stop
            if step % cfg.log_every == 0 or save:
                last = _measure(step, loss, parts, norm, optimizer, draws.bad_items, speed)
                log.log(step, **last)
            if save:
                checkpoint.save(step)
            if stop:
                break
    dist.shutdown()
    return last


def _check(cfg: TrainConfig, world: dist.World) -> None:
    if cfg.global_batch < 1 or cfg.global_batch % world.size:
        raise InputError(
            "global_batch", f"does not divide over {world.size} ranks", cfg.global_batch
        )
    if cfg.batch_norm not in ("local", "sync", "frozen"):
        raise InputError("batch_norm", "must be one of local, sync, frozen", cfg.batch_norm)
    for name in ("steps", "log_every", "save_every", "keep"):
        if getattr(cfg, name) < 1:
            raise InputError(name, "must be at least 1", getattr(cfg, name))
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


def _draws(cfg: TrainConfig, data: ReidData, transform: Any) -> Any:
    table = None
    if cfg.boundaries is not None:
        table = load_boundaries(cfg.boundaries, cfg.data.root)
    return _call(
        cfg, "draws", data.train, transform,
        seed=cfg.seed, boundaries=table, max_bad_items=cfg.max_bad_items,
    )  # fmt: skip


def _model(cfg: TrainConfig, num_classes: int, world: dist.World) -> nn.Module:
    model: nn.Module = _call(cfg, "model", num_classes=num_classes)
    if cfg.init is not None:
        load_initial(model, Path(cfg.init))
    if cfg.batch_norm == "sync":
        model = use_sync_bn(model, world.device)
    elif cfg.batch_norm == "frozen":
        model = freeze_bn(model)
    layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
    model.to(world.device).to(memory_format=layout)
    if cfg.compile:
        model.compile()
    return model


def _distributed(model: nn.Module, world: dist.World) -> nn.Module:
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def _loader(
    cfg: TrainConfig, draws: Any, sampler: ResumableSampler, world: dist.World
) -> DataLoader[Any]:
    return DataLoader(
        draws,
        batch_size=cfg.global_batch // world.size,
        sampler=sampler,
        num_workers=cfg.workers,
        worker_init_fn=worker_init,
        pin_memory=world.device.type == "cuda",
        # Its own generator: starting a loader must not move the stream that dropout draws from.
        generator=torch.Generator().manual_seed(cfg.seed),
    )


def _measure(
    step: int,
    loss: Tensor,
    parts: dict[str, Tensor],
    norm: Tensor,
    optimizer: torch.optim.Optimizer,
    bad_items: int,
    speed: Throughput,
) -> dict[str, float]:
    """Means over the ranks; stops a run whose loss is no number before it is saved."""
    values = {"loss": loss.item(), "grad_norm": norm.item()}
    values |= {name: value.item() for name, value in parts.items()}
    values = dist.mean_over_ranks(values)
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"loss is {values['loss']} at step {step}; parts: {values}")
    values["lr"] = optimizer.param_groups[0]["lr"]
    values["draws_per_s"] = speed.rate()
    if bad_items:
        values["bad_items"] = bad_items
    return values


@hydra.main(version_base=None, config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    setup_logging(dist.init(cfg.device).rank)
    train(cfg)  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
