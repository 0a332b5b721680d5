"""The demo and the claims: their rules, their files, and one tiny run from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.log import InputError
from reid_rqen.claims import TRAINED, ClaimsConfig, Entry, Gates, claims, markdown, write_readme
from reid_rqen.claims import judge as judge_claims
from reid_rqen.data.tracklet import Tracklet
from reid_rqen.demo import BASELINE, METHOD, DemoConfig, demo, judge
from reid_rqen.suite import Job, Measured, region_auc, train_all


def measured(first: float, auc: tuple[float, ...] | None = (0.9, 0.8, 0.9)) -> Measured:
    return Measured({"cmc@1": first, "mAP": first, "cmc_curve": [first] * 50}, auc)


@pytest.mark.parametrize(
    ("baseline", "method", "auc", "off", "passed"),
    [
        (0.4, 0.6, 0.8, 0.3, True),
        (0.5, 0.6, 0.8, 0.3, False),  # too small a gain
        (0.4, 0.6, 0.7, 0.3, False),  # scores that do not find clean frames
        (0.4, 0.6, 0.8, 0.6, False),  # the scores do nothing
    ],
)
def test_the_demo_passes_by_its_rule_alone(
    baseline: float, method: float, auc: float, off: float, passed: bool
) -> None:
    found = {
        (BASELINE, 0): measured(baseline, None),
        (METHOD, 0): measured(method, (0.99, auc, 0.99)),
    }
    report = judge(DemoConfig(), found, [measured(off, None)])
    assert report["passed"] is passed
    assert report["baseline"]["values"] == [baseline]
    assert report["method"]["values"] == [method]


def table(**values: float) -> dict[Entry, list[Measured]]:
    """Values that meet every gate, except where `values` (mode_row=...) says otherwise."""
    first = {"region_rqen": 0.8, "frame_rqen": 0.9, "frame_qan_parts": 0.9, "clean_rqen": 1.0}
    first |= {"clean_rqen_fixed1": 1.0} | values
    return {e: [measured(first.get(f"{e.mode}_{e.row}", 0.4))] for e in TRAINED}


def test_claims_meet_every_gate() -> None:
    assert all(gate["passed"] for gate in judge_claims(Gates(), table()))


@pytest.mark.parametrize(
    ("values", "missed"),
    [
        ({"region_qan_parts": 0.75}, {"region_rqen_over_qan_parts"}),
        ({"region_rqen_fixed1": 0.7}, {"region_rqen_over_fixed1"}),
        ({"frame_qan_parts": 0.8}, {"frame_rqen_near_qan_parts"}),
        ({"frame_rqen_fixed1": 0.75}, {"frame_both_over_fixed1"}),
        ({"clean_rqen": 0.9}, {"clean_rqen_near_fixed1"}),
    ],
)
def test_each_gate_can_be_missed(values: dict[str, float], missed: set[str]) -> None:
    gates = judge_claims(Gates(), table(**values))
    assert {gate["name"] for gate in gates if not gate["passed"]} == missed


def test_the_readme_table_is_replaced_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- claims:begin -->\nold\n<!-- claims:end -->\nbelow\n")
    rows = [{"data": "region", "row": "rqen", "cmc@1": [0.5, 0.7], "mAP": [0.5, 0.7], "auc": None}]
    evidence = {"seeds": [1, 2], "steps": 5, "hardware": "box", "rows": rows, "gates": []}
    write_readme(readme, evidence)
    text = readme.read_text()
    assert text.startswith("above\n<!-- claims:begin -->\n5 steps, seeds 1, 2")
    assert "| region | rqen | 60.0 ± 14.1 | 60.0 ± 14.1 | - |" in text
    assert text.endswith("<!-- claims:end -->\nbelow\n")
    assert "old" not in text
    assert markdown(evidence) in text
    readme.write_text("no markers")
    with pytest.raises(InputError, match="needs the markers"):
        write_readme(readme, evidence)


def test_region_auc_counts_ordered_pairs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(30)]
    clean = rng.random((30, 3)) < 0.5
    np.savez(tmp_path / "quality.npz", paths=np.array(names), clean=clean)
    tracklets = [
        Tracklet(tuple(tmp_path / n for n in part), 0, 0) for part in (names[:12], names[12:])
    ]
    score = rng.random((30, 3)).round(1)
    auc = region_auc(tracklets, [score[:12], score[12:]], tmp_path)
    assert auc is not None
    for r in range(3):
        good, bad = score[clean[:, r], r], score[~clean[:, r], r]
        pairs = (good[:, None] > bad) + 0.5 * (good[:, None] == bad)
        assert auc[r] == pytest.approx(pairs.mean(), abs=1e-12)
    assert region_auc(tracklets, [np.ones((12, 3)), np.ones((18, 3))], tmp_path) is None
    assert region_auc(tracklets, [], tmp_path) is None


@pytest.mark.slow
def test_a_failed_training_names_its_log(tmp_path: Path) -> None:
    job = Job("nothing", tmp_path / "run", tmp_path / "data", 0, 2, {"identities": 4, "frames": 2})
    with pytest.raises(InputError, match=r"train\.log: training ended with code 2: .*nothing"):
        train_all([job], 1)


@pytest.mark.slow
def test_a_tiny_demo_writes_its_files(tmp_path: Path) -> None:
    report = demo(DemoConfig(out=str(tmp_path), seeds=[5], steps=2))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    wanted = {"task", "claim", "metric", "baseline", "method", "controls", "passed", "seconds"}
    assert wanted <= report.keys()
    assert not report["passed"]  # two steps teach nothing
    for name in ("scores.png", "cmc.png", "training.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in (tmp_path / "report.md").read_text()


def test_no_seed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seeds"):
        demo(DemoConfig(out=str(tmp_path), seeds=[]))
    with pytest.raises(InputError, match="seeds"):
        claims(ClaimsConfig(out=str(tmp_path), seeds=[]))
