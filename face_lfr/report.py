"""Tables and pictures of the synthetic task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from face_lfr.drawing import Curve, FrameRow, draw_frames, draw_roc
from face_lfr.metrics import interval
from face_lfr.scoring import Images, some_videos
from face_lfr.video import VideoFrames

LIMITS = {
    "at least": lambda value, limit: value >= limit,
    "above": lambda value, limit: value > limit,
    "at most": lambda value, limit: value <= limit,
}


def draw_rates(groups: Mapping[str, Mapping[str, Images]], path: Path) -> None:
    """ROC curves down to one false accept, with Wilson's 95 % interval; a panel a group."""
    panels = {
        title: [_curve(name, found) for name, found in group.items()]
        for title, group in groups.items()
    }
    draw_roc(panels, path, "All pairs of unseen persons (band: 95 % interval)")


def _curve(name: str, found: Images) -> Curve:
    curve, count = found.pairs.curve, found.pairs.positives
    assert curve is not None
    ends = np.array([interval(round(rate * count), count) for rate in curve.tpr])
    return Curve(name, curve.fpr, curve.tpr, ends[:, 0], ends[:, 1])


def draw_some_videos(frames: VideoFrames, track: Path, path: Path) -> None:
    """Frames of some videos with learned quality, weight and true quality."""
    rows = [
        FrameRow(
            shown.name, shown.images, shown.quality_T, shown.weight_T,
            [f"true {truth:.2f}" for truth in shown.truth_T],
        )
        for shown in some_videos(frames, track)
    ]  # fmt: skip
    draw_frames(rows, path, "Learned quality · weight of the frame in its video")


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of fractions, in percent."""
    value_S = 100 * np.asarray(values, dtype=float)
    if len(value_S) < 2:
        return f"{value_S.mean():.1f}"
    return f"{value_S.mean():.1f} ± {value_S.std(ddof=1):.1f}"


def show_table(report: Mapping[str, Any]) -> None:
    """Print a demo report."""
    table = Table(title=f"{report['task']}: {report['metric']}, %")
    for name in ("row", "value", "role"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for entry, role in _entries(report):
        table.add_row(entry["name"], spread(entry["values"]), role)
    console = Console()
    console.print(table)
    for entry in report["rule"]:
        console.print(gate_line(entry))
    console.print("passed" if report["passed"] else "FAILED")


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """A demo report as Markdown, with its pictures."""
    verdict = "passed" if report["passed"] else "FAILED"
    lines = [f"# {report['task']}: {verdict}", "", report["claim"], ""]
    lines += [f"| row | {report['metric']}, % | role |", "|---|---|---|"]
    lines += [f"| {e['name']} | {spread(e['values'])} | {role} |" for e, role in _entries(report)]
    lines += ["", *gate_table(report["rule"]), ""]
    for name, values in report["accuracy"].items():
        lines += [f"Ten-fold verification accuracy of {name}: {spread(values)} %."]
    known = np.mean(report["quality_correlation"])
    lines += ["", f"Correlation of learned and true quality of a frame: {known:.2f}."]
    lines += ["", "![ROC curves](roc.png)", "![frames and their quality](frames.png)"]
    lines += ["![training](training.png)"]
    path.write_text("\n".join(lines) + "\n")


def gate(name: str, value: float, kind: str, limit: float) -> dict[str, Any]:
    """A value against a limit; `kind` is one of `LIMITS`."""
    passed = bool(LIMITS[kind](value, limit))
    return {"name": name, "value": value, "kind": kind, "limit": limit, "passed": passed}


def gate_line(entry: Mapping[str, Any]) -> str:
    """A gate as a line of text."""
    verdict = "met" if entry["passed"] else "MISSED"
    return f"{entry['name']}: {entry['value']:.3f}, {entry['kind']} {entry['limit']}: {verdict}"


def gate_table(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Gates as lines of a Markdown table."""
    lines = ["| gate | value | limit | |", "|---|---|---|---|"]
    for entry in gates:
        verdict = "met" if entry["passed"] else "**missed**"
        limit = f"{entry['kind']} {entry['limit']:.2f}"
        lines.append(f"| {entry['name']} | {entry['value']:.3f} | {limit} | {verdict} |")
    return lines


def _entries(report: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    rows = [(report["baseline"], "baseline"), (report["method"], "method")]
    return rows + [(entry, f"control: {entry['expected']}") for entry in report["controls"]]
