import json
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.seed import rng_state, seed_everything, set_rng_state, worker_init


def draw() -> list[float]:
    numpy_draws = [np.random.rand(), np.random.randn()]  # noqa: NPY002 - the generator under test
    return [random.random(), random.gauss(0, 1), *numpy_draws, torch.rand(()).item()]


class Draws(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(draw(), dtype=torch.float64)


def test_equal_seeds_equal_draws() -> None:
    seen = []
    for seed, rank in ((1, 0), (1, 1), (2, 0), (1, 0)):
        seed_everything(seed, rank)
        seen.append(draw())
    assert seen[0] == seen[3]
    for other in seen[1:3]:
        assert all(a != b for a, b in zip(seen[0], other, strict=True))


def test_state_survives_json() -> None:
    seed_everything(3)
    draw()  # leaves a second Gaussian waiting in Python and numpy
    text = json.dumps(rng_state())
    expected = [draw(), draw()]
    seed_everything(4)
    set_rng_state(json.loads(text))
    assert [draw(), draw()] == expected


def test_workers_differ_and_repeat() -> None:
    def rows() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(
            Draws(), num_workers=2, batch_size=1, worker_init_fn=worker_init, generator=generator
        )
        return torch.cat(list(loader))

    rows_45 = rows()
    assert len(torch.unique(rows_45)) == rows_45.numel()
    assert torch.equal(rows_45, rows())


@pytest.mark.parametrize(("seed", "rank"), [(-1, 0), (0, -1)])
def test_negative_seed_is_refused(seed: int, rank: int) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        seed_everything(seed, rank)
