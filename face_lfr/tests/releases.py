"""Small untrained networks as release files, whose features tell pictures apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from face_lfr.weights import write_release

MODELS = "face_lfr.models"
IR = {
    "_target_": f"{MODELS}.iresnet.IResNet", "layers": [1, 1, 1, 1], "widths": [4, 8, 8, 8],
    "features": 16, "input_size": 24,
}  # fmt: skip
MOBILE = {
    "_target_": f"{MODELS}.mobilefacenet.MobileFaceNet", "blocks": [1, 1, 1, 1], "scale": 1,
    "inside": [8] * 7, "features": 16, "input_size": 32,
}  # fmt: skip
POLY = {
    "_target_": f"{MODELS}.polyface.EfficientPolyFace", "blocks": [1, 1, 1], "features": 16,
    "input_size": 75, "width": 0.1,
}  # fmt: skip
QUALITY = {
    "_target_": f"{MODELS}.quality_net.QualityNet", "channels": [4, 4, 4, 4], "blocks": 1,
    "input_size": 24,
}  # fmt: skip
FACTS: dict[str, Any] = {"train_set": "drawn", "num_classes": 5, "seed": 0, "kind": "embedding"}


def transform_node(**options: Any) -> dict[str, Any]:
    return {"_target_": "face_lfr.data.transforms.FaceTransform", **options}


def settle(model: nn.Module, size: int) -> None:
    """Statistics of noise and uneven scales, as after training: what is folded wrongly is seen."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = None
        if norm.weight is not None:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
    model.train()
    with torch.no_grad():
        for _ in range(6):  # a block that PolyFace leaves out does not count
            model(
                torch.rand(32, 3, 1, 1) * torch.randn(32, 3, size, size) + torch.randn(32, 3, 1, 1)
            )
    model.eval()


def write(
    path: Path,
    model: dict[str, Any] = IR,
    transform: dict[str, Any] | None = None,
    change: Callable[[nn.Module], None] | None = None,
    **facts: Any,
) -> Path:
    """A release file of step 3; a quality network says so by itself.

    Args:
        path: of the file.
        model: its node.
        transform: its node; images of the model's own size when None.
        change: acts on the model before it is written.
        facts: in the place of `FACTS`.
    """
    torch.manual_seed(0)
    net, size = instantiate(model), model["input_size"]
    settle(net, size)
    if change is not None:
        change(net)
    config = FACTS | {"kind": "quality" if "quality" in model["_target_"] else "embedding"} | facts
    nodes = {"model": model, "transform": transform or transform_node(size=size)}
    write_release(net.state_dict(), nodes | config, 3, path)
    return path
