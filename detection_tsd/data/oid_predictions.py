"""Detections of a set in normalised boxes, in the two formats of files.

- CSV of the challenge: `ImageID,LabelName,Score,XMin,XMax,YMin,YMax`, read by column names.
- Dump of Sense-X/TSD: `image x1 y1 x2 y2 score label` a line, separated by spaces, without header.

Letters: D detections, N images, R rows of a block. Labels are 1..K.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.log import InputError
from detection_tsd.data.csv_columns import BLOCK_ROWS, Block, Kind, read_blocks
from detection_tsd.data.oid_files import (
    CORNERS,
    Classes,
    Duplicates,
    ImageIndex,
    corners,
    keep_rows,
    labels,
    refuse,
)

Unknown = Literal["error", "drop"]
COLUMNS: dict[str, Kind] = {"ImageID": "text", "LabelName": "text", "Score": "number"}
COLUMNS |= dict.fromkeys(CORNERS, "number")
DUMP = ("ImageID", *CORNERS, "Score", "Label")  # columns of the dump, in order
DUMP_COLUMNS: dict[str, Kind] = {"ImageID": "text"}
DUMP_COLUMNS |= dict.fromkeys(DUMP[1:], "number")


class Predictions(NamedTuple):
    """D detections of a set.

    Attributes:
        image_D: int32 rows of the set's images.
        label_D: int16, 1..K.
        score_D: float64, finite, from 0 on.
        box_D4: float64 xyxy as shares of the width and the height.
        counts: what was mended or left out -> how often.
    """

    image_D: NDArray[np.int32]
    label_D: NDArray[np.int16]
    score_D: NDArray[np.float64]
    box_D4: NDArray[np.float64]
    counts: dict[str, int]


def read_predictions(
    path: Path | str,
    classes: Classes,
    image_ids: Iterable[str],
    unknown_images: Unknown = "error",
    duplicates: Duplicates = "error",
) -> Predictions:
    """Detections of a file in either format; a comma in the first line means the CSV.

    Args:
        path: of the file; a header without rows is no detection at all.
        classes: that may occur.
        image_ids: of the set, by row.
        unknown_images: what happens to detections of other images; "drop" counts them.
        duplicates: what happens to a row that repeats image, class, score and box.

    Raises:
        InputError: as `read_blocks`; an unknown class or image, a score below 0, a coordinate more
            than 0.01 outside of [0, 1] (less is clipped and counted), corners in the wrong order, a
            repeated row.
    """
    path = Path(path)
    if unknown_images not in ("error", "drop"):
        raise InputError("unknown_images", "accepted: error, drop", unknown_images)
    images, official = ImageIndex(image_ids, grow=False), _has_header(path)
    blocks = read_blocks(path, COLUMNS) if official else read_blocks(path, DUMP_COLUMNS, names=DUMP)
    parts: list[tuple[NDArray[Any], ...]] = [_NOTHING]
    clipped = 0
    for block in blocks:
        score_R = block.columns["Score"]
        refuse(block, score_R < 0, "Score is below 0", score_R)
        box_R4, changed = corners(block)
        image_R = images.rows(block.columns["ImageID"])
        if unknown_images == "error":
            what = "image has no annotation (unknown_images=drop leaves such detections out)"
            refuse(block, image_R < 0, what, block.columns["ImageID"])
        label_R = labels(block, classes) if official else _plain_labels(block, len(classes))
        parts.append((image_R, label_R, score_R, box_R4))
        clipped += changed
    image_D, label_D, score_D, box_D4 = (np.concatenate(part) for part in zip(*parts, strict=True))
    counts = {"coordinates clipped": clipped}
    compared = (image_D, label_D, score_D, *box_D4.T)
    if unknown_images == "drop":
        counts["of unknown images"] = int((image_D < 0).sum())
        image_D = np.where(image_D < 0, -1 - np.arange(len(image_D), dtype=np.int32), image_D)
        compared = (image_D, *compared[1:])  # detections of different unknown images are not equal
    above = 2 if official else 1
    keep_D = keep_rows(
        path, duplicates, counts, "detection", *compared, line=lambda row: row + above
    )
    keep_D &= image_D >= 0
    return Predictions(image_D[keep_D], label_D[keep_D], score_D[keep_D], box_D4[keep_D], counts)


_NOTHING = (np.zeros(0, np.int32), np.zeros(0, np.int16), np.zeros(0), np.zeros((0, 4)))


def _has_header(path: Path) -> bool:
    if not path.is_file():
        raise InputError(path, "file is missing")
    with path.open("rb") as file:
        return b"," in file.readline()


def _plain_labels(block: Block, num_classes: int) -> NDArray[np.int16]:
    label_R = block.columns["Label"]
    bad_R = (label_R < 1) | (label_R > num_classes) | (label_R != np.floor(label_R))
    refuse(block, bad_R, f"label is no whole number in 1..{num_classes}", label_R)
    return label_R.astype(np.int16)


def write_predictions(
    path: Path | str, predictions: Predictions, class_ids: Sequence[str], image_ids: Sequence[str]
) -> None:
    """The CSV of the challenge, exact to the last bit; the file appears when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write("ImageID,LabelName,Score,XMin,XMax,YMin,YMax\n")
        file.writelines(_lines(predictions, class_ids, image_ids))
    os.replace(temporary, path)


def _lines(
    predictions: Predictions, class_ids: Sequence[str], image_ids: Sequence[str]
) -> Iterator[str]:
    for start in range(0, len(predictions.image_D), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        columns = (column[part].tolist() for column in predictions[:4])
        for image, label, score, (x1, y1, x2, y2) in zip(*columns, strict=True):
            place = f"{x1!r},{x2!r},{y1!r},{y2!r}"
            yield f"{image_ids[image]},{class_ids[label - 1]},{score!r},{place}\n"
