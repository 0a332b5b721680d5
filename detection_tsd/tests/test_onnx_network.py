"""The graph of a whole detector, in PyTorch: fixed sizes, and the detections of the detector."""

from pathlib import Path
from typing import Any

import pytest
import torch

from detection_tsd.boxes import iou
from detection_tsd.export import Example, detect
from detection_tsd.models.detector import TwoStage
from detection_tsd.onnx_network import Network, kept, write_onnx
from detection_tsd.postprocess import PostProcess
from detection_tsd.tests.small_detectors import an_input, liven, small

DETECTORS: dict[str, dict[str, Any]] = {
    "tsd": {"head": "tsd"},
    "rpn": {"rpn": True},
    "d_head": {"head": "d_head", "rpn": True, "plus": 1.0},
    "cascade": {"head": "tsd", "stages": 3},
    "threshold": {"rpn": True, "post": PostProcess(score_threshold=0.26, per_image=40)},
    "mask": {"rpn": True, "mask": True, "plus": 1.0},
}


@pytest.mark.parametrize("name", DETECTORS)
def test_the_graph_computes_what_the_detector_detects(name: str) -> None:
    """In PyTorch, without an export: sizes fixed, rows of zeros at the end."""
    model: TwoStage = small(**DETECTORS[name]).eval()
    liven(model)
    given = an_input(2)
    network = Network(model).eval()
    assert len(network.outputs) == (4 if name == "mask" else 3)
    for image in range(2):
        x_13HW, size_2 = given.x_B3HW[image : image + 1], given.size_B2[image]
        box_M4 = given.proposals[image] if model.rpn is None else None
        wanted = detect(model, Example(x_13HW, size_2, box_M4))
        with torch.no_grad():
            arguments = (x_13HW, size_2) if box_M4 is None else (x_13HW, size_2, box_M4)
            box_D4, score_D, label_D, *masks = network(*arguments)
        assert len(score_D) == model.post.per_image
        found = len(wanted.score_D)
        assert found > 3
        torch.testing.assert_close(box_D4[:found], wanted.box_D4, atol=1e-4, rtol=0)
        torch.testing.assert_close(score_D[:found], wanted.score_D)
        assert torch.equal(label_D[:found], wanted.label_D)
        assert not score_D[found:].any()
        assert not label_D[found:].any()
        if masks:
            torch.testing.assert_close(masks[0][:found], wanted.mask_DSS, atol=1e-4, rtol=0)


def test_the_graph_without_a_suppression_says_all_of_every_region() -> None:
    model = small(rpn=True, post=PostProcess(nms="soft_gaussian", per_image=20)).eval()
    liven(model)
    given = an_input(1)
    with pytest.raises(ValueError, match="only hard suppression has a graph"):
        Network(model)
    network = Network(model, suppress=False).eval()
    with torch.no_grad():
        prob_MK, box_MK4 = network(given.x_B3HW, given.size_B2[0])
    torch.testing.assert_close(prob_MK.sum(dim=1), torch.ones(len(prob_MK)))
    wanted = detect(model, Example(given.x_B3HW, given.size_B2[0], None))
    found = model.select(prob_MK, box_MK4, tuple(given.size_B2[0].tolist()))
    torch.testing.assert_close(found.score_D, wanted.score_D, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.box_D4, wanted.box_D4, atol=1e-3, rtol=0)


def test_kept_is_greedy_suppression_of_every_group() -> None:
    rng = torch.Generator().manual_seed(0)
    corner = torch.rand(3, 40, 2, 2, generator=rng) * 30
    box_GN4 = torch.cat((corner.amin(dim=2), corner.amax(dim=2)), dim=2)
    score_GN = torch.randint(0, 9, (3, 40), generator=rng) / 9  # with ties
    found_GN = kept(box_GN4, score_GN, 0.4, 12)
    for box_N4, score_N, found_N in zip(box_GN4, score_GN, found_GN, strict=True):
        left: list[int] = []
        for row in sorted(range(40), key=lambda n: (-float(score_N[n]), n)):
            overlaps = [float(iou(box_N4[row : row + 1], box_N4[k : k + 1])) for k in left]
            if len(left) < 12 and all(overlap <= 0.4 for overlap in overlaps):
                left.append(row)
        assert found_N.nonzero()[:, 0].tolist() == sorted(left)
    assert kept(box_GN4[:, :0], score_GN[:, :0], 0.4, 12).shape == (3, 0)


def test_an_example_of_one_proposal_is_refused(tmp_path: Path) -> None:
    given = an_input(1)
    network = Network(small().eval()).eval()
    example = (given.x_B3HW, given.size_B2[0], given.proposals[0][:1])
    with pytest.raises(ValueError, match="example has 1 proposals, need at least 2"):
        write_onnx(network, example, tmp_path / "a.onnx", 20)
