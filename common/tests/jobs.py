"""Programs the tests run in processes of their own: `python -m common.tests.jobs NAME ARGS`."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from common import checkpoint, dist
from common.checkpoint import Checkpointer
from common.log import MetricLogger
from common.samplers import ResumableSampler
from common.seed import seed_everything

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 180.0


def launch(job: str, *words: object, ranks: int = 1) -> list[subprocess.CompletedProcess]:
    """Run a job on so many gloo ranks (no group for one); kills all of them at the timeout."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "common.tests.jobs", job, *map(str, words)]
    running = []
    for rank in range(ranks):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), **group} if ranks > 1 else {}
        full = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **mine}
        pipe = subprocess.PIPE
        running.append(
            subprocess.Popen(command, cwd=ROOT, env=full, stdout=pipe, stderr=pipe, text=True)
        )
    try:
        texts = [one.communicate(timeout=TIMEOUT_S) for one in running]
    finally:
        for one in running:
            one.kill()
    return [
        subprocess.CompletedProcess(command, one.returncode, *text)
        for one, text in zip(running, texts, strict=True)
    ]


def results(done: list[subprocess.CompletedProcess]) -> list[dict[str, Any]]:
    """What each rank printed as JSON on its last line; fails with the stderr of a failed one."""
    for one in done:
        assert one.returncode == 0, f"{one.returncode}: {one.stdout[-300:]} {one.stderr[-3000:]}"
    return [json.loads(one.stdout.splitlines()[-1]) for one in done]


class Training:
    """A toy training with everything a checkpoint has to carry."""

    def __init__(self, folder: Path, wrap: Callable[[nn.Module], nn.Module] = lambda net: net):
        torch.set_num_threads(1)
        seed_everything(5)
        net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1)
        )
        self.data_N6 = torch.randn(64, 6)
        self.net = wrap(net)
        seed_everything(5, dist.rank())
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.05)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [7, 13])
        self.sampler = ResumableSampler(64, seed=1, rank=dist.rank(), world=dist.size())
        self.folder = folder
        self.checkpoint = Checkpointer(
            folder / "checkpoints",
            self.net,
            self.optimizer,
            keep=2,
            sampler=self.sampler,
            schedule=self.schedule,
        )

    def step(self, image_B6: Tensor) -> float:
        loss = (self.net(image_B6).squeeze(1) - image_B6.sum(dim=1)).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def run(self, steps: int, kill_at: int = -1) -> int:
        """Resume, then train up to `steps`; returns the step it started from."""
        start = self.checkpoint.resume()
        order = iter(self.sampler)
        with MetricLogger(self.folder, dist.rank() == 0, tensorboard=False) as log:
            for step in range(start + 1, steps + 1):
                rows = [next(order) for _ in range(8 // dist.size())]
                loss = self.step(self.data_N6[rows])
                self.sampler.consumed += 8
                log.log(step, **dist.mean_over_ranks({"loss": loss}))
                if step == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if step % 5 == 0 or step == steps:
                    self.checkpoint.save(step)
        return start

    def weights(self) -> dict[str, list[Any]]:
        state = checkpoint.dcp_state.get_model_state_dict(self.net)
        full = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in state.items()}
        return {key: value.tolist() for key, value in full.items()}


def kill_in_save(call: int) -> None:
    """SIGKILL at the n-th fsync or rename of the process."""
    left = [call]

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **named)

        return act

    os.fsync = deadly(os.fsync)
    os.rename = deadly(os.rename)  # pathlib calls it through the module


def train(folder: str, steps: str, kill_at: str = "-1", kill_call: str = "-1") -> dict[str, Any]:
    if int(kill_call) > 0:
        kill_in_save(int(kill_call))
    training = Training(Path(folder))
    return {"start": training.run(int(steps), int(kill_at)), "weights": training.weights()}


