"""Pictures of numbers: AP against the IoU it asks for, bars with their seeds, losses over steps.

All functions write a PNG; they use matplotlib without a display.
Letters: T IoU thresholds, S seeds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.log import read_metrics
from detection_tsd.metrics.coco import THRESHOLDS

# Okabe and Ito's colours, which colour-blind readers can tell apart; then darker ones of the same.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#8C6D1F",
    "#7F3C8D",
)  # fmt: skip


class Bar(NamedTuple):
    """A row of a bar chart: one value a seed, as fractions."""

    name: str
    values: Sequence[float]


def draw_thresholds(groups: Mapping[str, Mapping[str, np.ndarray]], path: Path, title: str) -> None:
    """AP at each IoU threshold, one panel a group; the line is the mean, the band the spread.

    Args:
        groups: panel -> row -> fractions (S, T).
        path: of the PNG.
        title: above the panels.
    """
    figure, axes = _figure(len(groups))
    for axis, (name, rows) in zip(np.ravel(axes), groups.items(), strict=True):
        for (row, value_ST), colour in zip(rows.items(), COLOURS, strict=False):
            percent_ST = 100 * np.asarray(value_ST)
            axis.plot(
                THRESHOLDS, percent_ST.mean(axis=0), "o-", color=colour, label=row, lw=1.6, ms=3
            )
            low_T, high_T = percent_ST.min(axis=0), percent_ST.max(axis=0)
            axis.fill_between(THRESHOLDS, low_T, high_T, color=colour, alpha=0.15, lw=0)
        axis.set(xlabel="IoU a detection must reach", ylabel="AP, %", title=name, ylim=(0, 101))
        axis.legend(loc="lower left", fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def draw_bars(groups: Mapping[str, Sequence[Bar]], path: Path, title: str) -> None:
    """One panel a group; the bar is the mean over the seeds, dots are the seeds."""
    most = max(len(bars) for bars in groups.values())
    columns = min(len(groups), 3 if len(groups) != 4 else 2)
    lines = -(-len(groups) // columns)
    figure, axes = _figure(columns, lines, height=1.1 + 0.34 * most)
    panels = list(np.ravel(axes))
    for axis, (name, bars) in zip(panels, groups.items(), strict=False):
        for row, bar in enumerate(bars):
            value_S = 100 * np.asarray(bar.values, dtype=float)
            axis.barh(row, value_S.mean(), color=COLOURS[row % len(COLOURS)], height=0.62)
            axis.plot(value_S, np.full(len(value_S), row), "k.", ms=5)
            axis.text(
                max(value_S.max(), 0) + 2, row, f"{value_S.mean():.1f}", va="center", fontsize=8
            )
        axis.set_yticks(range(len(bars)), [bar.name for bar in bars])
        axis.set(title=name, xlim=(0, 112), xlabel="%")
        axis.invert_yaxis()
    for axis in panels[len(groups) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def draw_training(runs: Mapping[str, Path], path: Path) -> None:
    """Losses of the branch that is tested, and the gradient norm, over the steps of some runs."""
    figure, axes = _figure(3)
    for (name, run_dir), colour in zip(runs.items(), COLOURS, strict=False):
        rows = read_metrics(run_dir / "metrics.jsonl")
        for axis, kind in zip(axes, ("loss_cls", "loss_box", "grad_norm"), strict=True):
            key = f"{kind}_tsd" if rows and f"{kind}_tsd" in rows[0] else kind
            step, value = [row["step"] for row in rows], [row[key] for row in rows]
            axis.plot(step, value, color=colour, label=name, lw=1.4)
    titles = ("classification loss", "box loss", "norm of the gradient")
    for axis, label in zip(axes, titles, strict=True):
        axis.set(xlabel="step", title=label, yscale="log")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _figure(
    columns: int = 1, rows: int = 1, width: float = 5.2, height: float = 4.4
) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns)
    for axis in np.ravel(axes):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
