"""The relation head: its sum over subsets, which subsets it takes, its size."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from video_mmit.models.trn import TRN


def features(frames: int = 5, width: int = 6) -> Tensor:
    return torch.randn(3, frames, width, generator=torch.Generator().manual_seed(0)).double()


def head(frames: int = 5, **options: object) -> TRN:
    torch.manual_seed(0)
    net = TRN(6, 4, frames, bottleneck=7, **options).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        net.reduce.weight.mul_(500)  # its first weights are too small to show a difference
    return net


def looped(net: TRN, x_NTD: Tensor, subsets: dict[int, list[tuple[int, ...]]]) -> Tensor:
    rows = []
    for video in x_NTD @ net.reduce.weight.T + net.reduce.bias:
        total = torch.zeros(4).double()
        for scale, relation in zip(net.scales, net.relations, strict=True):
            for subset in subsets[scale]:
                x = torch.cat([video[frame] for frame in subset]).clamp(min=0)
                x = (relation[1].weight @ x + relation[1].bias).clamp(min=0)
                total = total + relation[3].weight @ x + relation[3].bias
        rows.append(total)
    return torch.stack(rows)


def test_the_sum_over_subsets_equals_the_loops() -> None:
    # All subsets in the order of combinations; of 10 the middles of three thirds, of 5 likewise.
    every = {scale: list(combinations(range(5), scale)) for scale in (5, 4, 3, 2)}
    chosen = {
        5: every[5],
        4: [every[4][i] for i in (0, 2, 4)],
        3: [every[3][i] for i in (1, 5, 8)],
        2: [every[2][i] for i in (1, 5, 8)],
    }
    net, x = head(), features()
    torch.testing.assert_close(net(x), looped(net, x, chosen))
    net, x = head(subsets=99), features()
    torch.testing.assert_close(net(x), looped(net, x, every))


def test_single_scale_is_one_relation_of_all_frames() -> None:
    net, x = head(multi_scale=False), features()
    assert net.scales == [5]
    assert net.relations[0][1].out_features == 512
    torch.testing.assert_close(net(x), looped(net, x, {5: [(0, 1, 2, 3, 4)]}))


def test_evaluation_draws_nothing() -> None:
    net, x = head(), features()
    state = torch.get_rng_state()
    assert torch.equal(net(x), net(x))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_drawn_subsets_come_from_the_global_generator(training: bool) -> None:
    net, x = head(stochastic_eval=not training).train(training), features()
    torch.manual_seed(1)
    first = [net(x) for _ in range(4)]
    torch.manual_seed(1)
    again = [net(x) for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(first[0], other) for other in first[1:])


def test_drawn_subsets_are_ordered_distinct_and_all_possible() -> None:
    net = head(frames=4).train()
    seen = set()
    for _ in range(60):
        frames_MS = net.frames(2)
        rows = [tuple(row) for row in frames_MS.tolist()]
        assert len(set(rows)) == 3
        assert all(a < b for a, b in rows)
        seen |= set(rows)
    assert seen == set(combinations(range(4), 2))
    assert net.frames(4).tolist() == [[0, 1, 2, 3]]


def test_check_06_the_order_of_frames_counts() -> None:
    net, x = head(), features()
    with torch.no_grad():
        assert float((net(x) - net(x[:, [1, 0, 2, 3, 4]])).abs().max()) > 1e-3


def test_every_parameter_gets_a_gradient() -> None:
    net = head().train()
    net(features()).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_first_weights_of_the_bottleneck() -> None:
    torch.manual_seed(0)
    net = TRN(256, 3, 3)
    assert float(net.reduce.weight.detach().std()) == pytest.approx(0.001, rel=0.02)
    assert not net.reduce.bias.any()


@pytest.mark.parametrize(("frames", "expected"), [(3, 489_074), (5, 1_240_292), (8, 2_858_639)])
def test_check_04_parameters_of_the_relation_head(frames: int, expected: int) -> None:
    with torch.device("meta"):
        net = TRN(2048, 313, frames)
    assert sum(p.numel() for p in net.relations.parameters()) == expected
    rest = sum(p.numel() for p in net.parameters()) - expected
    assert rest == 2048 * 256 + 256
    assert all(name.startswith(("reduce.", "relations.")) for name in net.state_dict())


def test_check_13_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_segments=1"):
        TRN(8, 3, 1)
    with pytest.raises(ValueError, match="subsets=0"):
        TRN(8, 3, 4, subsets=0)
    with pytest.raises(ValueError, match=r"\(3, 4, 6\) have T=4, .* num_segments=5"):
        head()(features(4))
