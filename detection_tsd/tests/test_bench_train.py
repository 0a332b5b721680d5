"""The rows of training steps: equal losses are equal, steps train, loading loads the set."""

from typing import Any

import pytest
import torch
from torch import Tensor

from detection_tsd.benchmarks import bench_train
from detection_tsd.benchmarks.bench_infer import Bench
from detection_tsd.benchmarks.bench_train import batch_of, losses_agree, our_step, train_rows
from detection_tsd.benchmarks.networks import Work, pair, usual
from detection_tsd.benchmarks.peer_detector import NAME
from detection_tsd.benchmarks.results import Row, row

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = Work(2, (64, 120), 60, 32, (1, 1, 1, 1), 32, 32)
BENCH = Bench(SMALL, "float32", 1, CPU)
FIELDS = {"name", "shape", "ours_ms", "peer", "peer_ms", "ratio", "max_abs_diff"}


def test_a_tsd_step_against_one_of_the_sibling() -> None:
    found = bench_train.tsd_row(BENCH)
    assert FIELDS <= set(found)
    assert (found["name"], found["peer"]) == ("train step, TSD-R14", "sibling-R14")
    assert found["shape"] == "2 images of 64x120 in 64x128, 32 regions each, float32"
    assert found["max_abs_diff"] <= 1e-5
    factor = found["ours_ms"] / found["peer_ms"]
    assert found["note"].startswith(f"{factor:.3f} times the sibling's step; ")


def test_the_losses_that_both_have_are_those_of_the_companion() -> None:
    both, batch = pair(SMALL, joint=True), batch_of(SMALL)
    steps = [our_step(model, batch, CPU, "float32") for model in both]
    parts = [{name: x.detach() for name, x in step.losses(batch).items()} for step in steps]
    shared = {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box"}
    assert set(parts[1]) == shared
    more = {"loss_cls_tsd", "loss_box_tsd", "loss_pc_cls", "loss_pc_box"}
    assert set(parts[0]) == shared | more
    assert losses_agree("a", *parts) <= 1e-5
    assert all(float(value) > 0 for value in parts[0].values())
    parts[0]["loss_cls"] = parts[0]["loss_cls"] * 1.001
    with pytest.raises(RuntimeError, match="a: loss_cls differs by"):
        losses_agree("a", *parts)


def test_steps_train() -> None:
    step = our_step(pair(SMALL, joint=True).tsd, batch_of(SMALL), CPU, "float32")
    before = {name: x.detach().clone() for name, x in step.net.named_parameters()}
    losses = [float(torch.stack([*step().values()]).sum()) for _ in range(8)]
    assert losses[-1] < losses[0]
    moved = {name for name, x in step.net.named_parameters() if not torch.equal(x, before[name])}
    assert {"head.sibling.box_head.fc6.weight", "head.offset.shared.weight"} <= moved
    assert "backbone.body.layer2.0.conv1.weight" in moved


def test_a_step_against_one_of_torchvision() -> None:
    found = bench_train.torchvision_row(BENCH)
    assert (found["name"], found["peer"]) == ("train step, sibling-R14", NAME)
    assert found["max_abs_diff"] is None
    assert "of other samples" in found["note"]


def test_losses_far_from_those_of_torchvision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench_train.peer_detector.training_losses

    def doubled(*args: Any) -> dict[str, Tensor]:
        return {name: 2 * value for name, value in real(*args).items()}

    monkeypatch.setattr(bench_train.peer_detector, "training_losses", doubled)
    with pytest.raises(RuntimeError, match="are not near each other"):
        bench_train.torchvision_row(BENCH)


def test_a_step_with_loading() -> None:
    found = bench_train.loading_row(BENCH, workers=0, pictures=4)
    assert found["max_abs_diff"] == 0
    assert found["shape"].startswith("2 images of 64x85 in 64x128, ")
    assert found["shape"].endswith("0 workers")
    assert found["note"].endswith("JPEG of 120x160")


@pytest.mark.parametrize(
    ("device", "quick", "work", "repeats"),
    [
        (CPU, False, bench_train.CPU, 3),
        (CPU, True, bench_train.QUICK, 3),
        (CUDA, False, bench_train.GPU, 20),
    ],
)
def test_rows_of_a_device(
    device: torch.device, quick: bool, work: Work, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Bench] = []

    def note(bench: Bench, workers: int = 0) -> Row:
        seen.append(bench)
        assert (workers == 0) or device == CUDA
        return row("a", "1", "peer")

    for name in ("tsd_row", "torchvision_row", "loading_row"):
        monkeypatch.setattr(bench_train, name, note)
    assert len(list(train_rows(3, device, quick, 5))) == 3
    assert set(seen) == {Bench(work._replace(seed=5), usual(device), repeats, device)}


def test_batches_have_objects_inside_their_images() -> None:
    batch = batch_of(SMALL)
    assert batch.image_B3HW.shape == (2, 3, 64, 128)
    assert not batch.image_B3HW[:, :, :, 120:].any()
    for target in batch.targets:
        assert (target.box_G4 >= 0).all()
        assert (target.box_G4 <= torch.tensor([120.0, 64, 120, 64])).all()
        assert (target.box_G4[:, 2:] > target.box_G4[:, :2]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_on_cuda() -> None:
    bench = Bench(SMALL, usual(CUDA), 1, CUDA)
    found = [bench_train.tsd_row(bench), bench_train.torchvision_row(bench)]
    found.append(bench_train.loading_row(bench, workers=2, pictures=4))
    assert all(entry["ours_mib"] > 0 for entry in found)
