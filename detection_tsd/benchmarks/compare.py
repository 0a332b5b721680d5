"""Rows of a run against the stored rows of the same machine.

What is compared is `ratio` (peer over ours), not `ours_ms`: both sides are timed in turns, so the
load and the clock of the machine largely cancel. A row is worse when its ratio fell by more than
the tolerance: at 0.1 our side has become more than 10 % slower in relation to its peer. The caller
measures such a row a second time and keeps the better ratio, since one run of a busy machine
proves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from common.log import InputError
from detection_tsd.benchmarks.results import Row, hardware, slug, versions


class Change(NamedTuple):
    """One row now and then; `status` is worse, ok, or why there is nothing to compare."""

    name: str
    shape: str
    peer: str
    before: float | None
    now: float | None
    status: str


def stored(threads: int, folder: Path) -> dict[str, Any] | None:
    """The report in `folder` of exactly this hardware name, or None.

    Raises:
        InputError: the file is no result file.
    """
    path = Path(folder) / f"{slug(hardware(threads))}.json"
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text())
        same = report["hardware"] == hardware(threads) and isinstance(report["rows"], list)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(path, "is no result file", error) from error
    return dict(report) if same else None


def compare(rows: Iterable[Row], report: Mapping[str, Any], tolerance: float) -> list[Change]:
    """Changes of `rows` since the stored `report`, in the order of `rows`.

    Args:
        rows: of this run.
        report: as `stored` returns it; its rows that did not run now are left out.
        tolerance: fraction by which our side may become slower, for instance 0.1.
    """
    before = {_key(entry): entry["ratio"] for entry in report["rows"]}
    return [_change(entry, before, tolerance) for entry in rows]


def better(rows: Iterable[Row], again: Iterable[Row]) -> list[Row]:
    """`rows`, each replaced by the row of its name in `again` if that has the greater ratio."""
    second = {_key(entry): entry for entry in again if entry["ratio"] is not None}
    pairs = [(entry, second.get(_key(entry), entry)) for entry in rows]
    return [max(pair, key=lambda entry: entry["ratio"] or 0.0) for pair in pairs]


def _change(entry: Row, before: Mapping[tuple[str, str, str], Any], tolerance: float) -> Change:
    key, now = _key(entry), entry["ratio"]
    then = before.get(key)
    if key not in before:
        status = "not stored"
    elif now is None and then is not None:
        status = "no longer measured"
    elif now is None or then is None:
        status = "not measured"
    else:
        status = "worse" if now * (1 + tolerance) < then else "ok"
    return Change(*key, then, now, status)


def _key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return entry["name"], entry["shape"], entry["peer"]


def table(changes: Iterable[Change], report: Mapping[str, Any]) -> Table:
    """The changes for the terminal; other versions than the stored ones are named below."""
    here = versions()
    other = [
        f"{name} {number}, now {here.get(name)}"
        for name, number in report["versions"].items()
        if here.get(name) != number
    ]
    caption = f"stored with {'; '.join(other)}" if other else None
    found = Table("name", "shape", "peer", "stored ratio", "ratio", "status", caption=caption)
    for change in changes:
        ratios = ["-" if x is None else f"{x:.4g}" for x in (change.before, change.now)]
        found.add_row(change.name, change.shape, change.peer, *ratios, change.status)
    return found
