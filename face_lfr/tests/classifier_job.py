"""Ranks of the classifier's tests: `python -m face_lfr.tests.classifier_job FOLDER`.

One process imports torch and forks the ranks, first four of them, then two. Each group works
through the same list as `everything` does in one process, and its main rank writes what it found
to FOLDER/<ranks>.safetensors. All in float64, so that only a wrong rule makes a difference.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import dist
from common.checkpoint import Checkpointer
from common.seed import seed_everything
from face_lfr import shards
from face_lfr.classifier import Classifier, class_means
from face_lfr.margins import AdaCos, ArcFace, ArcNegFace, CurricularFace, Softmax
from face_lfr.optim import ShardScaler, sgd
from face_lfr.shards import local_rows
from face_lfr.weights import Trainee

CLASSES = 103  # 26 + 26 + 26 + 25 on four ranks
FEATURES = 16
BATCH = 8
TIMEOUT_S = 150.0
STEPS = 3  # before a checkpoint, and after it

# Arguments of a classifier by name of the case.
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "arcface": lambda: {"margin": ArcFace()},
    "arcnegface": lambda: {"margin": ArcNegFace()},
    "smoothing": lambda: {"margin": ArcNegFace(), "smoothing": 0.1},
    "subcentres": lambda: {"margin": ArcFace(), "centers": 3},
    "softmax": lambda: {"margin": Softmax(), "initial": "uniform"},
    "curricular": lambda: {"margin": CurricularFace()},
    "adacos": lambda: {"margin": AdaCos()},
    "regular": lambda: {"margin": ArcFace(), "regular": 2.0},
    "sampled": lambda: {"margin": ArcNegFace(), "sample_rate": 0.3},
    "sampled_all": lambda: {"margin": ArcFace(), "sample_rate": 0.9999},
    "sampled_softmax": lambda: {"margin": Softmax(), "sample_rate": 0.3},
    "sampled_regular": lambda: {"margin": ArcFace(), "sample_rate": 0.3, "regular": 2.0},
    "sampled_subcentres": lambda: {"margin": ArcFace(), "sample_rate": 0.3, "centers": 2},
    # Two classes for four ranks: two of these have none.
    "few": lambda: {"margin": ArcNegFace(), "num_classes": 2, "smoothing": 0.1},
}
CONTINUED = {
    "plain": lambda: {"margin": ArcNegFace(), "smoothing": 0.1},
    "state": lambda: {"margin": CurricularFace(), "sample_rate": 0.3, "centers": 2},
    "few": lambda: {"margin": Softmax(), "num_classes": 2},
}


def classifier(world: dist.World | None, named: dict[str, Any]) -> Classifier:
    sizes = {"features": FEATURES, "num_classes": CLASSES, "world": world, "seed": 3}
    return Classifier(**(sizes | named)).double()


def labels(kind: str, classes: int) -> Tensor:
    """Of a global batch: anywhere; all on one rank; on the last one, with doubles."""
    generator = torch.Generator().manual_seed(11)
    low = {"spread": 0, "first": 0, "last": classes - classes // 5}[kind]
    high = classes // 5 if kind == "first" else classes
    return torch.randint(low, max(high, 1), (BATCH,), generator=generator)


def features(step: int = 0) -> Tensor:
    return torch.randn(BATCH, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def network() -> nn.Module:
    seed_everything(5)
    return nn.Linear(6, FEATURES).double()


def wrapped(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net) if dist.size() > 1 else net


def mine(rows: Tensor) -> Tensor:
    """This rank's share of a global batch."""
    return rows.chunk(dist.size())[dist.rank()]


def whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def gradients(world: dist.World | None, named: dict[str, Any], kind: str) -> dict[str, Tensor]:
    """Loss, and gradients of the network, the features and the classifier, for a global batch.

    The gradient of sampled rows is told by the step of an optimizer with rate 1.
    """
    net, objective = network(), classifier(world, named)
    label_B = mine(labels(kind, objective.num_classes))
    before = {name: whole(value) for name, value in objective.named_parameters()}
    optimizer = sgd(net, objective, lr=1.0, momentum=0.9, weight_decay=0.0)
    ddp = wrapped(net)
    feature_BD = ddp(mine(features()))
    feature_BD.retain_grad()
    loss = objective(feature_BD, label_B)
    loss.backward()
    found = {"loss": loss.detach(), "network": net.weight.grad.clone()}
    found["feature"] = dist.gather_rows(feature_BD.grad / dist.size())
    optimizer.step()
    for name, value in objective.named_parameters():
        found[f"step.{name}"] = before[name] - whole(value)
    found |= {f"buffer.{name}": whole(value) for name, value in objective.named_buffers()}
    return found | {"centres": objective.centres()}


