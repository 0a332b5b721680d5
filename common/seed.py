"""Seeds and states of the random generators of a process.

A DataLoader without a `generator` draws a number from the global torch generator when its
iterator starts. A run that must continue exactly gives it one of its own:
`DataLoader(..., generator=torch.Generator(), worker_init_fn=worker_init)`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, numpy and torch (all devices); each (seed, rank) gets streams of its own.

    Seed before the model is built with rank 0 everywhere when all ranks must start alike.

    Raises:
        ValueError: seed or rank is negative.
    """
    if seed < 0 or rank < 0:
        raise ValueError(f"seed={seed} and rank={rank} must not be negative")
    words = np.random.SeedSequence([seed, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - third parties draw from the global generator
    torch.manual_seed(int(words[2]))


def worker_init(worker_id: int) -> None:
    """Start a DataLoader worker: seed Python and numpy, one OpenCV thread, deaf to a job's SIGTERM.

    torch has seeded itself by then, differently for each worker and epoch. A cluster that ends a
    job signals all its processes; the trainer still needs its workers then, up to its last save.
    """
    words = np.random.SeedSequence([torch.initial_seed(), worker_id]).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - as above
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(0)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """End a worker when its own trainer asks: ignoring that signal would keep it for ever."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def rng_state() -> dict[str, Any]:
    """States of the Python, numpy, torch and (when used) current CUDA generators, fit for JSON."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - as above
    version, internal, following = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), following],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; a CUDA state is passed over on a machine without one."""
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    keys = np.asarray(keys, dtype=np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, gauss))  # noqa: NPY002 - as above
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
