"""How the tests start entry points: in this process, in one of their own, or under torchrun.

`python -m detection_tsd.tests.launch N key=value ...` trains and dies by SIGKILL at the N-th
flush or rename of a file, that is, in the middle of a save.
"""

import io
import logging
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from safetensors.torch import load_file

import detection_tsd.evaluate
import detection_tsd.train
from common.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "detection_tsd" / "configs"
TIMEOUT_S = 180.0


def config(name: str, *words: str, **options: Any) -> DictConfig:
    """The configuration an entry point would get from the command line `words`."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return compose(name, list(words), **options)


def train(*words: str) -> dict[str, float]:
    return detection_tsd.train.train(config("train", "device=cpu", *words))  # type: ignore[arg-type]


def evaluate(*words: str) -> dict[str, Any]:
    cfg = config("eval", "device=cpu", "workers=0", *words)
    return detection_tsd.evaluate.evaluate(cfg)  # type: ignore[arg-type]


class Ended(NamedTuple):
    """What a command left behind; `code` is 0 when it returned."""

    code: Any
    out: str
    err: str


def command(module: str, *words: str) -> Ended:
    """`python -m module` in this process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    GlobalHydra.instance().clear()
    code: Any = 0
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", ".*found in sys.modules")  # the tests import it as well
        patch.setattr(sys, "argv", [module, *words])
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        finally:
            root.handlers[:], root.level = handlers, level
    return Ended(code, out.getvalue(), err.getvalue())


def start(module: str, *words: str, ranks: int = 0) -> subprocess.Popen[str]:
    """`python -m module`, with `ranks` under torchrun; a session and process group of its own."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    threads = torch.get_num_threads()  # sums depend on it in their last bit
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    environment.pop("HYDRA_FULL_ERROR", None)
    return subprocess.Popen(
        [sys.executable, "-m", *(launcher if ranks else []), module, *words],
        cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> Ended:
    """Wait for the end; the whole group is gone afterwards."""
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        kill_group(process)
    return Ended(process.returncode, out, err)


def kill_group(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def rows(run: Path) -> list[dict[str, Any]]:
    """Logged metrics, the last row of each step, without what a clock decides."""
    found = read_metrics(run / "metrics.jsonl")
    return [{key: row[key] for key in row if key != "images_per_s"} for row in found]


def saved(run: Path, step: int | None = None) -> dict[str, Any]:
    """Everything a checkpoint holds, the newest by default: tensors, position, generators."""
    folders = (run / "checkpoints").iterdir()
    folder = max(folders) if step is None else run / "checkpoints" / f"step_{step:08d}"
    found: dict[str, Any] = {"step": folder.name}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":  # its header is written in an order that varies
            found |= {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
        elif path.name != "manifest.json":
            found[path.name] = path.read_bytes()
    return found


def _die_in_save(call: int) -> None:
    left = [call]

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **named)

        return act

    os.fsync, os.rename = deadly(os.fsync), deadly(os.rename)


if __name__ == "__main__":
    _die_in_save(int(sys.argv.pop(1)))
    runpy.run_module("detection_tsd.train", run_name="__main__")