def gather() -> dict[str, Any]:
    """Every collective of `dist` on uneven shares; rank r has r rows."""
    rank = dist.rank()
    rows = {
        str(dtype): dist.gather_rows(torch.full((rank, 2), rank, dtype=dtype)).tolist()
        for dtype in (torch.bool, torch.int64, torch.float16, torch.uint8, torch.float64)
    }
    flat = dist.gather_rows(torch.arange(3 - 2 * rank) + 10 * rank).tolist()
    unknown = dist.gather_rows(torch.ones(2, 3) if rank else torch.empty(0)).shape
    empty = dist.gather_rows(torch.empty(0, 4, dtype=torch.int16))
    wide = dist.gather_rows(torch.empty(2, 0)).shape
    seen = {"rows": rows, "flat": flat, "unknown": list(unknown), "wide": list(wide)}
    seen |= {"empty": [list(empty.shape), str(empty.dtype)]}
    seen |= {"mean": dist.mean_over_ranks({"a": 0.1 * (rank + 1), "b": 1 + rank * 2e-12})}
    seen |= {"objects": dist.gather_objects({"rank": rank}), "any": dist.any_rank(rank == 1)}
    seen |= {"none": dist.any_rank(False), "sent": dist.broadcast_object(rank, src=1)}
    seen["errors"] = [
        complaint(lambda: dist.gather_rows(torch.ones(1, 2 + rank))),
        complaint(lambda: dist.gather_rows(torch.tensor(1.0))),
        complaint(lambda: dist.mean_over_ranks({str(rank): 1.0})),
        complaint(lambda: dist.together(lambda: 1 // rank)),
        complaint(lambda: dist.together(lambda: 1 // 0, main_only=True)),
    ]
    return seen


def collectives(folder: str) -> dict[str, Any]:
    """The main rank is slow to write what the other one reads at once; then the rest of `dist`."""
    file = Path(folder) / "cache"
    with dist.main_first():
        if dist.rank() == 0:
            time.sleep(0.5)
            file.write_text("ready")
        text = file.read_text()
    return {"text": text, **gather()}


def complaint(action: Callable[[], object]) -> str:
    try:
        action()
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def sharded(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net, mesh=td.device_mesh.init_device_mesh("cpu", (dist.size(),)))
    return net


def replicated(net: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)


def disk_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def two_ranks(folder: str, from_one: str) -> dict[str, Any]:
    """DDP and FSDP2: stop and go, a full disk on one rank, a save of one process, SIGTERM."""
    import safetensors.torch

    seen: dict[str, Any] = {}
    for name, wrap in (("ddp", replicated), ("fsdp", sharded)):
        top = Path(folder) / name
        whole = Training(top / "whole", wrap)
        whole.run(20)
        Training(top / "halves", wrap).run(10)
        second = Training(top / "halves", wrap)
        start = second.run(20)
        seen[name] = {"start": start, "same": whole.weights() == second.weights()}
        seen[name]["weights"] = second.weights()
        write, save = checkpoint.write_text, safetensors.torch.save
        if dist.rank() == 1:
            checkpoint.write_text = disk_full
            safetensors.torch.save = disk_full
        seen[name]["full"] = complaint(lambda run=second: run.checkpoint.save(21))
        checkpoint.write_text, safetensors.torch.save = write, save
        dist.barrier()
        seen[name]["left"] = sorted(p.name for p in (top / "halves/checkpoints").iterdir())
        other = Training(Path(from_one), wrap)
        seen[name]["from_one"] = [
            other.checkpoint.resume(),
            other.weights(),
            other.sampler.consumed,
        ]
        seen[name]["draw"] = torch.rand(()).item()
    before = other.checkpoint.stop_requested
    if dist.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return seen | {"stop": [before, other.checkpoint.stop_requested]}


if __name__ == "__main__":
    dist.init("cpu", timeout_s=60)
    jobs = {"train": train, "collectives": collectives, "two_ranks": two_ranks}
    sys.stdout.write(json.dumps(jobs[sys.argv[1]](*sys.argv[2:])) + "\n")
    sys.stdout.flush()
    dist.barrier()
    dist.shutdown()
    # Threads of gloo that are still running while the interpreter is torn down can abort it.
    os._exit(0)
