"""The classifier on two and four ranks against one process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from face_lfr.tests.classifier_job import CASES, CONTINUED, everything, kinds

ROOT = Path(__file__).resolve().parents[2]
RANKS = (2, 4)


class Results(NamedTuple):
    one: dict[str, Tensor]
    many: dict[int, dict[str, Tensor]]

    def compare(self, prefix: str, *keys: str) -> None:
        """The named results, or all with the prefix, are equal on any number of ranks."""
        found = [name for name in self.one if name.startswith(prefix)]
        assert found
        assert all(f"{prefix}{key}" in found for key in keys)
        for ranks in RANKS:
            others = self.many[ranks]
            assert [name for name in sorted(others) if name.startswith(prefix)] == sorted(found)
            for name in found:
                torch.testing.assert_close(
                    others[name], self.one[name], rtol=1e-9, atol=1e-11,
                    msg=lambda text, name=name, ranks=ranks: f"{name}, {ranks} ranks: {text}",
                )  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "face_lfr.tests.classifier_job", str(folder)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    many = {ranks: load_file(folder / f"{ranks}.safetensors") for ranks in RANKS}
    return Results(everything(folder), many)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arcface", "arcnegface", "smoothing"])
def test_check_04_sharded_equals_unsharded(results: Results, name: str) -> None:
    for kind in ("spread", "first", "last"):
        results.compare(f"{name} {kind} ", "loss", "network", "feature", "step.weight")
        # A gradient that is 0 everywhere would be equal too.
        assert all(
            results.one[f"{name} {kind} {key}"].abs().max() > 1e-3
            for key in ("loss", "network", "feature", "step.weight")
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("arcface", "arcnegface")])
def test_every_other_case_is_equal_on_any_number_of_ranks(results: Results, name: str) -> None:
    for kind in kinds(name):
        results.compare(f"{name} {kind} ", "loss", "network", "feature", "step.weight", "centres")


@pytest.mark.slow
def test_a_state_is_part_of_the_comparison(results: Results) -> None:
    found = results.many[4]
    assert found["curricular spread buffer.margin.t"] != 0
    assert found["adacos spread buffer.margin.scale"] > 1
    assert found["sampled spread buffer.draws"] == 1
    assert found["subcentres spread buffer.votes"].sum() == 8
    assert found["subcentres spread step.weight"].shape == (103, 3, 16)
    assert found["softmax spread step.bias"].abs().max() > 1e-3
    moved = (found["sampled spread step.weight"] != 0).any(dim=1).sum()
    assert 8 <= moved <= 31  # ceil(0.3 * 103)


@pytest.mark.slow
def test_all_classes_sampled_is_bitwise_the_plain_step(results: Results) -> None:
    for found in (results.one, *results.many.values()):
        for key in ("loss", "network", "step.weight"):
            plain, sampled = (found[f"{name} spread {key}"] for name in ("arcface", "sampled_all"))
            assert torch.equal(plain, sampled)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTINUED)
def test_check_04_a_checkpoint_of_four_ranks_continues_on_two_and_one(
    results: Results, name: str
) -> None:
    results.compare(f"continued {name} ", "losses", "objective.weight", "momentum.objective.weight")
    losses = results.one[f"continued {name} losses"]
    assert len(losses.unique()) == len(losses) == 6  # two batches a step


@pytest.mark.slow
def test_class_means_of_uneven_shares(results: Results) -> None:
    results.compare("anchors ", "mean", "weight")


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_an_overflow_on_one_rank_skips_the_step_on_all(results: Results, rate: float) -> None:
    results.compare(f"scaled {rate} ", "moved", "scale", "weight", "network")
    for found in (results.one, *results.many.values()):
        assert found[f"scaled {rate} moved"].tolist() == [True, False, True]
        assert found[f"scaled {rate} scale"] == 512
