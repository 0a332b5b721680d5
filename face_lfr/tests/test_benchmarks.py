"""The speed suite: rows compare equal things, results compare with the same machine only."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.log import InputError
from face_lfr.aggregate import aggregate
from face_lfr.benchmarks import __main__ as suite
from face_lfr.benchmarks import bench_video, results
from face_lfr.benchmarks.__main__ import BenchConfig, plan
from face_lfr.benchmarks.bench_video import Frames, dict_loop, frames_of, video_rows
from face_lfr.benchmarks.compare import better, compare, stored, table
from face_lfr.benchmarks.peer_video import aggregate_dict, aggregate_index_add, stacked
from face_lfr.benchmarks.results import Row, measured, rates, row
from face_lfr.tests.launch import command

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
    groups = ["margin", "records", "loader", "infer"]
    assert plan(groups, [1, 0], 4) == {1: groups, 4: ["margin", "loader", "infer"]}
    assert plan(["records"], [2, 1], 4) == {2: ["records"]}
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
    ended = command("face_lfr.benchmarks", "groups=[speed]")
    assert ended.code == 2
    assert ended.err.startswith("error: groups: must be some of")
    assert ended.err.count("\n") == 1


ASKED = {
    "pairs": "pair_rows", "margin": "margin_rows", "records": "read_rows",
    "loader": "loader_rows", "train": "train_rows", "infer": "infer_rows", "video": "video_rows",
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
def test_the_largest_network_is_for_cuda_or_who_asks_for_it(
    changes: dict, cuda: bool, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(monkeypatch, BenchConfig(compile=True, **changes), "infer", cuda)
    assert found["full"] is full
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


# One frame, two with usual and with negative qualities, three, constant ones, and many.
QUALITIES = [[-2.0], [3.0, 1.0], [-1.0, 2.0], [0.0, 0.0], [5.0, -3.0, 1.0], [2.0] * 4, [*range(9)]]


def ragged() -> Frames:
    """Videos that meet every rule of QAN++."""
    counts = torch.tensor([len(quality_T) for quality_T in QUALITIES])
    video_N = torch.arange(len(counts)).repeat_interleave(counts)
    quality_N = torch.tensor([float(q) for quality_T in QUALITIES for q in quality_T])
    generator = torch.Generator().manual_seed(0)
    return Frames(torch.randn(len(video_N), 5, generator=generator), video_N, quality_N)


def one_by_one(frames: Frames) -> Tensor:
    """The vectors (V, D), written out: min-max above two frames, the mean where that is nothing."""
    found = []
    for video in range(len(QUALITIES)):
        feature_TD = frames.feature_ND[frames.video_N == video].double()
        quality_T = frames.quality_N[frames.video_N == video].double()
        if len(quality_T) > 2:
            quality_T = quality_T - quality_T.min()
        if (quality_T < 0).any() or quality_T.sum() == 0:
            quality_T = torch.ones_like(quality_T)
        found.append((quality_T[:, None] * feature_TD).sum(dim=0) / quality_T.sum())
    return torch.stack(found)


@pytest.mark.parametrize("peer", ["dictionary", "index_add_"])
def test_the_peers_of_aggregation_are_qanpp(peer: str) -> None:
    frames = ragged()
    found = dict_loop(frames)() if peer == "dictionary" else aggregate_index_add(*frames)
    torch.testing.assert_close(found.double(), one_by_one(frames), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        aggregate(*frames, "qanpp").vector_VD.double(), one_by_one(frames), rtol=0, atol=1e-6
    )


def test_the_dictionary_keeps_the_order_of_the_videos() -> None:
    feature_ND = np.arange(8.0).reshape(4, 2)
    found = aggregate_dict(["b", "a", "b", "a"], feature_ND, np.array([1.0, 1.0, 1.0, 3.0]))
    assert list(found) == ["b", "a"]
    assert stacked(found).tolist() == [[2.0, 3.0], [5.0, 6.0]]


def test_video_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_video, "QUICK_VIDEOS", 20)
    found = list(video_rows(1, quick=True))
    assert [entry["peer"] for entry in found] == ["dictionary of videos, NumPy", "index_add_"]
    assert all(FIELDS <= set(entry) for entry in found)
    assert all(entry["max_abs_diff"] <= 1e-5 for entry in found)
    assert found[0]["shape"].startswith("20 videos, ")
    assert found[0]["note"].endswith("videos/s")


def test_videos_have_every_length() -> None:
    frames = frames_of(200, 0, longest=6, width=2)
    assert set(frames.video_N.bincount().tolist()) == {1, 2, 3, 4, 5, 6}
    assert not torch.equal(frames.feature_ND, frames_of(200, 1, longest=6, width=2).feature_ND)


def test_other_vectors_are_refused() -> None:
    frames = ragged()
    mean_VD = aggregate(*frames, "mean_raw").vector_VD
    with pytest.raises(RuntimeError, match="vectors differ from those of a mean by"):
        bench_video.compare("a mean", lambda: mean_VD, frames, 1)


@pytest.mark.slow
def test_a_small_run_writes_the_contract_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_video, "VIDEOS", 20)
    words = [f"out={tmp_path}", "groups=[video]", "threads=[1]", "repeats=1"]
    ended = command("face_lfr.benchmarks", *words)
    assert ended.code == 0, ended.err
    path = tmp_path / f"{results.slug(results.hardware(1))}.json"
    found = json.loads(path.read_text())
    assert set(found) == {"hardware", "versions", "rows"}
    assert len(found["rows"]) == 2
    assert all(FIELDS <= set(entry) for entry in found["rows"])
    assert path.with_suffix(".md").is_file()
