"""Averages over splits: the numbers, what is stated, and every refusal."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.log import InputError
from reid_rqen.tests.launch import command, evaluate, train
from reid_rqen.tools.average_splits import average

TOOL = "reid_rqen.tools.average_splits"


def write(folder: Path, split: int | None, score: float, **changes: Any) -> Path:
    """A file like those of `evaluate` on one split of PRID 2011."""
    content = {
        "protocol": "closed_pair", "metric": "cosine", "rerank": False, "cmc@1": score,
        "cmc@5": 1.0, "queries": 89, "valid": 89, "skipped": 0, "gallery": 89, "frames": 9000,
        "cmc_curve": [score] * 4 + [1.0], "splits_averaged": 1, "split": split, "seed": 0,
        "evaluated_on": "prid2011", "trained_on": "prid2011", "tie_fraction": 0.0,
        "max_frames": None, "fixed_scores": False, "commit": "a" * 40,
    }  # fmt: skip
    path = folder / f"{split}_{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v != "absent"}))
    return path


def test_mean_and_deviation(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random(10)
    paths = [write(tmp_path, split, float(score)) for split, score in enumerate(scores)]
    result = average(paths)
    assert result["cmc@1"] == pytest.approx(sum(scores) / 10, abs=1e-12)
    deviation = (sum((s - sum(scores) / 10) ** 2 for s in scores) / 9) ** 0.5
    assert result["std"]["cmc@1"] == pytest.approx(deviation, abs=1e-12)
    assert (result["cmc@5"], result["std"]["cmc@5"]) == (1, 0)
    assert result["values"]["cmc@1"] == scores.tolist()
    assert result["cmc_curve"] == pytest.approx([sum(scores) / 10] * 4 + [1])
    assert result["splits"] == list(range(10))
    assert result["splits_averaged"] == 10
    assert result["queries"] == [89] * 10
    assert result["protocol"] == "closed_pair"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "lpw"}, "protocol differs from closed_pair of .*0_0.json: lpw"),
        ({"metric": "xqda"}, "metric differs from cosine"),
        ({"rerank": True}, "rerank differs from False"),
        ({"evaluated_on": "ilidsvid"}, "evaluated_on differs from prid2011"),
        ({"max_frames": 4}, "max_frames differs from None"),
        ({"split": 0}, "same split as .*0_0.json: 0"),
        ({"split": None}, "is of a data set without splits: prid2011"),
        ({"splits_averaged": 10}, "is an average already, of splits: 10"),
        ({"cmc_curve": "absent"}, "was not written by evaluate, it has no: cmc_curve"),
    ],
    ids=str,
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    first = write(tmp_path, 0, 0.5)
    second = write(tmp_path, 1, 0.7)
    third = write(tmp_path, **{"split": 2, "score": 0.7} | changes)
    assert average([first, second])["splits_averaged"] == 2
    with pytest.raises(InputError, match=message) as caught:
        average([first, second, third])
    assert caught.value.where == str(third)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    good, bad = write(tmp_path, 0, 0.5), tmp_path / "bad.json"
    bad.write_text("{")
    for path in (bad, tmp_path / "none.json"):
        with pytest.raises(InputError, match="cannot be read as JSON") as caught:
            average([good, path])
        assert caught.value.where == str(path)
    bad.write_text("[]")
    with pytest.raises(InputError, match="was not written by evaluate"):
        average([good, bad])
    with pytest.raises(InputError, match="metrics: needs the files of at least two splits: 1"):
        average([good])


def test_from_trainings_on_two_splits_to_the_table(
    replica: dict[str, Path], tmp_path: Path
) -> None:
    files = []
    for split in (0, 3):
        folder = tmp_path / f"split{split}"
        train(
            "experiment=debug/tiny", "data=prid2011", f"data.root={replica['prid2011']}",
            "~data.identities", f"data.split={split}", f"run_dir={folder}", "steps=1",
            "global_batch=1", "draws.frames=2",
        )  # fmt: skip
        evaluate(f"run_dir={folder}", f"out={folder}", "max_frames=2")
        files.append(str(folder / "metrics.json"))
    done = command(TOOL, f"metrics=[{','.join(files)}]", f"out={tmp_path / 'mean'}")
    assert done.code == 0, done.err
    assert "prid2011, mean of 2 splits" in done.out
    assert "2 splits; published numbers average 10" in done.err
    written = json.loads((tmp_path / "mean" / "metrics.json").read_text())
    parts = [json.loads(Path(file).read_text()) for file in files]
    assert written["splits"] == [0, 3]
    assert written["cmc@1"] == pytest.approx((parts[0]["cmc@1"] + parts[1]["cmc@1"]) / 2)
    refused = command(TOOL, f"metrics=[{files[0]},{files[0]}]", f"out={tmp_path / 'mean'}")
    assert refused.code == 2
    assert refused.err.startswith(f"error: {files[0]}: same split as {files[0]}: 0")
