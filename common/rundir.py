"""The run folder: the configuration that was resolved, and where and how it ran."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from common.log import InputError

_PACKAGES = ("torch", "torchvision", "numpy", "hydra-core", "omegaconf", "opencv-python", "decord")


def prepare(run_dir: Path, config: Mapping[str, Any], main: bool = True) -> None:
    """Create the folder; write `config.yaml` and `run.json` on the main rank.

    `run.json` describes the first start; every later start in the same folder is appended to its
    list `restarts`. Both files are replaced as a whole, never written in place.

    Args:
        run_dir: the folder; parents are created.
        config: plain containers, or an OmegaConf node, whose interpolations are resolved here.
        main: whether this process is the one that writes.

    Raises:
        InputError: the folder cannot be created or written, or `run.json` is not ours.
    """
    run_dir = Path(run_dir)
    if not main:
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / "config.yaml", _yaml(config))
        write_text(
            run_dir / "run.json", json.dumps(_history(run_dir / "run.json"), indent=2) + "\n"
        )
    except OSError as error:
        raise InputError(error.filename or run_dir, "cannot be written", error.strerror) from error


def environment() -> dict[str, Any]:
    """Git revision, versions, host, device, argv and time; what is unknown is None."""
    revision, dirty = _git()
    cuda = torch.cuda.is_available()
    return {
        "git": {"revision": revision, "dirty": dirty},
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in _PACKAGES}},
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "argv": list(sys.argv),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _history(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {**environment(), "restarts": []}
    try:
        first = json.loads(path.read_text(encoding="utf-8"))
        first["restarts"].append(environment())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(path, "is not the run.json of an earlier start", error) from error
    return dict(first)


def _yaml(config: Mapping[str, Any]) -> str:
    from omegaconf import OmegaConf

    node = config if OmegaConf.is_config(config) else OmegaConf.create(dict(config))
    return OmegaConf.to_yaml(node, resolve=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: readers, and a crash, see the old text or the new one."""
    fresh = path.with_name(f".{path.name}.tmp")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync_folder(path.parent)


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def sync_folder(folder: Path) -> None:
    """Put the names in a folder (creations, renames) on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> tuple[str | None, bool | None]:
    """Revision of the checkout that holds this file; (None, None) for an installed package."""
    top = Path(__file__).resolve().parents[1]
    if not (top / ".git").exists():
        return None, None
    try:
        revision = _run_git(top, "rev-parse", "HEAD")
        return revision, bool(_run_git(top, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _run_git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.strip()
