"""The task packages know `common` and themselves; `common` knows no package and stays small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"detection_tsd", "face_lfr", "face_s2ap", "reid_rqen", "video_mmit"}
CLOSED_LIST = {
    "__init__.py",
    "checkpoint.py",
    "dist.py",
    "log.py",
    "rundir.py",
    "samplers.py",
    "seed.py",
    "py.typed",
}


def imported(tree: ast.AST, module: list[str]) -> Iterator[tuple[int, str]]:
    """Line and top-level name of each import; `module` are the parts of the folder's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level + 1] if node.level else []
            names = [*base, *(node.module or "").split(".")]
            top = next((name for name in names if name), "")
            yield from ((node.lineno, top or alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            call = ast.unparse(node.func).split(".")[-1]
            if call in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value.lstrip(".").split(".")[0]


def violations(root: Path) -> list[str]:
    found = []
    for owner in sorted({"common", *PACKAGES}):
        for path in sorted((root / owner).rglob("*.py")):
            folder = list(path.relative_to(root).parent.parts)
            for line, name in imported(ast.parse(path.read_text(encoding="utf-8")), folder):
                if name in PACKAGES - {owner}:
                    found.append(f"{path.relative_to(root)}:{line} imports {name}")
    for path in sorted((root / "common").rglob("*")):
        place = path.relative_to(root / "common")
        if path.is_file() and not {"tests", "__pycache__"} & {*place.parts[:1], *place.parts[-2:]}:
            if str(place) not in CLOSED_LIST:
                found.append(f"common/{place} is not on the closed list")
    return found


def schemas(root: Path) -> Iterator[tuple[str, str]]:
    """Package and name of every schema put into Hydra's ConfigStore, which a process has once."""
    for owner in sorted(PACKAGES):
        for path in sorted((root / owner).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                    "ConfigStore.instance().store"
                ):
                    yield owner, str(ast.literal_eval(node.args[0]))


def test_the_repository_keeps_to_it() -> None:
    assert (ROOT / "common" / "dist.py").exists()
    assert violations(ROOT) == []


def test_no_schema_takes_the_place_of_another() -> None:
    names = [name for _, name in schemas(ROOT)]
    assert len(names) >= 20
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("place", "text", "complaint"),
    [
        ("reid_rqen/a.py", "import face_lfr.models", "imports face_lfr"),
        ("reid_rqen/a.py", "import os, face_lfr as f", "imports face_lfr"),
        ("reid_rqen/sub/a.py", "def f():\n    from video_mmit.data import x", "imports video_mmit"),
        ("reid_rqen/sub/a.py", "from ... import face_s2ap", "imports face_s2ap"),
        ("reid_rqen/a.py", "from ..face_s2ap import x", "imports face_s2ap"),
        (
            "face_lfr/a.py",
            "import importlib\nimportlib.import_module('reid_rqen.ops')",
            "reid_rqen",
        ),
        ("face_lfr/a.py", "__import__('detection_tsd')", "imports detection_tsd"),
        ("common/dist.py", "from reid_rqen import metrics", "imports reid_rqen"),
        ("common/tests/test_a.py", "import reid_rqen", "imports reid_rqen"),
        ("common/utils.py", "", "common/utils.py is not on the closed list"),
        ("common/sub/dist.py", "", "common/sub/dist.py is not on the closed list"),
        ("common/data.json", "{}", "common/data.json is not on the closed list"),
    ],
)
def test_a_planted_violation_is_found(
    tmp_path: Path, place: str, text: str, complaint: str
) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (found,) = violations(tmp_path)
    assert found.endswith(complaint)


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    path = tmp_path / "reid_rqen" / "sub" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text("import common.log\nfrom ..models import rqen\nfrom . import b\nimport torch")
    (tmp_path / "common" / "tests").mkdir(parents=True)
    (tmp_path / "common" / "tests" / "jobs.py").write_text("from common import dist")
    assert violations(tmp_path) == []
