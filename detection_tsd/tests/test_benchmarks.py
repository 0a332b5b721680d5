"""The speed suite: rows compare equal things, results compare with the same machine only."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.log import InputError
from detection_tsd.benchmarks import __main__ as suite
from detection_tsd.benchmarks import bench_nms, results
from detection_tsd.benchmarks.__main__ import BenchConfig, plan
from detection_tsd.benchmarks.compare import better, compare, stored, table
from detection_tsd.benchmarks.results import Row, measured, rates, row
from detection_tsd.tests.launch import command

FIELDS = {"name", "shape", "ours_ms", "peer", "peer_ms", "ratio", "max_abs_diff"}


def timed(name: str, ratio: float | None) -> Row:
    return row(name, "1", "peer") | {"ratio": ratio}


def report(*rows: Row) -> dict[str, object]:
    return {"hardware": results.hardware(1), "versions": results.versions(), "rows": list(rows)}


def test_a_row_is_worse_when_our_side_became_slower_by_more_than_the_tolerance() -> None:
    before = report(timed("a", 2.2), timed("b", 2.2), timed("c", 2.2), timed("gone", 1.0))
    now = [timed("a", 2.001), timed("b", 1.999), timed("c", 9.0), timed("new", 0.1)]
    changes = compare(now, before, 0.1)
    assert [change.status for change in changes] == ["ok", "worse", "ok", "not stored"]
    assert (changes[1].before, changes[1].now) == (2.2, 1.999)


def test_unmeasured_rows_are_named_and_not_worse() -> None:
    before = report(timed("a", None), timed("b", 2.0), timed("c", None))
    changes = compare([timed("a", 1.0), timed("b", None), timed("c", None)], before, 0.1)
    wanted = ["not measured", "no longer measured", "not measured"]
    assert [change.status for change in changes] == wanted
    assert table(changes, before).row_count == 3


def test_only_the_same_hardware_name_is_stored(tmp_path: Path) -> None:
    assert stored(1, tmp_path) is None
    path = results.merge([timed("a", 2.0)], 1, tmp_path)
    found = stored(1, tmp_path)
    assert found is not None
    assert found["rows"][0]["ratio"] == 2.0
    assert stored(2, tmp_path) is None
    path.write_text(json.dumps(found | {"hardware": "another"}))
    assert stored(1, tmp_path) is None
    path.write_text("[]")
    with pytest.raises(InputError, match="is no result file"):
        stored(1, tmp_path)


def test_other_versions_are_named() -> None:
    before = report(timed("a", 2.0)) | {"versions": results.versions() | {"torch": "1.0"}}
    caption = str(table([], before).caption)
    assert caption == f"stored with torch 1.0, now {torch.__version__.partition('+')[0]}"


def test_what_works_on_one_thread_is_measured_once() -> None:
    groups = ["ops", "data", "infer"]
    assert plan(groups, [1, 0], 4) == {1: groups, 4: ["ops", "infer"]}
    assert plan(["data"], [2, 1], 4) == {2: ["data"]}
    assert plan(groups, [1, 0], 1) == {1: groups}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": ["speed"]}, "groups: must be some of"),
        ({"groups": []}, "groups: must be some of"),
        ({"threads": [-1]}, "threads: must be counts"),
        ({"repeats": 0}, "must be positive"),
        ({"tolerance": 0.0}, "must be positive"),
        ({"quick": True, "full": True}, "quick, full: exclude each other"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        suite.run(BenchConfig(**changes))


def test_the_command_line_refuses_them_as_well() -> None:
    ended = command("detection_tsd.benchmarks", "groups=[speed]")
    assert ended.code == 2
    assert ended.err.startswith("error: groups: must be some of")
    assert ended.err.count("\n") == 1


ASKED = {
    "ops": "pool_rows", "nms": "nms_rows", "infer": "infer_rows", "train": "train_rows",
    "data": "data_rows",
}  # fmt: skip


def asked(
    monkeypatch: pytest.MonkeyPatch, cfg: BenchConfig, group: str, cuda: bool = False
) -> dict[str, Any]:
    """What a group's function is called with, by name."""
    name = ASKED[group]
    signature = inspect.signature(getattr(suite, name))
    seen: list[dict[str, Any]] = []

    def rows(*args: Any, **named: Any) -> Iterator[Row]:
        seen.append(dict(signature.bind(*args, **named).arguments))
        yield timed("a", 1.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(suite, name, rows)
    assert len(list(suite._rows(cfg, group))) == 1
    return seen[0]


@pytest.mark.parametrize("group", suite.GROUPS)
def test_every_group_gets_the_settings(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(monkeypatch, BenchConfig(seed=7, quick=True, repeats=4), group)
    networks = group in ("train", "infer")
    assert (found["quick"], found["seed"]) == (True, 7)
    assert found["repeats"] == (4 if networks else suite.QUICK_REPEATS)
    assert found.get("device", torch.device("cpu")) == torch.device("cpu")
    assert found.get("compile", False) is False
    assert found.get("full", False) is False


@pytest.mark.parametrize(
    ("changes", "cuda", "full"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"full": True}, False, True),
        ({"full": False}, True, False),
        ({"quick": True}, True, False),
    ],
)
def test_every_layout_is_for_cuda_or_who_asks_for_it(
    changes: dict, cuda: bool, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(monkeypatch, BenchConfig(compile=True, **changes), "ops", cuda)
    assert found["full"] is full
    found = asked(monkeypatch, BenchConfig(compile=True, **changes), "infer", cuda)
    assert found["device"].type == ("cuda" if cuda else "cpu")
    assert found["compile"] is True


def test_the_better_of_two_measurements_is_kept() -> None:
    rows = [timed("a", 1.0), timed("b", 3.0), timed("c", None), timed("d", 1.0)]
    again = [timed("a", 2.0), timed("b", 1.0), timed("c", None)]
    kept = better(rows, again)
    assert [entry["ratio"] for entry in kept] == [2.0, 3.0, None, 1.0]


def test_a_worse_run_fails_and_leaves_the_stored_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ratios = [1.0, 2.0, 1.0, 1.5, 1.0, 2.1]

    def rows(cfg: BenchConfig, group: str) -> Iterator[Row]:
        yield timed("a", ratios.pop(0))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "stored")
    monkeypatch.setattr(suite, "_rows", rows)
    cfg = BenchConfig(groups=["train"], threads=[1], compare=True)
    assert suite.run(cfg) == 0
    assert "not compared: no stored results for" in capsys.readouterr().out
    assert suite.run(BenchConfig(groups=["train"], threads=[1])) == 0
    assert suite.run(cfg) == 1, "1.0 and then 1.5 are both worse than 2.0"
    assert "worse" in capsys.readouterr().out
    assert suite.run(cfg) == 0, "the second measurement says 2.1"
    found = stored(1, tmp_path / "stored")
    assert found is not None
    assert found["rows"][0]["ratio"] == 2.0


