"""Every configuration below `configs/data` composes, instantiates and reads its replica."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.utils import instantiate

import video_mmit.tools.build_lists  # noqa: F401 - its schema
from video_mmit.data import replicas
from video_mmit.data.sampling import Dense, Uniform
from video_mmit.data.video import FileReader, FlowReader, FolderReader
from video_mmit.tests.launch import config
from video_mmit.tests.loader_checks import readable

FILES, DIGITS = FileReader(), FolderReader("{:05d}.jpg")
WRITERS: dict[str, Callable[..., Path]] = {
    "mmit": replicas.write_mmit,
    "mit": replicas.write_mit,
    "kinetics400": replicas.write_kinetics,
    "kinetics600": replicas.write_kinetics,
    "kinetics700": replicas.write_kinetics,
    "sthv1": replicas.write_something_v1,
    "sthv2": replicas.write_something_v2,
    "jester": replicas.write_jester,
    "ucf101": replicas.write_ucf101,
    "hmdb51": replicas.write_hmdb51,
    "lists": replicas.write_lists,
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("sets")
    return {name: write(top / name) for name, write in WRITERS.items()}


def set_words(root: Path, name: str) -> list[str]:
    files = [f"data.train_list={root}/train.txt", f"data.test_list={root}/val.txt"]
    return [f"data={name}", f"data.root={root}", *(files if name == "lists" else [])]


@pytest.mark.parametrize("name", WRITERS)
def test_the_config_of_every_set(roots: dict[str, Path], name: str) -> None:
    words = set_words(roots[name], name)
    data = instantiate(config("build_lists", *words, f"out={roots[name]}").data)
    assert data.name == name
    assert data.sampler == Uniform(8)
    assert data.reader == (DIGITS if name in ("sthv1", "jester") else FILES)
    assert data.multi_label == (name in ("mmit", "lists"))
    if name != "hmdb51":
        readable(data)


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"sthv1", "jester", "kinetics400"}))
def test_frame_folders_of_every_set(tmp_path: Path, name: str) -> None:
    root = WRITERS[name](tmp_path, folders=True)
    words = ["data/reader=frames", "data/sampler=dense", "data.sampler.count=4"]
    data = instantiate(config("build_lists", *set_words(root, name), *words, "out=o").data)
    assert (data.reader, data.sampler) == (FolderReader(), Dense(4))
    readable(data, 5 if name == "hmdb51" else 6)


def test_other_readers_compose() -> None:
    for name, reader in {
        "flow": FlowReader(),
        "frames_image": FolderReader("image_{:05d}.jpg"),
        "frames_5digits": DIGITS,
        "frames_6digits": FolderReader("{:06d}.jpg"),
    }.items():
        cfg = config("build_lists", "data=sthv2", f"data/reader={name}", "data.root=r", "out=o")
        assert instantiate(cfg.data.reader) == reader
