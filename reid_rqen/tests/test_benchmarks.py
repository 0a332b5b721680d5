"""The speed suite: rows compare equal things, results compare with the same machine only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.log import InputError
from reid_rqen.benchmarks import __main__ as suite
from reid_rqen.benchmarks import bench_infer, bench_train, results
from reid_rqen.benchmarks.__main__ import BenchConfig, plan
from reid_rqen.benchmarks.bench_infer import extract_row, replica_tracklets, synthetic_tracklets
from reid_rqen.benchmarks.bench_train import Step, Variant, Work, gmac, step_row, train_rows
from reid_rqen.benchmarks.compare import better, compare, stored, table
from reid_rqen.benchmarks.results import Row, row
from reid_rqen.data.transforms import FrameTransform
from reid_rqen.models.googlenet_bn import GoogLeNetBN
from reid_rqen.models.quality import TinyQuality
from reid_rqen.models.rqen import RQEN
from reid_rqen.models.tiny import TinyTrunk

CPU = torch.device("cpu")


def tiny(num_classes: int | None = bench_train.CLASSES) -> RQEN:
    torch.manual_seed(0)
    return RQEN(TinyTrunk(), TinyQuality(3), num_classes, auxiliary=False)


def tiny_work() -> Work:
    return Work(tiny(), draws=2, frames=2, size=(56, 28))


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


def test_scores_are_counted_on_the_first_thread_count_only() -> None:
    groups = ["evaluate", "rerank", "train"]
    assert plan(groups, [1, 0], 4) == {1: groups, 4: ["rerank", "train"]}
    assert plan(["evaluate"], [2, 1], 4) == {2: ["evaluate"]}
    assert plan(groups, [1, 0], 1) == {1: groups}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": ["speed"]}, "groups: must be some of"),
        ({"threads": [-1]}, "threads: must be counts"),
        ({"repeats": 0}, "must be positive"),
        ({"tolerance": 0.0}, "must be positive"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        suite.run(BenchConfig(**changes))


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


def test_macs_are_those_of_the_paper() -> None:
    assert gmac(GoogLeNetBN(), 224) == pytest.approx(2.01782784, abs=1e-9)


def test_the_peer_trunk_costs_as_much_as_ours() -> None:
    from torchvision.models import googlenet

    peer = googlenet(weights=None, aux_logits=False, init_weights=False)
    ratio = gmac(peer, bench_train.PEER_SIZE) / 2.01782784
    assert ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("variant", [Variant(channels_last=True), Variant("bfloat16")])
def test_a_variant_is_the_same_step(variant: Variant) -> None:
    found = step_row("step", variant, "plain", Variant(), tiny_work(), 1, CPU, 2e-2)
    assert found["max_abs_diff"] < 0.2
    assert found["ratio"] == pytest.approx(found["peer_ms"] / found["ours_ms"])
    assert found["shape"] == "2 x 3 sets x 2 = 12 frames of 56x28"
    assert "of its gradient" in found["note"]


def test_a_variant_that_computes_something_else_is_refused() -> None:
    with pytest.raises(RuntimeError, match="first loss"):
        step_row("step", Variant("bfloat16"), "plain", Variant(), tiny_work(), 1, CPU, 1e-9)


def test_a_step_trains_a_copy() -> None:
    work = tiny_work()
    before = [x.clone() for x in work.model.parameters()]
    step = Step(work, Variant(), CPU)
    losses = [float(step()) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert step.gradient().numel() == sum(x.numel() for x in work.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, work.model.parameters(), strict=True))


def test_extraction_rows_compare_with_one_tracklet_at_a_time(tmp_path: Path) -> None:
    tracklets = synthetic_tracklets(tmp_path / "synth", 2, 0)
    assert len(tracklets) == 6
    transform = FrameTransform(size=(56, 28), scale=0.01)
    found = extract_row("extract", tiny(None), tracklets, transform, 1, CPU)
    assert found["max_abs_diff"] < 1e-5
    assert found["shape"] == "6 tracklets, 72 frames"
    assert found["note"].endswith("frames/s")


def test_extraction_that_differs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracklets = replica_tracklets(tmp_path, (1, 2), 0)
    assert [len(tracklet.frames) for tracklet in tracklets] == [1, 2]
    model = tiny(None)
    monkeypatch.setattr(
        bench_infer, "vectors_one_by_one", lambda *_: torch.zeros(2, model.dimensions)
    )
    with pytest.raises(RuntimeError, match="differs from one tracklet at a time"):
        extract_row("extract", model, tracklets, FrameTransform(size=(56, 28)), 1, CPU)


def test_unmeasured_compilation_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "trunk_row", lambda *_: row("trunk step", "1", "peer"))
    monkeypatch.setattr(bench_train, "step_row", lambda *_: row("step", "1", "peer"))
    rows = list(train_rows(1, CPU))
    assert len(rows) == 3
    assert rows[-1]["note"].startswith("not measured: takes over a minute")
    assert rows[-1]["ours_ms"] is None


@pytest.mark.slow
def test_a_small_run_writes_the_contract_files(tmp_path: Path) -> None:
    cfg = BenchConfig(out=str(tmp_path), groups=["aggregate"], threads=[1], repeats=1)
    assert suite.run(cfg) == 0
    path = tmp_path / f"{results.slug(results.hardware(1))}.json"
    found = json.loads(path.read_text())
    assert set(found) == {"hardware", "versions", "rows"}
    keys = {"name", "shape", "ours_ms", "peer", "peer_ms", "ratio", "max_abs_diff"}
    assert all(keys <= set(entry) for entry in found["rows"])
    assert path.with_suffix(".md").is_file()
