import pytest
import torch

from common import dist
from common.log import InputError
from common.tests.jobs import launch, results


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    world = dist.init("cpu")
    assert (world.rank, world.size, world.device.type, world.main) == (0, 1, "cpu", True)
    rows_23 = torch.arange(6.0, requires_grad=True).reshape(2, 3)
    gathered_23 = dist.gather_rows(rows_23)
    assert torch.equal(gathered_23, rows_23)
    assert not gathered_23.requires_grad
    assert dist.mean_over_ranks({"a": 2}) == {"a": 2.0}
    assert dist.gather_objects("x") == ["x"]
    assert dist.broadcast_object("x") == "x"
    assert dist.any_rank(True)
    assert not dist.any_rank(False)
    with dist.main_first():
        dist.barrier()
    assert dist.together(lambda: 3) == 3
    dist.shutdown()
    with pytest.raises(ZeroDivisionError):
        dist.together(lambda: 1 // 0)
    with pytest.raises(ValueError, match="dimension 0"):
        dist.gather_rows(torch.tensor(1))


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"^device: .*{name}$"):
        dist.init(name)


@pytest.mark.slow
def test_two_ranks(tmp_path) -> None:
    first, second = results(launch("collectives", tmp_path, ranks=2))
    for seen in (first, second):
        assert seen["text"] == "ready"
        assert seen["rows"]["torch.bool"] == [[True, True]]
        assert len(seen["rows"]) == 5
        assert all(rows == [[1, 1]] for rows in seen["rows"].values())
        assert seen["flat"] == [0, 1, 2, 10]
        assert (seen["unknown"], seen["wide"]) == ([2, 3], [4, 0])
        assert seen["empty"] == [[0, 4], "torch.int16"]
        # float32 would lose the second: 1 + 1e-12 rounds to 1 there.
        assert seen["mean"] == {"a": pytest.approx(0.15), "b": pytest.approx(1 + 1e-12, abs=1e-15)}
        assert seen["objects"] == [{"rank": 0}, {"rank": 1}]
        assert (seen["any"], seen["none"], seen["sent"]) == (True, False, 1)
        shapes, scalar, keys, one, main = seen["errors"]
        assert "differ between ranks in shape" in shapes
        assert "dimension 0" in scalar
        assert "keys differ" in keys
        assert "ZeroDivisionError" in one
        assert "ZeroDivisionError" in main
