"""Measured rows: timing in turns, hardware names, and the JSON and Markdown files of a machine.

`results/<hardware>.json` is `{"hardware", "versions", "rows": [...]}`; a row has `name`, `shape`,
`ours_ms`, `peer`, `peer_ms`, `ratio` (peer over ours), `max_abs_diff`, and where it says more than
that a `note`, `ours_mib`, `peer_mib`. Unmeasured values are null and the note says why.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common.log import InputError

Row = dict[str, Any]
FOLDER = Path(__file__).with_name("results")
PACKAGES = (
    "torch", "torchvision", "numpy", "pycocotools", "opencv-python", "triton", "mmcv",
    "faster-coco-eval",
)  # fmt: skip
COLUMNS = ("name", "shape", "ours_ms", "peer", "peer_ms", "ratio", "max_abs_diff", "note")
SLOW_S = 15.0


def row(name: str, shape: str, peer: str, note: str = "") -> Row:
    """An unmeasured row."""
    empty = dict.fromkeys(("peer_ms", "ratio", "max_abs_diff"))
    values = {"name": name, "shape": shape, "ours_ms": None, "peer": peer} | empty
    return values | ({"note": note} if note else {})


def measure(ours: Callable[[], Any], peer: Callable[[], Any], repeats: int) -> Row:
    """Median times of both, in turns, so that a change of the machine's load meets both.

    A side whose first call takes more than 15 s is called once, which the note then says.
    """
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(repeats):
        for name, call in (("ours", ours), ("peer", peer)):
            if not times[name] or times[name][0] < SLOW_S:
                start = time.perf_counter()
                call()
                _wait()
                times[name].append(time.perf_counter() - start)
    middle = {name: median(values) * 1e3 for name, values in times.items()}
    ratio = middle["peer"] / middle["ours"]
    once = [name for name, values in times.items() if len(values) < repeats]
    note = {"note": f"{' and '.join(once)} timed once"} if once else {}
    return {"ours_ms": middle["ours"], "peer_ms": middle["peer"], "ratio": ratio} | note


def measured(
    name: str,
    shape: str,
    peer: str,
    timed: Mapping[str, Any],
    difference: float | None,
    *notes: str,
) -> Row:
    """A row of what `measure` returned; its note comes after the others."""
    note = "; ".join(filter(None, [*notes, timed.get("note", "")]))
    found = row(name, shape, peer) | dict(timed) | {"max_abs_diff": difference}
    return found | ({"note": note} if note else {})


def rates(timed: Mapping[str, Any], count: int, unit: str) -> str:
    """How many of `count` things a call each side does in a second."""
    ours, peer = (f"{1e3 * count / timed[f'{side}_ms']:.3g}" for side in ("ours", "peer"))
    return f"{ours} against {peer} {unit}/s"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def hardware(threads: int) -> str:
    """`<processor>[ + <GPU>], <threads> threads`."""
    name = _processor()
    if torch.cuda.is_available():
        name += f" + {torch.cuda.get_device_name()}"
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


def slug(name: str) -> str:
    """File name of a hardware name: lower case, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def merge(rows: Sequence[Mapping[str, Any]], threads: int, folder: Path = FOLDER) -> Path:
    """Put rows into the machine's file; one of the same name, shape and peer is replaced.

    Returns:
        The JSON file; the Markdown rendering lies beside it.

    Raises:
        InputError: the file there is no result file, or the folder cannot be written.
    """
    name = hardware(threads)
    path = Path(folder) / f"{slug(name)}.json"
    kept = {_key(entry): dict(entry) for entry in [*_rows(path), *rows]}
    report = {"hardware": name, "versions": versions(), "rows": list(kept.values())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(report, indent=2) + "\n")
        _replace(path.with_suffix(".md"), render(report))
    except OSError as error:
        raise InputError(path, "cannot be written", error.strerror) from error
    return path


def versions() -> dict[str, str | None]:
    """Versions of what the rows depend on; None where a package is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def version_line(found: Mapping[str, str | None] | None = None) -> str:
    """What is installed, in one line; of this process when nothing is given."""
    known = versions() if found is None else found
    return ", ".join(f"{name} {number}" for name, number in known.items() if number)


def render(report: Mapping[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = [f"# {report['hardware']}", "", version_line(report["versions"]), ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for entry in report["rows"]:
        lines.append("| " + " | ".join(cells(entry)) + " |")
    return "\n".join(lines) + "\n"


def cells(entry: Mapping[str, Any]) -> list[str]:
    """Texts of one row, in the order of `COLUMNS`; memory goes into the note."""
    peaks = {side: entry.get(f"{side}_mib") for side in ("ours", "peer")}
    memory = [f"{side} {peak:.0f} MiB" for side, peak in peaks.items() if peak is not None]
    note = "; ".join([*filter(None, [entry.get("note")]), *memory])
    return [_text(entry.get(column)) for column in COLUMNS[:-1]] + [note]


def _text(value: object) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _key(entry: Mapping[str, Any]) -> tuple[object, ...]:
    return entry["name"], entry["shape"], entry["peer"]


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    try:
        rows: list[Row] = json.loads(path.read_text())["rows"]
        return [entry for entry in rows if _key(entry)]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(path, "is no result file", error) from error


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
