"""Tiny replicas of the real data sets, in their on-disk layouts: for tests and for newcomers.

Every person has one colour, darker in every second camera, so a replica can also be learned.
Images have the real size. Each function writes a tree that its loader reads and returns the root.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

TALL, SMALL = (256, 128), (128, 64)  # rows, columns: LPW, MARS, Duke; PRID, iLIDS
LPW_VIEWS = {1: {1: 4, 2: 4, 3: 3}, 2: {1: 3, 2: 4, 3: 5, 4: 3}, 3: {1: 2, 2: 3, 3: 4, 4: 2}}


def write_image(path: Path, person: int, camera: int, rng: np.random.Generator) -> None:
    """One noisy image in the colour of `person`; the suffix decides format and size."""
    import cv2

    colour = np.random.default_rng(person + 2).uniform(40, 215, 3)  # the same in every replica
    size = SMALL if path.suffix == ".png" else TALL
    image = colour * (1 - 0.2 * (camera % 2)) + rng.normal(0, 10, (*size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image.clip(0, 255).astype(np.uint8))


def write_lpw(
    root: Path, views: Mapping[int, Mapping[int, int]] | None = None, frames: int = 3
) -> Path:
    """`scen{S}/view{V}/{pid}/{n}.jpg`.

    Args:
        root: of the tree.
        views: {scene: {view: number of persons}}; a view shows the first ones of its scene.
        frames: per tracklet.
    """
    rng = np.random.default_rng(0)
    for scene, counts in (views or LPW_VIEWS).items():
        for view, count in counts.items():
            for pid in range(1, count + 1):
                home = root / f"scen{scene}" / f"view{view}" / str(3 * pid)
                for n in range(1, frames + 1):
                    write_image(home / f"{n}.jpg", 100 * scene + pid, view, rng)
    return root


def write_prid2011(
    root: Path, persons: int = 6, frames: int | Callable[[str, int], int] = 27
) -> Path:
    """`multi_shot/cam_{a,b}/person_XXXX/NNNN.png` and `train_test_splits_prid.mat`.

    Camera b has one person more, numbered 201, as the real one shares only its first 200.

    Args:
        root: of the tree.
        persons: in both cameras.
        frames: per tracklet, or a function of (camera letter, person).
    """
    rng = np.random.default_rng(0)
    count = frames if callable(frames) else lambda camera, person: frames
    for index, camera in enumerate("ab"):
        for person in [*range(1, persons + 1), *([201] if camera == "b" else [])]:
            home = root / "multi_shot" / f"cam_{camera}" / f"person_{person:04d}"
            for n in range(1, count(camera, person) + 1):
                write_image(home / f"{n:04d}.png", person, index, rng)
    write_ls_set(root / "train_test_splits_prid.mat", persons)
    return root


def write_ilidsvid(root: Path, persons: int = 6, frames: int = 4) -> Path:
    """`i-LIDS-VID/sequences/cam{1,2}/personNNN/...png` and the archive's split file."""
    rng = np.random.default_rng(0)
    for camera in (1, 2):
        for person in range(1, 2 * persons, 2):  # the real numbers have gaps too
            name = f"person{person:03d}"
            home = root / "i-LIDS-VID/sequences" / f"cam{camera}" / name
            for n in range(317, 317 + frames):
                write_image(home / f"cam{camera}_{name}_{n:05d}.png", person, camera, rng)
    write_ls_set(root / "train-test people splits" / "train_test_splits_ilidsvid.mat", persons)
    return root


def write_ls_set(path: Path, persons: int) -> None:
    """`ls_set` (10, persons): permutations of 1..persons, stored as the real file stores them."""
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.stack([rng.permutation(persons) + 1 for _ in range(10)])
    savemat(path, {"ls_set": rows.astype(np.uint16)})


def write_mars(root: Path, persons: int = 4, tracks: int = 2, frames: int = 3) -> Path:
    """`bbox_train`, `bbox_test` and `info` with all five files.

    Train persons are odd, test persons even; each has `tracks` tracklets in camera 1 and one in
    camera 2, and the first tracklet of a (person, camera) is its query. Junk and distractors have
    one tracklet each. `persons` counts one half.
    """
    train = [
        (pid, cam, tracks if cam == 1 else 1) for pid in range(1, 2 * persons, 2) for cam in (1, 2)
    ]
    test = [
        (pid, cam, tracks if cam == 1 else 1)
        for pid in range(2, 2 * persons + 1, 2)
        for cam in (1, 2)
    ]
    test = [(-1, 1, 1), (0, 3, 1), *test]
    _mars_part(root, "train", train, frames)
    table = _mars_part(root, "test", test, frames)
    _, first = np.unique(table[:, 2:], axis=0, return_index=True)
    query = [row + 1 for row in sorted(first) if table[row, 2] > 0]
    _save_info(root / "info" / "query_IDX.mat", "query_IDX", np.array([query], dtype=np.uint16))
    return root


def _mars_part(
    root: Path, part: str, people: list[tuple[int, int, int]], frames: int
) -> np.ndarray:
    """Images, name list and table of one half; `people` holds (pid, camera, tracklets)."""
    rng = np.random.default_rng(0)
    names: list[str] = []
    table = []
    for pid, camera, tracks in people:
        digits = "00-1" if pid < 0 else f"{pid:04d}"
        for track in range(1, tracks + 1):
            table.append((len(names) + 1, len(names) + frames, pid, camera))
            for n in range(1, frames + 1):
                names.append(f"{digits}C{camera}T{track:04d}F{n:03d}.jpg")
                write_image(root / f"bbox_{part}" / digits / names[-1], pid, camera, rng)
    rows = np.array(table, dtype=np.int32)
    _save_info(root / "info" / f"tracks_{part}_info.mat", f"track_{part}_info", rows)
    lines = "".join(f"{name}\r\n" for name in names)
    (root / "info" / f"{part}_name.txt").write_bytes(lines.encode())
    return rows


def _save_info(path: Path, name: str, values: np.ndarray) -> None:
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {name: values})


def write_duke_video(root: Path, persons: int = 3, frames: int = 3) -> Path:
    """`{train,query,gallery}/{pid}/{tracklet}/{pid}_C{cam}_F{frame}_X{n}.jpg`, cameras 1 and 2."""
    rng = np.random.default_rng(0)
    parts = {"train": (0, (1, 2)), "query": (persons, (1,)), "gallery": (persons, (1, 2))}
    for part, (offset, cameras) in parts.items():
        for pid in range(offset + 1, offset + persons + 1):
            for camera in cameras:
                home = root / part / f"{pid:04d}" / f"{10 * pid + camera:04d}"
                for n in range(1, frames + 1):
                    name = f"{pid:04d}_C{camera}_F{n:04d}_X{9 * n:05d}.jpg"
                    write_image(home / name, pid, camera, rng)
    return root
