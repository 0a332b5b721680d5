"""Features of images: mirror images, batches, kinds of networks, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import dist
from common.log import InputError
from face_lfr.data.challenge import load_deepglint
from face_lfr.data.draws import FaceItem, ImageRows
from face_lfr.engine import Embedding, autocast, check_fits, embed_images, train_step
from face_lfr.weights import Trained, load_trained


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    return load_trained(run)


@pytest.fixture(scope="module")
def rows(trained: Trained, synth: Path) -> ImageRows:
    return ImageRows(load_deepglint(synth / "glint_syn"), trained.transform)


def test_a_feature_is_the_mean_of_image_and_mirror_image(
    trained: Trained, rows: ImageRows, tmp_path: Path
) -> None:
    how = Embedding(trained.transform, dist.init("cpu"), batch=5)
    found = embed_images(trained.model, rows, how, tmp_path / "f.npy")
    assert found.shape == (len(rows), 16)
    with torch.inference_mode():
        for row in (0, 7, len(rows) - 1):
            x_BCHW = trained.transform.normalize(rows[row].image[None])
            pair = [trained.model.embed(x)[0] for x in (x_BCHW, x_BCHW.flip(-1))]
            expected = (pair[0] + pair[1]) / 2
            np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-6)
            assert not torch.allclose(*pair, rtol=1e-2)
    plain = embed_images(trained.model, rows, how._replace(flip=False), tmp_path / "p.npy")
    np.testing.assert_allclose(plain[-1], pair[0], rtol=1e-4, atol=1e-6)


def test_batches_and_workers_change_nothing(
    trained: Trained, rows: ImageRows, tmp_path: Path
) -> None:
    world, found = dist.init("cpu"), []
    for number, (batch, workers) in enumerate(((1, 0), (64, 0), (7, 1))):
        how = Embedding(trained.transform, world, batch=batch, workers=workers)
        found.append(np.array(embed_images(trained.model, rows, how, tmp_path / f"{number}.npy")))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-6)


def test_a_quality_network_gives_one_number(scorer: Path, synth: Path, tmp_path: Path) -> None:
    rated = load_trained(scorer)
    rows = ImageRows(load_deepglint(synth / "glint_syn"), rated.transform)
    how = Embedding(rated.transform, dist.init("cpu"), flip=False)
    found = embed_images(rated.model, rows, how, tmp_path / "q.npy")
    assert found.shape == (len(rows), 1)
    assert found.std() > 0


class Broken(nn.Module):
    features, input_size = 16, 24

    def embed(self, x_BCHW: Tensor) -> Tensor:
        out_BD = x_BCHW.mean(dim=(1, 2, 3))[:, None].repeat(1, 16)
        out_BD[-1, 3] = torch.nan
        return out_BD


def test_a_feature_that_is_no_number_is_named(
    trained: Trained, rows: ImageRows, tmp_path: Path
) -> None:
    how = Embedding(trained.transform, dist.init("cpu"), batch=10)
    with pytest.raises(InputError, match="feature: is no number at image: 9"):
        embed_images(Broken(), rows, how, tmp_path / "f.npy")


def test_what_does_not_fit_is_refused(trained: Trained) -> None:
    with pytest.raises(InputError, match="precision: must be one of float32"):
        autocast(torch.device("cpu"), "int8")
    other = Broken()
    other.input_size = 40
    with pytest.raises(InputError, match="transform: the model takes 40 px"):
        check_fits(other, trained.transform)


def test_a_frozen_network_gets_no_gradient(trained: Trained) -> None:
    item = FaceItem(torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8), torch.arange(4))
    head = nn.Linear(16, 4)

    def objective(feature_BD: Tensor, label_B: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(feature_BD), label_B)

    device = torch.device("cpu")
    loss = train_step(trained.model, item, trained.transform, objective, device, frozen=True)
    loss.backward()
    assert head.weight.grad is not None
    assert all(p.grad is None for p in trained.model.parameters())
