"""Groups of pictures: equal to a search over exact fractions, and to scikit-learn."""

from fractions import Fraction

import numpy as np
import pytest

from face_lfr.clusters import LINKAGES, average_linkage, connected, similarity_to_mean


def cosines(count: int, seed: int, width: int = 6) -> np.ndarray:
    """Cosines of random unit vectors around a few directions."""
    rng = np.random.default_rng(seed)
    vector_ND = (
        rng.normal(size=(count, width))
        + 2 * rng.normal(size=(5, width))[rng.integers(5, size=count)]
    )
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    similarity_NN = vector_ND @ vector_ND.T
    return (similarity_NN + similarity_NN.T) / 2


def greedy(similarity_NN: np.ndarray, threshold: float) -> list[int]:
    """Average linkage from its definition, in exact fractions; ties go to the first pictures."""
    exact = [[Fraction(value) for value in row] for row in similarity_NN.tolist()]
    groups = [[row] for row in range(len(exact))]
    while True:
        best: tuple[Fraction, int, int] | None = None
        for i, left in enumerate(groups):
            for j in range(i + 1, len(groups)):
                total = sum((exact[a][b] for a in left for b in groups[j]), Fraction(0))
                mean = total / (len(left) * len(groups[j]))
                if best is None or mean > best[0]:
                    best = (mean, i, j)
        if best is None or best[0] <= Fraction(threshold):
            return labels(groups, len(exact))
        _, i, j = best
        groups[i] += groups.pop(j)
        groups.sort(key=min)


def labels(groups: list[list[int]], count: int) -> list[int]:
    found = [0] * count
    for number, group in enumerate(sorted(groups, key=min)):
        for row in group:
            found[row] = number
    return found


def chains(similarity_NN: np.ndarray, threshold: float) -> list[int]:
    """Connected components by joining pair after pair."""
    group = list(range(len(similarity_NN)))
    for a in range(len(group)):
        for b in range(a):
            if similarity_NN[a, b] > threshold:
                old, new = group[a], group[b]
                group = [new if value == old else value for value in group]
    names = sorted(set(group), key=group.index)
    return [names.index(value) for value in group]


@pytest.mark.parametrize("seed", range(8))
def test_average_linkage_equals_its_definition_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 15))
    similarity_NN = rng.integers(-3, 4, (count, count)) / 4
    similarity_NN = np.triu(similarity_NN, 1) + np.triu(similarity_NN, 1).T
    for threshold in (-1.0, -0.25, 0.0, 0.25, 0.6):
        found = average_linkage(similarity_NN, threshold).tolist()
        assert found == greedy(similarity_NN, threshold)


@pytest.mark.parametrize("seed", range(4))
def test_average_linkage_equals_its_definition(seed: int) -> None:
    similarity_NN = cosines(24, seed)
    for threshold in (-0.2, 0.1, 0.4, 0.8):
        found = average_linkage(similarity_NN, threshold).tolist()
        assert found == greedy(similarity_NN, threshold)


@pytest.mark.parametrize(("rule", "linkage"), [("average", "average"), ("connected", "single")])
def test_groups_equal_those_of_scikit_learn(rule: str, linkage: str) -> None:
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is not installed")
    sizes = set()
    for seed in range(12):
        count = (2, 3, 40, 150)[seed % 4]
        similarity_NN = cosines(count, seed)
        above = similarity_NN[np.triu_indices(count, 1)]
        for threshold in np.quantile(above, (0.05, 0.4, 0.7, 0.9, 0.97)).tolist():
            peer = cluster.AgglomerativeClustering(
                n_clusters=None, metric="precomputed", linkage=linkage,
                distance_threshold=1 - threshold,
            )  # fmt: skip
            wanted = peer.fit(1 - similarity_NN).labels_
            found = LINKAGES[rule](similarity_NN, threshold)
            sizes.add(len(set(wanted)))
            assert labels_of_first(wanted) == found.tolist()
    assert {1, 2} < sizes
    assert max(sizes) > 20


def labels_of_first(label_N: np.ndarray) -> list[int]:
    order = list(dict.fromkeys(label_N.tolist()))
    return [order.index(value) for value in label_N.tolist()]


