"""Two ranks that share the tiles find, bit for bit, what one process finds.

`python -m face_lfr.tests.test_all_pairs_ranks FILE` is what each rank runs.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import dist
from common.dist import World
from common.log import InputError
from face_lfr.all_pairs import all_pairs
from face_lfr.tests.launch import finish, start
from face_lfr.tests.test_all_pairs import problem

FPRS = (1.0, 0.3, 0.01, 0.001)
# One pass; one rank keeps too many ties; the second pass collects; it counts in bins.
BUFFERS = (2**20, 90, 3000, 5)


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Problems with ties, one that is nothing but ties, and fewer tiles than ranks."""
    for seed in (0, 1, 2):
        features, labels = problem(seed, rows=150)
        for buffer in BUFFERS:
            where = {"features": features, "labels": labels, "fprs": FPRS, "buffer": buffer}
            yield f"problem {seed}, buffer {buffer}", where | {"tile": 16}
    where = {"features": np.ones((60, 4)), "labels": np.arange(60) // 3, "fprs": FPRS}
    yield "all tied", where | {"tile": 16, "buffer": 30}
    features, labels = problem(3, rows=40)  # sums of a lattice are exact in float32 as well
    where = {"features": features, "labels": labels, "fprs": (0.1,)}
    yield "one tile", where | {"tile": 64, "curve_points": 20}
    yield "curve", where | {"tile": 8, "curve_points": 20, "pairs": "gallery_probe"}


def results(world: World | None) -> dict[str, Any]:
    """Every number of every case; floats keep all their digits in JSON."""
    found: dict[str, Any] = {}
    for name, case in cases():
        result = asdict(all_pairs(**case, world=world))
        if result["curve"] is not None:
            curve = result["curve"].items()
            result["curve"] = {key: np.asarray(value).tolist() for key, value in curve}
        found[name] = result
    try:
        all_pairs(np.zeros((3, 2)), [0, 0, 1], [1.0], world=world)
    except InputError as error:
        found["error"] = str(error)
    return json.loads(json.dumps(found))


@pytest.mark.slow
def test_check_11_two_ranks_equal_one(tmp_path: Path) -> None:
    done = finish(start("face_lfr.tests.test_all_pairs_ranks", str(tmp_path), ranks=2))
    assert done.code == 0, done.err
    expected = results(None)
    assert len(expected) == 16
    assert {expected[name]["passes"] for name in expected if name != "error"} >= {1, 2, 3}
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["ranks"] == 2
        for name, result in expected.items():
            assert _counts(found["results"][name]) == _counts(result), name


def _counts(result: Any) -> Any:
    """All but the passes: ties that overflow one rank's share need not overflow the whole."""
    if isinstance(result, str):
        return result
    return {key: value for key, value in result.items() if key != "passes"}


def _main(folder: Path) -> None:
    world = dist.init("cpu")
    found = {"ranks": world.size, "results": results(world)}
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
    dist.shutdown()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
