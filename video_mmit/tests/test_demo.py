"""The demo and the claims: their rules, their files, and one tiny run from end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from video_mmit.claims import (
    ENSEMBLES,
    SHUFFLED,
    TRAINED,
    ClaimsConfig,
    Entry,
    Gates,
    claims,
    markdown,
    write_readme,
)
from video_mmit.claims import judge as judge_claims
from video_mmit.data.motion import CATEGORIES
from video_mmit.demo import DemoConfig, Rule, demo, judge
from video_mmit.report import gate
from video_mmit.suite import PAIR_NAMES, Job, Measured, figures, train_all


def measured(quality: float, pair: float = 0.5) -> Measured:
    result = {"mmit_mAP": quality, "macro_mAP": quality}
    return Measured(np.zeros((1, 1)), np.ones((1, 1)), result, (pair, pair))


@pytest.mark.parametrize(
    ("tsn", "tin", "shuffled", "missed"),
    [
        ((0.8, 0.5), (0.95, 0.9), 0.79, []),
        ((0.8, 0.5), (0.88, 0.9), 0.79, ["gain in mmit_mAP"]),
        ((0.8, 0.5), (0.95, 0.6), 0.79, ["pair accuracy of TIN"]),
        ((0.8, 0.6), (0.95, 0.9), 0.79, ["distance of TSN's pair accuracy from chance"]),
        ((0.8, 0.5), (0.95, 0.9), 0.9, ["gain left with shuffled frames"]),
    ],
)
def test_the_demo_passes_by_its_rule_alone(
    tsn: tuple[float, float], tin: tuple[float, float], shuffled: float, missed: list[str]
) -> None:
    found = {"tsn": [measured(*tsn)], "tin": [measured(*tin)], "shuffled": [measured(shuffled)]}
    report = judge(Rule(), found)
    assert [entry["name"] for entry in report["rule"] if not entry["passed"]] == missed
    assert report["passed"] is (not missed)
    assert report["baseline"]["values"] == [tsn[0]]
    assert report["method"]["values"] == [tin[0]]


def test_figures_hold_every_pair() -> None:
    target_NK = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1]], dtype=bool)
    score_NK = np.array([[2.0, 1, 5, 0], [2, 1, 0, 5], [1, 1, 0, 5], [0, 9, 1, 2]])
    # Right or left: right, wrong, tied, and a video of neither; down or up: one of four wrong.
    found = figures(score_NK, target_NK, "gap")
    assert found.pairs == pytest.approx((0.5, 0.75))
    assert found.pair == pytest.approx(0.625)
    assert set(PAIR_NAMES) == {"order", "gap", "static"}
    for part, names in PAIR_NAMES.items():
        count = len(CATEGORIES[part])
        assert len(figures(np.eye(count), np.eye(count), part).pairs) == len(names)
    assert np.isnan(figures(np.eye(18), np.eye(18), "static").pair)


def table(**values: float) -> dict[Entry, list[Measured]]:
    """Values that meet every gate, except where `values` (part_row=...) says otherwise."""
    good = {
        "order_tsn": 0.80, "order_trn": 0.9, "order_tsm": 0.95, "order_tin": 0.95,
        "short_tsn": 0.7, "short_trn": 0.8, "short_tsm": 0.9, "short_tin": 0.92,
        "gap_tsn": 0.5, "gap_tsm": 0.75, "gap_tin": 0.99, "gap_tsm_both": 0.99,
    } | values  # fmt: skip
    found = {}
    for e in TRAINED:
        value = good.get(f"{e.setting}_{e.row}", 0.9)
        found[e] = [measured(value, values.get("tsn_pair", 0.5) if e.setting == "order" else value)]
    for e in SHUFFLED:
        found[Entry("order", f"{e.row}, frames shuffled")] = [measured(good.get("shuffled", 0.8))]
    for name in ENSEMBLES:
        found[Entry("order", name)] = [measured(0.96)]
        found[Entry("short", name)] = [measured(good.get("ensemble", 0.94))]
    return found


def test_claims_meet_every_gate() -> None:
    assert [entry["name"] for entry in judge_claims(Gates(), table()) if not entry["passed"]] == []


@pytest.mark.parametrize(
    ("values", "missed"),
    [
        ({"order_tin": 0.85}, {"order_tin_over_tsn"}),
        ({"order_tsm": 0.85}, {"order_tsm_over_tsn"}),
        ({"tsn_pair": 0.6}, {"order_tsn_pair_off_chance"}),
        ({"shuffled": 0.9}, {"order_shuffled_gain"}),
        ({"ensemble": 0.91}, {"short_ensemble_over_best"}),
        ({"gap_tsn": 0.6}, {"gap_tsn"}),
        ({"gap_tsm": 0.9}, {"gap_tsm"}),
        ({"gap_tin": 0.9}, {"gap_tin"}),
        ({"gap_tsm_both": 0.9}, {"gap_tsm_both"}),
        ({"static_tin": 0.95}, {"static_tin_over_tsn"}),
    ],
)
def test_each_gate_can_be_missed(values: dict[str, float], missed: set[str]) -> None:
    gates = judge_claims(Gates(), table(**values))
    assert {entry["name"] for entry in gates if not entry["passed"]} == missed


def evidence() -> dict[str, Any]:
    row = {
        "data": "gap", "row": "tin", "mmit_mAP": [0.5, 0.7], "macro_mAP": [0.5, 0.7],
        "pairs": [[0.5, 0.6], [0.7, 0.8]],
    }  # fmt: skip
    static = row | {"data": "static", "pairs": [[], []]}
    steps = {"order": 5, "gap": 5, "static": 5}
    gates = [gate("gap_tin", 0.65, "at least", 0.95)]
    return {
        "seeds": [1, 2],
        "steps": steps,
        "hardware": "box",
        "rows": [row, static],
        "gates": gates,
    }


def test_the_readme_table_is_replaced_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- claims:begin -->\nstale\n<!-- claims:end -->\nbelow\n")
    write_readme(readme, evidence())
    text = readme.read_text()
    assert text.startswith(
        "above\n<!-- claims:begin -->\nSteps: order 5, gap 5, static 5; seeds 1, 2"
    )
    assert "| gap | tin | 60.0 ± 14.1 | 60.0 ± 14.1 | 65.0 ± 14.1 | 60 / 70 |" in text
    assert "| static | tin | 60.0 ± 14.1 | 60.0 ± 14.1 | - | - |" in text
    assert "| gap_tin | 0.650 | at least 0.95 | **missed** |" in text
    assert text.endswith("<!-- claims:end -->\nbelow\n")
    assert "stale" not in text
    assert markdown(evidence()) in text
    readme.write_text("no markers")
    with pytest.raises(InputError, match="needs the markers"):
        write_readme(readme, evidence())


@pytest.mark.slow
def test_a_failed_training_names_its_log(tmp_path: Path) -> None:
    few = {"train": 4, "val": 4}
    job = Job("gap", "nothing", tmp_path / "run", tmp_path / "data", 0, 2, few)
    with pytest.raises(InputError, match=r"training ended with code 2: .*nothing"):
        train_all([job], 1)


@pytest.mark.slow
def test_a_tiny_demo_writes_its_files(tmp_path: Path) -> None:
    report = demo(
        DemoConfig(out=str(tmp_path), seeds=[5], steps=2, videos={"train": 16, "val": 12})
    )
    assert json.loads((tmp_path / "report.json").read_text()) == report
    wanted = {"task", "claim", "metric", "baseline", "method", "controls", "passed", "seconds"}
    assert wanted <= report.keys()
    assert not report["passed"]  # two steps teach nothing
    for name in ("videos.png", "pairs.png", "offsets.png", "training.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in (tmp_path / "report.md").read_text()


def test_no_seed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seeds"):
        demo(DemoConfig(out=str(tmp_path), seeds=[]))
    with pytest.raises(InputError, match="seeds"):
        claims(ClaimsConfig(out=str(tmp_path), seeds=[]))
