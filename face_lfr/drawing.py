"""Pictures: ROC curves at low false positive rates, frames with their quality, bars, curves.

All functions write a PNG; they use matplotlib without a display.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.log import read_metrics

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")


class Bar(NamedTuple):
    """A row of a bar chart: one value a seed, as fractions."""

    name: str
    values: Sequence[float]


class Curve(NamedTuple):
    """A ROC curve of M points with its confidence band, all as fractions, `fpr_M` ascending."""

    name: str
    fpr_M: np.ndarray
    tpr_M: np.ndarray
    low_M: np.ndarray
    high_M: np.ndarray


class FrameRow(NamedTuple):
    """A set of frames, uint8 (T, H, W, 3) RGB, with a score and a share (sum 1) for each."""

    name: str
    frames: Sequence[np.ndarray]
    score_T: np.ndarray
    weight_T: np.ndarray
    notes: Sequence[str] = ()


def draw_roc(groups: Mapping[str, Sequence[Curve]], path: Path, title: str) -> None:
    """One panel a group: true against false positive rate, the latter on a logarithmic axis."""
    figure, axes = _figure(len(groups))
    for axis, (name, curves) in zip(np.ravel(axes), groups.items(), strict=True):
        for curve, colour in zip(curves, COLOURS, strict=False):
            axis.plot(curve.fpr_M, 100 * curve.tpr_M, color=colour, label=curve.name, lw=1.8)
            axis.fill_between(
                curve.fpr_M, 100 * curve.low_M, 100 * curve.high_M, color=colour, alpha=0.15, lw=0
            )
        axis.set(xscale="log", xlabel="false positive rate", title=name, ylim=(0, 101))
        axis.set_ylabel("true positive rate, %")
        axis.legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def draw_frames(rows: Sequence[FrameRow], path: Path, title: str) -> None:
    """Sets of frames, one a row; below each frame its score, and its share as a bar."""
    columns = max(len(row.frames) for row in rows)
    figure, axes = _figure(columns, len(rows), width=1.45, height=1.95, grid=False)
    grid = np.reshape(axes, (len(rows), columns))
    for axis in grid.ravel():
        axis.set_axis_off()
    for line, row in zip(grid, rows, strict=True):
        most = max(float(np.max(row.weight_T)), 1e-9)
        for spot, frame in enumerate(row.frames):
            axis, side = line[spot], frame.shape[1]
            axis.imshow(frame)
            share = float(row.weight_T[spot])
            axis.add_patch(_rectangle(side * share / most, frame.shape[0]))
            note = f"\n{row.notes[spot]}" if row.notes else ""
            axis.set_title(f"{row.score_T[spot]:.2f} · {100 * share:.0f} %{note}", fontsize=8)
        line[0].text(
            -0.08, 0.5, row.name, transform=line[0].transAxes, rotation=90,
            ha="right", va="center", fontsize=8,
        )  # fmt: skip
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _rectangle(width: float, below: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((-0.5, below - 7), width, 6.5, color=COLOURS[4], lw=0)


def draw_bars(groups: Mapping[str, Sequence[Bar]], path: Path, title: str) -> None:
    """One panel a group; the bar is the mean over the seeds, dots are the seeds."""
    most = max(len(bars) for bars in groups.values())
    columns = min(len(groups), 3 if len(groups) != 4 else 2)
    rows = -(-len(groups) // columns)
    figure, axes = _figure(columns, rows, height=1.1 + 0.34 * most)
    panels = list(np.ravel(axes))
    for axis, (name, bars) in zip(panels, groups.items(), strict=False):
        for row, bar in enumerate(bars):
            value = 100 * np.asarray(bar.values, dtype=float)
            axis.barh(row, value.mean(), color=COLOURS[row % len(COLOURS)], height=0.62)
            axis.plot(value, np.full(len(value), row), "k.", ms=5)
            axis.text(value.mean() + 1, row - 0.18, f"{value.mean():.1f}", va="bottom", fontsize=8)
        axis.set_yticks(range(len(bars)), [bar.name for bar in bars])
        axis.set(title=name, xlim=(0, 108), xlabel="%")
        axis.invert_yaxis()
    for axis in panels[len(groups) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def draw_training(runs: Mapping[str, Path], path: Path) -> None:
    """Loss and gradient norm over the steps of some runs."""
    figure, axes = _figure(2)
    for (name, run_dir), colour in zip(runs.items(), COLOURS, strict=False):
        rows = read_metrics(run_dir / "metrics.jsonl")
        for axis, key in zip(axes, ("loss", "grad_norm"), strict=True):
            step, value = [row["step"] for row in rows], [row[key] for row in rows]
            axis.plot(step, value, color=colour, label=name, lw=1.6)
    for axis, label in zip(axes, ("loss", "norm of the network's gradient"), strict=True):
        axis.set(xlabel="step", title=label, ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=110)


def _figure(
    columns: int = 1, rows: int = 1, width: float = 5.2, height: float = 4.4, grid: bool = True
) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns)
    for axis in np.ravel(axes) if grid else ():
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
