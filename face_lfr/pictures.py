"""Faces out of pictures, folders, videos and landmarks, for `predict`.

A square picture counts as an aligned face. Any other needs five (or 68) landmarks, by which it is
aligned as `face_lfr.data.align` does. Landmarks are a text with lines `name x1 y1 ... x5 y5`, or a
JSON object `{"name": [[x1, y1], ..., [x5, y5]]}`. A name is the path of a picture or its end:
`7.jpg` and `anna/7.jpg` both name `album/anna/7.jpg`.

Shapes: H rows, W columns; points are (x, y) in pixels.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from torch import Tensor

from common.log import InputError
from face_lfr.data.align import Points, align, five_points
from face_lfr.data.transforms import FaceTransform, read_rgb
from face_lfr.tools.align_faces import read_landmarks

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")

Landmarks = dict[tuple[str, ...], Points]


class Picture(NamedTuple):
    """A picture and, when it is to be aligned, the landmarks of the face in it, (5, 2)."""

    path: Path
    point_52: Points | None = None


class Faces:
    """The faces of some pictures at the size that a network's transform stores them in."""

    def __init__(self, pictures: Sequence[Picture], transform: FaceTransform):
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def read(self, row: int) -> np.ndarray:
        """Face uint8 (size, size, 3), red first.

        Raises:
            InputError: the picture cannot be decoded, or is neither square nor can be aligned.
        """
        path, point_52 = self.pictures[row]
        image_HWC = read_rgb(path)
        rows, columns = image_HWC.shape[:2]
        if point_52 is None:
            if rows != columns:
                what = "is no aligned face: not square, and there are no landmarks to align it by"
                raise InputError(path, what, f"{columns} x {rows}")
            return self.transform.fit(image_HWC)
        if not ((point_52 >= 0) & (point_52 < (columns, rows))).all(axis=1).any():
            what = f"its landmarks lie outside of its {columns} x {rows} pixels"
            raise InputError(path, what, point_52.tolist())
        try:
            return align(image_HWC, point_52, self.transform.size)
        except ValueError as error:
            raise InputError(path, "cannot be aligned", error) from error

    def ready(self, row: int) -> Tensor:
        """Face as the transform takes it, uint8 (3, size, size); `InputError` as `read`."""
        return self.transform.test(self.read(row))


def find_pictures(path: Path, leave_out: Path | None = None) -> list[Path]:
    """The picture at `path`, or all pictures of a folder and its folders.

    They are in the order of their names, numbers in names by their value. Hidden files and folders
    are passed over.

    Args:
        path: a file or folder.
        leave_out: a folder that is not searched, where output goes.

    Raises:
        InputError: nothing there, or a folder without a picture.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(path, "no such file or folder")
    found = list(_walk(path, None if leave_out is None else leave_out.resolve()))
    if not found:
        raise InputError(path, f"has no picture ({', '.join(SUFFIXES)})")
    return sorted(found, key=lambda p: natural(str(p.relative_to(path))))


def split_video(path: Path, out: Path, most: int) -> list[Path]:
    """The frames of a video as PNG files `out/<number>.png`, in their order.

    Raises:
        InputError: it cannot be decoded, or has more than `most` frames.
    """
    import cv2

    video = cv2.VideoCapture(str(path))
    out.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []
    try:
        while len(found) <= most:
            there, image_HWC = video.read()
            if not there:
                break
            found.append(out / f"{len(found):06d}.png")
            cv2.imwrite(str(found[-1]), image_HWC)
    finally:
        video.release()
    if not found:
        raise InputError(path, "is no video that can be decoded")
    if len(found) > most:
        raise InputError(path, "has more frames than limit", most)
    return found


def _walk(root: Path, leave_out: Path | None) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (Path(folder) / name).resolve() != leave_out
        ]
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(folder) / name


def natural(text: str) -> tuple[list[tuple[str, int]], str]:
    """Sort key that puts `2` before `10`."""
    words = re.findall(r"(\D*)(\d*)", text)
    return [(letters, int(digits or -1)) for letters, digits in words], text


def with_landmarks(paths: Sequence[Path], file: Path | None) -> list[Picture]:
    """The pictures with their landmarks; without any where the file names none.

    Raises:
        InputError: the file cannot be used, one of its names fits several pictures, or none of its
            names fits any.
    """
    if file is None:
        return [Picture(path) for path in paths]
    known = load_landmarks(file)
    taken: dict[tuple[str, ...], Path] = {}
    pictures = []
    for path in paths:
        parts = path.absolute().parts
        ends = (parts[start:] for start in range(len(parts)))
        name = next((end for end in ends if end in known), None)
        if name is None:
            pictures.append(Picture(path))
            continue
        if taken.setdefault(name, path) != path:
            what = f"{'/'.join(name)} may be {taken[name]} and"
            raise InputError(file, what, path)
        pictures.append(Picture(path, known[name]))
    if not taken:
        raise InputError(file, "names none of the pictures, the first of which is", paths[0])
    return pictures


def load_landmarks(path: Path) -> Landmarks:
    """Landmarks by name; a text, or JSON when the file ends in `.json`.

    Raises:
        InputError: missing, or malformed; the message names the line or entry.
    """
    if path.suffix.lower() != ".json":
        faces = read_landmarks(path)
        points = zip(faces.names, faces.point_N52, strict=True)
        return {PurePosixPath(name).parts: point_52 for name, point_52 in points}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(path, "cannot be read", error.strerror or "") from error
    except ValueError as error:
        raise InputError(path, "is no JSON", error) from error
    if not isinstance(content, dict) or not content:
        raise InputError(path, "is no JSON object of landmarks by name", type(content).__name__)
    found: Landmarks = {}
    for name, points in content.items():
        try:
            found[PurePosixPath(name).parts] = five_points(points)
        except (ValueError, TypeError) as error:
            raise InputError(path, f"landmarks of {name} cannot be used", error) from error
    return found
