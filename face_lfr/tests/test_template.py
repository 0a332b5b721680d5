"""IJB protocols: the published scripts spelled out, ROC of scikit-learn, cases done by hand."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_curve

from common.log import InputError
from face_lfr import template as module
from face_lfr.data.ijb import IjbData, Subjects, load_ijb
from face_lfr.data.replicas import write_replica
from face_lfr.template import (
    FPRS,
    Mode,
    Templates,
    mean_search,
    pair_scores,
    search_gallery,
    search_templates,
    template_vectors,
    verify_templates,
)
from face_lfr.verification import RocPoint, bounded_points, nearest_points, roc

PERSONS = 24


def make(seed: int, images: int = 300, width: int = 12) -> tuple[IjbData, np.ndarray]:
    """A set without files: templates 3 k + 5, two a person, and flip-concatenated features."""
    rng = np.random.default_rng(seed)
    owner_N = np.concatenate([np.arange(2 * PERSONS), rng.integers(0, 2 * PERSONS, images)])
    owner_N = rng.permutation(owner_N)
    person_N = owner_N % PERSONS
    media_N = 10 * owner_N + rng.integers(0, 3, len(owner_N))
    centre = rng.standard_normal((PERSONS, width))
    noise = rng.standard_normal((len(owner_N), 2 * width))
    feature = np.tile(centre[person_N], 2) + 2.6 * noise
    ids = 3 * np.arange(2 * PERSONS) + 5
    pair_P2 = ids[rng.integers(0, 2 * PERSONS, (2000, 2))]
    same_P = (pair_P2[:, 0] - pair_P2[:, 1]) % (3 * PERSONS) == 0
    half = PERSONS // 2
    galleries = {
        "G1": Subjects(ids[:half], np.arange(half) + 70),
        "G2": Subjects(ids[half:PERSONS], np.arange(half, PERSONS) + 70),
    }
    probes = Subjects(ids[PERSONS:], np.arange(PERSONS) + 70)
    data = IjbData(
        "ijbc", Path("set"), [f"{k}.jpg" for k in range(len(owner_N))],
        np.zeros((len(owner_N), 5, 2), np.float32),
        rng.uniform(0.2, 1, len(owner_N)).astype(np.float32),
        ids[owner_N], media_N, pair_P2, same_P, galleries, probes,
    )  # fmt: skip
    return data, feature


def literal_vectors(data: IjbData, feature: np.ndarray, mode: Mode) -> dict[int, np.ndarray]:
    """Image by image, media by media: the order of steps of eval_ijbc.py."""
    width = feature.shape[1] // 2
    rows = []
    for row, values in enumerate(feature):
        value = values[:width] + values[width:] if mode.flip else values[:width]
        if not mode.norm:
            value = value / np.sqrt((value * value).sum())
        if mode.detector:
            value = value * float(data.score_N[row])
        rows.append(value)
    found = {}
    for template in sorted(set(data.template_N.tolist())):
        media: dict[int, list[np.ndarray]] = {}
        for row in range(len(rows)):
            if data.template_N[row] == template:
                media.setdefault(int(data.media_N[row]), []).append(rows[row])
        total = sum(sum(part) / len(part) for part in media.values())
        found[template] = total / np.sqrt((total * total).sum())
    return found


@pytest.mark.parametrize("switches", list(product([True, False], repeat=3)))
def test_check_14_templates_equal_the_steps_spelled_out(switches: tuple[bool, ...]) -> None:
    data, feature = make(0)
    mode = Mode(*switches)
    assert str(mode) == "N{}D{}F{}".format(*map(int, switches))
    want = literal_vectors(data, feature, mode)
    got = template_vectors(feature, data, mode, concatenated=True)
    assert got.ids_T.tolist() == sorted(want)
    np.testing.assert_allclose(got.vector_TD, np.stack(list(want.values())), atol=1e-12)
    others = {str(m): template_vectors(feature, data, m, True) for m in MODES if m != mode}
    for other in others.values():
        assert np.abs(other.vector_TD - got.vector_TD).max() > 1e-3  # every switch does something


MODES = [Mode(*switches) for switches in product([True, False], repeat=3)]


@pytest.mark.parametrize("seed", range(3))
def test_check_14_pairs_equal_the_steps_spelled_out(seed: int) -> None:
    data, feature = make(seed)
    vectors = literal_vectors(data, feature, Mode())
    score = np.array([vectors[a] @ vectors[b] for a, b in data.pair_P2])
    got = verify_templates(template_vectors(feature, data, concatenated=True), data)
    fpr, tpr, _ = roc_curve(data.same_P, score)
    fpr, tpr = fpr[::-1], tpr[::-1]
    whole_fpr, whole_tpr, _ = roc_curve(data.same_P, score, drop_intermediate=False)
    for x in FPRS:
        best, at = min(zip(abs(fpr - x), range(len(fpr)), strict=True))
        assert got.nearest[x].tpr == pytest.approx(tpr[at], abs=1e-12)
        assert abs(got.nearest[x].fpr - x) == pytest.approx(best, abs=1e-12)
        bound = max(t for f, t in zip(whole_fpr, whole_tpr, strict=True) if f <= x)
        assert got.bounded[x].tpr == pytest.approx(bound, abs=1e-12)
        point = got.bounded[x]
        assert point.false_accepts == (score[~data.same_P] >= point.threshold - 1e-12).sum()
        assert point.false_accepts <= x * got.impostor
    assert (got.genuine, got.impostor) == (data.same_P.sum(), (~data.same_P).sum())
    assert 0.1 < got.bounded[1e-2].tpr < 0.95
    metrics = got.metrics()
    assert metrics["tpr@0.01"] == got.bounded[1e-2].tpr
    assert metrics["tpr_nearest@1e-06"] == got.nearest[1e-6].tpr
    assert metrics["false_accepts@0.1"] == got.bounded[1e-1].false_accepts > 0


def test_check_14_the_replica_from_its_files(tmp_path: Path) -> None:
    data = load_ijb(write_replica("ijb", tmp_path))
    images = data.images()
    # mean colour of the middle, less grey: enough to tell the persons of the replica apart
    colour = np.stack([images.read(row)[30:80, 30:80].mean(axis=(0, 1)) for row in range(20)])
    half = (colour - 127.5).astype(np.float32)
    feature = np.concatenate([half, half], axis=1)
    templates = template_vectors(feature, data, concatenated=True)
    want = literal_vectors(data, feature.astype(np.float64), Mode())
    np.testing.assert_allclose(templates.vector_TD, np.stack(list(want.values())), atol=1e-12)
    found = verify_templates(templates, data)
    assert (found.genuine, found.impostor) == (4, 12)
    assert found.bounded[1e-1].tpr == 1.0
    searched = search_templates(templates, data)
    assert sorted(searched) == ["G1", "G2"]
    assert mean_search(searched)["rank@1"] == 1.0


def literal_search(
    probe: list[np.ndarray], probe_id: list[int], gallery: list[np.ndarray], gallery_id: list[int],
    fpirs: tuple[float, ...],
) -> tuple[list[int], list[float], list[float]]:  # fmt: skip
    """Probe by probe: hits at ranks 1, 5, 10, TPIR and threshold at each FPIR."""
    hits, positive, negative, stranger = [0, 0, 0], [], [], []
    for vector, subject in zip(probe, probe_id, strict=True):
        score = np.array([vector @ entry for entry in gallery])
        if subject not in gallery_id:
            stranger.append(max(score))
            continue
        mate = gallery_id.index(subject)
        order = list(np.argsort(-score, kind="stable"))
        for k, rank in enumerate((1, 5, 10)):
            hits[k] += mate in order[:rank]
        positive.append(score[mate])
        negative.append(max(value for k, value in enumerate(score) if k != mate))
    stranger.sort(reverse=True)
    rates, thresholds = [], []
    for fpir in fpirs:
        threshold = stranger[max(int(len(stranger) * fpir) - 1, 0)]
        found = [p > n and p > threshold for p, n in zip(positive, negative, strict=True)]
        rates.append(sum(found) / len(found))
        thresholds.append(threshold)
    return hits, rates, thresholds


@pytest.mark.parametrize("seed", range(3))
def test_check_14_search_equals_the_steps_spelled_out(seed: int) -> None:
    data, feature = make(seed)
    fpirs = (0.01, 0.1, 0.3)
    mode = Mode(norm=False)
    vectors = literal_vectors(data, feature, mode)
    templates = template_vectors(feature, data, mode, concatenated=True)
    got = search_templates(templates, data, fpirs=fpirs)
    assert data.probes is not None
    hits, rates = np.zeros(3, int), np.zeros(3)
    for name, part in data.galleries.items():
        want = literal_search(
            [vectors[t] for t in data.probes.template_T], data.probes.subject_T.tolist(),
            [vectors[t] for t in part.template_T], part.subject_T.tolist(), fpirs,
        )  # fmt: skip
        assert [got[name].hits[rank] for rank in (1, 5, 10)] == want[0]
        assert [got[name].found[x].tpir for x in fpirs] == pytest.approx(want[1], abs=1e-12)
        assert [got[name].found[x].threshold for x in fpirs] == pytest.approx(want[2], abs=1e-12)
        assert (got[name].mated, got[name].non_mated) == (PERSONS // 2, PERSONS // 2)
        hits, rates = hits + want[0], rates + want[1]
    mean = mean_search(got)
    assert [mean[f"rank@{rank}"] for rank in (1, 5, 10)] == pytest.approx(hits / PERSONS)
    assert [mean[f"tpir@{x:g}"] for x in fpirs] == pytest.approx(rates / 2)
    assert 0.2 < mean["rank@1"] < min(1.0, mean["rank@5"] + 1e-9)
    assert 0 < mean["tpir@0.1"] < 1


def test_check_14_a_search_by_hand() -> None:
    # Gallery: subjects 7, 8, 9 along the axes; a score is a coordinate of the probe.
    probes = [
        (7, (0.9, 0.1, 0.0)),  # rank 1, above every threshold below 0.9
        (8, (0.6, 0.5, 0.0)),  # rank 2
        (9, (0.7, 0.6, 0.5)),  # rank 3
        (8, (0.4, 0.4, 0.1)),  # tied with another: rank 2, not found
        (9, (0.1, 0.2, 0.3)),  # rank 1, and below the thresholds
        (1, (0.8, 0.0, 0.0)), (1, (0.2, 0.35, 0.1)), (2, (0.1, 0.1, 0.2)), (3, (0.3, 0.0, 0.0)),
    ]  # fmt: skip
    found = search_gallery(
        np.array([vector for _, vector in probes]), np.array([subject for subject, _ in probes]),
        np.eye(3)[[1, 2, 0]], np.array([8, 9, 7]), ranks=(1, 2, 3), fpirs=(0.1, 0.5, 0.75, 1.0),
    )  # fmt: skip
    assert dict(found.hits) == {1: 2, 2: 4, 3: 5}
    assert (found.mated, found.non_mated, found.gallery) == (5, 4, 3)
    # best scores of the strangers: 0.8, 0.35, 0.3, 0.2
    thresholds = [found.found[x].threshold for x in (0.1, 0.5, 0.75, 1.0)]
    assert thresholds == [0.8, 0.35, 0.3, 0.2]
    assert [found.found[x].tpir for x in (0.1, 0.5, 0.75, 1.0)] == [0.2, 0.2, 0.2, 0.4]
    assert [found.found[x].false_accepts for x in (0.1, 0.5, 0.75, 1.0)] == [0, 1, 2, 3]
    metrics = found.metrics()
    assert metrics["rank@2"] == 0.8
    assert metrics["fpir@0.75"] == 0.5
    assert metrics["non_mated"] == 4


def test_check_14_media_by_hand() -> None:
    # One template: media 1 has (2, 0) twice, media 2 has (0, 1): mean 2 + 1 beside each other.
    data, _ = make(0)
    data = replace(
        data, names=["a", "b", "c", "d"], template_N=np.array([4, 4, 4, 9]),
        media_N=np.array([1, 1, 2, 1]), score_N=np.float32([1, 0.5, 0.5, 1]),
    )  # fmt: skip
    feature = np.array([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    plain = template_vectors(feature, data, Mode(detector=False))
    np.testing.assert_allclose(plain.vector_TD, [np.array([2, 1]) / 5**0.5, [0.6, 0.8]])
    scored = template_vectors(feature, data, Mode(detector=True))
    np.testing.assert_allclose(scored.vector_TD[0], np.array([1.5, 0.5]) / 2.5**0.5)
    unit = template_vectors(feature, data, Mode(norm=False, detector=False))
    np.testing.assert_allclose(unit.vector_TD[0], np.array([1, 1]) / 2**0.5)


@pytest.mark.parametrize("seed", range(4))
def test_the_curve_is_that_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    score = np.round(rng.normal(size=500), 1 + seed)  # ties, many or few
    same = rng.random(500) < 0.3
    curve = roc(score + 0.3 * same, same)
    for drop, found in ((False, curve), (True, curve.corners())):
        fpr, tpr, threshold = roc_curve(same, score + 0.3 * same, drop_intermediate=drop)
        np.testing.assert_allclose(found.fpr, fpr, atol=1e-15)
        np.testing.assert_allclose(found.tpr, tpr, atol=1e-15)
        np.testing.assert_array_equal(found.threshold_S, threshold)


def test_nearest_and_bounded_by_hand() -> None:
    # Scores 5 g, 4 i, 3 g, 2 i, 1 g, 0 i i: rates of impostors 0, 1/4, 1/2, 1.
    score = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0])
    same = np.array([True, False, True, False, True, False, False])
    curve = roc(score, same)
    assert bounded_points(curve, [0.24, 0.25, 1.0]) == {
        0.24: RocPoint(1 / 3, 0.0, 5.0, 0),
        0.25: RocPoint(2 / 3, 0.25, 3.0, 1),
        1.0: RocPoint(1.0, 1.0, 0.0, 4),
    }
    # 0.24 is answered with a rate beyond it; 0.375 is as near to 1/4 as to 1/2
    assert nearest_points(curve, [0.24, 0.375]) == {
        0.24: RocPoint(2 / 3, 0.25, 3.0, 1),
        0.375: RocPoint(1.0, 0.5, 1.0, 2),
    }
    nothing = RocPoint(0.0, 0.0, np.inf, 0)
    assert bounded_points(roc(-score, same), [0.1]) == {0.1: nothing}


@pytest.mark.parametrize("dense", [0, 10**9])
def test_both_ways_to_score_pairs(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data, feature = make(1)
    templates = template_vectors(feature, data, concatenated=True)
    monkeypatch.setattr(module, "DENSE", dense)
    want = [templates.vector_TD[templates.rows(pair)].prod(axis=0).sum() for pair in data.pair_P2]
    np.testing.assert_allclose(pair_scores(templates, data.pair_P2), want, atol=1e-14)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_the_block_size_does_not_matter(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data, feature = make(2)
    want = template_vectors(feature, data, concatenated=True)
    monkeypatch.setattr(module, "BLOCK", block)
    got = template_vectors(feature.astype(np.float32), data, concatenated=True)
    np.testing.assert_allclose(got.vector_TD, want.vector_TD, atol=1e-6)
    got = template_vectors(feature, data, concatenated=True)
    np.testing.assert_allclose(got.vector_TD, want.vector_TD, atol=1e-14)
    shuffled = np.random.default_rng(0).permutation(len(data.names))
    moved = replace(
        data, names=[data.names[row] for row in shuffled], score_N=data.score_N[shuffled],
        template_N=data.template_N[shuffled], media_N=data.media_N[shuffled],
    )  # fmt: skip
    got = template_vectors(feature[shuffled], moved, concatenated=True)
    np.testing.assert_allclose(got.vector_TD, want.vector_TD, atol=1e-12)


def test_search_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    data, feature = make(2)
    templates = template_vectors(feature, data, concatenated=True)
    want = search_templates(templates, data)
    monkeypatch.setattr(module, "SCORES", 5 * PERSONS)
    assert search_templates(templates, data) == want
    np.testing.assert_array_equal(
        verify_templates(templates, data).curve.true_S,
        roc(pair_scores(templates, data.pair_P2), data.same_P).true_S,
    )


def refused(feature: np.ndarray, data: IjbData, complaint: str, **named: bool) -> None:
    with pytest.raises(InputError) as error:
        template_vectors(feature, data, Mode(norm=False), **named)
    assert str(error.value) == complaint


def test_features_that_do_not_fit() -> None:
    data, feature = make(0)
    count = len(feature)
    what = f"features: needs {count} rows, one for each image of ijbc: {count - 1}"
    refused(feature[1:], data, what)
    what = "number of columns is odd, and concatenated features are two of one length: 23"
    refused(feature[:, 1:], data, f"features: {what}", concatenated=True)
    refused(
        feature.astype(int), data, f"features: must be rows of floats, (N, D): int64 ({count}, 24)"
    )
    broken = feature.copy()
    broken[[9, 200]] = np.nan
    refused(broken, data, "features: not finite, first row: 9")
    broken = feature.copy()
    broken[9] = 0
    refused(broken, data, "features: all 0, which N0 cannot scale to length 1, row: 9")
    silent = replace(data, score_N=np.where(data.template_N == 8, 0, data.score_N))
    refused(feature, silent, "features: the sum over a template is 0, template: 8")


def test_protocols_without_an_answer() -> None:
    data, feature = make(0)
    templates = template_vectors(feature, data)
    with pytest.raises(InputError, match="set: has no files of the search protocol of ijbc"):
        search_templates(templates, replace(data, probes=None))
    with pytest.raises(
        InputError, match="pairs: there is nothing to tell apart, every pair is: gen"
    ):
        verify_templates(templates, replace(data, same_P=np.ones(2000, bool)))
    with pytest.raises(InputError, match="scores: not finite, first pair: 1"):
        roc(np.array([0.0, np.nan]), np.array([True, False]))
    vector = np.eye(3)
    with pytest.raises(InputError, match="gallery: subject occurs twice: 5"):
        search_gallery(vector, np.array([5, 6, 7]), vector, np.array([4, 5, 5]))
    with pytest.raises(InputError, match="probes: there is no non-mated probe among: 3"):
        search_gallery(vector, np.array([5, 6, 6]), vector, np.array([4, 5, 6]))
    with pytest.raises(InputError, match="probes: there is no mated probe among: 3"):
        search_gallery(vector, np.array([8, 9, 1]), vector, np.array([4, 5, 6]))


def test_rows_of_ids() -> None:
    templates = Templates(np.array([2, 5, 9]), np.eye(3))
    assert templates.rows(np.array([9, 2])).tolist() == [2, 0]
