"""Tables and gates of the synthetic task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

LIMITS = {
    "at least": lambda value, limit: value >= limit,
    "above": lambda value, limit: value > limit,
    "at most": lambda value, limit: value <= limit,
}


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


def write_report(path: Path, report: Mapping[str, Any], pictures: Mapping[str, str]) -> None:
    """A demo report as Markdown, with its pictures: file name -> what it shows."""
    verdict = "passed" if report["passed"] else "FAILED"
    lines = [f"# {report['task']}: {verdict}", "", report["claim"], ""]
    lines += [f"| row | {report['metric']}, % | role |", "|---|---|---|"]
    lines += [f"| {e['name']} | {spread(e['values'])} | {role} |" for e, role in _entries(report)]
    lines += ["", *gate_table(report["rule"]), ""]
    lines += [f"![{title}]({name})" for name, title in pictures.items()]
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
        limit = f"{entry['kind']} {entry['limit']:g}"
        lines.append(f"| {entry['name']} | {entry['value']:.3f} | {limit} | {verdict} |")
    return lines


def _entries(report: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    rows = [(report["baseline"], "baseline"), (report["method"], "method")]
    return rows + [(entry, f"control: {entry['expected']}") for entry in report["controls"]]
