"""Result rows with remarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from video_mmit.benchmarks.results import Row, row


def measured(
    name: str,
    shape: str,
    peer: str,
    timed: Mapping[str, Any],
    difference: float | None,
    *notes: str,
) -> Row:
    """A row of what `results.measure` returned; its note comes after the others."""
    note = "; ".join(filter(None, [*notes, timed.get("note", "")]))
    found = row(name, shape, peer) | dict(timed) | {"max_abs_diff": difference}
    return found | ({"note": note} if note else {})


def rates(timed: Mapping[str, Any], count: int, unit: str) -> str:
    """How many of `count` things a call each side does in a second."""
    ours, peer = (f"{1e3 * count / timed[f'{side}_ms']:.3g}" for side in ("ours", "peer"))
    return f"{ours} against {peer} {unit}/s"
