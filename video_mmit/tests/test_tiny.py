"""The small backbone."""

import pytest
import torch
from torch.nn import functional as F

from video_mmit.models.tiny import TinyNet


def test_shapes_and_names() -> None:
    net = TinyNet((16, 32, 64), in_channels=10)
    assert net(torch.randn(2, 10, 33, 32)).shape == (2, net.out_features) == (2, 64)
    heads = {name.split(".")[0] for name in net.state_dict()}
    assert heads == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    assert [len(getattr(net, name)) for name in net.stages] == [1, 1, 1]
    assert net.layer1[0].downsample is None
    assert net.layer2[0].stride == net.layer3[0].stride == 2
    assert TinyNet((16, 32)).stages == ["layer1", "layer2"]


def test_forward_is_stem_blocks_and_mean() -> None:
    torch.manual_seed(0)
    net, x = TinyNet((8, 16), stem_stride=1).eval(), torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        map_BCHW = F.relu(net.bn1(F.conv2d(x, net.conv1.weight, padding=2)))
        assert map_BCHW.shape == (2, 8, 12, 12)
        map_BCHW = net.layer2[0](net.layer1[0](map_BCHW))
        assert map_BCHW.shape == (2, 16, 6, 6)
        torch.testing.assert_close(net(x), map_BCHW.mean(dim=(2, 3)))


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    net = TinyNet()
    net(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_check_13_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"widths=\[\]"):
        TinyNet(())
    with pytest.raises(ValueError, match=r"widths=\[8, 0\]"):
        TinyNet((8, 0))
    with pytest.raises(ValueError, match="stem_stride=0"):
        TinyNet(stem_stride=0)
