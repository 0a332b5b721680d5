"""What every network of `configs/model` does: sizes, layouts, half precision, compilation, ONNX."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from torch import Tensor, nn

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
# Small enough to run here; of the others only shapes are computed.
SMALL: dict[str, list[str]] = {
    "ir_nano": [],
    "polyface_nano": ["blocks=[1,1,1]", "width=0.125"],
    "quality_nano": [],
    "mobilefacenet": ["blocks=[1,1,1,1]", "scale=1", "features=16", "input_size=48"],
    "polynet": ["modules=[1,1,1]", "width=0.125", "features=8", "input_size=75"],
}
TRACED = [name for name in SMALL if name != "polynet"]  # slow, and of the layers of PolyFace


@cache
def node(name: str, *overrides: str) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS / "model"), version_base=None):
        return compose(name, list(overrides))


def small(name: str, *overrides: str) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = instantiate(node(name, *SMALL[name], *overrides))
    return net


def images(net: Any, count: int = 3) -> Tensor:
    size = net.input_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_names() -> None:
    assert set(NAMES) == {
        "polyface_base", "polyface_deep", "polyface_deeper", "polyface_nano", "polynet",
        "ir18", "ir34", "ir50", "ir100", "ir_nano", "mobilefacenet", "mobilefacenet_y2",
        "quality_net", "quality_nano",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_builds_and_gives_its_shape(name: str) -> None:
    with torch.device("meta"):
        net = instantiate(node(name)).eval()
        size = net.input_size
        quality = name.startswith("quality")
        assert net(torch.empty(2, 3, size, size)).shape == ((2,) if quality else (2, net.features))
        assert hasattr(net, "embed") != quality


@pytest.mark.parametrize("name", SMALL)
def test_images_of_another_shape_are_refused(name: str) -> None:
    net = small(name)
    size = net.input_size
    for shape in ((2, 1, size, size), (2, 3, size + 1, size), (3, size, size)):
        with pytest.raises(ValueError, match=rf"need \(B, 3, {size}, {size}\)"):
            net(torch.zeros(shape))


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_and_half_precision(name: str) -> None:
    net = small(name).eval()
    x = images(net)
    with torch.no_grad():
        wanted = net(x)
        last = net.to(memory_format=torch.channels_last)
        found = last(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x.to(memory_format=torch.channels_last))
    assert y.dtype == torch.float32  # the last layer keeps full precision
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net.eval()(x)
    assert half.dtype == torch.float32
    assert (half - net(x)).abs().max() < 0.1 * net(x).abs().max()


@pytest.mark.parametrize("name", TRACED)
def test_the_test_feature_compiles_in_one_piece(name: str) -> None:
    net = small(name).eval()
    torch._dynamo.reset()
    run = torch.compile(getattr(net, "embed", net), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(run(images(net)), getattr(net, "embed", net)(images(net)))
    torch._dynamo.reset()


class Embedding(nn.Module):
    """The part of a network that is exported."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        embed = getattr(self.net, "embed", self.net)
        y: Tensor = embed(x)
        return y


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ir_nano", "polyface_nano", "quality_nano"])
def test_onnx_gives_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="ONNX export is an extra")
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is an extra")
    model = Embedding(small(name).eval())
    batch = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (images(model.net, 2),), dynamic_shapes=batch, strict=True)
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, f=path, dynamo=True, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        x = images(model.net, count)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            wanted = model(x).numpy()
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
