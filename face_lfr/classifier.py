"""The classifier of a training: class centres over the ranks, and the loss of the global batch.

Letters: B images of this rank, A images of all ranks, M those of them whose class this rank has, C
classes, S classes of this rank (or those that take part in a step), K sub-centres, D embedding
width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from common import dist
from face_lfr.losses import regular_face
from face_lfr.ops.margin_softmax import margin_softmax
from face_lfr.shards import (
    GatherRows,
    RegularFace,
    UnitRows,
    gathered,
    initial_rows,
    keys,
    local_rows,
    share,
    starts,
)

MEMORY = 0.9  # what a class's count of nearest sub-centres keeps when the class is seen again


class Rows(NamedTuple):
    """Gradient of some rows of a parameter, (S,) sorted and (S, ...)."""

    row: Tensor
    grad: Tensor


class _Part(NamedTuple):
    """The classes that take part in a step, renumbered from 0 over all ranks."""

    row: Tensor | None  # (S,) this rank's among its own rows; None: all of them
    label: Tensor  # (A,)
    starts: list[int]  # number of the first class of every rank, and of classes


class Classifier(nn.Module):
    """Margin softmax over all classes, whose centres are spread over the ranks.

    Every rank gets the features of all ranks and compares them with its own classes; the softmax
    runs over all of them (arcface_torch's PartialFC). The loss is the mean over the global batch
    and the same on every rank. Gradients are such that DistributedDataParallel's mean over ranks
    gives the network exactly the gradient of that loss, and `weight` gets its exact gradient as it
    is: keep the classifier itself outside of DistributedDataParallel.

    `weight` is (C, D), or (C, K, D) with sub-centres. With several ranks it is a DTensor cut along
    the classes as `torch.chunk` cuts; checkpoints of `common.checkpoint`, with the momentum, fit
    any other number of ranks. Its starting values do not depend on the rank count either.

    A margin with `normalised = False` (plain softmax) takes x W + b, without scale. A margin that
    is a module keeps its state here.

    sample_rate < 1 (PartialFC, arXiv 2203.15565): in training mode a step compares with the classes
    of the global batch and, up to ceil(sample_rate * C) in all, random others. Which ones depends
    on seed, step and batch alone, neither on ranks nor on the device. Weight, momentum and decay of
    all other classes stay as they are, and no gradient of the shape of `weight` exists: the
    gradient of the rows waits in `sampled` for the optimizer of `face_lfr.optim.sgd`. Others do
    not see it. With float16 use `face_lfr.optim.ShardScaler`.

    Memory of a rank beside weight and momentum, in units of S x D numbers: unit rows (1), their
    gradient (1) and that of the weight (1), and one buffer of A x S (see `margin_softmax`). With
    sampling S are the classes of the step, and there is a copy of their rows (1). RegularFace
    comes on top: the gradient it keeps (1) and a sum of gradients (1).

    Args:
        features: D.
        num_classes: C, at least 2.
        margin: of `face_lfr.margins`.
        scale: s, factor of the cosines.
        world: ranks and device; None is one process on the CPU.
        sample_rate: share of the classes that take part in a step, in (0, 1].
        centers: K, sub-centres of a class, of which the nearest counts (Sub-center ArcFace, ECCV
            2020).
        smoothing: share of the target spread over all classes, in [0, 1).
        regular: factor of RegularFace's penalty on near centres, (1/C) sum_i max_{j != i} w_i.w_j,
            exact over all ranks; over the classes of the step when they are sampled.
        seed: of starting values and samples.
        initial: "normal" (0.01, arcface_torch) or "uniform" (1/sqrt(D), trojans-face-recognizer).

    Raises:
        ValueError: an argument out of its range; sub-centres with RegularFace or plain softmax.
    """

    draws: Tensor
    votes: Tensor

    def __init__(
        self,
        features: int,
        num_classes: int,
        margin: Any,
        scale: float = 64.0,
        world: dist.World | None = None,
        sample_rate: float = 1.0,
        centers: int = 1,
        smoothing: float = 0.0,
        regular: float = 0.0,
        seed: int = 0,
        initial: str = "normal",
    ):
        super().__init__()
        _check(features, num_classes, scale, sample_rate, centers, smoothing, regular, seed)
        if centers > 1 and not margin.normalised:
            raise ValueError(f"centers={centers} needs a margin of cosines, not {margin}")
        self.features, self.num_classes, self.margin = features, num_classes, margin
        self.scale = scale if margin.normalised else 1.0
        self.sample_rate, self.centers = sample_rate, centers
        self.smoothing, self.regular, self.seed = smoothing, regular, seed
        world = world or dist.World(0, 1, torch.device("cpu"))
        self.starts = starts(num_classes, world.size)
        self.own = share(num_classes, world.rank, world.size)
        self._mesh = None if world.size == 1 else init_device_mesh(world.device.type, (world.size,))
        shape = (features,) if centers == 1 else (centers, features)
        flat = range(self.own.start * centers, self.own.stop * centers)
        local = initial_rows(flat, features, initial, seed).view(len(self.own), *shape)
        self.weight = nn.Parameter(self._spread(local.to(world.device)))
        bias = None
        if not margin.normalised:
            bias = nn.Parameter(self._spread(torch.zeros(len(self.own), device=world.device)))
        self.register_parameter("bias", bias)
        if sample_rate < 1:  # a plain training has no use for it, nor its checkpoint
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=world.device))
        if centers > 1:
            votes = torch.zeros(len(self.own), centers, device=world.device)
            self.register_buffer("votes", self._spread(votes))
        self.sampled: list[tuple[str, Tensor, Tensor]] = []

    @property
    def group(self) -> td.ProcessGroup | None:
        """The ranks that share the classes; None for one process."""
        return None if self._mesh is None else self._mesh.get_group()

    def forward(self, feature_BD: Tensor, label_B: Tensor) -> Tensor:
        """Mean loss of the global batch; a collective.

        Args:
            feature_BD: rows of this rank, not normalised; every rank holds equally many.
            label_B: int64 classes in [0, C).

        Raises:
            ValueError: another shape, labels that are no int64.
        """
        self._check_batch(feature_BD, label_B)
        with torch.autocast(feature_BD.device.type, enabled=False):
            row_BD = feature_BD.to(self.weight.dtype)
            if self.margin.normalised:
                row_BD = UnitRows.apply(row_BD)
            row_AD, label_A = self._everyone(row_BD, label_B)
            part = self._part(label_A)
            weight_SD = self._weight(part.row)
            if self.training and self.centers > 1:
                self._vote(row_AD.detach(), label_A, weight_SD.detach(), part.row)
            loss = self._softmax(row_AD, weight_SD, part)
            if self.regular:
                loss = loss + self.regular * self._penalty(weight_SD, part.starts)
        return loss

    def _check_batch(self, feature_BD: Tensor, label_B: Tensor) -> None:
        if feature_BD.dim() != 2 or feature_BD.shape[1] != self.features:
            raise ValueError(f"feature_BD is {tuple(feature_BD.shape)}: need (B, {self.features})")
        if label_B.shape != feature_BD.shape[:1] or label_B.dtype != torch.int64:
            what = f"{tuple(label_B.shape)} {label_B.dtype}"
            raise ValueError(f"label_B is {what}: need ({len(feature_BD)},) torch.int64")

    def _everyone(self, row_BD: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
        if (group := self.group) is None:
            return row_BD, label_B
        return GatherRows.apply(row_BD, group), gathered(label_B, group)

    def _part(self, label_A: Tensor) -> _Part:
        """All classes, or in a training with sampling those of this step."""
        if not (self.training and self.sample_rate < 1):
            return _Part(None, label_A, self.starts)
        class_S = self._choose(label_A)
        edges = torch.searchsorted(class_S, class_S.new_tensor(self.starts)).tolist()
        row_S = class_S[edges[self._rank] : edges[self._rank + 1]] - self.own.start
        return _Part(row_S, torch.searchsorted(class_S, label_A), edges)

    @torch.no_grad()
    def _choose(self, label_A: Tensor) -> Tensor:
        """Sorted classes of this step, over all ranks and the same on every one of them."""
        present = label_A.unique()
        # One class alone would have nothing to be told from.
        count = max(math.ceil(self.sample_rate * self.num_classes), len(present), 2)
        key_C = keys(self.num_classes, self.seed, int(self.draws), label_A.device)
        key_C[present] = -1  # before all others
        self.draws += 1
        return key_C.topk(count, largest=False, sorted=False).indices.sort().values

    def _weight(self, row_S: Tensor | None) -> Tensor:
        """Rows that take part, (S, D) or (S, K, D); of unit length unless the margin is plain."""
        weight = self._rows("weight", row_S)
        return UnitRows.apply(weight) if self.margin.normalised else weight

    def _rows(self, name: str, row_S: Tensor | None) -> Tensor:
        """Own rows of a parameter, or a copy of some of them whose gradient is kept apart."""
        whole = local_rows(getattr(self, name))
        if row_S is None:
            return whole
        leaf = whole.detach()[row_S]
        if torch.is_grad_enabled() and whole.requires_grad:
            self.sampled.append((name, row_S, leaf.requires_grad_()))
        return leaf

    def take_sampled(self) -> dict[str, Rows]:
        """Gradients of sampled rows since the last call, by parameter; forgets them.

        Several batches of one step may have sampled different rows: their gradients are added.
        """
        found: dict[str, list[Rows]] = {}
        for name, row_S, leaf in self.sampled:
            if leaf.grad is not None:
                found.setdefault(name, []).append(Rows(row_S, leaf.grad))
        self.sampled.clear()
        return {name: _added(parts) for name, parts in found.items()}

    def _softmax(self, row_AD: Tensor, weight_SD: Tensor, part: _Part) -> Tensor:
        bias_S = None if self.margin.normalised else self._rows("bias", part.row)
        return margin_softmax(
            row_AD, weight_SD.view(-1, self.features), part.label, self.margin, self.scale,
            smoothing=self.smoothing, centers=self.centers, bias_C=bias_S, group=self.group,
            first=part.starts[self._rank], classes=part.starts[-1],
        )  # fmt: skip

    @property
    def _rank(self) -> int:
        return 0 if self._mesh is None else self._mesh.get_rank()

    def _penalty(self, weight_SD: Tensor, edges: list[int]) -> Tensor:
        unit_SD = weight_SD if self.margin.normalised else UnitRows.apply(weight_SD)
        if (group := self.group) is None:
            return regular_face(unit_SD)
        return RegularFace.apply(unit_SD, edges, group)

    @torch.no_grad()
    def _vote(
        self, row_AD: Tensor, label_A: Tensor, weight_SKD: Tensor, row_S: Tensor | None
    ) -> None:
        """Count which sub-centre of its class each image of the batch is nearest to."""
        local_A = label_A - self.own.start
        mine_A = (local_A >= 0) & (local_A < len(self.own))
        local_M, row_MD = local_A[mine_A], row_AD[mine_A]
        place_M = local_M if row_S is None else torch.searchsorted(row_S, local_M)
        nearest_M = torch.einsum("md,mkd->mk", row_MD, weight_SKD[place_M]).argmax(dim=1)
        votes_SK = local_rows(self.votes)
        votes_SK[local_M.unique()] *= MEMORY
        votes_SK.index_put_((local_M, nearest_M), votes_SK.new_ones(()), accumulate=True)

    @torch.no_grad()
    def centres(self) -> Tensor:
        """Unit centres (C, D) of all classes, on every rank; a collective.

        With sub-centres that of a class is the dominant one, which most of its recent images were
        nearest to; Sub-center ArcFace takes the others for noise.
        """
        weight = self._whole(self.weight)
        if self.centers > 1:
            place_C = self._whole(self.votes).argmax(dim=1)
            weight = weight[torch.arange(self.num_classes, device=weight.device), place_C]
        return F.normalize(weight, dim=1)

    @torch.no_grad()
    def anchor(self, mean_CD: Tensor) -> None:
        """Turn every centre into the direction of the mean of its class; its length stays.

        The first step of anchor finetuning (a name of arXiv 1909.00632's abstract; the method is
        ours). A class whose mean is zero, for want of images, keeps its centre. With sub-centres
        the dominant one is turned. The length stays because it sets how far a step turns a row.

        Args:
            mean_CD: of all classes, or this rank's rows as `class_means` returns them.

        Raises:
            ValueError: another shape.
        """
        if len(mean_CD) == self.num_classes:
            mean_CD = mean_CD[self.own.start : self.own.stop]
        if mean_CD.shape != (len(self.own), self.features):
            need = f"({self.num_classes} or {len(self.own)}, {self.features})"
            raise ValueError(f"mean_CD is {tuple(mean_CD.shape)}: need {need}")
        local = local_rows(self.weight)
        row_S = torch.arange(len(self.own), device=local.device)
        place = (row_S,) if self.centers == 1 else (row_S, local_rows(self.votes).argmax(dim=1))
        mean_SD = mean_CD.to(local)
        known_S1 = mean_SD.norm(dim=1, keepdim=True) > 0
        turned_SD = F.normalize(mean_SD, dim=1) * local[place].norm(dim=1, keepdim=True)
        local[place] = torch.where(known_S1, turned_SD, local[place])

    def _spread(self, local: Tensor) -> Tensor:
        """Own rows as a part of the matrix of all ranks."""
        if self._mesh is None:
            return local
        shape = (self.num_classes, *local.shape[1:])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self._mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
        )

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def class_means(batches: Iterable[tuple[Tensor, Tensor]], classifier: Classifier) -> Tensor:
    """Mean of the unit features of each class, for `Classifier.anchor`; a collective.

    No rank holds more than the sums of its own classes and the rows of one batch of every rank.

    Args:
        batches: features (B, D) and int64 classes (B,) of this rank's images; ranks may have
            different numbers of images and of batches.
        classifier: says which rank has which class.

    Returns:
        (S, D) float32 rows of this rank's classes; 0 for a class without an image.
    """
    own = classifier.own
    device = local_rows(classifier.weight).device
    sum_SD = torch.zeros(len(own), classifier.features, device=device)
    count_S1 = torch.zeros(len(own), 1, device=device)
    steps = iter(batches)
    while True:
        batch = next(steps, None)
        if not dist.any_rank(batch is not None):
            return sum_SD / count_S1.clamp_min(1)
        feature_BD, label_B = batch or (sum_SD[:0], torch.zeros(0, dtype=torch.int64))
        unit_AD = dist.gather_rows(F.normalize(feature_BD.float(), dim=1).to(device))
        label_A = dist.gather_rows(label_B.to(device)) - own.start
        mine_A = (label_A >= 0) & (label_A < len(own))
        sum_SD.index_add_(0, label_A[mine_A], unit_AD[mine_A])
        count_S1.index_add_(0, label_A[mine_A], torch.ones_like(label_A[mine_A, None]).float())


def _added(parts: list[Rows]) -> Rows:
    """Sum of gradients that are of different rows."""
    if len(parts) == 1:
        return parts[0]
    row_S, place = torch.cat([part.row for part in parts]).unique(return_inverse=True)
    grad = torch.cat([part.grad for part in parts])
    return Rows(row_S, grad.new_zeros(len(row_S), *grad.shape[1:]).index_add_(0, place, grad))


def _check(
    features: int,
    num_classes: int,
    scale: float,
    sample_rate: float,
    centers: int,
    smoothing: float,
    regular: float,
    seed: int,
) -> None:
    for name, value, least in (
        ("features", features, 1), ("num_classes", num_classes, 2), ("centers", centers, 1),
        ("regular", regular, 0), ("seed", seed, 0),
    ):  # fmt: skip
        if not value >= least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if not scale > 0:
        raise ValueError(f"scale={scale} must be above 0")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate={sample_rate} must be in (0, 1]")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing} must be in [0, 1)")
    if regular and centers > 1:
        raise ValueError(f"regular={regular} needs one centre a class, not centers={centers}")
