"""Something-Something versions 1 and 2, and Jester."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.log import InputError
from video_mmit.data import replicas
from video_mmit.data.jester import load_jester
from video_mmit.data.sampling import Uniform
from video_mmit.data.something import load_something_v1, load_something_v2
from video_mmit.data.video import FileReader, FolderReader
from video_mmit.data.video_data import VideoData
from video_mmit.tests.loader_checks import edit, refused

FILES, DIGITS = FileReader(), FolderReader("{:05d}.jpg")
WRITERS = {
    "sthv1": replicas.write_something_v1,
    "sthv2": replicas.write_something_v2,
    "jester": replicas.write_jester,
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("sets")
    return {name: write(top / name) for name, write in WRITERS.items()}


@pytest.fixture
def copy(roots: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(roots[name], tmp_path / name)


# Something-Something version 1 and Jester


@pytest.mark.parametrize(
    ("load", "name", "folder"),
    [
        (load_something_v1, "sthv1", "20bn-something-something-v1"),
        (load_jester, "jester", "20bn-jester-v1"),
    ],
)
def test_templates(
    roots: dict[str, Path], load: Callable[..., VideoData], name: str, folder: str
) -> None:
    root = roots[name]
    data = load(root, DIGITS, Uniform(), class_order="file")
    assert (data.name, data.classes) == (name, replicas.TEMPLATES)
    rows = [(video.id, video.labels) for video in data.train + data.test]
    ids = ["100218", "24413", "1044", "78687", "74225", "116154"]
    assert rows == list(zip(ids, [(0,), (1,), (2,), (3,), (0,), (1,)], strict=True))
    assert data.train[0].path == root / folder / "100218"
    other = load(root, DIGITS, Uniform())
    assert list(other.classes) == sorted(replicas.TEMPLATES)
    assert [video.labels for video in other.train] == [(3,), (2,), (0,), (1,)]
    tested = load(root, DIGITS, Uniform(), test_part="test")
    assert [(video.id, video.labels) for video in tested.test] == [("42", ())]
    assert tested.target(tested.test[0]).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("7", "row is not <id>;<template>: 7"),
        ("7;Throwing nothing", "template is none of the labels: Throwing nothing"),
        ("seven;Closing something", "id is no number: seven"),
        (";Closing something", "id is no number: ''"),
        ("100218;Closing something", "video occurs twice, first at line 1: 100218"),
        ("", "line is empty"),
    ],
)
def test_bad_rows_of_templates(copy: Callable[[str], Path], line: str, complaint: str) -> None:
    root = copy("sthv1")
    path = edit(root / "something-something-v1-train.csv", 2, line)
    refused(lambda: load_something_v1(root, DIGITS, Uniform()), f"{path}:2: {complaint}")


def test_bad_files_and_options_of_templates(copy: Callable[[str], Path]) -> None:
    root = copy("sthv1")

    def load(reader: Any = DIGITS, **options: str) -> VideoData:
        return load_something_v1(root, reader, Uniform(), **options)

    refused(lambda: load(class_order="abc"), "class_order: accepted: sorted, file: abc")
    refused(lambda: load(test_part="val"), "test_part: accepted: validation, test: val")
    with pytest.raises(InputError, match=r"data\.reader: this set is folders.*: FileReader"):
        load(FILES)
    path = edit(root / "something-something-v1-test.csv", 1, "42;Closing something")
    refused(lambda: load(test_part="test"), f"{path}:1: row is not <id>: 42;Closing something")
    path = edit(root / "something-something-v1-labels.csv", 3, "Throwing something")
    refused(load, f"{path}:3: class occurs twice, first at line 1: Throwing something")


# Something-Something version 2


def test_something_v2(roots: dict[str, Path]) -> None:
    root = roots["sthv2"]
    data = load_something_v2(root, FILES, Uniform())
    assert data.classes == replicas.TEMPLATES
    assert [video.labels for video in data.train + data.test] == [
        (0,),
        (1,),
        (2,),
        (3,),
        (0,),
        (1,),
    ]
    assert data.train[3].id == "78687"
    assert data.train[3].path == root / "20bn-something-something-v2" / "78687.webm"
    tested = load_something_v2(root, FILES, Uniform(), test_part="test")
    assert [(video.id, video.labels) for video in tested.test] == [("42", ())]


def test_labels_follow_the_index(copy: Callable[[str], Path]) -> None:
    root = copy("sthv2")
    path = root / "something-something-v2-labels.json"
    path.write_text(json.dumps({name: str(3 - k) for k, name in enumerate(replicas.TEMPLATES)}))
    data = load_something_v2(root, FILES, Uniform())
    assert data.classes == replicas.TEMPLATES[::-1]
    assert [video.labels for video in data.train] == [(3,), (2,), (1,), (0,)]


@pytest.mark.parametrize(
    ("part", "content", "complaint"),
    [
        ("labels", {"a": "0", "b": "2"}, " entry 'b': index of a class is not in 0..1: 2"),
        ("labels", {"a": "-1"}, " entry 'a': index of a class is no whole number from 0 on: -1"),
        ("labels", [], ": must be an object with at least one entry: list"),
        ("train", {}, ": must be a list with at least one entry: dict"),
        ("train", [{"id": "1"}], " entry 1: is no object with a text under template: {'id': '1'}"),
        ("train", [{"id": 1}], " entry 1: is no object with a text under id: {'id': 1}"),
        ("train", ["1"], " entry 1: is no object with a text under id: 1"),
        (
            "train",
            [
                {"id": "1", "template": "Closing [something]"},
                {"id": "2", "template": "Closing [it]"},
            ],
            " entry 2: template is none of the labels: Closing [it]",
        ),
        (
            "validation",
            [{"id": "1", "template": "Closing [something]"}] * 2,
            " entry 2: video occurs twice, first at {} entry 1: 1",
        ),
        ("validation", [{"id": "a", "template": "b"}], " entry 1: id is no number: a"),
    ],
)
def test_bad_json(copy: Callable[[str], Path], part: str, content: Any, complaint: str) -> None:
    root = copy("sthv2")
    path = root / f"something-something-v2-{part}.json"
    path.write_text(json.dumps(content))
    expected = f"{path}{complaint.replace('{} entry', f'{path} entry')}"
    refused(lambda: load_something_v2(root, FILES, Uniform()), expected)


def test_files_that_are_no_json(copy: Callable[[str], Path]) -> None:
    root = copy("sthv2")
    path = root / "something-something-v2-train.json"
    path.write_text('[\n{"id": "1",}]')
    with pytest.raises(InputError, match=r"train\.json:2: is no JSON: "):
        load_something_v2(root, FILES, Uniform())
    path = root / "something-something-v2-labels.json"
    path.write_text('{"a": "0", "a": "1"}')
    refused(
        lambda: load_something_v2(root, FILES, Uniform()),
        f"{path}: an object has a key twice: a",
    )
