"""The demo and the claims: their rules, their files, and one tiny run from end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from face_lfr.all_pairs import AllPairs
from face_lfr.claims import (
    LOSSES,
    NOISES,
    SCORERS,
    TRAINED,
    ClaimsConfig,
    Entry,
    Gates,
    claims,
    markdown,
    tprs,
    write_readme,
)
from face_lfr.claims import judge as judge_claims
from face_lfr.demo import DemoConfig, Rule, demo, judge
from face_lfr.metrics import operating_point
from face_lfr.report import gate
from face_lfr.scoring import AGGREGATORS, FPRS, FREE, TRACKS, Images
from face_lfr.suite import Job, train_all
from face_lfr.tests.conftest import SIZES


def images(tpr: float) -> Images:
    points = tuple(
        operating_point(rate, 0.5, int(rate * 10**6), round(tpr * 1000), 10**6, 1000)
        for rate in FPRS
    )
    return Images(AllPairs(points, 10**6, 1000, 0, "all", 1), accuracy=0.9)


def tracks(**rates: float) -> dict[str, list[dict[str, float]]]:
    """Videos that meet the rule, except where `bad_method` or `clean_method` says otherwise."""
    good = {"bad_mean_l2": 0.8, "bad_qanpp_l2": 0.9, "clean_mean_l2": 0.95, "clean_qanpp_l2": 0.95}
    found = good | rates
    return {
        track: [{method: found[f"{name}_{method}"] for method in ("mean_l2", "qanpp_l2")}]
        for track, name in zip(TRACKS, ("bad", "clean"), strict=True)
    }


@pytest.mark.parametrize(
    ("arc", "neg", "rates", "missed"),
    [
        (0.5, 0.6, {}, []),
        (0.5, 0.5, {}, ["gain of ArcNegFace over ArcFace"]),
        (0.5, 0.6, {"bad_qanpp_l2": 0.815}, ["gain of QAN++ over the mean, bad frames"]),
        (0.5, 0.6, {"clean_qanpp_l2": 0.92}, ["loss of QAN++ against the mean, clean frames"]),
    ],
)
def test_the_demo_passes_by_its_rule_alone(
    arc: float, neg: float, rates: dict[str, float], missed: list[str]
) -> None:
    found = {"arcface": [images(arc)], "arcnegface": [images(neg)]}
    report = judge(Rule(), found, tracks(**rates))
    assert [entry["name"] for entry in report["rule"] if not entry["passed"]] == missed
    assert report["passed"] is (not missed)
    assert report["baseline"]["values"] == [arc]
    assert report["method"]["values"] == [neg]
    assert len(report["controls"]) == 4


GOOD = {("arcface", 0.0): 0.95, ("arcface", 0.3): 0.5, ("arcface", 0.6): 0.1}
GOOD |= {("arcnegface", 0.0): 0.94, ("arcnegface", 0.3): 0.8, ("arcnegface", 0.6): 0.4}


def table(changes: dict[tuple[str, float], float]) -> dict[Entry, list[Images]]:
    return {e: [images((GOOD | changes).get(tuple(e), 0.4))] * 2 for e in TRAINED}


def videos(bad: tuple[float, ...] = (0.9, 0.9), clean: float = 0.95) -> Any:
    found = {track: {name: [0.8, 0.8] for name in AGGREGATORS} for track in TRACKS}
    found[TRACKS[0]]["qanpp_l2"] = list(bad)
    found[TRACKS[1]] |= {"mean_l2": [0.95, 0.95], "qanpp_l2": [clean, clean]}
    return found


@pytest.mark.parametrize(
    ("changes", "seen", "missed"),
    [
        ({}, videos(), set()),
        ({("arcnegface", 0.3): 0.5}, videos(), {"noise30_gain"}),
        ({("arcnegface", 0.6): 0.05}, videos(), set()),
        ({}, videos(bad=(0.95, 0.815)), {"quality_gain_every_seed"}),
        ({}, videos(clean=0.92), {"quality_clean_difference"}),
        ({}, videos(clean=0.98), {"quality_clean_difference"}),
        (
            {("arcnegface", 0.0): 0.1},
            videos(),
            set(),
        ),  # clean and very noisy rows are published, not judged
    ],
)
def test_each_gate_can_be_missed(
    changes: dict[tuple[str, float], float], seen: Any, missed: set[str]
) -> None:
    gates = judge_claims(Gates(), tprs(table(changes)), seen)
    assert {entry["name"] for entry in gates if not entry["passed"]} == missed


def evidence() -> dict[str, Any]:
    row = {
        "row": "arcface", "noise": 0.3, "accuracy": [0.9, 0.8],
        "tpr": {f"{rate:g}": [0.5, 0.7] for rate in FPRS},
        "false_accepts": {f"{rate:g}": [10, 20] for rate in FPRS},
    }  # fmt: skip
    return {
        "seeds": [1, 2],
        "steps": 5,
        "hardware": "box",
        "rows": [row],
        "videos": videos(),
        "quality_correlation": [dict.fromkeys(SCORERS, 0.8)] * 2,
        "gates": [gate("noise30_gain", -0.1, "above", 0.0)],
    }


def test_the_readme_tables_are_replaced_between_their_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- claims:begin -->\nstale\n<!-- claims:end -->\nbelow\n")
    write_readme(readme, evidence())
    text = readme.read_text()
    assert text.startswith("above\n<!-- claims:begin -->\n5 steps; seeds 1, 2; mean")
    cell = "60.0 ± 14.1 (15)"
    assert f"| 0.3 | arcface | {cell} | {cell} | {cell} | 85.0 ± 7.1 |" in text
    assert "| qanpp_l2 | 90.0 ± 0.0 | 95.0 ± 0.0 |" in text
    assert "| noise30_gain | -0.100 | above 0.00 | **missed** |" in text
    assert text.endswith("<!-- claims:end -->\nbelow\n")
    assert "stale" not in text
    assert markdown(evidence()) in text
    readme.write_text("no markers")
    with pytest.raises(InputError, match="needs the markers"):
        write_readme(readme, evidence())


def test_every_row_of_the_claims_is_there() -> None:
    assert {(loss, noise) for loss in LOSSES for noise in NOISES} <= {tuple(e) for e in TRAINED}
    assert set(AGGREGATORS.values()) == {FREE, *SCORERS}


@pytest.mark.slow
def test_a_failed_training_names_its_log(tmp_path: Path) -> None:
    job = Job("nothing", tmp_path / "run", tmp_path / "data", 0, 2, sizes=SIZES)
    with pytest.raises(InputError, match=r"training ended with code 2: .*nothing"):
        train_all([job], 1)
    with pytest.raises(InputError, match="jobs: must be at least 1"):
        train_all([job], 0)


@pytest.mark.slow
def test_a_tiny_demo_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A hundredth of the pairs cannot show rates of 1e-5.
    monkeypatch.setattr("face_lfr.scoring.FPRS", (0.1, 0.2))
    monkeypatch.setattr("face_lfr.scoring.HEADLINE", 0.1)
    monkeypatch.setattr("face_lfr.scoring.Images.tpr", lambda self: self.pairs.points[0].tpr)
    cfg = DemoConfig(out=str(tmp_path), seeds=[5], steps=2, quality_steps=2, sizes=SIZES)
    report = demo(cfg)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    wanted = {"task", "claim", "metric", "baseline", "method", "controls", "passed", "seconds"}
    assert wanted <= report.keys()
    assert np.isfinite(report["quality_correlation"]).all()
    for name in ("roc.png", "frames.png", "training.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in (tmp_path / "report.md").read_text()


def test_no_seed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seeds"):
        demo(DemoConfig(out=str(tmp_path), seeds=[]))
    with pytest.raises(InputError, match="seeds"):
        claims(ClaimsConfig(out=str(tmp_path), seeds=[]))
