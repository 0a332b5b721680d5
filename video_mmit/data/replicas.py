"""Tiny replicas of the real data sets, in their on-disk layouts: for tests and for newcomers.

Each function writes four training and two test videos of 32 x 32 pixels and 8 frames, which its
loader reads, and returns the root. Frame t of a video has one grey level plus 24 t, so that a test
can tell frames apart; class k is a square at the k-th of four places, so that a replica can also be
learned. With `folders=True` the videos are folders of JPEGs where frame readers look for them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SIZE, FRAMES = 32, 8
CODECS = {".mp4": "mp4v", ".avi": "MJPG", ".webm": "VP80"}
JPEG = "img_{:05d}.jpg"
MMIT_CLASSES = ("crafting", "paddling", "adult+female+singing", "cooking")
MMIT_ROWS = (
    ("cooking/yt-a_1.mp4", (3, 0)),
    ("adult+female+singing/0-3_5.mp4", (2,)),
    ("crafting/flickr-2.mp4", (0,)),
    ("paddling/3.mp4", (1, 3, 2)),
    ("cooking/4.mp4", (3,)),
    ("paddling/yt-5_6.mp4", (1, 0)),
)


def frame(label: int, time: int) -> np.ndarray:
    """Frame `time` of a video of class `label`, (32, 32, 3) uint8 with three equal channels."""
    image = np.full((SIZE, SIZE, 3), 20 + 24 * (time % 8), np.uint8)
    row, column = divmod(label % 4, 2)
    image[4 + 16 * row : 12 + 16 * row, 4 + 16 * column : 12 + 16 * column] += 40
    return image


def write_video(path: Path, label: int = 0, frames: int = FRAMES) -> None:
    """A video at 8 frames a second in the format of the suffix: .mp4, .avi or .webm.

    Raises:
        RuntimeError: OpenCV cannot encode it.
    """
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    code = cv2.VideoWriter.fourcc(*CODECS[path.suffix])
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, 8.0, (SIZE, SIZE))
    if not writer.isOpened():
        raise RuntimeError(f"OpenCV cannot encode {path}")
    for time in range(frames):
        writer.write(frame(label, time))
    writer.release()


def write_folder(
    path: Path, label: int = 0, frames: int = FRAMES, template: str = JPEG, flow: bool = False
) -> None:
    """A folder of JPEGs counted from 1; with `flow` an x and a y picture (y inverted) a frame."""
    import cv2

    path.mkdir(parents=True, exist_ok=True)
    for time in range(frames):
        image = frame(label, time)
        if not flow:
            cv2.imwrite(str(path / template.format(time + 1)), image)
            continue
        for axis, grey in (("x", image[..., 0]), ("y", 255 - image[..., 0])):
            cv2.imwrite(str(path / f"flow_{axis}_{time + 1:05d}.jpg"), grey)


def _media(home: Path, name: str, label: int, folders: bool, template: str = JPEG) -> None:
    if folders:
        write_folder(home / name.rpartition(".")[0], label, template=template)
    else:
        write_video(home / name, label)


def _text(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_mmit(root: Path, suffix: str = ".txt", folders: bool = False) -> Path:
    """M-MiT: categories, two lists with the given suffix, `videos/<class>/*.mp4`."""
    _text(root / "moments_categories.txt", [f"{c},{i}" for i, c in enumerate(MMIT_CLASSES)])
    rows = [",".join([name, *map(str, labels)]) for name, labels in MMIT_ROWS]
    _text(root / f"trainingSet{suffix}", rows[:4])
    _text(root / f"validationSet{suffix}", rows[4:])
    for name, labels in MMIT_ROWS:
        _media(root / ("rawframes" if folders else "videos"), name, labels[0], folders)
    return root


def write_mit(root: Path, folders: bool = False) -> Path:
    """Moments in Time: categories, two csv lists with votes, `{training,validation}/<class>/`."""
    _text(root / "moments_categories.txt", [f"{c},{i}" for i, c in enumerate(MMIT_CLASSES)])
    for part, rows in (("training", MMIT_ROWS[:4]), ("validation", MMIT_ROWS[4:])):
        names = [(name, MMIT_CLASSES[labels[0]], labels[0]) for name, labels in rows]
        _text(root / f"{part}Set.csv", [f"{name},{label},3,0" for name, label, _ in names])
        for name, _, number in names:
            _media(root / ("rawframes" if folders else "") / part, name, number, folders)
    return root


KINETICS_ROWS = (
    ("passing American football (in game)", "aB-_0123456", 3, 13, "train"),
    ("abseiling", "0123456789a", 104, 114, "train"),
    ("tying knot (not on a tie)", "b123456789a", 0, 10, "train"),
    ("massaging person's head", "c123456789a", 1234, 1244, "train"),
    ("abseiling", "d123456789a", 5, 15, "val"),
    ("massaging person's head", "e123456789a", 6, 16, "val"),
)


def write_kinetics(root: Path, directory: str = "mmaction2", folders: bool = False) -> Path:
    """Kinetics: `train.csv`, `val.csv`, `kinetics_label_map.txt`, `{train,val}/<class>/*.mp4`.

    The label map is in an order that is not alphabetical.
    """
    rename = {
        "label": lambda label: f"{label}/",
        "mmaction2": lambda label: label.replace(" ", "_") + "/",
        "xtemporal": lambda label: (
            "".join(c for c in label if c not in "'()").replace(" ", "_") + "/"
        ),
        "flat": lambda label: "",
    }[directory]
    labels = list(dict.fromkeys(row[0] for row in KINETICS_ROWS))
    _text(root / "kinetics_label_map.txt", labels)
    for part in ("train", "val"):
        rows = [row for row in KINETICS_ROWS if row[4] == part]
        lines = [",".join(f'"{x}"' if " " in str(x) else str(x) for x in row) for row in rows]
        _text(root / f"{part}.csv", ["label,youtube_id,time_start,time_end,split", *lines])
        home = root / (f"rawframes_{part}" if folders else part)
        for label, clip, start, end, _ in rows:
            name = f"{rename(label)}{clip}_{start:06d}_{end:06d}.mp4"
            _media(home, name, labels.index(label), folders)
    return root


TEMPLATES = (
    "Throwing something",
    "Pushing something from left to right",
    "Closing something",
    "Holding something next to something",
)
IDENTIFIERS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("train", (100218, 24413, 1044, 78687)),
    ("validation", (74225, 116154)),
    ("test", (42,)),
)


def write_something_v1(root: Path, prefix: str = "something-something-v1") -> Path:
    """Something-Something version 1: csv files with semicolons, `20bn-<prefix>/<id>/00001.jpg`."""
    _text(root / f"{prefix}-labels.csv", TEMPLATES)
    for part, numbers in IDENTIFIERS:
        tails = [""] * len(numbers) if part == "test" else [f";{name}" for name in TEMPLATES]
        _text(
            root / f"{prefix}-{part}.csv",
            [f"{n}{tail}" for n, tail in zip(numbers, tails, strict=False)],
        )
        for k, number in enumerate(numbers):
            write_folder(root / f"20bn-{prefix}" / str(number), k, template="{:05d}.jpg")
    return root


def write_jester(root: Path) -> Path:
    """Jester: as Something-Something version 1."""
    return write_something_v1(root, "jester-v1")


def write_something_v2(root: Path, folders: bool = False) -> Path:
    """Something-Something version 2: JSON files, `20bn-something-something-v2/<id>.webm`."""
    prefix = "something-something-v2"
    home = root / ("rawframes" if folders else f"20bn-{prefix}")
    numbered = {template: str(k) for k, template in enumerate(TEMPLATES)}
    for part, numbers in IDENTIFIERS:
        entries = []
        for k, number in enumerate(numbers):
            marked = TEMPLATES[k].replace("something", "[something]")
            label = TEMPLATES[k].replace("something", "a cup").lower()
            entry = {"id": str(number), "label": label, "template": marked, "placeholders": []}
            entries.append(entry if part != "test" else {"id": str(number)})
            _media(home, f"{number}.webm", k, folders)
        (root / f"{prefix}-{part}.json").write_text(json.dumps(entries, indent=1))
    (root / f"{prefix}-labels.json").write_text(json.dumps(numbered, indent=1))
    return root


UCF_CLASSES = ("ApplyEyeMakeup", "Archery", "YoYo")


def write_ucf101(root: Path, folders: bool = False) -> Path:
    """UCF101: `ucfTrainTestlist/*.txt` with three splits, `UCF-101/<Class>/*.avi`."""
    lists, home = root / "ucfTrainTestlist", root / ("rawframes" if folders else "UCF-101")
    _text(lists / "classInd.txt", [f"{k} {name}" for k, name in enumerate(UCF_CLASSES, start=1)])
    names = [
        (f"{name}/v_{name}_g{group:02d}_c01.avi", k)
        for k, name in enumerate(UCF_CLASSES, start=1)
        for group in (1, 2)
    ]
    for name, k in names:
        _media(home, name, k, folders)
    for split in (1, 2, 3):
        tested = (2 * split - 2, (2 * split + 1) % 6)
        train = [f"{name} {k}" for row, (name, k) in enumerate(names) if row not in tested]
        _text(lists / f"trainlist{split:02d}.txt", train)
        _text(lists / f"testlist{split:02d}.txt", [names[row][0] for row in sorted(tested)])
    return root


def write_hmdb51(root: Path, folders: bool = False) -> Path:
    """HMDB51: `testTrainMulti_7030_splits/<class>_test_split<k>.txt`, `videos/<class>/*.avi`.

    In split 1 one video of the six is not used. Lines end with a space, as the real ones do.
    """
    home = root / ("rawframes" if folders else "videos")
    for k, name in enumerate(("brush_hair", "cartwheel")):
        files = [f"#{n}_{name}_goo_{n}(a)&.avi" for n in range(3)]
        for file in files:
            _media(home / name, file, k, folders)
        for split in (1, 2, 3):
            flags = [2 if n == split - 1 else 1 for n in range(3)]
            if split == 1 and not k:
                flags[2] = 0
            lines = [f"{file} {flag} " for file, flag in zip(files, flags, strict=True)]
            lists = root / "testTrainMulti_7030_splits"
            _text(lists / f"{name}_test_split{split}.txt", lines)
    return root


def write_lists(root: Path, format: str = "xtemporal", folders: bool = False) -> Path:
    """The videos of the M-MiT replica with `train.txt`, `val.txt` and `classes.txt` beside them."""
    for name, labels in MMIT_ROWS:
        _media(root, name, labels[0], folders)
    rows = []
    for name, labels in MMIT_ROWS:
        place = name.rpartition(".")[0] if folders else name
        words = [str(label) for label in labels]
        tail = [",".join(words)] if format == "xtemporal" else words
        count = [] if format == "mmaction_video" else [str(FRAMES)]
        rows.append(" ".join([place, *count, *tail]))
    _text(root / "train.txt", rows[:4])
    _text(root / "val.txt", rows[4:])
    _text(root / "classes.txt", MMIT_CLASSES)
    return root
