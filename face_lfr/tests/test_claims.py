"""The committed evidence says what its own rows, the configuration and the README say."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from face_lfr.benchmarks.results import FOLDER
from face_lfr.claims import SCORERS, TRAINED, Gates, markdown
from face_lfr.scoring import AGGREGATORS, FPRS, TRACKS
from face_lfr.tests.launch import config

EVIDENCE = sorted(FOLDER.glob("claims-*.json"))


@pytest.fixture(params=EVIDENCE, ids=lambda path: path.stem)
def evidence(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


def test_check_15_there_is_evidence() -> None:
    assert EVIDENCE


def test_check_15_every_row_has_every_fresh_seed(evidence: dict[str, Any]) -> None:
    seeds, cfg = evidence["seeds"], config("claims")
    assert len(set(seeds)) >= 3
    assert 0 not in seeds  # the task was designed on it
    rows = {(row["row"], row["noise"]): row for row in evidence["rows"]}
    assert set(rows) == {tuple(entry) for entry in TRAINED}
    for row in rows.values():
        for name in ("tpr", "false_accepts", "interval"):
            assert list(row[name]) == [f"{rate:g}" for rate in FPRS]
            assert all(len(values) == len(seeds) for values in row[name].values())
        assert len(row["accuracy"]) == len(seeds)
    for track in TRACKS:
        assert list(evidence["videos"][track]) == list(AGGREGATORS)
        assert all(len(values) == len(seeds) for values in evidence["videos"][track].values())
    assert [set(seed) for seed in evidence["quality_correlation"]] == [set(SCORERS)] * len(seeds)
    assert evidence["steps"] == cfg.steps
    assert evidence["quality_steps"] == dict(cfg.quality_steps)


def test_check_15_the_intervals_hold_their_rates(evidence: dict[str, Any]) -> None:
    for row in evidence["rows"]:
        for rate, values in row["tpr"].items():
            for value, (low, high) in zip(values, row["interval"][rate], strict=True):
                assert low <= value <= high
        counts = np.array(list(row["false_accepts"].values()))
        assert (np.diff(counts, axis=0) > 0).all()  # a larger rate stands on more of them
        assert (counts[0] >= 1).all()


def test_check_15_the_gates_follow_from_the_rows(evidence: dict[str, Any]) -> None:
    tpr = {(row["row"], row["noise"]): np.mean(row["tpr"]["0.0001"]) for row in evidence["rows"]}
    bad, clean = (
        np.array(evidence["videos"][track]["qanpp_l2"])
        - np.array(evidence["videos"][track]["mean_l2"])
        for track in TRACKS
    )
    expected = {
        "noise30_gain": tpr["arcnegface", 0.3] - tpr["arcface", 0.3],
        "quality_gain_every_seed": bad.min(),
        "quality_clean_difference": abs(clean.mean()),
    }
    limits = config("claims").gates
    assert [gate["name"] for gate in evidence["gates"]] == [entry.name for entry in fields(Gates)]
    for gate in evidence["gates"]:
        assert gate["limit"] == limits[gate["name"]]
        assert gate["value"] == pytest.approx(expected[gate["name"]], abs=1e-12)
        met = {
            "above": gate["value"] > gate["limit"],
            "at most": gate["value"] <= gate["limit"],
        }[gate["kind"]]
        assert gate["passed"] is bool(met)
    assert evidence["passed"] is all(gate["passed"] for gate in evidence["gates"])


def test_check_15_the_readme_shows_it() -> None:
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    shown = text.partition("<!-- claims:begin -->\n")[2].partition("\n<!-- claims:end -->")[0]
    assert shown in [markdown(json.loads(path.read_text())) for path in EVIDENCE]
