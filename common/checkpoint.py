"""Checkpoints: sharded, atomic, verified, readable on another number of ranks, free of pickles.

A checkpoint is a folder `step_XXXXXXXX`:

    shard-*.safetensors   tensors, each rank its own part (torch.distributed.checkpoint)
    state.json            everything that is not a tensor, and where the tensors belong
    rank_XXXXX.json       states of the random generators, one file a rank
    manifest.json         step, rank count, size and SHA-256 of the files above, and of itself

Written as `step_XXXXXXXX.tmp`, renamed when complete and on the disk. An older folder of the same
step is `.old` for the moment between two renames; a reader that finds it alone takes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickletools
import re
import shutil
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as td
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from common import dist, seed
from common.log import InputError, get_logger
from common.rundir import fingerprint, sync_folder, write_text

_NAME = re.compile(r"step_(\d{8,})(\.old)?")
_PICKLE = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
Tensors = Mapping[str, Tensor]
_live: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


class Checkpointer:
    """Saves and resumes a training. All ranks call its methods, at the same steps.

    Works for a plain module, DDP and FSDP2, on any number of ranks; a save of N ranks resumes on
    M. While a Checkpointer exists SIGTERM does not end the process: see `stop_requested`.

    Args:
        folder: holds the `step_XXXXXXXX` folders; on storage that all ranks see.
        model: parameters and buffers are saved; buffers are those of rank 0.
        optimizer: its state and parameter groups are saved.
        keep: how many complete checkpoints stay, at least 1.
        stateful: objects with `state_dict` and `load_state_dict` (sampler, schedule, average of
            weights); their state, equal on all ranks or DTensors, is built of dicts, lists,
            tuples, tensors, arrays, numbers, strings and None.

    Raises:
        ValueError: `keep` is below 1.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        keep: int = 3,
        **stateful: Any,
    ):
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1")
        self.folder, self.model, self.optimizer = Path(folder), model, optimizer
        self.keep, self.stateful = keep, stateful
        self._broken: set[Path] = set()
        self._stop = False
        _live.add(self)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _on_sigterm)

    @property
    def stop_requested(self) -> bool:
        """Whether a rank received SIGTERM. A collective: every rank asks at the same step."""
        return dist.any_rank(self._stop)

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`, then delete the oldest ones beyond `keep`.

        Raises:
            OSError: the disk failed (full, gone), on every rank; older checkpoints are untouched.
            ValueError, RuntimeError: a state cannot be stored.
        """
        final = self.folder / f"step_{step:08d}"
        part = final.with_name(final.name + ".tmp")
        try:
            dist.together(lambda: self._make_room(part), main_only=True)
            dist.together(lambda: self._write(part))
            dist.together(lambda: _publish(part, final, step), main_only=True)
        except BaseException:
            if dist.rank() == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise
        self._broken.discard(final)
        dist.together(lambda: self._prune(step), main_only=True)

    def _make_room(self, part: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("step_*.*"):  # of a process that died
            if left.suffix == ".tmp" or left.with_suffix("").exists():
                shutil.rmtree(left)
        part.mkdir()

    def _write(self, part: Path) -> None:
        """This rank's files."""
        tensors: dict[str, Tensor] = {}
        tree = _split(self._state(), "", tensors)
        writer = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)
        # Buffers may differ between ranks (running statistics): all must come from the same one.
        planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        _collective(dcp.save, _storable(tensors), storage_writer=writer, planner=planner)
        write_text(part / f"rank_{dist.rank():05d}.json", json.dumps(seed.rng_state()))
        if dist.rank() == 0:
            write_text(part / "state.json", json.dumps(tree))

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"model": dcp_state.get_model_state_dict(self.model)}
        if self.optimizer is not None:
            untouched = not self.optimizer.state
            state["optimizer"] = dcp_state.get_optimizer_state_dict(self.model, self.optimizer)
            if untouched:
                # torch takes a step to have a state to return; that state must not stay.
                self.optimizer.state.clear()
                state["optimizer"]["state"] = {}
        return state | {name: item.state_dict() for name, item in self.stateful.items()}

    def _prune(self, step: int) -> None:
        """Delete what is older than the newest `keep` good ones; steps after this one stay."""
        found = _folders(self.folder)
        good = [p for p in found if p not in self._broken and _step(p) <= step][: self.keep]
        for path in found:
            if _step(path) < _step(good[-1]):
                shutil.rmtree(path)

    def resume(self) -> int:
        """Load the newest good checkpoint; returns its step, or 0 when there is none at all.

        A checkpoint with a missing, short or changed file is named in a warning and passed over.
        The random generators continue where they were when the rank count is the same, else each
        rank gets a stream that follows from the saved one and its rank.

        Raises:
            InputError: none is intact; one holds a pickle; one does not fit the model, the
                optimizer or the stateful objects.
        """
        path, self._broken = dist.together(lambda: _choose(self.folder), main_only=True)
        if path is None:
            return 0
        parts = {name: item.state_dict() for name, item in self.stateful.items()}
        wanted = ["optimizer", *parts] if self.optimizer is not None else list(parts)
        state = _read(path, self.model, parts, wanted, ())
        self._load_optimizer(path, state.get("optimizer"))
        for name, item in self.stateful.items():
            item.load_state_dict(state[name])
        same = _manifest(path)["world"] == dist.size()
        generators = path / f"rank_{dist.rank() if same else 0:05d}.json"
        seed.set_rng_state(json.loads(generators.read_text()))
        if not same:
            seed.seed_everything(int(torch.randint(2**31, ())), dist.rank())
        return _step(path)

    def _load_optimizer(self, path: Path, state: dict[str, Any] | None) -> None:
        if self.optimizer is None or state is None:
            return
        saved = [len(group["params"]) for group in state["param_groups"]]
        mine = [len(group["params"]) for group in self.optimizer.param_groups]
        if saved != mine:
            raise InputError(path, f"parameter groups have sizes {saved}, the optimizer's", mine)
        # Not strict: a parameter that never had a gradient has no state.
        options = dcp_state.StateDictOptions(strict=False)
        dcp_state.set_optimizer_state_dict(self.model, self.optimizer, state, options=options)


def newest(folder: Path) -> Path | None:
    """The checkpoint of the greatest step in `folder` that was completely written."""
    return next((path for path in _folders(folder) if (path / "manifest.json").exists()), None)


def load_model(path: Path, model: nn.Module, ignore: tuple[str, ...] = ()) -> int:
    """Load the weights of a `step_XXXXXXXX` folder; returns its step. All ranks call it.

    Stored weights whose name begins with one of `ignore` need no place in the model: parts that
    only training has.

    Raises:
        InputError: the checkpoint is missing or broken, holds a pickle, or does not fit the model.
    """
    path = Path(path)
    if not (_NAME.fullmatch(path.name) and path.is_dir()):
        raise InputError(path, "is not a checkpoint folder step_XXXXXXXX")
    for name, what in dist.together(lambda: _flaws(path), main_only=True).items():
        raise InputError(path / name, what)
    _read(path, model, {}, [], ignore)
    return _step(path)


def _on_sigterm(number: int, _frame: object) -> None:
    if not _live:  # the training is over: what follows need not survive
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    for checkpointer in _live:
        checkpointer._stop = True


def _split(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON form of a state; its tensors go into `tensors` under their path."""
    if isinstance(node, Mapping):
        return {"dict": [[k, _split(v, f"{path}/{k}", tensors)] for k, v in node.items()]}
    if isinstance(node, list | tuple):
        kind = "tuple" if isinstance(node, tuple) else "list"
        return {kind: [_split(v, f"{path}/{i}", tensors) for i, v in enumerate(node)]}
    if isinstance(node, np.ndarray | Tensor):
        tensors[path] = node if isinstance(node, Tensor) else torch.tensor(node)
        return {"tensor" if isinstance(node, Tensor) else "array": path}
    if node is None or isinstance(node, bool | int | float | str | np.generic):
        return node.item() if isinstance(node, np.generic) else node
    raise ValueError(f"{path}: a {type(node).__name__} cannot be stored in a checkpoint")


def _join(node: Any, tensors: Tensors) -> Any:
    """Inverse of `_split`."""
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "dict":
        return {key: _join(item, tensors) for key, item in value}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_join(item, tensors) for item in value)
    return tensors[value].numpy() if kind == "array" else tensors[value]


def _storable(tensors: Tensors) -> dict[str, Tensor]:
    """Contiguous, and no two in one storage (tied weights), as the file format asks."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, tensor in tensors.items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        place = local.untyped_storage().data_ptr()
        whole = tensor.detach().contiguous()
        ready[path] = whole.clone() if place in seen else whole
        seen.add(place)
    return ready


def _read(
    path: Path, model: nn.Module, parts: dict[str, Any], wanted: list[str], ignore: tuple[str, ...]
) -> dict[str, Any]:
    """Load the model in place; return the other wanted parts, like the live `parts` if given."""
    live: dict[str, Tensor] = {}
    _split({"model": dcp_state.get_model_state_dict(model), **parts}, "", live)
    tree = dict(json.loads((path / "state.json").read_text())["dict"])
    if missing := ", ".join(name for name in wanted if name not in tree):
        raise InputError(path, "holds no state of", missing)
    reader = dcp.HuggingFaceStorageReader(str(path))
    stored = cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)
    stored = {k: x for k, x in stored.items() if not k.removeprefix("/model/").startswith(ignore)}
    tree["model"] = {"dict": [w for w in tree["model"]["dict"] if not w[0].startswith(ignore)]}
    _check_fit(path, stored, live)
    used = {"model", *wanted}
    targets = {k: _target(k, entry, live) for k, entry in stored.items() if k.split("/")[1] in used}
    _collective(dcp.load, targets, storage_reader=reader)
    state = {name: _join(tree[name], targets) for name in used}
    dcp_state.set_model_state_dict(model, state.pop("model"))
    return state


def _check_fit(path: Path, stored: Mapping[str, TensorStorageMetadata], live: Tensors) -> None:
    saved = {key: tuple(x.size) for key, x in stored.items() if key.startswith("/model/")}
    mine = {key: tuple(x.shape) for key, x in live.items() if key.startswith("/model/")}
    for key in sorted(saved.keys() | mine.keys()):
        shape, wanted = saved.get(key, "absent"), mine.get(key, "absent")
        if shape != wanted:
            name = key.removeprefix("/model/")
            raise InputError(path, f"{name} is {shape} here, and in the model", wanted)


def _target(key: str, entry: TensorStorageMetadata, live: Tensors) -> Tensor:
    """Where a stored tensor is read to: like the live one, so sharded when that is sharded."""
    like, dtype = live.get(key), entry.properties.dtype
    if like is not None and like.shape == entry.size and like.dtype == dtype:
        return like
    if key.startswith("/optimizer/state/"):
        like = live.get("/model/" + key.removeprefix("/optimizer/state/").rpartition("/")[0])
    # Without a dimension it may be a step count, which stays on the CPU.
    if like is not None and like.shape == entry.size and like.dim():
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=dtype)


def _collective(action: Callable[..., Any], *args: Any, **named: Any) -> None:
    """Run `dcp.save` or `dcp.load`; raises the error of the disk rather than a report on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            action(*args, **named, no_dist=not td.is_initialized())
        except dcp.CheckpointException as failed:
            causes = (c for c, _ in failed.failures.values() if isinstance(c, OSError))
            raise next(causes, failed) from None


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, greatest step first; an `.old` one only when it is alone."""
    found = {p for p in Path(folder).glob("step_*") if _NAME.fullmatch(p.name) and p.is_dir()}
    shown = [p for p in found if p.suffix != ".old" or p.with_suffix("") not in found]
    return sorted(shown, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removesuffix(".old").removeprefix("step_"))


def _publish(part: Path, final: Path, step: int) -> None:
    files = {path.name: fingerprint(path) for path in part.iterdir()}
    content = {"step": step, "world": dist.size(), "files": files}
    manifest = json.dumps({"content": content, "sha256": _digest(content)})
    write_text(part / "manifest.json", manifest)
    old = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    part.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _choose(folder: Path) -> tuple[Path | None, set[Path]]:
    """The newest good checkpoint, and the broken ones that are newer."""
    broken: dict[Path, str] = {}
    for path in _folders(folder):
        flaws = _flaws(path)
        if not flaws:
            return path, set(broken)
        broken[path] = "; ".join(f"{path / name} {what}" for name, what in flaws.items())
        get_logger(__name__).warning("checkpoint passed over: %s", broken[path])
    if broken:
        raise InputError(folder, "no checkpoint is intact", "; ".join(broken.values()))
    return None, set()


def _manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError when it is missing, unreadable or changed."""
    try:
        whole = json.loads((path / "manifest.json").read_bytes())
        content: dict[str, Any] = whole["content"]
        if _digest(content) == whole["sha256"] and content["step"] == _step(path):
            return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError("is missing or unreadable") from error
    raise ValueError("was changed after it was written")


def _flaws(path: Path) -> dict[str, str]:
    """What is wrong with which file; a pickle, which nothing here writes or loads, is refused."""
    found = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    for file in filter(_is_pickle, found.values()):
        raise InputError(file, "is a pickle, which is never loaded")
    try:
        files = _manifest(path)["files"]
    except ValueError as error:
        return {"manifest.json": str(error)}
    flaws = {name: "is missing" for name in files if name not in found}
    for name, file in found.items():
        if name not in files:
            if file.suffix == ".safetensors":  # the reader would take it for a shard
                flaws[name] = "does not belong to the checkpoint"
        elif (now := fingerprint(file)) != files[name]:
            flaws[name] = f"was changed: {now['bytes']} bytes, written {files[name]['bytes']}"
    return flaws


def _is_pickle(path: Path) -> bool:
    """Whether the file is a pickle or an archive of `torch.save`; looks without loading."""
    with path.open("rb") as file:
        head = file.read(1 << 20)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= path.stat().st_size - 8:
        return False  # safetensors, whose first bytes are a length and may look like opcodes
    try:
        return head.startswith(_PICKLE) or sum(1 for _ in pickletools.genops(head)) > 1
    except Exception:  # not opcodes: whatever the parser stumbled over
        return False
