"""The demo and the claims: their rules, their files, and one tiny run from end to end."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from detection_tsd.claims import (
    COLUMNS,
    LONG,
    ROWS,
    TRAINED,
    ClaimsConfig,
    Entry,
    Gates,
    claims,
    markdown,
    write_readme,
)
from detection_tsd.claims import judge as judge_claims
from detection_tsd.demo import PICTURES, DemoConfig, Rule, demo, judge
from detection_tsd.metrics.coco import SUMMARY, THRESHOLDS, CocoScores
from detection_tsd.probe import Probe
from detection_tsd.report import gate
from detection_tsd.scoring import Measured
from detection_tsd.suite import Job, train_all
from detection_tsd.tests.conftest import SIZES


def measured(
    ap: float, ap50: float = 0.99, ap90: float = 0.2, probe: Probe | None = None
) -> Measured:
    summary = dict.fromkeys(SUMMARY, 0.5) | {"AP": ap, "AP50": ap50}
    at = {f"AP{round(100 * t)}": ap for t in THRESHOLDS} | {"AP50": ap50, "AP90": ap90}
    return Measured(CocoScores(summary, at, {}, np.zeros(0), {}), ap, probe, (300, 300))


GOOD = Probe(0.9, 0.09, 0.03, 100)


@pytest.mark.parametrize(
    ("sibling", "tsd", "missed"),
    [
        (measured(0.6), measured(0.7, probe=GOOD), []),
        (measured(0.7), measured(0.7, probe=GOOD), ["AP of TSD above AP of the sibling head"]),
        (measured(0.6, ap50=0.8), measured(0.7, probe=GOOD), ["AP50 of the sibling head"]),
        (
            measured(0.6), measured(0.7, probe=GOOD._replace(correlation=0.1)),
            ["correlation of shift and true error"],
        ),
    ],
)  # fmt: skip
def test_the_demo_passes_by_its_rule_alone(
    sibling: Measured, tsd: Measured, missed: list[str]
) -> None:
    report = judge(Rule(), {"sibling": [sibling], "tsd": [tsd]})
    assert [entry["name"] for entry in report["rule"] if not entry["passed"]] == missed
    assert report["passed"] is (not missed)
    assert report["baseline"] == {"name": "sibling", "values": [sibling.ap]}
    assert report["method"] == {"name": "tsd", "values": [tsd.ap]}


def table(**changes: Any) -> dict[Entry, list[Measured]]:
    """Two seeds of every row, in which every gate is met but for the changes."""
    ap = {
        "sibling": 0.6, "sibling_wide": 0.62, "d_head": 0.65, "dpool": 0.66, "tsd_joint": 0.69,
        "tsd": 0.7, "tsd_detached": 0.5, "long": 0.65, "centred_sibling": 0.8, "centred_tsd": 0.81,
    } | {name: value for name, value in changes.items() if isinstance(value, float)}  # fmt: skip
    found = {}
    for entry in TRAINED:
        name = entry.row if entry.kind == "glyphs" else f"{entry.kind}_{entry.row}"
        value = ap["long" if entry == LONG else name]
        shifts = entry.row in ("tsd", "tsd_joint", "tsd_detached")
        one = measured(value, 0.99, value - 0.4, GOOD if shifts else None)
        found[entry] = [one, one]
    return found | {entry: value for entry, value in changes.get("rows", {}).items()}


def seeds(*values: float, **more: Any) -> list[Measured]:
    return [measured(value, **{"ap90": value - 0.4, "probe": GOOD} | more) for value in values]


SIBLING, TSD = Entry("glyphs", "sibling"), Entry("glyphs", "tsd")
MISSES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "nothing": ({}, set()),
    "weak baseline": ({"rows": {SIBLING: seeds(0.6, 0.6, ap50=0.9)}}, {"sibling_ap50"}),
    "one seed loses": ({"rows": {TSD: seeds(0.59, 0.81)}}, {"gain_every_seed"}),
    "no better than two extractors": ({"d_head": 0.69}, {"gain_over_d_head"}),
    "only parameters": ({"sibling_wide": 0.71}, {"gain_over_wide"}),
    "only faster": ({"long": 0.705}, {"gain_over_long"}),
    "only coarse": ({"rows": {TSD: seeds(0.7, 0.7, ap50=1.2)}}, {"ap90_over_ap50"}),
    "no aim": (
        {"rows": {TSD: seeds(0.7, 0.7, probe=Probe(0.5, 0.09, 0.08, 9))}},
        {"correlation", "error_left"},
    ),
    "gains where it should not": ({"centred_tsd": 0.9}, {"centred_gain_share"}),
    "no gain": (
        {"tsd": 0.62, "d_head": 0.6, "sibling_wide": 0.6, "long": 0.6, "centred_tsd": 0.8},
        {"gain"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSES)
def test_each_gate_can_be_missed(name: str) -> None:
    changes, missed = MISSES[name]
    gates = judge_claims(Gates(), table(**changes))
    assert {entry["name"] for entry in gates if not entry["passed"]} == missed


def evidence() -> dict[str, Any]:
    row = {
        "kind": "glyphs", "row": "tsd", "parameters": [867_418, 645_559],
        "summary": {name: [0.5, 0.7] for name in SUMMARY},
        "by_threshold": {f"AP{round(100 * t)}": [0.5, 0.7] for t in THRESHOLDS},
        "probe": [GOOD._asdict()] * 2,
    }  # fmt: skip
    plain = row | {"row": "sibling", "parameters": [312_979, 312_979], "probe": []}
    return {
        "seeds": [1, 2], "steps": 5, "hardware": "box", "rows": [plain, row],
        "gates": [gate("gain", -0.1, "at least", 0.03)],
    }  # fmt: skip


def test_the_readme_tables_are_replaced_between_their_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- claims:begin -->\nstale\n<!-- claims:end -->\nbelow\n")
    write_readme(readme, evidence())
    text = readme.read_text()
    assert text.startswith("above\n<!-- claims:begin -->\n5 steps; seeds 1, 2; mean")
    cells = " | ".join(["60.0 ± 14.1"] * len(COLUMNS))
    assert f"| tsd | 0.87 M (0.65 M) | {cells} | 0.90 | 9.0 → 3.0 |" in text
    assert f"| sibling | 0.31 M | {cells} |  |  |" in text
    assert "| gain | -0.100 | at least 0.03 | **missed** |" in text
    assert text.endswith("<!-- claims:end -->\nbelow\n")
    assert "stale" not in text
    assert markdown(evidence()) in text
    readme.write_text("no markers")
    with pytest.raises(InputError, match="needs the markers"):
        write_readme(readme, evidence())


def test_every_row_of_the_claims_has_an_experiment() -> None:
    folder = Path(__file__).parents[1] / "configs" / "experiment" / "synth"
    assert {entry.row for entry in TRAINED} <= {path.stem for path in folder.glob("*.yaml")}
    assert {"sibling", "sibling_wide", "d_head", "tsd_joint", "tsd"} <= set(ROWS)
    assert len({entry.name for entry in TRAINED if entry.kind == "glyphs"}) == len(ROWS) + 1


@pytest.mark.slow
def test_a_failed_training_names_its_log(tmp_path: Path) -> None:
    job = Job("nothing", tmp_path / "run", tmp_path / "data", "glyphs", 0, 2, SIZES)
    with pytest.raises(InputError, match=r"training ended with code 2: .*nothing"):
        train_all([job], 1)
    with pytest.raises(InputError, match="jobs: must be at least 1"):
        train_all([job], 0)


@pytest.mark.slow
def test_a_tiny_demo_writes_its_files(tmp_path: Path) -> None:
    report = demo(DemoConfig(out=str(tmp_path), seeds=[5], steps=3, sizes=SIZES))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    wanted = {"task", "claim", "metric", "baseline", "method", "controls", "passed", "seconds"}
    assert wanted <= report.keys()
    assert all(math.isfinite(value) for value in report["method"]["values"])
    for name in PICTURES:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in (tmp_path / "report.md").read_text()


def test_no_seed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seeds"):
        demo(DemoConfig(out=str(tmp_path), seeds=[]))
    with pytest.raises(InputError, match="seeds"):
        claims(ClaimsConfig(out=str(tmp_path), seeds=[]))
