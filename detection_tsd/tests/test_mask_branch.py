"""Mask branch: torchvision's layers, losses and pasting; degenerate input.

Letters: B images of a batch, R RoIs, G objects, D detections, H W size, S mask bins per side.
"""

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    maskrcnn_inference,
    maskrcnn_loss,
    paste_masks_in_image,
)
from torchvision.ops import MultiScaleRoIAlign

from detection_tsd.data.detection_data import Target
from detection_tsd.matching import Sampled
from detection_tsd.models.detector import join_rois
from detection_tsd.models.mask_branch import MaskBranch, paste
from detection_tsd.ops.pyramid import Pyramid

STRIDES = (4, 8)
SIZE = (96, 128)


def branch(**other: object) -> MaskBranch:
    torch.manual_seed(0)
    settings: dict[str, object] = {"num_classes": 3, "channels": 8, "layers": (8, 6)}
    return MaskBranch(**settings | {"level_base": 28.0} | other)  # type: ignore[arg-type]


def pyramid(images: int, requires_grad: bool = False) -> Pyramid:
    torch.manual_seed(1)
    maps = [torch.randn(images, 8, SIZE[0] // s, SIZE[1] // s) for s in STRIDES]
    return Pyramid([one.requires_grad_(requires_grad) for one in maps], STRIDES)


def some_boxes(count: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    corner_R2 = torch.rand(count, 2, generator=rng) * torch.tensor([80.0, 60.0])
    size_R2 = 4 + torch.rand(count, 2, generator=rng) * torch.tensor([44.0, 32.0])
    return torch.cat((corner_R2, corner_R2 + size_R2), dim=1)


def targets() -> list[Target]:
    """Two images of different size; the masks are blobs, not boxes."""
    made = []
    for seed, (height, width) in ((2, (96, 128)), (3, (90, 100))):
        rng = torch.Generator().manual_seed(seed)
        mask_GHW = (torch.rand(3, height, width, generator=rng) > 0.4).to(torch.uint8)
        label_G = torch.randint(1, 4, (3,), generator=rng)
        made.append(Target(some_boxes(3, seed), label_G, torch.zeros(0, 4), mask_GHW))
    return made


def sampled(of: list[Target]) -> Sampled:
    """Five positives in the first image, none or two in the others; negatives behind them."""
    rois, labels, matches, numbers = [], [], [], []
    for image, target in enumerate(of):
        positives = 5 if image == 0 else 2
        box_R4 = some_boxes(positives + 4, 10 + image)
        gt_R = torch.cat((torch.arange(positives) % 3, torch.full((4,), -1)))
        label_R = torch.where(gt_R >= 0, target.label_G[gt_R.clamp(min=0)], 0)
        rois.append(torch.cat((torch.full((len(box_R4), 1), float(image)), box_R4), dim=1))
        labels.append(label_R)
        matches.append(target.box_G4[gt_R.clamp(min=0)])
        numbers.append(gt_R)
    roi_R5 = torch.cat(rois)
    ones = torch.ones(len(roi_R5))
    return Sampled(roi_R5, torch.cat(labels), torch.cat(matches), torch.cat(numbers), ones)


class Peer(nn.Module):
    """torchvision's parts with the weights of a branch."""

    def __init__(self, ours: MaskBranch) -> None:
        super().__init__()
        self.mask_head = MaskRCNNHeads(8, (8, 6), 1)
        self.mask_predictor = MaskRCNNPredictor(6, 6, 4)
        self.load_state_dict(ours.state_dict())
        self.pool = MultiScaleRoIAlign(["0", "1"], 14, 2, canonical_scale=56, canonical_level=3)

    def forward(self, of: Pyramid, boxes: list[Tensor]) -> Tensor:
        features = dict(zip(("0", "1"), of.maps, strict=True))
        pooled = self.pool(features, boxes, [SIZE] * of.batch)
        logits: Tensor = self.mask_predictor(self.mask_head(pooled))
        return logits


def test_keys_are_those_of_torchvision() -> None:
    keys = {name.split(".")[0] for name in branch().state_dict()}
    assert keys == {"mask_head", "mask_predictor"}
    assert sum(p.numel() for p in MaskBranch(90).parameters()) == 44_401_393 - 41_755_286


def test_probabilities_equal_those_of_torchvision() -> None:
    ours, of = branch(pooling="torchvision").eval(), pyramid(2)
    boxes = [some_boxes(4, 5), some_boxes(3, 6)]
    labels = [torch.tensor([1, 2, 3, 1]), torch.tensor([3, 3, 2])]
    roi_R5 = join_rois(boxes)
    with torch.no_grad():
        got = ours(of, roi_R5, torch.cat(labels))
        wanted = maskrcnn_inference(Peer(ours)(of, boxes), labels)
    torch.testing.assert_close(got, torch.cat(wanted)[:, 0], rtol=1e-5, atol=1e-6)
    assert got.std() > 0.05


def test_loss_and_gradients_equal_those_of_torchvision() -> None:
    ours, wanted = branch(pooling="torchvision"), targets()
    peer, chosen = Peer(ours), sampled(wanted)
    mine, other = pyramid(2, True), pyramid(2, True)
    loss = ours.loss(mine, chosen, wanted)
    positive = [(chosen.label_R > 0) & (chosen.roi_R5[:, 0] == image) for image in range(2)]
    boxes = [chosen.roi_R5[rows, 1:] for rows in positive]
    expected = maskrcnn_loss(
        peer(other, boxes), boxes, [t.mask_GHW for t in wanted],  # type: ignore[misc]
        [t.label_G for t in wanted], [chosen.gt_R[rows] for rows in positive],
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(ours.named_parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    for one, two in zip(mine.maps, other.maps, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


def test_padding_rows_are_not_positives() -> None:
    ours, of, wanted = branch(), pyramid(2), targets()
    chosen = sampled(wanted)
    twice = Sampled(*(torch.cat((part, part[:3])) for part in chosen))
    twice.weight_R[-3:] = 0
    order = torch.cat((torch.arange(9), torch.tensor([15, 16, 17]), torch.arange(9, 15)))
    padded = Sampled(*(part[order] for part in twice))
    assert (padded.label_R > 0).sum() > (chosen.label_R > 0).sum()
    torch.testing.assert_close(ours.loss(of, padded, wanted), ours.loss(of, chosen, wanted))


def test_inclusive_boxes_have_the_same_targets() -> None:
    """With `plus` = 1 a RoI that ends at pixel 9 covers what a continuous one does that ends at 10.

    Pooling "mmdet_v1" of the one is pooling "torchvision" of the other.
    """
    of, wanted = pyramid(2), targets()
    chosen = sampled(wanted)
    inner_R5 = chosen.roi_R5 - torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    got = branch(pooling="mmdet_v1", plus=1.0).loss(of, chosen._replace(roi_R5=inner_R5), wanted)
    torch.testing.assert_close(got, branch(pooling="torchvision").loss(of, chosen, wanted))


def test_no_positive_gives_zero_with_a_graph() -> None:
    ours, of, wanted = branch(), pyramid(2, True), targets()
    chosen = sampled(wanted)
    none = chosen._replace(label_R=torch.zeros_like(chosen.label_R))
    empty = Sampled(*(part[:0] for part in chosen))
    for one in (none, empty):
        loss = ours.loss(of, one, [t._replace(mask_GHW=t.mask_GHW[:0]) for t in wanted])  # type: ignore[index]
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())
    assert all(one.grad is not None for one in of.maps)
    assert ours(of, empty.roi_R5, empty.label_R).shape == (0, 28, 28)


def test_bad_arguments_are_named() -> None:
    of, wanted = pyramid(2), targets()
    with pytest.raises(ValueError, match="mask_GHW=None"):
        branch().loss(of, sampled(wanted), [t._replace(mask_GHW=None) for t in wanted])
    for settings in ({"num_classes": 0}, {"layers": ()}, {"pooling": "max"}, {"size": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            branch(**settings)
    with pytest.raises(ValueError, match="2 masks and 3 boxes"):
        paste(torch.zeros(2, 28, 28), torch.zeros(3, 4), 9, 9)


def test_pasted_masks_equal_those_of_torchvision() -> None:
    rng = torch.Generator().manual_seed(4)
    box_D4 = some_boxes(40, 7) * torch.tensor([1.1, 1.3, 1.1, 1.3]) - 9  # some leave the image
    box_D4[:3, 2:] = box_D4[:3, :2] + torch.tensor([[0.3, 40.0], [40.0, 0.0], [0.01, 0.01]])
    mask_DSS = torch.rand(40, 28, 28, generator=rng)
    got = paste(mask_DSS, box_D4, 80, 100)
    wanted = paste_masks_in_image(mask_DSS[:, None], box_D4, (80, 100))[:, 0] > 0.5
    assert got.dtype == torch.uint8
    assert torch.equal(got.bool(), wanted)
    assert 0.02 < got.float().mean() < 0.5


def test_pasting_outside_and_nothing() -> None:
    full = torch.ones(2, 28, 28)
    away = torch.tensor([[200.0, 200, 240, 240], [-60, -60, -20, -20]])
    assert not paste(full, away, 50, 60).any()
    assert paste(full[:0], away[:0], 50, 60).shape == (0, 50, 60)
    whole = paste(full[:1], torch.tensor([[0.0, 0, 60, 50]]), 50, 60)
    assert whole.float().mean() > 0.97


def test_an_object_is_found_again_where_it_is() -> None:
    """The target of a box, pasted back, is the object."""
    mask_HW = torch.zeros(64, 64, dtype=torch.uint8)
    mask_HW[12:40, 20:52] = 1
    mask_HW[12:20, 20:30] = 0
    box_14 = torch.tensor([[20.0, 12.0, 52.0, 40.0]])
    target = Target(box_14, torch.tensor([1]), torch.zeros(0, 4), mask_HW[None])
    roi_15 = torch.tensor([[0.0, 20, 12, 52, 40]])
    grid = branch()._wanted(roi_15, torch.tensor([0]), [target], 28)
    again = paste(grid, box_14, 64, 64)[0]
    overlap = (again & mask_HW).sum() / (again | mask_HW).sum()
    assert overlap > 0.95
