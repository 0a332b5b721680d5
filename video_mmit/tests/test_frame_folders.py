"""Readers of folders with pictures of frames or of flow."""

from pathlib import Path

import numpy as np
import pytest

from common.log import InputError
from video_mmit.data.video import FlowReader, FolderReader
from video_mmit.data.video_data import Video
from video_mmit.tests.clip_files import draw, numbers, write_flow, write_folder


def as_video(path: Path) -> Video:
    return Video(path.name, path, None, ())


def test_folder_numbering(tmp_path: Path) -> None:
    """Other files are passed over; numbers may start at 0; a hole is named."""
    path = write_folder(tmp_path / "clip", draw(5), "{:06d}.png")
    (path / "notes.txt").write_text("x")
    (path / "000001.png.part").write_bytes(b"")
    with FolderReader("{:06d}.png").open(as_video(path)) as clip:
        assert numbers(clip.read(np.array([4, 0]))) == [4, 0]
        assert clip.frames == 5
    with FolderReader("{:06d}.png", first=3).open(as_video(path)) as clip:
        assert numbers(clip.read(np.array([0]))) == [2]
    with pytest.raises(InputError, match=r"has no frame like: img_00001.jpg"):
        FolderReader().open(as_video(path)).__enter__()
    (path / "000003.png").unlink()
    with pytest.raises(InputError, match=r"clip: frame is missing.*: 000003.png"):
        FolderReader("{:06d}.png").open(as_video(path)).__enter__()
    with pytest.raises(InputError, match="folder cannot be read"):
        FolderReader().open(as_video(tmp_path / "none")).__enter__()


def test_folder_with_bad_pictures(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "clip", draw(3))
    write_folder(tmp_path / "other", draw(1, 32, 48))
    (path / "img_00002.jpg").write_bytes((tmp_path / "other" / "img_00001.jpg").read_bytes())
    with FolderReader().open(as_video(path)) as clip:
        with pytest.raises(InputError, match=r"img_00002.jpg: frame differs in size"):
            clip.read(np.arange(3))
        (path / "img_00002.jpg").write_bytes(b"")
        with pytest.raises(InputError, match=r"img_00002.jpg: frame cannot be decoded"):
            clip.read(np.arange(3))
        (path / "img_00002.jpg").unlink()
        with pytest.raises(InputError, match=r"img_00002.jpg: frame cannot be read"):
            clip.read(np.arange(3))


@pytest.mark.parametrize("template", ["flow_{}_{:05d}.png", "{}/frame{:06d}.png"])
def test_flow_folder(tmp_path: Path, template: str) -> None:
    flow_FHW2 = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 2), dtype=np.uint8)
    path = write_flow(tmp_path / "clip", flow_FHW2, template)
    index = np.array([5, 0, 0, 2])
    with FlowReader(template).open(as_video(path)) as clip:
        assert clip.frames == 6
        np.testing.assert_array_equal(clip.read(index), flow_FHW2[index])
    (path / template.format("y", 6)).unlink()
    with pytest.raises(InputError, match="differs in number of x and y: 6 and 5"):
        FlowReader(template).open(as_video(path)).__enter__()


def test_templates_are_checked() -> None:
    with pytest.raises(ValueError, match="1 fields"):
        FolderReader("flow_{}_{:05d}.jpg")
    with pytest.raises(ValueError, match="2 fields"):
        FlowReader("img_{:05d}.jpg")
