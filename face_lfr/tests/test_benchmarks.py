"""The speed suite: rows compare equal things, results compare with the same machine only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.log import InputError
from face_lfr.benchmarks import __main__ as suite
from face_lfr.benchmarks import bench_infer, bench_train, results
from face_lfr.benchmarks.__main__ import BenchConfig, plan
from face_lfr.benchmarks.bench_infer import Forward, infer_rows, views_row, volume_row
from face_lfr.benchmarks.bench_train import Step, Work, compare_steps, train_rows
from face_lfr.benchmarks.compare import better, compare, stored, table
from face_lfr.benchmarks.networks import SAME, Variant, gmac, recogniser, twins, variants
from face_lfr.benchmarks.notes import measured, rates
from face_lfr.benchmarks.results import Row, row
from face_lfr.models.r2plus1d import R2Plus1D
from face_lfr.tests.launch import command

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = Work(clips=2, size=32, depth=18, frames=4)
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
    groups = ["interlace", "metrics", "train", "read", "loader"]
    assert plan(groups, [1, 0], 4) == {1: groups, 4: ["interlace", "train", "loader"]}
    assert plan(["read"], [2, 1], 4) == {2: ["read"]}
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


@pytest.mark.parametrize(
    ("changes", "cuda", "repeats", "full"),
    [
        ({}, False, 5, False),
        ({"quick": True}, False, 2, False),
        ({"full": True}, False, 5, True),
        ({}, True, 5, True),
        ({"quick": True}, True, 2, False),
        ({"full": False}, True, 5, False),
        ({"quick": True, "repeats": 1}, False, 1, False),
    ],
)
def test_what_the_operators_are_asked_for(
    changes: dict, cuda: bool, repeats: int, full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[suite.OperatorSizes] = []

    def rows(sizes: suite.OperatorSizes) -> Iterator[Row]:
        seen.append(sizes)
        yield timed("a", 1.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(suite.bench_ops, "interlace_rows", rows)
    assert len(list(suite._rows(BenchConfig(seed=7, **changes), "interlace"))) == 1
    assert seen == [suite.OperatorSizes(repeats, full, 7)]


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
    found = measured("a", "1x2", "loop", times, 0.5, rates(times, 2, "clips"), "", "mine")
    assert FIELDS <= set(found)
    assert found["note"] == "40 against 10 clips/s; mine; peer timed once"
    assert (found["ratio"], found["max_abs_diff"], found["peer"]) == (4.0, 0.5, "loop")
    assert times["note"] == "peer timed once"
    assert "note" not in measured("a", "1", "loop", {"ours_ms": 1.0}, None)


def test_variants_of_a_device() -> None:
    half = Variant("bfloat16", channels_last=True)
    assert variants(CUDA) == [Variant(), half, half._replace(compiled=True)]
    assert variants(CPU) == [Variant(), Variant(channels_last=True)]
    assert variants(CPU, quick=True) == [Variant()]
    assert variants(CPU, compile=True)[-1] == Variant(channels_last=True, compiled=True)
    assert half._replace(compiled=True).label == "bfloat16 channels_last, compiled"


@pytest.mark.parametrize("kind", ["TSN", "TSM", "TIN"])
def test_every_kind_has_the_same_backbone_and_classifier(kind: str) -> None:
    plain = recogniser("TSN", 18, 4, seed=3).state_dict()
    state = {
        name.replace("conv1.conv.", "conv1."): tensor
        for name, tensor in recogniser(kind, 18, 4, seed=3).state_dict().items()
        if ".temporal." not in name
    }
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    other = recogniser(kind, 18, 4, seed=4).state_dict()
    assert not torch.equal(other["head.weight"], plain["head.weight"])


def test_a_tin_has_learned_offsets_unless_it_stands_in_for_another() -> None:
    def extra(**options: object) -> int:
        net = recogniser("TIN", 18, 4, **options)
        return sum(x.numel() for name, x in net.named_parameters() if ".temporal." in name)

    assert extra() > 0
    assert extra(**SAME["TSN"]) == extra(**SAME["TSM"]) == 0


@pytest.mark.parametrize("kind", ["TIN", "TSM"])
@pytest.mark.parametrize("variant", [Variant(channels_last=True), Variant("bfloat16")])
def test_twins_take_the_same_step(kind: str, variant: Variant) -> None:
    name, peer, fixed = twins(kind, 18, SMALL.frames, 0)
    assert name == ("TSM" if kind == "TSM" else "TSN")
    difference, gap = compare_steps(name, fixed, peer, SMALL, variant, CPU)
    assert difference <= 1e-4
    assert gap <= 1e-5


@pytest.mark.parametrize(("ours", "peer"), [("TIN", "TSN"), ("TSM", "TSN"), ("TIN", "TSM")])
def test_networks_that_compute_something_else_are_refused(ours: str, peer: str) -> None:
    nets = (recogniser(kind, 18, SMALL.frames) for kind in (ours, peer))
    with pytest.raises(RuntimeError, match="a pair: losses differ"):
        compare_steps("a pair", *nets, SMALL, Variant(), CPU)


def test_networks_of_one_loss_and_another_gradient_are_refused() -> None:
    ours, peer = (recogniser("TSN", 18, SMALL.frames) for _ in range(2))
    ours.head.weight.register_hook(lambda grad: 2 * grad)
    with pytest.raises(RuntimeError, match=r"losses differ by 0\.0, gradients by 0\."):
        compare_steps("a pair", ours, peer, SMALL, Variant(), CPU)
    ours, peer = (recogniser("TSN", 18, SMALL.frames) for _ in range(2))
    peer.head.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"a pair: other parameters, \['head.bias'\]"):
        compare_steps("a pair", ours, peer, SMALL, Variant(), CPU)


def test_steps_train() -> None:
    step = Step(recogniser("TIN", 18, SMALL.frames), SMALL.item(CPU), Variant(), CPU)
    losses = [float(step()) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all("temporal" not in name for name in step.gradient())
    grads = [x.grad for name, x in step.net.named_parameters() if ".temporal." in name]
    assert all(grad is not None for grad in grads)
    assert any(grad.abs().max() > 0 for grad in grads if grad is not None)
    assert SMALL.item(CPU).target.sum(dim=1).tolist() == [2.0, 2.0]


def test_a_step_takes_another_item() -> None:
    step = Step(recogniser("TSN", 18, SMALL.frames), SMALL.item(CPU), Variant(), CPU)
    step.optimizer.param_groups[0]["lr"] = 0.0
    first, other = SMALL.item(CPU), SMALL._replace(seed=1).item(CPU)
    assert float(step(first)) == float(step())
    assert float(step(other)) != float(step())


@pytest.mark.parametrize("kind", ["TIN", "TSM"])
def test_a_training_row(kind: str) -> None:
    found = bench_train.tsn_row(kind, SMALL, Variant(), 1, CPU)
    assert FIELDS <= set(found)
    assert (found["name"], found["peer"]) == (f"train step, {kind}-R18", "TSN-R18")
    assert found["shape"] == "2 x 4 frames of 32x32, float32 contiguous"
    assert found["max_abs_diff"] <= 1e-4
    assert found["ratio"] == pytest.approx(found["peer_ms"] / found["ours_ms"])
    assert f"{1 / found['ratio']:.3f} times the step of the TSN" in found["note"]
    assert ("wanted 1.15" in found["note"]) is (kind == "TIN")


def test_training_rows_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fake(kind: str, work: Work, variant: Variant, repeats: int, device: torch.device) -> Row:
        seen.append((kind, work.size, variant, repeats))
        return timed("step", 1.0)

    monkeypatch.setattr(bench_train, "tsn_row", fake)
    assert len(list(train_rows(3, CPU, quick=True))) == 2
    assert seen == [("TIN", 112, Variant(), 3), ("TSM", 112, Variant(), 3)]
    seen.clear()
    assert len(list(train_rows(3, CPU))) == 4
    assert {size for _, size, _, _ in seen} == {224}


@pytest.mark.parametrize("rows", [train_rows, infer_rows])
def test_a_missing_compiler_is_told(rows: object, monkeypatch: pytest.MonkeyPatch) -> None:
    module = bench_train if rows is train_rows else bench_infer
    for name in ("tsn_row", "compiled_row", "volume_row", "views_row"):
        monkeypatch.setattr(module, name, lambda *_: timed("a", 1.0), raising=False)
    monkeypatch.setattr(module, "no_compiler", lambda: "no compiler")
    found = [entry for entry in rows(1, CPU, compile=True) if "note" in entry]  # type: ignore[operator]
    assert [entry["note"] for entry in found] == ["not measured: no compiler"]
    assert "compiled" in found[0]["shape"]
    assert found[0]["ours_ms"] is None


def test_inference_rows() -> None:
    work = bench_infer.Work(2, 4, 32)
    found = bench_infer.tsn_row(18, work, Variant(channels_last=True), 1, CPU)
    assert FIELDS <= set(found)
    assert found["shape"] == "2 x 4 frames of 32x32, float32 channels_last"
    assert found["max_abs_diff"] <= 1e-4
    assert found["note"].endswith("videos/s")


def test_another_network_is_compared_by_its_multiplications() -> None:
    work, other = bench_infer.Work(1, 4, 32), bench_infer.Work(1, 8, 32)
    net = R2Plus1D(5, 10, max_pool=False)
    found = volume_row("R(2+1)D-10", net, work, other, Variant(channels_last=True), 1, CPU)
    cost = gmac(net, work.x())
    assert f"ours {cost:.1f} GMAC a clip" in found["note"]
    assert found["max_abs_diff"] is None
    from torchvision.models.video import r2plus1d_18

    theirs = gmac(r2plus1d_18(weights=None), other.x().transpose(1, 2))
    wanted = (found["peer_ms"] / theirs) / (found["ours_ms"] / cost)
    assert found["ratio"] == pytest.approx(wanted)


def test_macs_of_the_networks_that_are_compared() -> None:
    x = torch.zeros(1, 8, 3, 64, 64)
    tsn, tin = (gmac(recogniser(kind, 50), x) for kind in ("TSN", "TIN"))
    assert tin == pytest.approx(tsn, rel=1e-3)
    assert tsn * (224 / 64) ** 2 == pytest.approx(32.8, rel=0.02)


def test_gmac_leaves_the_mode_of_the_network() -> None:
    net = recogniser("TSN", 18, 2)
    gmac(net, torch.zeros(1, 2, 3, 32, 32))
    assert net.training


@pytest.mark.slow
def test_thirty_views_are_the_mean_of_single_ones() -> None:
    found = views_row(18, 32, 1, CPU, 0)
    assert found["max_abs_diff"] <= 1e-4
    assert found["shape"].startswith("3 crops x 10 clips x 8 frames of 32x32")
    assert "reading included" in found["note"]


def test_scores_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_infer, "CROPS", 1)
    monkeypatch.setattr(bench_infer, "CLIPS", 1)
    monkeypatch.setattr(bench_infer, "scores_by_view", lambda *_: torch.zeros(1, 313))
    with pytest.raises(RuntimeError, match="30 views: results differ by"):
        views_row(18, 32, 1, CPU, 0)


def test_a_forward_pass_has_no_graph_and_float32_logits() -> None:
    x = torch.zeros(1, 4, 3, 32, 32)
    found = Forward(recogniser("TIN", 18, 4), x, Variant("bfloat16"), CPU)()
    assert found.shape == (1, 313)
    assert found.dtype == torch.float32
    assert not found.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["TIN", "TSM"])
def test_a_training_row_on_cuda(kind: str) -> None:
    half = Variant("bfloat16", channels_last=True)
    found = bench_train.tsn_row(kind, SMALL, half, 1, CUDA)
    assert found["ours_mib"] > 0
    assert found["peer_mib"] > 0


@pytest.mark.slow
def test_a_small_run_writes_the_contract_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite.bench_ops, "SHAPES", ((64, 4), (256, 4), (128, 2)))
    words = [f"out={tmp_path}", "groups=[interlace,shift]", "threads=[1]", "repeats=1"]
    ended = command("face_lfr.benchmarks", *words)
    assert ended.code == 0, ended.err
    path = tmp_path / f"{results.slug(results.hardware(1))}.json"
    found = json.loads(path.read_text())
    assert set(found) == {"hardware", "versions", "rows"}
    assert found["rows"]
    assert all(FIELDS <= set(entry) for entry in found["rows"])
    assert path.with_suffix(".md").is_file()
