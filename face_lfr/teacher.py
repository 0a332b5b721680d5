"""What a finished recogniser tells a training: class means to start from, targets of quality."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common import dist
from common.log import InputError, progress
from common.samplers import EvalSampler
from common.seed import worker_init
from face_lfr.classifier import Classifier, class_means
from face_lfr.data.draws import ImageRows
from face_lfr.data.face_data import FaceData
from face_lfr.data.proxy_set import Proxy, build_proxy
from face_lfr.engine import Embedding, embed_images, features
from face_lfr.quality import class_means as feature_means
from face_lfr.weights import load_centres, open_trained


def anchor_classes(model: nn.Module, classifier: nn.Module, data: FaceData, how: Embedding) -> None:
    """Put the class centres where the network's features of the training images are.

    The first step of anchor finetuning, a name of arXiv 1909.00632's abstract; what it means here
    is ours. A collective; the network is left in evaluation mode.

    Raises:
        InputError: the objective has no class centres; an image cannot be read.
    """
    if not isinstance(classifier, Classifier):
        raise InputError("anchor", "needs a classifier, not", type(classifier).__name__)
    classifier.anchor(class_means(_embedded(model.eval(), data, how), classifier))


@torch.inference_mode()
def _embedded(model: nn.Module, data: FaceData, how: Embedding) -> Iterator[tuple[Tensor, Tensor]]:
    share = EvalSampler(data.epoch_length, how.world.rank, how.world.size)
    loader = DataLoader(
        ImageRows(data.images, how.transform), batch_size=how.batch, sampler=share,
        num_workers=how.workers, worker_init_fn=worker_init, generator=torch.Generator(),
    )  # fmt: skip
    labels_N = torch.from_numpy(data.labels_N)
    with progress(how.world.main) as bar:
        task = bar.add_task("class means", total=len(share))
        for image_BCHW, row_B in loader:
            yield features(model, image_BCHW, how), labels_N[row_B]
            bar.advance(task, len(row_B))


def prepare_proxy(
    teacher: Path, path: Path, data: FaceData, copies: int, seed: int, world: dist.World,
    precision: str, workers: int,
) -> Proxy:  # fmt: skip
    """The proxy set at `path`: degraded copies of the training images as the teacher sees them.

    Class centres are those of the teacher's classifier; a release file has none, then they are the
    class means of its features. A collective.

    Raises:
        InputError: the teacher is no recogniser, has other classes than the data, or `path` holds
            a proxy set of something else.
    """
    trained = open_trained(teacher, world.device)
    if trained.kind != "embedding":
        raise InputError(teacher, "must be a recogniser, not a network of kind", trained.kind)
    centres_CD = load_centres(trained)
    if centres_CD is None:
        how = Embedding(trained.transform, world, workers=workers, precision=precision)
        rows: Any = ImageRows(data.images, trained.transform)
        clean_ND = embed_images(
            trained.model, rows, how, path.with_name("clean.npy"), "class means"
        )
        centres_CD = feature_means(clean_ND, data.labels_N, data.num_classes)
    if len(centres_CD) != data.num_classes:
        what = f"has {len(centres_CD)} classes, {data.name} has"
        raise InputError(teacher, what, data.num_classes)
    return build_proxy(
        path, data, trained.transform, trained.model, centres_CD, copies, seed, world,
        precision=precision, workers=workers,
    )  # fmt: skip
