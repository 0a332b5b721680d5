"""Pictures and tables of the synthetic task: CMC curves, training curves, scored tracklets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from common.log import read_metrics
from reid_rqen.data.lpw import load_lpw
from reid_rqen.data.transforms import read_bgr
from reid_rqen.drawing import ScoreRow, draw_scores
from reid_rqen.suite import Job, clean_table, look, open_run

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class Curve(NamedTuple):
    """CMC of one row, a list of values at ranks 1, 2, ... for each seed."""

    name: str
    values: Sequence[Sequence[float]]


def draw_cmc(curves: Sequence[Curve], path: Path, most: int = 20, title: str = "") -> None:
    """CMC curves with the range over the seeds as a band."""
    figure, axis = _figure()
    for curve, colour in zip(curves, COLOURS, strict=False):
        value_SK = 100 * np.asarray(curve.values, dtype=float)[:, :most]
        rank_K = np.arange(1, value_SK.shape[1] + 1)
        label = f"{curve.name}: {value_SK[:, 0].mean():.1f} %"
        axis.plot(rank_K, value_SK.mean(axis=0), color=colour, label=label, lw=2)
        if len(value_SK) > 1:
            axis.fill_between(
                rank_K, value_SK.min(axis=0), value_SK.max(axis=0), color=colour, alpha=0.15, lw=0
            )
    axis.set(xlabel="rank k", ylabel="CMC@k, %", xlim=(1, most), ylim=(0, 101))
    axis.set_xticks([1, *range(5, most + 1, 5)])
    axis.set_title(title or "Queries whose person is among the k nearest; CMC@1 in the legend")
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def draw_training(runs: Mapping[str, Path], path: Path) -> None:
    """Loss and spread of the quality scores over the steps of some runs."""
    figure, axes = _figure(columns=2)
    panels = (("loss", "loss"), ("score_std", "spread of the frame weights (0 = plain mean)"))
    for (name, run_dir), colour in zip(runs.items(), COLOURS, strict=False):
        rows = read_metrics(run_dir / "metrics.jsonl")
        for axis, (key, _) in zip(axes, panels, strict=True):
            known = [row for row in rows if row.get(key) is not None]
            step, value = [row["step"] for row in known], [row[key] for row in known]
            if known:
                axis.plot(step, value, color=colour, label=name, lw=2)
    for axis, (_, label) in zip(axes, panels, strict=True):
        axis.set(xlabel="step", title=label, ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=110)


def draw_tracklets(job: Job, path: Path, count: int = 4) -> None:
    """Frames of some query tracklets with the score of every region and the true covers."""
    trained = open_run(job)
    data = load_lpw(job.data)
    queries, score = data.query, look(trained, data).query.score
    clean = clean_table(job.data)
    edges = (0.0, *trained.model.pool.edges, 1.0)
    rows = []
    for i in np.linspace(0, len(queries) - 1, count).round().astype(int):
        frames = queries[i].frames
        images = [read_bgr(frame)[..., ::-1] for frame in frames]
        clean_TR = np.stack([clean[frame] for frame in frames])
        rows.append(ScoreRow(images, score[i], edges, f"person {queries[i].pid}", clean_TR))
    draw_scores(rows, path, "Predicted quality of every region")


def _figure(columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * columns if columns > 1 else 7.5, 4.6), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.grid(alpha=0.3)
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
    for name, rule in report["rule"].items():
        met = "met" if rule["value"] >= rule["least"] else "not met"
        console.print(f"{name}: {rule['value']:.3f}, at least {rule['least']:.2f}: {met}")
    console.print("passed" if report["passed"] else "FAILED")


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """A demo report as Markdown, with its pictures."""
    lines = [
        f"# {report['task']}: {'passed' if report['passed'] else 'FAILED'}",
        "",
        report["claim"],
        "",
    ]
    lines += [f"| row | {report['metric']}, % | role |", "|---|---|---|"]
    lines += [f"| {e['name']} | {spread(e['values'])} | {role} |" for e, role in _entries(report)]
    lines += ["", "| rule | value | at least |", "|---|---|---|"]
    lines += [f"| {n} | {r['value']:.3f} | {r['least']:.2f} |" for n, r in report["rule"].items()]
    auc = ", ".join(f"{value:.3f}" for value in report["auc"])
    lines += ["", f"Score against true mask, AUC of upper, middle, lower region: {auc}.", ""]
    lines += [
        "![quality of every region](scores.png)",
        "![CMC](cmc.png)",
        "![training](training.png)",
    ]
    path.write_text("\n".join(lines) + "\n")


def _entries(report: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    rows = [(report["baseline"], "baseline"), (report["method"], "method")]
    return rows + [(entry, f"control: {entry['expected']}") for entry in report["controls"]]
