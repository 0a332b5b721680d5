"""Parameter groups of the Caffe recipe."""

import torch
from torch import nn

from reid_rqen.models.quality import TinyQuality
from reid_rqen.models.rqen import RQEN
from reid_rqen.models.tiny import TinyTrunk
from reid_rqen.optim import adam, caffe_groups, caffe_sgd


def test_biases_learn_twice_as_fast_without_decay() -> None:
    model = RQEN(TinyTrunk(), TinyQuality(3), 5)
    names = {id(p): name for name, p in model.named_parameters()}
    weights, biases = caffe_groups(model, 1e-3, 2e-4)
    assert (weights["lr"], weights["weight_decay"]) == (1e-3, 2e-4)
    assert (biases["lr"], biases["weight_decay"]) == (2e-3, 0.0)
    assert sorted(names[id(p)] for p in biases["params"]) == [
        "classifier.bias",
        "quality.conv1.bias",
        "quality.conv2.bias",
        "quality.fc.bias",
    ]
    decayed = {names[id(p)] for p in weights["params"]}
    assert {"trunk.blocks.0.1.weight", "trunk.blocks.0.1.bias"} <= decayed
    assert len(weights["params"]) + len(biases["params"]) == len(names)


def test_frozen_and_shared_parameters() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    groups = caffe_groups(nn.Sequential(layer, layer), 1.0, 0.1)
    assert [len(group["params"]) for group in groups] == [1]


def test_one_caffe_step() -> None:
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    optimizer = caffe_sgd(model, lr=0.1, weight_decay=0.5)
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.item(), 1 - 0.1 * (1 + 0.5))
    torch.testing.assert_close(model.bias.item(), 1 - 0.2)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert len(adam(model, lr=0.1).param_groups) == 1
