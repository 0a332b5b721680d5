"""What the search leaves behind: JSON, table, picture, and the network as configuration files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from face_lfr.drawing import COLOURS
from face_lfr.flops import require
from face_lfr.search_runs import quoted
from face_lfr.search_score import Score
from face_lfr.search_space import Candidate, Fitting, pareto

if TYPE_CHECKING:
    from face_lfr.search import SearchConfig

OURS = "our search, not the paper's"
CAVEATS = (
    f"This is {OURS}: arXiv 1909.00632 says that its network was searched and not how.",
    "Every value is one short training with one seed: intervals (95 %, Wilson) are those of the "
    "image test alone, and only values of one column compare.",
)
SMALL = (
    "Where all have one input size, a rung tells how much blocks and channels are worth, and "
    "nothing of what a larger input adds."
)


@dataclass
class Entry:
    """A candidate that is tried, with its score in each rung it reached."""

    candidate: Candidate
    scores: list[Score] = field(default_factory=list)
    failed: str | None = None  # how its training broke down


def describe(
    cfg: SearchConfig, space: Fitting, entries: Sequence[Entry], test: str, seconds: float
) -> dict[str, Any]:
    """The content of `search.json` after a rung."""
    reached = max(len(entry.scores) for entry in entries)
    last = [entry for entry in entries if len(entry.scores) == reached]
    points = [(e.candidate.gflops, e.scores[-1].tpr) for e in last]
    front = {e.candidate.name for e, best in zip(last, pareto(points), strict=True) if best}
    best = min(last, key=lambda e: (-e.scores[-1].tpr, e.candidate.operations))
    close = [e.candidate.name for e in last if e.scores[-1].high >= best.scores[-1].low]
    ends = {"cheapest": space.cheapest, "dearest": space.dearest}
    return {
        "what": f"PolyFace for at most {cfg.budget_gflops:g} GFLOPs, {OURS}",
        "budget_gflops": cfg.budget_gflops,
        "fit": list(cfg.fit),
        "metric": f"TPR@FPR={cfg.fpr:g}",
        "test": test,
        "rungs": list(cfg.rungs),
        "divide": cfg.divide,
        "seed": cfg.seed,
        "rung_sizes": list(cfg.rung_sizes) or [None] * len(cfg.rungs),
        "space": {"networks": space.total, "fitting": len(space.candidates)}
        | {name: {"name": end.name, "gflops": end.gflops} for name, end in ends.items()},
        "candidates": [_row(entry, cfg.rungs, front) for entry in entries],
        "pareto": sorted(front),
        "found": {
            "name": best.candidate.name,
            "gflops": best.candidate.gflops,
            "not_told_apart": [name for name in close if name != best.candidate.name],
        },
        "complete": False,
        "seconds": round(seconds, 1),
    }


def _row(entry: Entry, rungs: Sequence[int], front: set[str]) -> dict[str, Any]:
    candidate = entry.candidate
    scores = zip(rungs, entry.scores, strict=False)
    return {
        "name": candidate.name,
        **candidate.node(),
        "input_size": candidate.input_size,
        "gflops": candidate.gflops,
        "params": candidate.params,
        "scores": [{"steps": steps, **score._asdict()} for steps, score in scores],
        "pareto": candidate.name in front,
        "failed": entry.failed,
    }


def write_found(
    folder: Path, cfg: SearchConfig, best: Candidate, trained: Path
) -> dict[str, str | float]:
    """Write the best network as `found.yaml` in the groups model, transform and experiment.

    The nodes are those its proxy was trained with, at the size of its own input.

    Args:
        folder: for Hydra's search path.
        cfg: of the search.
        best: the network.
        trained: `config.yaml` of its proxy.

    Returns:
        `command` that trains it, `config` its experiment file, and `counted_gflops` of the network
        as the nodes build it.

    Raises:
        InputError: it costs more than the budget after all.
    """
    config: Any = OmegaConf.load(trained)
    OmegaConf.update(config, "model.input_size", best.input_size)
    OmegaConf.update(config, cfg.size_key, best.input_size)
    with torch.device("meta"):  # no weights are drawn
        network = instantiate(config.model)
    counted = require(network, cfg.budget_gflops, best.input_size)
    command = _command(folder, cfg)
    nodes = {name: OmegaConf.to_yaml(config[name]) for name in ("model", "transform")}
    head = f"# Found by face_lfr.search: {OURS}. {counted:.4g} GFLOPs at {best.input_size} px.\n"
    for name, text in nodes.items():
        _write(folder / name / "found.yaml", head + text)
    groups = [{f"override /{name}": "found"} for name in nodes]
    overlay = {
        "defaults": [f"/experiment/{cfg.experiment}", *groups, "_self_"],
        "run_dir": "runs/lfr/found",
        "max_gflops": cfg.budget_gflops,
        # Once more, since the row may set arguments of the network that it was written for.
        **{name: config[name] for name in nodes},
    }
    path = folder / "experiment" / "found.yaml"
    _write(
        path,
        f"# @package _global_\n{head}# {command}\n{OmegaConf.to_yaml(OmegaConf.create(overlay))}",
    )
    return {"config": str(path), "command": command, "counted_gflops": counted}


def _command(folder: Path, cfg: SearchConfig) -> str:
    where = f"hydra.searchpath=[{quoted(f'file://{folder.resolve()}')}]"
    root = [] if cfg.root is None else [f"data.root={quoted(cfg.root)}"]
    kept = [word for word in cfg.words if not word.lstrip("+~").startswith(("model", "transform"))]
    return shlex.join(["python", "-m", "face_lfr.train", where, "experiment=found", *kept, *root])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def show(report: Mapping[str, Any]) -> None:
    """Print the table."""
    header, *rows = _table(report, intervals=False)
    table = Table(title=f"{report['what']}: {report['metric']}, %")
    for number, name in enumerate(header):
        table.add_column(name, no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"found: {report['found']['name']}, in {report['found']['config']}")


def write_markdown(report: Mapping[str, Any], path: Path) -> None:
    """The table with what it stands on, the picture, and the command that trains the network."""
    space, found = report["space"], report["found"]
    ends = [f"`{space[k]['name']}` ({space[k]['gflops']:.4g} G)" for k in ("cheapest", "dearest")]
    low, high = (f"{100 * share:g}" for share in report["fit"])
    header, *rows = _table(report, intervals=True)
    lines = [
        f"# {report['what']}", "", *CAVEATS, *([SMALL] if any(report["rung_sizes"]) else []), "",
        f"{space['networks']} networks from {ends[0]} to {ends[1]}; {space['fitting']} cost "
        f"{low} % to {high} % of the budget by the organisers' counting; {len(rows)} that differ "
        f"much were trained, one in {report['divide']:g} went on. Scores: {report['metric']}, %, "
        f"on {report['test']}.", "",
        f"| {' | '.join(header)} |", f"|{'---|' * len(header)}",
        *(f"| {' | '.join(row)} |" for row in rows), "",
        f"Found: `{found['name']}`, {found['counted_gflops']:.4g} GFLOPs counted layer by layer.",
    ]  # fmt: skip
    if found["not_told_apart"]:
        names = ", ".join(f"`{name}`" for name in found["not_told_apart"])
        lines += [f"Its interval overlaps with that of {names}: these are not told apart."]
    lines += ["", "```", found["command"], "```", "", "![cost and score](search.png)"]
    path.write_text("\n".join(lines) + "\n")


def _table(report: Mapping[str, Any], intervals: bool) -> list[list[str]]:
    """Header and rows: those that came furthest first, then by score."""
    best = report["found"]["name"]
    header = ["network", "GFLOPs", "params, M", *_rungs(report)]

    def order(row: Mapping[str, Any]) -> tuple[int, float, float]:
        last = row["scores"][-1]["tpr"] if row["scores"] else 0.0
        return -len(row["scores"]), -last, row["gflops"]

    rows = []
    for row in sorted(report["candidates"], key=order):
        values = [_percent(score, intervals) for score in row["scores"]]
        values += [row["failed"] or "-"] * (len(report["rungs"]) - len(values))
        mark = "found" if row["name"] == best else "Pareto" if row["pareto"] else ""
        cost = [row["name"], f"{row['gflops']:.4g}", f"{row['params'] / 1e6:.2f}"]
        rows.append([*cost, *values, mark])
    return [[*header, ""], *rows]


def _percent(score: Mapping[str, Any], interval: bool) -> str:
    value, low, high = (f"{100 * score[key]:.1f}" for key in ("tpr", "low", "high"))
    return f"{value} ({low} to {high})" if interval else value


def _rungs(report: Mapping[str, Any]) -> list[str]:
    """What the trainings of each rung have in common."""
    pairs = zip(report["rungs"], report["rung_sizes"], strict=True)
    return [f"{steps} steps" + (f" at {size} px" if size else "") for steps, size in pairs]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Cost and score, a panel a rung; the last has the Pareto front. Needs matplotlib."""
    from matplotlib.figure import Figure

    rungs = _rungs(report)
    figure = Figure(figsize=(7.2 * len(rungs), 4.8), layout="constrained")
    axes = figure.subplots(1, len(rungs), squeeze=False)[0]
    for number, (axis, rung) in enumerate(zip(axes, rungs, strict=True)):
        rows = [row for row in report["candidates"] if len(row["scores"]) > number]
        _panel(axis, rows, number, report)
        axis.set_title(rung + (", with Pareto front" if number + 1 == len(rungs) else ""))
    figure.suptitle(report["what"])
    figure.savefig(path, dpi=110)


