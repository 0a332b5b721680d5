"""Pictures and tables of the synthetic task: bars, training curves, filmstrips, learned offsets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from common import dist
from common.log import read_metrics
from video_mmit.drawing import FilmRow, OffsetTrack, draw_filmstrip, draw_offsets
from video_mmit.engine import Views, score_videos
from video_mmit.models.tin import record_offsets
from video_mmit.suite import Job, Measured, open_run

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class Bar(NamedTuple):
    """A row of a bar chart: one value a seed, as fractions."""

    name: str
    values: Sequence[float]


def draw_bars(
    groups: Mapping[str, Sequence[Bar]], path: Path, title: str, chance: float | None = None
) -> None:
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
            axis.text(1.5, row, f"{value.mean():.1f}", va="center", color="white", weight="bold")
        if chance is not None:
            axis.axvline(100 * chance, color="black", lw=1, ls=":")
        axis.set_yticks(range(len(bars)), [bar.name for bar in bars])
        axis.set(title=name, xlim=(0, 101), xlabel="%")
        axis.invert_yaxis()
    for axis in panels[len(groups) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def draw_training(runs: Mapping[str, Path], path: Path) -> None:
    """Loss and gradient norm over the steps of some runs."""
    figure, axes = _figure(columns=2)
    for (name, run_dir), colour in zip(runs.items(), COLOURS, strict=False):
        rows = read_metrics(run_dir / "metrics.jsonl")
        for axis, key in zip(axes, ("loss", "grad_norm"), strict=True):
            step, value = [row["step"] for row in rows], [row[key] for row in rows]
            axis.plot(step, value, color=colour, label=name, lw=1.6)
    for axis, label in zip(axes, ("loss", "norm of the gradient"), strict=True):
        axis.set(xlabel="step", title=label, ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=110)


def draw_videos(job: Job, measured: Measured, path: Path, count: int = 4) -> None:
    """Filmstrips of some test videos with the labels a model gives them, right and wrong."""
    trained, data = open_run(job)
    rows = []
    for index in np.linspace(0, len(data.test) - 1, count).round().astype(int):
        video = data.test[index]
        with data.reader.open(video) as clip:
            spots = data.sampler.test(clip.frames, 1)[0]
            frames = list(clip.read(spots))
        prob_K = 1 / (1 + np.exp(-measured.score[index].astype(float)))
        best = np.argsort(-prob_K, kind="stable")[: len(video.labels)]
        predicted = [(trained.classes[k].replace("+", " "), float(prob_K[k])) for k in best]
        truth = [trained.classes[k].replace("+", " ") for k in video.labels]
        rows.append(FilmRow(frames, video.path.stem, predicted, truth, numbers=spots.tolist()))
    draw_filmstrip(rows, path, f"Test videos and what {job.name.upper()} calls them")


def draw_learned_offsets(job: Job, path: Path) -> None:
    """Learned offsets of every block of a TIN over its test videos."""
    trained, data = open_run(job)
    how = Views(trained.transform, dist.init(), batch=128)
    with record_offsets(trained.model) as record, torch.inference_mode():
        score_videos(trained.model, data.test, data, how, "offsets")
    tin = trained.config["model"]["tin"]
    tracks = [
        OffsetTrack(name, np.concatenate([part.cpu().numpy() for part in parts]))
        for name, parts in record.items()
    ]
    draw_offsets(tracks, path, start=tin["offset_init"], limit=tin["offset_scale"] / 2)


def _figure(columns: int = 1, rows: int = 1, height: float = 4.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    width = 4.6 * columns if columns > 2 else 5.4 * columns
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns)
    for axis in np.ravel(axes):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


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
    for gate in report["rule"]:
        console.print(gate_line(gate))
    console.print("passed" if report["passed"] else "FAILED")


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """A demo report as Markdown, with its pictures."""
    verdict = "passed" if report["passed"] else "FAILED"
    lines = [f"# {report['task']}: {verdict}", "", report["claim"], ""]
    lines += [f"| row | {report['metric']}, % | role |", "|---|---|---|"]
    lines += [f"| {e['name']} | {spread(e['values'])} | {role} |" for e, role in _entries(report)]
    lines += ["", *gate_table(report["rule"]), ""]
    for name, values in report["pair_accuracy"].items():
        lines += [f"Pair accuracy of {name}: {spread(values)} % (chance 50)."]
    lines += ["", "![labels of test videos](videos.png)", "![pairs](pairs.png)"]
    lines += ["![learned offsets](offsets.png)", "![training](training.png)"]
    path.write_text("\n".join(lines) + "\n")


def gate(name: str, value: float, kind: str, limit: float) -> dict[str, Any]:
    """A value against a limit; `kind` is "at least" or "at most"."""
    passed = value >= limit if kind == "at least" else value <= limit
    return {"name": name, "value": value, "kind": kind, "limit": limit, "passed": bool(passed)}


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