class Training:
    """Network and classifier with momentum, saved and resumed."""

    def __init__(self, folder: Path, world: dist.World | None, named: dict[str, Any]):
        net = network()
        self.objective = classifier(world, named)
        self.optimizer = sgd(net, self.objective, lr=0.1, decay_norm=False)
        self.trainee = Trainee(net, self.objective)
        self.checkpoint = Checkpointer(folder, self.trainee, self.optimizer)
        self.net = net

    def run(self, first: int, steps: int) -> list[float]:
        ddp, found = wrapped(self.net), []
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(100 + step)
            label_B = torch.randint(0, self.objective.num_classes, (BATCH,), generator=generator)
            self.optimizer.zero_grad()
            for part in range(2):  # a step of two batches, which sample different classes
                feature_BD = ddp(mine(features(2 * step + part)))
                loss = self.objective(feature_BD, mine(label_B)) / 2
                loss.backward()
                found.append(loss.item())
            self.optimizer.step()
        return found

    def state(self) -> dict[str, Tensor]:
        weights = {name: whole(value) for name, value in self.trainee.state_dict().items()}
        moments = {
            f"momentum.{name}": whole(self.optimizer.state[value]["momentum_buffer"])
            for name, value in self.trainee.named_parameters()
        }
        return weights | moments


def continued(folder: Path, world: dist.World | None, named: dict[str, Any]) -> dict[str, Tensor]:
    """Losses and state after the second half of a training; four ranks write the first half."""
    if dist.size() == 4:
        first = Training(folder, world, named)
        first.run(0, STEPS)
        first.checkpoint.save(STEPS)
        straight = first.run(STEPS, STEPS)
    training = Training(folder, world, named)
    assert training.checkpoint.resume() == STEPS
    losses = training.run(STEPS, STEPS)
    if dist.size() == 4:
        assert losses == straight, (losses, straight)
    return {"losses": torch.tensor(losses, dtype=torch.float64)} | training.state()


def anchors(world: dist.World | None) -> dict[str, Tensor]:
    """Class means of batches that the ranks have unequally many of, and centres turned to them."""
    objective = classifier(world, {"margin": ArcFace()})
    generator = torch.Generator().manual_seed(8)
    feature_N6 = torch.randn(40, FEATURES, generator=generator)
    label_N = torch.randint(0, CLASSES, (40,), generator=generator)
    batches = list(zip(feature_N6.split(7), label_N.split(7), strict=True))
    mean_SD = class_means(batches[dist.rank() :: dist.size()], objective)
    objective.anchor(mean_SD)
    return {"mean": dist.gather_rows(mean_SD), "weight": whole(objective.weight)}


def scaled(world: dist.World | None, rate: float) -> dict[str, Tensor]:
    """Three steps with a scaled loss; on the second the gradient of the last rank overflows."""
    net, objective = network(), classifier(world, {"margin": ArcFace(), "sample_rate": rate})
    optimizer, scaler = sgd(net, objective), ShardScaler("cpu", init_scale=1024.0)
    ddp, moved = wrapped(net), []
    for step in range(3):
        before = whole(objective.weight)
        optimizer.zero_grad()
        loss = objective(ddp(mine(features(step))), mine(labels("last", CLASSES)))
        scaler.scale(loss).backward()
        if step == 1 and dist.rank() == dist.size() - 1:
            leaf = objective.sampled[0][2] if rate < 1 else objective.weight
            local_rows(leaf.grad)[-1] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(before, whole(objective.weight)))
    found = {"moved": torch.tensor(moved), "scale": torch.tensor(scaler.get_scale())}
    return found | {"weight": whole(objective.weight), "network": net.weight.detach()}


def kinds(name: str) -> tuple[str, ...]:
    every = ("arcface", "arcnegface", "smoothing", "sampled", "regular")
    return ("spread", "first", "last") if name in every else ("spread",)


def everything(folder: Path, world: dist.World | None = None) -> dict[str, Tensor]:
    """All results of this number of ranks by the name of the case."""
    found: dict[str, Tensor] = {}
    for name, named in CASES.items():
        for kind in kinds(name):
            results = gradients(world, named(), kind)
            found |= {f"{name} {kind} {key}": value for key, value in results.items()}
    for name, named in CONTINUED.items():
        results = continued(folder / name, world, named())
        found |= {f"continued {name} {key}": value for key, value in results.items()}
    for rate in (1.0, 0.3):
        found |= {f"scaled {rate} {key}": value for key, value in scaled(world, rate).items()}
    return found | {f"anchors {key}": value for key, value in anchors(world).items()}


def rank_main(rank: int, ranks: int, port: int, folder: Path) -> None:
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
    world = dist.init("cpu", timeout_s=60)
    shards.TILE = (7, 11)  # so that RegularFace sees several tiles of every peer
    found = everything(folder, world)
    if world.main:
        ready = {name: value.contiguous().clone() for name, value in found.items()}
        save_file(ready, folder / f"{ranks}.safetensors")
    dist.barrier()
    dist.shutdown()


def fork(ranks: int, folder: Path) -> None:
    """Run a group to its end; none of it is left when one of it fails or the time is up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running: dict[int, int] = {}
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                rank_main(rank, ranks, port, folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        running[process] = rank
    end = time.monotonic() + TIMEOUT_S
    while running:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            running.pop(process)
        if status or time.monotonic() > end:
            for other in running:
                os.kill(other, signal.SIGKILL)
            sys.exit(f"a rank of {ranks} ended with {status}, or ran out of time")
        time.sleep(0.01)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in (4, 2):
        fork(size, Path(sys.argv[1]))
