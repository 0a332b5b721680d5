from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.log import InputError
from common.samplers import EvalSampler, ResumableSampler


def stream(length: int, seed: int, count: int) -> list[int]:
    """The samples all ranks together see, from the definition."""
    order: list[int] = []
    for epoch in range(count // length + 1):
        generator = torch.Generator().manual_seed(seed + epoch)
        order += torch.randperm(length, generator=generator).tolist()
    return order[:count]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 7, 12])
def test_ranks_deal_out_one_stream(length: int, world: int) -> None:
    samplers = [ResumableSampler(length, seed=3, rank=r, world=world) for r in range(world)]
    seen = list(islice(zip(*samplers, strict=True), 24 // world))
    assert [index for group in seen for index in group] == stream(length, 3, 24)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 3)])
def test_position_survives_another_rank_count(before: int, after: int) -> None:
    seen: list[int] = []
    state = {"consumed": 0, "length": 10, "seed": 0}
    for world in (before, after):
        samplers = [ResumableSampler(10, rank=r, world=world) for r in range(world)]
        for sampler in samplers:
            sampler.load_state_dict(state)
        for group in islice(zip(*samplers, strict=True), 12 // world):
            seen += group
        state = {**state, "consumed": state["consumed"] + 12}
    assert seen == stream(10, 0, 24)


def test_prefetching_workers_do_not_move_the_position() -> None:
    sampler = ResumableSampler(6, seed=1)
    loader = DataLoader(
        np.arange(6), batch_size=2, sampler=sampler, num_workers=1, prefetch_factor=4
    )
    for _batch in islice(loader, 2):
        sampler.consumed += 2
    resumed = ResumableSampler(6, seed=1)
    resumed.load_state_dict(sampler.state_dict())
    assert sampler.consumed == 4
    assert list(islice(resumed, 8)) == stream(6, 1, 12)[4:]


def test_a_permutation_is_computed_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: calls.append(a) or real(*a, **k))
    sampler = ResumableSampler(5)
    list(islice(sampler, 15))
    assert len(calls) == 3
    for _ in range(3):
        list(islice(sampler, 5))
    assert len(calls) == 4


def test_unshuffled_stream_is_free_of_the_length() -> None:
    sampler = ResumableSampler(2**62, rank=1, world=2, shuffle=False)
    sampler.consumed = 2**62 - 2
    assert list(islice(sampler, 3)) == [2**62 - 1, 1, 3]


def test_state_of_another_data_set_is_refused() -> None:
    for other, key in ((ResumableSampler(9), "length"), (ResumableSampler(8, seed=1), "seed")):
        with pytest.raises(InputError, match=f"sampler.{key}: differs"):
            ResumableSampler(8).load_state_dict(other.state_dict())


@pytest.mark.parametrize("length", [0, 1, 5, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_eval_shares_are_the_whole_in_order(length: int, world: int) -> None:
    shares = [EvalSampler(length, rank, world) for rank in range(world)]
    assert [index for share in shares for index in share] == list(range(length))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("length", "rank", "world", "name"),
    [(0, 0, 1, "length=0"), (3, 2, 2, "rank=2"), (3, -1, 2, "rank=-1"), (3, 0, 0, "world=0")],
)
def test_arguments_out_of_range_are_named(length: int, rank: int, world: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ResumableSampler(length, rank=rank, world=world)