def _panel(
    axis: Any, rows: Sequence[Mapping[str, Any]], rung: int, report: Mapping[str, Any]
) -> None:
    last, budget = rung + 1 == len(report["rungs"]), report["budget_gflops"]
    scale, unit = (1.0, "GFLOPs") if budget >= 1 else (1e3, "MFLOPs")
    left, right = (scale * budget * share for share in report["fit"])
    margin = 0.05 * (right - left)
    points = []
    for row in rows:
        x, score = scale * row["gflops"], row["scores"][rung]
        y, low, high = (100 * score[key] for key in ("tpr", "low", "high"))
        found = last and row["name"] == report["found"]["name"]
        on = row["pareto"] if last else len(row["scores"]) > rung + 1
        colour = COLOURS[1] if found else COLOURS[0]
        axis.errorbar(x, y, [[y - low], [high - y]], color=colour, lw=1, capsize=2, alpha=0.6)
        style = {"color": colour, "ms": 13 if found else 7, "mfc": colour if on else "white"}
        axis.plot(x, y, "*" if found else "o", **style)
        points.append((x, y, row["name"], on))
    if last:
        front = sorted((x, y) for x, y, _, on in points if on)
        axis.step(*zip(*front, strict=True), where="post", color=COLOURS[6], lw=1, ls="--")
    axis.set_xlim(left - margin, right + 0.75 * (right - left))
    _name(axis, points, right + margin)
    axis.axvline(right, color=COLOURS[6], lw=1)
    axis.set_xticks([left + k * (right - left) / 4 for k in range(5)])
    axis.xaxis.set_major_formatter("{x:.4g}")
    what = "filled: Pareto, star: found" if last else "filled: went on"
    axis.set(xlabel=f"{unit}, organisers' counting ({what})", ylabel=f"{report['metric']}, %")
    axis.spines[["top", "right"]].set_visible(False)


def _name(axis: Any, points: Sequence[tuple[float, float, str, bool]], x_names: float) -> None:
    """Names in a column beside the points, in their order and apart from each other."""
    ordered = sorted(points, key=lambda point: point[1])
    low, high = axis.get_ylim()
    places = apart([point[1] for point in ordered], low, high, (high - low) / 22)
    for (x, y, name, on), place in zip(ordered, places, strict=True):
        axis.plot([x, x_names], [y, place], color="0.8", lw=0.6, zorder=0)
        weight = "bold" if on else "normal"
        axis.text(x_names, place, name, va="center", fontsize=8, fontweight=weight)


def apart(wanted: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Rising places near the wanted rising ones, `gap` apart and, where they fit, within bounds."""
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    places: list[float] = []
    for value in wanted:
        places.append(max([low, value, *(place + gap for place in places[-1:])]))
    ceiling = high
    for row in reversed(range(len(places))):
        places[row] = min(places[row], ceiling)
        ceiling = places[row] - gap
    return places
