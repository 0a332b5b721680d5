"""The committed evidence says what its own rows, the configuration and the README say."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection_tsd.benchmarks.results import FOLDER
from detection_tsd.claims import LONG, TRAINED, Gates, markdown
from detection_tsd.tests.launch import config

EVIDENCE = sorted(FOLDER.glob("claims-*.json"))


@pytest.fixture(params=EVIDENCE, ids=lambda path: path.stem)
def evidence(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


def test_check_13_there_is_evidence() -> None:
    assert EVIDENCE


def test_check_13_every_row_has_every_fresh_seed(evidence: dict[str, Any]) -> None:
    seeds, cfg = evidence["seeds"], config("claims")
    assert len(set(seeds)) >= 3
    assert 0 not in seeds  # the task was designed on it
    rows = {(row["kind"], row["row"]): row for row in evidence["rows"]}
    assert set(rows) == {(entry.kind, entry.name) for entry in TRAINED}
    for row in rows.values():
        for values in (*row["summary"].values(), *row["by_threshold"].values()):
            assert len(values) == len(seeds)
        assert len(row["probe"]) == (len(seeds) if row["row"].startswith("tsd") else 0)
    assert evidence["steps"] == cfg.steps


def test_check_13_the_gates_follow_from_the_rows(evidence: dict[str, Any]) -> None:
    rows = {(row["kind"], row["row"]): row for row in evidence["rows"]}
    ap = {key: np.array(row["summary"]["AP"]) for key, row in rows.items()}
    tsd, sibling = rows["glyphs", "tsd"], rows["glyphs", "sibling"]
    gain = ap["glyphs", "tsd"] - ap["glyphs", "sibling"]
    more = {
        name: np.subtract(tsd["by_threshold"][name], sibling["by_threshold"][name]).mean()
        for name in ("AP50", "AP90")
    }
    known = np.array([[p["correlation"], p["after"] / p["before"]] for p in tsd["probe"]])
    centred = ap["centred", "tsd"] - ap["centred", "sibling"]
    expected = {
        "sibling_ap50": np.mean(sibling["summary"]["AP50"]),
        "gain": gain.mean(),
        "gain_every_seed": gain.min(),
        "gain_over_d_head": (ap["glyphs", "tsd"] - ap["glyphs", "d_head"]).mean(),
        "gain_over_wide": (ap["glyphs", "tsd"] - ap["glyphs", "sibling_wide"]).mean(),
        "gain_over_long": (ap["glyphs", "tsd"] - ap["glyphs", LONG.name]).mean(),
        "ap90_over_ap50": more["AP90"] - more["AP50"],
        "correlation": known[:, 0].mean(),
        "error_left": known[:, 1].mean(),
        "centred_gain_share": centred.mean() / gain.mean(),
    }
    limits = config("claims").gates
    assert [gate["name"] for gate in evidence["gates"]] == [entry.name for entry in fields(Gates)]
    for gate in evidence["gates"]:
        assert gate["value"] == pytest.approx(expected[gate["name"]], abs=1e-9), gate["name"]
        assert gate["limit"] == limits[gate["name"]]
    assert evidence["passed"] == all(gate["passed"] for gate in evidence["gates"])


def test_check_13_the_shift_finds_the_centre(evidence: dict[str, Any]) -> None:
    """The mechanism, on every seed."""
    (row,) = [r for r in evidence["rows"] if (r["kind"], r["row"]) == ("glyphs", "tsd")]
    for probe in row["probe"]:
        assert probe["correlation"] > 0.8
        assert probe["after"] < 0.5 * probe["before"]


def test_the_readme_holds_the_evidence(evidence: dict[str, Any]) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert markdown(evidence) in text