def test_remarks_are_joined_and_the_clock_speaks_last() -> None:
    times = {"ours_ms": 50.0, "peer_ms": 200.0, "ratio": 4.0, "note": "peer timed once"}
    found = measured("a", "1x2", "loop", times, 0.5, rates(times, 2, "images"), "", "mine")
    assert FIELDS <= set(found)
    assert found["note"] == "40 against 10 images/s; mine; peer timed once"
    assert (found["ratio"], found["max_abs_diff"], found["peer"]) == (4.0, 0.5, "loop")
    assert times["note"] == "peer timed once"
    assert "note" not in measured("a", "1", "loop", {"ours_ms": 1.0}, None)


def test_unmeasured_peers_and_memory_are_in_the_table(tmp_path: Path) -> None:
    entries = [
        row("a", "1", "mmcv", "not measured: mmcv is not installed"),
        measured("b", "1", "loop", {"ours_ms": 1.0, "ours_mib": 3.6, "peer_mib": 9.0}, 0.0),
    ]
    text = results.merge(entries, 1, tmp_path).with_suffix(".md").read_text()
    assert "| not measured: mmcv is not installed |" in text
    assert "ours 4 MiB; peer 9 MiB |" in text
    assert f"torch {results.versions()['torch']}" in text
    results.merge([timed("b", 2.0) | {"peer": "loop"}], 1, tmp_path)
    found = stored(1, tmp_path)
    assert found is not None
    assert [(entry["name"], entry["ratio"]) for entry in found["rows"]] == [("a", None), ("b", 2.0)]


def test_a_small_run_writes_the_contract_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_nms, "CLASSES", 5)
    words = [f"out={tmp_path}", "groups=[nms]", "threads=[1]", "repeats=1", "quick=true"]
    ended = command("detection_tsd.benchmarks", *words)
    assert ended.code == 0, ended.err
    assert f"torch {results.versions()['torch']}" in ended.out
    path = tmp_path / f"{results.slug(results.hardware(1))}.json"
    found = json.loads(path.read_text())
    assert set(found) == {"hardware", "versions", "rows"}
    assert len(found["rows"]) == 5
    assert all(FIELDS <= set(entry) for entry in found["rows"])
    assert path.with_suffix(".md").is_file()