@pytest.mark.parametrize("seed", range(5))
def test_connected_groups_are_chains(seed: int) -> None:
    rng = np.random.default_rng(seed)
    similarity_NN = np.triu(rng.integers(-4, 5, (30, 30)) / 4, 1)
    similarity_NN += similarity_NN.T
    for threshold in (-1.0, 0.5, 0.75, 1.0):
        assert connected(similarity_NN, threshold).tolist() == chains(similarity_NN, threshold)


def test_a_long_chain_is_one_group_only_when_it_is_connected() -> None:
    count = 300
    similarity_NN = np.eye(count)
    near = np.arange(count - 1)
    similarity_NN[near, near + 1] = similarity_NN[near + 1, near] = 0.9
    assert not connected(similarity_NN, 0.5).any()
    assert len(set(average_linkage(similarity_NN, 0.5).tolist())) == count // 2


@pytest.mark.parametrize("rule", LINKAGES)
def test_a_similarity_at_the_threshold_does_not_count(rule: str) -> None:
    similarity_22 = np.array([[1.0, 0.3], [0.3, 1.0]])
    assert LINKAGES[rule](similarity_22, 0.3).tolist() == [0, 1]
    assert LINKAGES[rule](similarity_22, np.nextafter(0.3, 0)).tolist() == [0, 0]


@pytest.mark.parametrize("rule", LINKAGES)
def test_the_order_of_the_pictures_means_nothing(rule: str) -> None:
    similarity_NN, rng = cosines(60, 3), np.random.default_rng(0)
    threshold = {"average": 0.4, "connected": 0.85}[rule]
    wanted = LINKAGES[rule](similarity_NN, threshold)
    assert 1 < len(set(wanted.tolist())) < 60
    for _ in range(3):
        order = rng.permutation(60)
        found = LINKAGES[rule](similarity_NN[np.ix_(order, order)], threshold)
        assert found.tolist() == labels_of_first(wanted[order])


@pytest.mark.parametrize("rule", LINKAGES)
def test_few_pictures_and_the_input_stays(rule: str) -> None:
    assert LINKAGES[rule](np.empty((0, 0)), 0.5).tolist() == []
    assert LINKAGES[rule](np.ones((1, 1)), 0.5).tolist() == [0]
    similarity_NN = cosines(9, 0)
    before = similarity_NN.copy()
    LINKAGES[rule](similarity_NN, -1.0)
    np.testing.assert_array_equal(similarity_NN, before)


@pytest.mark.parametrize("rule", LINKAGES)
@pytest.mark.parametrize(
    ("similarity", "threshold", "message"),
    [
        (np.ones((2, 3)), 0.5, r"shape \(2, 3\), need \(N, N\)"),
        (np.full((2, 2), np.nan), 0.5, "must be finite"),
        (np.ones((2, 2)), float("nan"), "threshold=nan must be finite"),
        (np.array([[1.0, 0.2], [0.3, 1.0]]), 0.5, "not symmetric"),
    ],
)
def test_what_is_refused(rule: str, similarity: np.ndarray, threshold: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LINKAGES[rule](similarity, threshold)


def test_similarity_to_the_mean_of_the_group() -> None:
    rng = np.random.default_rng(0)
    vector_ND = rng.normal(size=(20, 5))
    vector_ND /= np.linalg.norm(vector_ND, axis=1, keepdims=True)
    label_N = np.append(rng.integers(0, 4, 19), 4)
    found = similarity_to_mean(vector_ND, label_N)
    for row, label in enumerate(label_N):
        members = [vector_ND[k] for k in range(20) if label_N[k] == label]
        mean_D = sum(members) / len(members)
        wanted = vector_ND[row] @ mean_D / np.sqrt(mean_D @ mean_D)
        assert found[row] == pytest.approx(wanted, abs=1e-12)
    assert found[19] == pytest.approx(1)
    assert similarity_to_mean(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.zeros(2, int)).tolist() == [
        0, 0,
    ]  # fmt: skip
    assert similarity_to_mean(np.empty((0, 5)), np.empty(0, int)).shape == (0,)
