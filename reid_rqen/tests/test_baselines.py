"""CNN-RNN, ASTPN and the temporal controls."""

import pytest
import torch
from torch import Tensor, nn

from reid_rqen.losses import PKObjective, SiameseObjective
from reid_rqen.models.astpn import ASTPN, attentive_pool
from reid_rqen.models.cnn_rnn import CNNRNN, FrameCNN
from reid_rqen.models.resnet import ResNet50
from reid_rqen.models.temporal import TemporalAttention, TemporalModel
from reid_rqen.models.tiny import TinyTrunk
from reid_rqen.ops.aggregate import aggregate

PID = torch.tensor([[0, 0, 1], [2, 2, 0]])


def clip(sets: int = 6, frames: int = 4, channels: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sets, frames, channels, 56, 40, generator=generator)


def temporal(mode: str | None = "softmax") -> TemporalModel:
    torch.manual_seed(0)
    attention = None if mode is None else TemporalAttention(64, 8, (7, 5), mode)
    if attention is not None:
        nn.init.constant_(attention.temporal.bias, 0.5)  # keeps the last ReLU open
    return TemporalModel(TinyTrunk(in_channels=5), attention, 4)


MODELS = {
    "cnn_rnn": lambda: CNNRNN(4),
    "astpn": lambda: ASTPN(4),
    "resnet50_ta softmax": temporal,
    "resnet50_ta sigmoid": lambda: temporal("sigmoid"),
    "resnet50_tp": lambda: temporal(None),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    objective = PKObjective(4.0) if "resnet" in name else SiameseObjective(margin=50.0)
    loss, _ = objective(model(clip()), PID)
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", MODELS)
def test_padding_has_no_influence(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    image = clip(sets=2, frames=3)
    padded = torch.cat([image, torch.full((2, 2, 5, 56, 40), torch.nan)], dim=1)
    valid = torch.tensor([True] * 3 + [False] * 2).expand(2, -1)
    with torch.no_grad():
        expected, got = model(image), model(padded, valid)
        torch.testing.assert_close(got.vector_SD, expected.vector_SD, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.logits[0], expected.logits[0], rtol=1e-5, atol=1e-6)
        rows = model.sequences(padded, valid)
        if name == "astpn":
            rows = rows[:, :3]
        torch.testing.assert_close(rows, model.sequences(image), rtol=1e-5, atol=1e-6)
        assert rows.shape[-1] == model.dimensions
        assert model(image[:, :1]).vector_SD.isfinite().all()
    with pytest.raises(ValueError, match="padding must follow"):
        model(padded, ~valid)
    with pytest.raises(ValueError, match="need bool"):
        model(image, torch.ones(2, 3))


def test_frame_cnn_has_the_published_sizes() -> None:
    assert FrameCNN().fc.in_features == 32 * 10 * 8
    assert FrameCNN(pyramid=(8, 4, 2, 1)).fc.in_features == 32 * 85
    with pytest.raises(ValueError, match=r"frames are \(5, 64, 48\), need \(5, 56, 40\)"):
        FrameCNN()(torch.zeros(1, 5, 64, 48))


def test_cnn_rnn_is_its_recurrence() -> None:
    torch.manual_seed(0)
    model = CNNRNN().eval()
    nn.init.normal_(model.rnn.start)
    image = clip(sets=2)
    with torch.no_grad():
        rows = []
        for frames in image:
            x = model.cnn(frames)
            state = x[0] + model.rnn.start
            states = [state]
            for t in range(1, 4):
                state = x[t] + model.rnn.fc.weight @ torch.tanh(state) + model.rnn.fc.bias
                states.append(state)
            rows.append(torch.stack(states).mean(dim=0))
        torch.testing.assert_close(model.sequences(image), torch.stack(rows))


def test_dropout_is_active_in_training_only() -> None:
    torch.manual_seed(0)
    model, image = CNNRNN(), clip(sets=1)
    assert not torch.equal(model.sequences(image), model.sequences(image))
    model.eval()
    assert torch.equal(model.sequences(image), model.sequences(image))


def test_astpn_attention_equals_the_loops() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(1, 3, 4).double(), torch.randn(1, 5, 4).double()
    weight = torch.randn(4, 4).double()
    affinity = torch.empty(3, 5).double()
    for i in range(3):
        for j in range(5):
            affinity[i, j] = torch.tanh(left[0, i] @ weight @ right[0, j])
    row = torch.tensor([float(affinity[i].max()) for i in range(3)]).double().exp()
    column = torch.tensor([float(affinity[:, j].max()) for j in range(5)]).double().exp()
    expected = ((row / row.sum()) @ left[0], (column / column.sum()) @ right[0])
    ones = torch.ones(1, 5, dtype=torch.bool)
    got = attentive_pool(left, right, weight, ones[:, :3], ones)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a[0], b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_astpn_pair_distance(chunk: int) -> None:
    torch.manual_seed(0)
    model = ASTPN().eval()
    with torch.no_grad():
        nn.init.normal_(model.weight_DD, std=0.2)
        query, gallery = model.sequences(clip(2, 3)), model.sequences(clip(4, 5, seed=1))
        valid_q = torch.tensor([[True, True, True], [True, True, False]])
        valid_g = torch.ones(4, 5, dtype=torch.bool)
        got = model.pair_distance(query, valid_q, gallery, valid_g, chunk)
        for q, count in ((0, 3), (1, 2)):
            for g in range(4):
                ones = valid_g[:1]
                a, b = attentive_pool(
                    query[q : q + 1, :count],
                    gallery[g : g + 1],
                    model.weight_DD,
                    ones[:, :count],
                    ones,
                )
                assert got[q, g].item() == pytest.approx((a - b).norm().item(), abs=1e-5)
        back = model.pair_distance(gallery, valid_g, query, valid_q)
    assert not torch.allclose(back.T, got, atol=1e-6)  # W is not symmetric


def test_astpn_pairs_each_anchor_with_positive_and_negative() -> None:
    torch.manual_seed(0)
    model = ASTPN(4, dropout=0.0, rnn_dropout=0.0)
    out = model(clip())
    assert out.pairs is not None
    left, right = out.pairs
    assert left.shape == right.shape == (4, 128)
    assert out.logits[0].shape == (8, 4)
    state = model.sequences(clip())
    ones = torch.ones(1, 4, dtype=torch.bool)
    a, n = attentive_pool(state[3:4], state[5:6], model.weight_DD, ones, ones)
    torch.testing.assert_close(left[3:4], a)
    torch.testing.assert_close(right[3:4], n)
    with pytest.raises(ValueError, match="4 sets: need"):
        model(clip(sets=4))
    assert model.eval()(clip(sets=4)).pairs is None


def test_sigmoid_attention_is_quality_weighting() -> None:
    """With the scores of the attention, QAN's aggregation gives the same vector."""
    model = temporal("sigmoid").eval()
    image = clip(sets=2)
    with torch.no_grad():
        out = model(image)
        assert out.score_STR is not None
        feature = model.trunk(image.flatten(0, 1)).map_BCHW.mean(dim=(2, 3)).unflatten(0, (2, 4))
        qan = aggregate(feature[:, :, None], out.score_STR)[:, 0]
    assert ((out.score_STR > 0.5) & (out.score_STR < 1)).all()
    assert out.score_STR.std() > 0
    torch.testing.assert_close(out.vector_SD, qan)


def test_softmax_attention_equals_its_equation() -> None:
    model = temporal().eval()
    attention = model.attention
    assert attention is not None
    image = clip(sets=1)
    with torch.no_grad():
        maps = model.trunk(image[0]).map_BCHW
        hidden = torch.einsum("tchw,ochw->to", maps, attention.spatial.weight)
        hidden = (hidden + attention.spatial.bias).relu()
        padded = nn.functional.pad(hidden, (0, 0, 1, 1))
        kernel = attention.temporal.weight[0].T
        logit = torch.stack([(padded[t : t + 3] * kernel).sum() for t in range(4)])
        weight = (logit + attention.temporal.bias).relu().softmax(dim=0)
        expected = weight @ maps.mean(dim=(2, 3))
        torch.testing.assert_close(model(image).vector_SD[0], expected, rtol=1e-4, atol=1e-5)


def test_temporal_mean_is_the_mean_and_errors_are_named() -> None:
    model = temporal(None).eval()
    image = clip(sets=2)
    mean = model.trunk(image.flatten(0, 1)).map_BCHW.mean(dim=(2, 3)).unflatten(0, (2, 4)).mean(1)
    out = model(image)
    torch.testing.assert_close(out.vector_SD, mean)
    assert out.score_STR is None
    with pytest.raises(ValueError, match="mode='tanh'"):
        TemporalAttention(mode="tanh")
    wrong = TemporalModel(TinyTrunk(in_channels=5), TemporalAttention(64, 8))
    with pytest.raises(ValueError, match=r"map is \(7, 5\)"):
        wrong(image)


def test_published_resnet_attention_fits_224x112() -> None:
    with torch.device("meta"):
        map_BCHW = ResNet50()(torch.empty(8, 3, 224, 112)).map_BCHW
        score = TemporalAttention()(map_BCHW.unflatten(0, (2, 4)), torch.ones(2, 4).bool())
    assert score.shape == (2, 4, 1)
