"""Some classes of a training set."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from common.log import InputError
from face_lfr.data.draws import FaceDraws
from face_lfr.data.part import load_rec_part
from face_lfr.data.rec import load_rec
from face_lfr.data.transforms import FaceTransform
from face_lfr.search_score import open_held_out

CLASSES = 12  # of the fixture `synth`, each with 6 images


def people(root: Path, part: list[int], seed: int = 0) -> set[str]:
    """Names of the images of a part."""
    data = load_rec_part(root, part, seed)
    return {data.images.name(row) for row in range(len(data.images))}


def test_parts_of_one_order_share_nobody_and_make_up_the_set(synth: Path) -> None:
    parts = [people(synth, part) for part in ([0, 5], [5, 6], [6, CLASSES])]
    assert [len(part) for part in parts] == [30, 6, 36]
    whole = load_rec(synth)
    assert set().union(*parts) == {whole.images.name(row) for row in range(len(whole.images))}
    assert people(synth, [0, 5]) == parts[0]
    assert people(synth, [0, 5], seed=1) != parts[0]


def test_a_part_has_the_images_of_its_people_under_new_numbers(synth: Path) -> None:
    whole, data = load_rec(synth), load_rec_part(synth, [3, 7])
    row_of = {whole.images.name(row): row for row in range(len(whole.images))}
    assert data.num_classes == 4
    assert data.epoch_length == len(data.images) == 24
    assert sorted(np.bincount(data.labels_N)) == [6] * 4
    old: dict[int, set[int]] = {}
    for row in range(len(data.images)):
        there = row_of[data.images.name(row)]
        assert (data.images.read(row) == whole.images.read(there)).all()
        assert data.images.label(row) == data.labels_N[row]
        old.setdefault(int(data.labels_N[row]), set()).add(int(whole.labels_N[there]))
    assert sorted(old) == [0, 1, 2, 3]
    assert all(len(labels) == 1 for labels in old.values())
    assert len(set.union(*old.values())) == 4


def test_noise_stays_within_the_part(synth: Path) -> None:
    clean, noisy = load_rec_part(synth, [0, 4]), load_rec_part(synth, [0, 4], noise=0.5)
    assert noisy.num_classes == 4
    assert set(noisy.labels_N) <= {0, 1, 2, 3}
    assert 0 < (noisy.labels_N != clean.labels_N).sum() <= 12


def test_a_part_can_be_drawn_from_and_pickled(synth: Path) -> None:
    data = pickle.loads(pickle.dumps(load_rec_part(synth, [0, 4])))
    draws = FaceDraws(data, FaceTransform(size=24))
    items = [draws[number] for number in range(24)]
    assert sorted(item.label for item in items) == sorted(data.labels_N)
    assert items[0].image.shape == (3, 24, 24)


@pytest.mark.parametrize("part", [[0, 13], [4, 4], [-1, 3], [3], [0, 1, 2]])
def test_a_part_that_is_not_there_is_refused(synth: Path, part: list[int]) -> None:
    with pytest.raises(InputError, match="part: needs two rising numbers from 0 to the 12"):
        load_rec_part(synth, part)


def test_people_left_out_of_the_training_are_a_test(synth: Path) -> None:
    node = {"_target_": "face_lfr.data.part.load_rec_part", "root": str(synth), "part": [0, 8]}
    test = open_held_out(node | {"noise": 0.9}, None, [8, 12])
    names = {test.images.name(row) for row in range(len(test.images))}
    assert names == people(synth, [8, 12])
    assert test.labels_N is not None
    assert sorted(np.bincount(test.labels_N)) == [6] * 4  # without the noise of the training
    for classes in ([7, 12], [0, 2], [3]):
        with pytest.raises(InputError, match="test_classes: needs two ends without a class"):
            open_held_out(node, None, classes)
    with pytest.raises(InputError, match="the training has all persons"):
        open_held_out({"_target_": "face_lfr.data.rec.load_rec"}, None, [8, 12])
    with pytest.raises(InputError, match="give only one of them"):
        open_held_out(node, "a.bin", [8, 12])
