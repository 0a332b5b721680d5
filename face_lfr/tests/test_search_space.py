"""The space of the search: costs, what fits a budget, the choice of candidates, the Pareto set."""

from itertools import product

import numpy as np
import pytest
import torch

from common.log import InputError
from face_lfr.flops import closed_form, count
from face_lfr.models.polyface import EfficientPolyFace
from face_lfr.search_space import Candidate, Space, fitting, pareto, spread

SMALL = Space(blocks=[1, 4], maps=[1, 2], features=[16, 64], widths=[0.1, 0.18])
LARGE = Space(blocks=[20, 40], maps=[6, 7], features=[256], widths=[1.0])
FIT = (0.93, 1.0)


@pytest.fixture(scope="module")
def candidates() -> list[Candidate]:
    return fitting(SMALL, 0.015, FIT).candidates


def built(candidate: Candidate) -> EfficientPolyFace:
    with torch.device("meta"):
        return EfficientPolyFace(
            candidate.blocks, candidate.features, candidate.input_size, candidate.width
        )


def test_costs_are_those_of_the_built_networks(candidates: list[Candidate]) -> None:
    large = fitting(LARGE, 30, FIT).candidates
    for candidate in [*candidates[:: len(candidates) // 4], large[0], large[-1]]:
        network = built(candidate)
        assert candidate.operations == count(network, candidate.input_size)
        assert candidate.params == sum(p.numel() for p in network.parameters())


def test_the_authors_network_fits_the_challenge() -> None:
    (found,) = [
        candidate
        for candidate in fitting(LARGE, 30, FIT).candidates
        if candidate.name == "a23b38c23_235px_d256"
    ]
    assert round(found.gflops, 3) == 28.104
    assert found.params == 119_927_552


def test_exactly_the_networks_within_the_budget_fit(candidates: list[Candidate]) -> None:
    wanted, costs = set(), []
    side = range(SMALL.blocks[0], SMALL.blocks[1] + 1)
    for a, b, c in product(side, side, side):
        if min(a, b, c) / (a + b + c) < 0.15 or max(a, b, c) / (a + b + c) > 0.6:
            continue
        for f, features, width in product(SMALL.maps, SMALL.features, SMALL.widths):
            size = 43 + 32 * f
            cost = closed_form((a, b, c), size, features, width)["organiser"]
            costs.append(cost)
            if 0.93 * 0.015e9 <= cost <= 0.015e9:
                wanted.add(Candidate((a, b, c), size, features, width, cost))
    found = fitting(SMALL, 0.015, FIT)
    assert set(candidates) == wanted
    assert len(candidates) == len(wanted) > 10
    assert found.total == len(costs)
    assert found.cheapest.operations == min(costs)
    assert found.dearest.operations == max(costs)


@pytest.mark.parametrize("budget", [0.001, 1.0])
def test_a_budget_nothing_fits_is_refused_with_the_ends_of_the_space(budget: float) -> None:
    with pytest.raises(InputError) as caught:
        fitting(SMALL, budget, FIT)
    message = str(caught.value)
    assert message.startswith("budget_gflops: no network costs 93% to 100% of it")
    assert "cheapest a1b1c1_75px_d16_w0.1 with 0.004788 G," in message
    assert "dearest a4b4c4_107px_d64_w0.18 with 0.04094 G)" in message
    assert message.endswith(f": {budget:g}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [0, 4]}, "space.blocks: needs the fewest and the most"),
        ({"blocks": [4, 2]}, "space.blocks"),
        ({"blocks": [1, 900]}, "space.blocks.*to 200"),
        ({"stage_share": [0.4, 0.6]}, "space.stage_share: needs a lower bound of at most 1/3"),
        ({"maps": [0, 1]}, "space.maps: needs at least one, all above 0"),
        ({"features": []}, "space.features"),
        ({"widths": [0.0]}, "space.widths"),
    ],
)
def test_a_space_without_networks_is_refused(changes: dict[str, list], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fitting(Space(**changes), 30, FIT)


@pytest.mark.parametrize("fit", [(1.0, 0.9), (0.5, 1.1), (0.9,)])
def test_shares_of_the_budget_must_rise(fit: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="fit: needs two rising shares"):
        fitting(SMALL, 0.015, fit)


def places(candidates: list[Candidate]) -> np.ndarray:
    """Coordinates from their description, one candidate after another."""
    rows = []
    for candidate in candidates:
        a, b, c = candidate.blocks
        total, rest = a + b + c, (candidate.input_size, candidate.features, candidate.width)
        rows.append([np.log(total), a / total, b / total, *(np.log(value) for value in rest)])
    point = np.array(rows)
    width = np.ptp(point, axis=0)
    return (point - point.min(axis=0)) / np.where(width > 0, width, 1)


def test_the_next_candidate_is_the_farthest_from_the_chosen(candidates: list[Candidate]) -> None:
    point, chosen = places(candidates), spread(candidates, 7, seed=3)
    rows = [candidates.index(candidate) for candidate in chosen]
    assert len(set(rows)) == 7
    for number in range(1, 7):
        near = [min(np.linalg.norm(p - point[row]) for row in rows[:number]) for p in point]
        assert near[rows[number]] == pytest.approx(max(near), abs=1e-12)


def test_the_choice_is_decided_by_the_seed(candidates: list[Candidate]) -> None:
    chosen = spread(candidates, 6, seed=0)
    assert spread(candidates, 6, seed=0) == chosen
    assert spread(candidates, 9, seed=0)[:6] == chosen
    firsts = {spread(candidates, 1, seed)[0] for seed in range(20)}
    assert len(firsts) > 5
    assert set(spread(candidates, 10_000, seed=0)) == set(candidates)


def test_named_candidates_come_first(candidates: list[Candidate]) -> None:
    names = [candidates[4].name, candidates[9].name]
    chosen = spread(candidates, 4, 0, names)
    assert [candidate.name for candidate in chosen[:2]] == names
    assert len(chosen) == 4
    assert [candidate.name for candidate in spread(candidates, 1, 0, names)] == names
    with pytest.raises(InputError, match=r"include: is not among the \d+ candidates.*: a9b9c9"):
        spread(candidates, 4, 0, ["a9b9c9"])
    with pytest.raises(InputError, match="candidates: must be at least 1"):
        spread(candidates, 0, 0)


def test_the_pareto_set_is_what_nothing_beats() -> None:
    assert pareto([(1, 0.5), (2, 0.7), (3, 0.6), (2, 0.6), (1, 0.5)]) == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert pareto([(1, 0.5), (2, 0.5)]) == [True, False]
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.integers(0, 8, (40, 2))]
    best_below = [max(y for x, y in points if x < cost) if any(x < cost for x, _ in points) else -1
                  for cost, _ in points]  # fmt: skip
    best_at = [max(y for x, y in points if x == cost) for cost, _ in points]
    wanted = [score == best_at[i] and score > best_below[i] for i, (_, score) in enumerate(points)]
    assert pareto(points) == wanted
