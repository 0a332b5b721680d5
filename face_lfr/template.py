"""Template protocols of IJB-B and IJB-C: verification of pairs (1:1) and search (1:N).

The vector of a template is the sum over its media of the mean over the images of a media, scaled to
length 1; the score of two templates is the product of their vectors. Three switches decide what
goes in, named as insightface's eval_ijbc.py names them:

- N1 keeps the length of an image's feature, N0 scales it to 1 (ijb_evals.py names them the other
  way round);
- D1 multiplies it by the score of the face detector;
- F1 adds the feature of the mirror image.

1:1, from the curve of all pairs, at a false positive rate x: the curve point whose rate is nearest
to x, as those scripts report it, and the highest true positive rate with a rate <= x, which is the
definition. 1:N, per gallery: the rank of the mate, and the share of mated probes that are found
before every other subject and above the threshold that n non-mated probes set: the score number
max(int(n x) - 1, 0), from 0, of their best scores.

Shapes: N images, D columns, T templates, P pairs, Q probes, G gallery entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.log import InputError
from face_lfr.data.ijb import IjbData, Subjects
from face_lfr.verification import Roc, RocPoint, bounded_points, nearest_points, roc

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

FPRS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FPIRS = (1e-2, 1e-1)
RANKS = (1, 5, 10)
BLOCK = 16_384  # images or pairs in memory at a time
SCORES = 2**24  # cells of a score matrix in memory at a time
DENSE = 16  # cells of a score matrix for each listed pair, up to which the matrix is cheaper


@dataclass(frozen=True)
class Mode:
    """What the feature of an image is made of.

    Attributes:
        norm: N1, keep its length.
        detector: D1, multiply by the score of the face detector.
        flip: F1, add the mirror image's; needs concatenated features.
    """

    norm: bool = True
    detector: bool = True
    flip: bool = True

    def __str__(self) -> str:
        return f"N{self.norm:d}D{self.detector:d}F{self.flip:d}"


def template_vectors(
    feature_ND: np.ndarray, data: IjbData, mode: Mode | None = None, concatenated: bool = False
) -> Templates:
    """Vectors of all templates.

    Args:
        feature_ND: (N, D) floats, also a memory map, in the order of `data.names`; with
            `concatenated` (N, 2 D), the image's and the mirror image's beside each other.
        data: the set.
        mode: switches, N1D1F1 when absent.
        concatenated: see `feature_ND`. Without it features are taken as they are, flip-averaged or
            not, and F only tells in the report which they are.

    Raises:
        InputError: another number of rows, an odd number of concatenated columns, a feature that
            is not finite, one that N0 cannot scale because it is 0, or a template whose sum is 0.
    """
    mode = mode or Mode()
    if feature_ND.ndim != 2 or feature_ND.dtype.kind != "f" or not feature_ND.shape[1]:
        kind = f"{feature_ND.dtype} {feature_ND.shape}"
        raise InputError("features", "must be rows of floats, (N, D)", kind)
    if len(feature_ND) != len(data.names):
        what = f"needs {len(data.names)} rows, one for each image of {data.name}"
        raise InputError("features", what, len(feature_ND))
    if concatenated and feature_ND.shape[1] % 2:
        what = "number of columns is odd, and concatenated features are two of one length"
        raise InputError("features", what, feature_ND.shape[1])
    ids_T, number_N = np.unique(data.template_N, return_inverse=True)
    weight_N = _media_weights(number_N, data.media_N)
    if mode.detector:
        weight_N = weight_N * data.score_N.astype(np.float64)
    width = feature_ND.shape[1] // 2 if concatenated else feature_ND.shape[1]
    sum_TD = np.zeros((len(ids_T), width))
    order_N = np.argsort(number_N, kind="stable")
    for start in range(0, len(order_N), BLOCK):
        row_B = order_N[start : start + BLOCK]
        part_BD = _image_features(feature_ND, row_B, mode, concatenated)
        part_BD *= weight_N[row_B, None]
        first_B = np.flatnonzero(np.diff(number_N[row_B], prepend=-1))
        sum_TD[number_N[row_B[first_B]]] += np.add.reduceat(part_BD, first_B, axis=0)
    norm_T = np.sqrt(np.einsum("td,td->t", sum_TD, sum_TD))
    zero = np.flatnonzero(norm_T == 0)
    if zero.size:
        raise InputError("features", "the sum over a template is 0, template", ids_T[zero[0]])
    return Templates(ids_T, sum_TD / norm_T[:, None])


class Templates(NamedTuple):
    """Ids in ascending order (T,) int64, and vectors of length 1 (T, D) float64."""

    ids_T: Numbers
    vector_TD: Floats

    def rows(self, wanted: Numbers) -> Numbers:
        """Row of each id, which has to be there."""
        return np.searchsorted(self.ids_T, wanted)


def _media_weights(number_N: Numbers, media_N: Numbers) -> Floats:
    """1 over the number of images of the same template and media."""
    _, media_N = np.unique(media_N, return_inverse=True)
    key_N = number_N * (int(media_N.max()) + 1) + media_N
    _, group_N, size = np.unique(key_N, return_inverse=True, return_counts=True)
    return 1.0 / size[group_N]


def _image_features(
    feature_ND: np.ndarray, row_B: Numbers, mode: Mode, concatenated: bool
) -> Floats:
    """Features of some images in float64, flipped and scaled as the mode wants."""
    part_BD = np.asarray(feature_ND[row_B], np.float64)
    if not np.isfinite(part_BD).all():
        bad_B = ~np.isfinite(part_BD).all(axis=1)
        raise InputError("features", "not finite, first row", int(row_B[bad_B].min()))
    if concatenated:
        width = part_BD.shape[1] // 2
        mirrored = part_BD[:, width:] if mode.flip else 0.0
        part_BD = part_BD[:, :width] + mirrored
    if not mode.norm:
        norm_B = np.sqrt(np.einsum("bd,bd->b", part_BD, part_BD))
        if not norm_B.all():
            what = "all 0, which N0 cannot scale to length 1, row"
            raise InputError("features", what, int(row_B[norm_B == 0].min()))
        part_BD = part_BD / norm_B[:, None]
    return part_BD


def pair_scores(templates: Templates, pair_P2: Numbers) -> Floats:
    """Score of each pair of template ids, (P,).

    Where the pairs fill much of the matrix of their templates, as those of IJB do, blocks of that
    matrix are computed; else the vectors of the pairs are multiplied one by one.
    """
    (left_AD, a_P), (right_BD, b_P) = (_used(templates, ids_P) for ids_P in pair_P2.T)
    if len(left_AD) * len(right_BD) > DENSE * len(pair_P2):
        return _listed_scores(left_AD, right_BD, a_P, b_P)
    rows = max(1, SCORES // len(right_BD))
    block_P = a_P // rows
    if len(left_AD) <= rows * 2**16:
        block_P = block_P.astype(np.uint16)  # sorted in linear time
    order_P = np.argsort(block_P, kind="stable")
    end_K = np.cumsum(np.bincount(block_P))
    score_P = np.empty(len(pair_P2))
    for block, part in enumerate(np.split(order_P, end_K[:-1])):
        score_AB = left_AD[block * rows : (block + 1) * rows] @ right_BD.T
        score_P[part] = score_AB[a_P[part] - block * rows, b_P[part]]
    return score_P


def _used(templates: Templates, ids_P: Numbers) -> tuple[Floats, Numbers]:
    """Vectors of the templates that occur, and where among them each one is."""
    row_P = templates.rows(ids_P)
    used_T = np.zeros(len(templates.ids_T), bool)
    used_T[row_P] = True
    return templates.vector_TD[used_T], (np.cumsum(used_T) - 1)[row_P]


def _listed_scores(left_AD: Floats, right_BD: Floats, a_P: Numbers, b_P: Numbers) -> Floats:
    score_P = np.empty(len(a_P))
    for start in range(0, len(a_P), BLOCK):
        part = slice(start, start + BLOCK)
        score_P[part] = np.einsum("pd,pd->p", left_AD[a_P[part]], right_BD[b_P[part]])
    return score_P


@dataclass(frozen=True)
class PairResult:
    """Verification of template pairs.

    Attributes:
        curve: all of it.
        nearest, bounded: by false positive rate.
        genuine, impostor: numbers of pairs.
    """

    curve: Roc
    nearest: Mapping[float, RocPoint]
    bounded: Mapping[float, RocPoint]
    genuine: int
    impostor: int

    def metrics(self) -> dict[str, float]:
        """`tpr@x` (rate <= x), `tpr_nearest@x`, the rates met and the false accepts behind them."""
        found: dict[str, float] = {"genuine": self.genuine, "impostor": self.impostor}
        for suffix, points in (("", self.bounded), ("_nearest", self.nearest)):
            for fpr, point in points.items():
                found[f"tpr{suffix}@{fpr:g}"] = point.tpr
                found[f"fpr{suffix}@{fpr:g}"] = point.fpr
                found[f"false_accepts{suffix}@{fpr:g}"] = point.false_accepts
        return found


def verify_templates(
    templates: Templates, data: IjbData, fprs: Sequence[float] = FPRS
) -> PairResult:
    """The 1:1 protocol.

    Raises:
        InputError: as `roc`.
    """
    curve = roc(pair_scores(templates, data.pair_P2), data.same_P)
    nearest, bounded = nearest_points(curve, fprs), bounded_points(curve, fprs)
    genuine = int(data.same_P.sum())
    return PairResult(curve, nearest, bounded, genuine, len(data.same_P) - genuine)


class Identification(NamedTuple):
    """One threshold of a search: mated probes found, and non-mated ones that found someone."""

    tpir: float
    fpir: float
    threshold: float
    false_accepts: int


@dataclass(frozen=True)
class SearchResult:
    """Search of one gallery.

    Attributes:
        hits: rank -> mated probes whose mate is among the first so many.
        found: false positive identification rate -> what it allows.
        mated, non_mated: numbers of probes with and without an entry in the gallery.
        gallery: entries.
    """

    hits: Mapping[int, int]
    found: Mapping[float, Identification]
    mated: int
    non_mated: int
    gallery: int

    def metrics(self) -> dict[str, float]:
        """`rank@k`, `tpir@x`, rates met, false accepts, and how many of what there were."""
        found: dict[str, float] = {f"rank@{k}": hits / self.mated for k, hits in self.hits.items()}
        for fpir, point in self.found.items():
            found[f"tpir@{fpir:g}"] = point.tpir
            found[f"fpir@{fpir:g}"] = point.fpir
            found[f"false_accepts@{fpir:g}"] = point.false_accepts
        sizes = {"mated": self.mated, "non_mated": self.non_mated, "gallery": self.gallery}
        return found | sizes


def search_gallery(
    probe_QD: Floats,
    subject_Q: Numbers,
    gallery_GD: Floats,
    subject_G: Numbers,
    ranks: Sequence[int] = RANKS,
    fpirs: Sequence[float] = FPIRS,
) -> SearchResult:
    """Search every probe in a gallery that holds each subject once.

    A mate's rank counts the other entries that score at least as high, so ties go against it. A
    mated probe is found when its mate scores higher than every other entry and than the threshold;
    a non-mated one is a false accept when any entry scores higher than the threshold.

    Raises:
        InputError: a subject twice in the gallery, or no mated or no non-mated probe.
    """
    known_G, first_G = np.unique(subject_G, return_index=True)
    if len(known_G) != len(subject_G):
        twice = int(np.bincount(np.unique(subject_G, return_inverse=True)[1]).argmax())
        raise InputError("gallery", "subject occurs twice", known_G[twice])
    place_Q = np.minimum(np.searchsorted(known_G, subject_Q), len(known_G) - 1)
    mated_Q = known_G[place_Q] == subject_Q
    if mated_Q.all() or not mated_Q.any():
        kind = "non-mated" if mated_Q.all() else "mated"
        raise InputError("probes", f"there is no {kind} probe among", len(mated_Q))
    mate_Q = np.where(mated_Q, first_G[place_Q], -1)
    own_Q, other_Q, rank_Q = _scan(probe_QD, gallery_GD, mate_Q)
    best_own, best_other = own_Q[mated_Q], other_Q[mated_Q]
    stranger = np.sort(other_Q[~mated_Q])[::-1]
    found = {}
    for fpir in fpirs:
        threshold = stranger[max(int(len(stranger) * fpir) - 1, 0)]
        tpir = float(((best_own > best_other) & (best_own > threshold)).mean())
        wrong = int((stranger > threshold).sum())
        found[fpir] = Identification(tpir, wrong / len(stranger), float(threshold), wrong)
    hits = {rank: int((rank_Q[mated_Q] <= rank).sum()) for rank in ranks}
    return SearchResult(hits, found, int(mated_Q.sum()), len(stranger), len(subject_G))


def _scan(probe_QD: Floats, gallery_GD: Floats, mate_Q: Numbers) -> tuple[Floats, Floats, Numbers]:
    """Score and rank of each probe's mate, and the best score of the others.

    Without a mate (-1) the score is -inf, the rank means nothing, and all entries are others.
    """
    own_Q = np.full(len(probe_QD), -np.inf)
    other_Q = np.empty(len(probe_QD))
    rank_Q = np.empty(len(probe_QD), np.int64)
    rows = max(1, SCORES // len(gallery_GD))
    for start in range(0, len(probe_QD), rows):
        part = slice(start, start + rows)
        score_BG, mate_B = probe_QD[part] @ gallery_GD.T, mate_Q[part]
        mated = np.flatnonzero(mate_B >= 0)
        own_B = own_Q[part]  # a view: it fills own_Q
        own_B[mated] = score_BG[mated, mate_B[mated]]
        score_BG[mated, mate_B[mated]] = -np.inf
        other_Q[part] = score_BG.max(axis=1)
        rank_Q[part] = 1 + (score_BG >= own_B[:, None]).sum(axis=1)
    return own_Q, other_Q, rank_Q


def search_templates(
    templates: Templates,
    data: IjbData,
    ranks: Sequence[int] = RANKS,
    fpirs: Sequence[float] = FPIRS,
) -> dict[str, SearchResult]:
    """The 1:N protocol, gallery by gallery.

    Raises:
        InputError: the set has no search protocol, or as `search_gallery`.
    """
    if data.probes is None:
        raise InputError(data.root, f"has no files of the search protocol of {data.name}")
    probe_QD, subject_Q = _chosen(templates, data.probes)
    return {
        name: search_gallery(probe_QD, subject_Q, *_chosen(templates, gallery), ranks, fpirs)
        for name, gallery in data.galleries.items()
    }


def _chosen(templates: Templates, subjects: Subjects) -> tuple[Floats, Numbers]:
    return templates.vector_TD[templates.rows(subjects.template_T)], subjects.subject_T


def mean_search(results: Mapping[str, SearchResult]) -> dict[str, float]:
    """Ranks over the mated probes of all galleries together, `tpir@x` as the mean over galleries.

    In IJB every probe has its mate in exactly one gallery, so the ranks are shares of all probes.
    """
    parts = list(results.values())
    mated = sum(part.mated for part in parts)
    ranks = {f"rank@{k}": sum(part.hits[k] for part in parts) / mated for k in parts[0].hits}
    rates = {
        f"tpir@{x:g}": float(np.mean([part.found[x].tpir for part in parts]))
        for x in parts[0].found
    }
    return ranks | rates
