"""The committed evidence says what its own rows, the configuration and the README say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reid_rqen.benchmarks.results import FOLDER
from reid_rqen.claims import TRAINED, TRANSFERRED, Gates, markdown
from reid_rqen.tests.launch import config

EVIDENCE = sorted(FOLDER.glob("claims-*.json"))


@pytest.fixture(params=EVIDENCE, ids=lambda path: path.stem)
def evidence(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


def test_check_14_there_is_evidence() -> None:
    assert EVIDENCE


def test_check_14_every_row_has_every_fresh_seed(evidence: dict[str, Any]) -> None:
    seeds = evidence["seeds"]
    assert len(set(seeds)) >= 3
    assert 0 not in seeds  # the task was designed on it
    rows = {(row["data"], row["row"]): row for row in evidence["rows"]}
    assert set(rows) == {(entry.mode, entry.name) for entry in (*TRAINED, *TRANSFERRED)}
    for row in rows.values():
        assert len(row["cmc@1"]) == len(row["mAP"]) == len(seeds)
        # CMC@1 of 120 queries: a value that is no multiple of 1/120 was not counted.
        hits = np.array(row["cmc@1"]) * 120
        assert np.allclose(hits, hits.round(), atol=1e-9)


def test_check_14_the_gates_follow_from_the_rows(evidence: dict[str, Any]) -> None:
    first = {(row["data"], row["row"]): np.mean(row["cmc@1"]) for row in evidence["rows"]}
    auc = {(row["data"], row["row"]): row["auc"] for row in evidence["rows"]}
    region, frame, clean = (
        {row: value for (data, row), value in first.items() if data == mode}
        for mode in ("region", "frame", "clean")
    )
    both = min(frame["rqen"], frame["qan_parts"])
    expected = {
        "region_rqen_over_qan_parts": region["rqen"] - region["qan_parts"],
        "region_rqen_over_fixed1": region["rqen"] - region["rqen_fixed1"],
        "region_auc": min(auc["region", "rqen"]),
        "frame_rqen_near_qan_parts": abs(frame["rqen"] - frame["qan_parts"]),
        "frame_both_over_fixed1": both - frame["rqen_fixed1"],
        "clean_rqen_near_fixed1": abs(clean["rqen"] - clean["rqen_fixed1"]),
    }
    limits = config("claims").gates
    assert {gate["name"] for gate in evidence["gates"]} == set(expected) == set(vars(Gates()))
    for gate in evidence["gates"]:
        value, limit = expected[gate["name"]], limits[gate["name"]]
        assert gate["value"] == pytest.approx(value, abs=1e-12)
        assert gate["limit"] == limit
        assert gate["passed"] is bool(value <= limit if "near" in gate["name"] else value >= limit)
    assert evidence["passed"] is all(gate["passed"] for gate in evidence["gates"])
    assert evidence["passed"]


def test_check_14_the_readme_shows_the_evidence() -> None:
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    table = readme.partition("<!-- claims:begin -->\n")[2].partition("\n<!-- claims:end -->")[0]
    assert table in [markdown(json.loads(path.read_text())) for path in EVIDENCE]
