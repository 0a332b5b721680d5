"""Set aggregation: loops, invariances, gradients, streaming."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from reid_rqen.losses import contrastive, set_triplet
from reid_rqen.ops.aggregate import (
    StreamingAggregate,
    aggregate,
    aggregate_reference,
    score_weights,
    set_vector,
)


def random_sets(
    sets: int = 4, frames: int = 6, regions: int = 3, channels: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    feature = torch.rand(sets, frames, regions, channels, generator=generator).double()
    score = torch.rand(sets, frames, regions, generator=generator).double() + 0.01
    return feature, score


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (4, 6, 3, 5), (2, 9, 1, 7)])
@pytest.mark.parametrize("shared", [False, True])
def test_check_02_equals_the_loop(shape: tuple[int, int, int, int], shared: bool) -> None:
    feature, score = random_sets(*shape)
    score = score[..., :1] if shared else score
    valid = torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)) < 0.6
    valid[:, 0] = True
    expected = aggregate_reference(feature, score, valid)
    torch.testing.assert_close(aggregate(feature, score, valid), expected, rtol=0, atol=1e-12)
    got32 = aggregate(feature.float(), score.float(), valid).double()
    torch.testing.assert_close(got32, expected, rtol=0, atol=1e-6)


def test_check_02_invariances() -> None:
    feature, score = random_sets()
    expected = aggregate(feature, score)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    same = {
        "permutation": aggregate(feature[:, order], score[:, order]),
        "scale": aggregate(feature, score * torch.linspace(0.1, 9, 12).double().view(4, 1, 3)),
        "duplicates": aggregate(feature.repeat(1, 2, 1, 1), score.repeat(1, 2, 1)),
        "constant": aggregate(feature, torch.full_like(score, 0.3)),
    }
    constant = same.pop("constant")
    for got in same.values():
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(constant, feature.mean(dim=1), rtol=0, atol=1e-12)
    assert not torch.allclose(constant, expected, atol=1e-3)


def test_check_02_weights_sum_to_one_per_set_and_region() -> None:
    _, score = random_sets()
    weight = score_weights(score)
    torch.testing.assert_close(weight.sum(dim=1), torch.ones(4, 3).double(), rtol=0, atol=1e-12)
    assert (weight.sum(dim=2) - 1).abs().max() > 0.1


def test_check_02_one_frame_is_itself_and_leaves_its_score_alone() -> None:
    feature, score = random_sets(frames=1)
    score.requires_grad_()
    result = aggregate(feature, score)
    torch.testing.assert_close(result, feature[:, 0], rtol=0, atol=1e-15)
    (set_vector(result) * torch.arange(15)).sum().backward()
    torch.testing.assert_close(score.grad, torch.zeros_like(score), rtol=0, atol=1e-12)


def test_check_03_gradcheck_of_vectors_and_losses() -> None:
    feature, score = random_sets(sets=6, frames=3, regions=2, channels=3)

    def loss(feature: Tensor, score: Tensor) -> Tensor:
        anchor, positive, negative = set_vector(aggregate(feature, score)).view(2, 3, 6).unbind(1)
        triplet = set_triplet(anchor, positive, negative, 1.2)
        return triplet + contrastive(anchor, positive)

    assert torch.autograd.gradcheck(loss, (feature.requires_grad_(), score.requires_grad_()))
    valid = torch.tensor([[True, True, False], [True, False, False]]).repeat(3, 1)
    assert torch.autograd.gradcheck(lambda f, s: aggregate(f, s, valid), (feature, score))


def test_check_03_gradient_of_the_score() -> None:
    """Sum mu dL/dmu = 0, and dL/dmu_i = (g_i - sum_j w_j g_j) / sum_j mu_j."""
    feature, score = random_sets()
    score.requires_grad_()
    result = aggregate(feature, score)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(3)).double()
    result.backward(upstream)
    assert score.grad is not None
    along = (score * score.grad).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros(4, 3).double(), rtol=0, atol=1e-12)
    with torch.no_grad():
        g = torch.einsum("strc,src->str", feature, upstream)
        weight = score / score.sum(dim=1, keepdim=True)
        expected = (g - (weight * g).sum(dim=1, keepdim=True)) / score.sum(dim=1, keepdim=True)
    torch.testing.assert_close(score.grad, expected, rtol=0, atol=1e-12)


def test_set_vector_has_one_norm_over_all_regions() -> None:
    feature, score = random_sets()
    result = aggregate(feature, score)
    vector = set_vector(result)
    assert vector.shape == (4, 15)
    torch.testing.assert_close(vector.norm(dim=1), torch.ones(4).double())
    expected = result.flatten(1) / result.flatten(1).norm(dim=1, keepdim=True)
    torch.testing.assert_close(vector, expected)


def test_padding_may_hold_anything() -> None:
    feature, score = random_sets()
    valid = torch.ones(4, 6, dtype=torch.bool)
    valid[:, 4:] = False
    feature[:, 4:], score[:, 4:] = torch.nan, torch.inf
    torch.testing.assert_close(
        aggregate(feature, score, valid), aggregate(feature[:, :4], score[:, :4])
    )


def test_sets_without_frames_are_zero_and_differentiable() -> None:
    feature, score = random_sets(sets=2)
    score.requires_grad_()
    valid = torch.zeros(2, 6, dtype=torch.bool)
    vector = set_vector(aggregate(feature, score, valid))
    assert not vector.any()
    vector.sum().backward()
    assert score.grad is not None
    assert score.grad.isfinite().all()
    assert aggregate(feature[:0], score[:0]).shape == (0, 3, 5)


def test_half_precision_is_summed_in_float32() -> None:
    feature, score = random_sets(frames=500)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = aggregate(feature.bfloat16(), score.bfloat16())
    assert got.dtype == torch.float32
    expected = aggregate_reference(feature.bfloat16(), score.bfloat16())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


def test_shapes_are_checked() -> None:
    feature, score = random_sets()
    with pytest.raises(ValueError, match=r"score has shape \(4, 6, 2\)"):
        aggregate(feature, score[..., :2])
    with pytest.raises(ValueError, match=r"valid is torch\.float32"):
        aggregate(feature, score, torch.ones(4, 6))
    with pytest.raises(ValueError, match="need \\(S, T, R, C\\)"):
        aggregate(feature[0], score)


def ragged(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Frames of 7 sets in set order, with the vectors that the loop gives."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 40, 3, 7, 2, 1, 90]
    index = torch.arange(7).repeat_interleave(torch.tensor(lengths))
    feature = torch.rand(len(index), 3, 8, generator=generator)
    score = torch.rand(len(index), 3, generator=generator) + 0.01
    parts = zip(feature.split(lengths), score.split(lengths), strict=True)
    rows = [aggregate_reference(f[None], s[None]) for f, s in parts]
    return index, feature, score, set_vector(torch.cat(rows))


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shuffle", [False, True])
def test_check_06_streaming_in_any_order(chunk: int, dtype: torch.dtype, shuffle: bool) -> None:
    index, feature, score, expected = ragged()
    order = torch.arange(len(index))
    if shuffle:
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(4))
    stream = StreamingAggregate(7, 3, 8, dtype)
    for part in order.split(chunk):
        stream.update(index[part], feature[part], score[part])
    atol = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(stream.vectors().double(), expected, rtol=0, atol=atol)


def test_check_06_a_padded_batch_changes_nothing() -> None:
    index, feature, score, _ = ragged()
    plain, padded = StreamingAggregate(7, 3, 8), StreamingAggregate(7, 3, 8)
    plain.update(index, feature, score)
    junk = torch.full((6, 3, 8), torch.nan)
    padded.update(
        torch.cat([index, torch.full((6,), -1)]),
        torch.cat([feature, junk]),
        torch.cat([score, junk[..., 0]]),
    )
    assert torch.equal(plain.vectors(), padded.vectors())


def test_check_06_parts_merge() -> None:
    index, feature, score, expected = ragged()
    first, second = StreamingAggregate(7, 3, 8), StreamingAggregate(7, 3, 8)
    first.update(index[:50], feature[:50], score[:50])
    second.update(index[50:], feature[50:], score[50:])
    first.merge(second)
    torch.testing.assert_close(first.vectors().double(), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="other has shape"):
        first.merge(StreamingAggregate(6, 3, 8))


def shard(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    index, feature, score, expected = ragged()
    stream = StreamingAggregate(7, 3, 8)
    stream.update(index[rank::2], feature[rank::2], score[rank::2])
    stream.merge_ranks()
    stream.merge_ranks()
    torch.testing.assert_close(stream.vectors().double(), expected, rtol=0, atol=1e-6)
    assert int(stream.frames_N.sum()) == len(index)
    with pytest.raises(ValueError, match="after merge_ranks"):
        stream.update(index, feature, score)
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo can abort an interpreter that is torn down


def test_check_06_two_processes(tmp_path: Path) -> None:
    mp.spawn(shard, args=(str(tmp_path),), nprocs=2)


def test_more_frames_than_one_product_takes_in_any_order() -> None:
    generator = torch.Generator().manual_seed(5)
    index = torch.randint(40, (900,), generator=generator)
    feature = torch.rand(900, 3, 8, generator=generator)
    score = torch.rand(900, 3, generator=generator)
    stream = StreamingAggregate(40, 3, 8)
    stream.update(index, feature, score)
    total = torch.zeros(40, 3, 8, dtype=torch.float64)
    total.index_add_(0, index, feature.double() * score.double()[..., None])
    torch.testing.assert_close(stream.total_NRC.double(), total, rtol=0, atol=1e-5)
    assert stream.frames_N.tolist() == torch.bincount(index, minlength=40).tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_streaming_on_cuda_repeats_bit_for_bit() -> None:
    index, feature, score, expected = ragged()
    results = []
    for _ in range(3):
        stream = StreamingAggregate(7, 3, 8, device="cuda")
        stream.update(index.cuda(), feature.cuda(), score.cuda())
        results.append(stream.vectors().cpu())
    torch.testing.assert_close(results[0].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_set_without_frames_is_named() -> None:
    stream = StreamingAggregate(3, 3, 8)
    index = torch.tensor([0, 2])
    stream.update(index, torch.ones(2, 3, 8), torch.ones(2, 1))
    with pytest.raises(ValueError, match="1 of 3 sets have no frame, first index 1"):
        stream.vectors()
    with pytest.raises(ValueError, match="index 3 is beyond the last of 3 sets"):
        stream.update(index + 1, torch.ones(2, 3, 8), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"need \(2, 3, 8\)"):
        stream.update(index, torch.ones(2, 3, 7), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"dtype=torch\.float16"):
        StreamingAggregate(3, 3, 8, torch.float16)
