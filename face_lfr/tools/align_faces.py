"""Cut aligned faces out of a tree of pictures, given their landmarks.

    python -m face_lfr.tools.align_faces input=DIR landmarks=FILE out=DIR

A line of the landmarks is `path x1 y1 ... x5 y5`, the path below `input`: left eye, right eye,
nose, left and right corner of the mouth, left in the picture. 68 points in the order of iBUG 300-W
are taken too, and a number behind the points, as the files of IJB have it, is passed over.
`input/a/b.png` becomes `out/a/b.jpg`. A run that was stopped goes on where it was. Faces that
cannot be read or aligned are listed in `out/failed.txt`; the exit code is 2 then, unless
`allow_failed=true`.

Shapes: N faces.
"""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from common.log import InputError, exit_on_bad_input, get_logger, progress, setup_logging
from face_lfr.data.align import Points, align, five_points
from face_lfr.data.folder import Names
from face_lfr.data.transforms import read_rgb

COORDINATES = (10, 136)
SUFFIXES = (".jpg", ".png")
SETTINGS, FAILED, LOCK = "settings.json", "failed.txt", ".lock"
CHUNK = 64  # faces a worker is given at a time
PATIENCE_S = 3.0  # for the workers of a killed run to notice its end


@dataclass
class AlignFacesConfig:
    """Schema of configs/align_faces.yaml.

    `size` of the faces in pixels; `suffix` .jpg or .png; `quality` of JPEGs, 1 to 100; `workers`
    processes, 0 works in the main one.
    """

    input: Path = MISSING
    landmarks: Path = MISSING
    out: Path = MISSING
    size: int = 112
    suffix: str = ".jpg"
    quality: int = 95
    workers: int = 2
    allow_failed: bool = False


ConfigStore.instance().store("lfr_align_faces_schema", AlignFacesConfig)


class Face(NamedTuple):
    """A picture and the five landmarks of the face in it, (5, 2)."""

    name: str
    point_52: Points


class Tally(NamedTuple):
    """How many faces this run aligned, were there before, and failed."""

    done: int
    before: int
    failed: int


class Output(NamedTuple):
    """Where faces come from and go to, and how they are written."""

    source: Path
    out: Path
    size: int
    suffix: str
    quality: int

    def target(self, name: str) -> Path:
        """Where the face of a picture goes."""
        return self.out / PurePosixPath(name).with_suffix(self.suffix)


def align_faces(cfg: AlignFacesConfig) -> Tally:
    """Align every face that is not there yet.

    Raises:
        InputError: a bad option, folder or line; a folder begun with other settings or in use; or
            failed faces without `allow_failed`.
    """
    _check(cfg)
    output = Output(Path(cfg.input), Path(cfg.out), cfg.size, cfg.suffix, cfg.quality)
    faces = read_landmarks(Path(cfg.landmarks))
    _check_targets(faces.names, output, Path(cfg.landmarks))
    failed: list[str] = []
    counts: Counter[str] = Counter()
    with _locked(output.out), progress() as bar:
        _same_settings(output)
        task = bar.add_task("align faces", total=len(faces.names))
        for results in _run(output, faces.chunks(), cfg.workers):
            failed += [complaint for state, complaint in results if state == "failed"]
            counts.update(state for state, _ in results)
            bar.advance(task, len(results))
        tally = Tally(counts["done"], counts["before"], counts["failed"])
        message = "%s: %d aligned, %d before, %d failed"
        get_logger(__name__).info(message, output.out, *tally)
        _report_failed(output.out, failed, cfg.allow_failed)
    return tally


def _check(cfg: AlignFacesConfig) -> None:
    for name, least, most in (("size", 1, 4096), ("quality", 1, 100), ("workers", 0, 1024)):
        if not least <= getattr(cfg, name) <= most:
            raise InputError(name, f"must be in {least}..{most}", getattr(cfg, name))
    if cfg.suffix not in SUFFIXES:
        raise InputError("suffix", f"accepted: {', '.join(SUFFIXES)}", cfg.suffix)
    source, out = Path(cfg.input), Path(cfg.out)
    if not source.is_dir():
        raise InputError(source, "folder of pictures is missing")
    if out.resolve().is_relative_to(source.resolve()):
        raise InputError("out", f"must not lie inside the input folder {source}", out)


class Faces(NamedTuple):
    """All faces of a landmark file, compact: it may have millions of lines."""

    names: Sequence[str]
    point_N52: Points

    def chunks(self) -> Iterator[list[Face]]:
        """The faces in their order, some at a time."""
        for start in range(0, len(self.names), CHUNK):
            rows = range(start, min(start + CHUNK, len(self.names)))
            yield [Face(self.names[row], self.point_N52[row]) for row in rows]


def read_landmarks(path: Path) -> Faces:
    """Faces of a landmark file, in its order.

    Raises:
        InputError: missing or empty, or a line that is no path and 5 or 68 points; names the line.
    """
    if not path.is_file():
        raise InputError(path, "file is missing")
    numbers = array("d")

    def names() -> Iterator[str]:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                face = _parse(line, f"{path}:{number}")
                numbers.extend(face.point_52.ravel().tolist())
                yield face.name

    try:
        found = Names(names())
    except UnicodeDecodeError as error:
        raise InputError(path, "is no UTF-8 text", error.reason) from error
    if not len(found):
        raise InputError(path, "is empty")
    return Faces(found, np.array(numbers).reshape(-1, 5, 2))


def _parse(line: str, where: str) -> Face:
    name, *words = line.split() or [""]
    count = next((count for count in COORDINATES if len(words) in (count, count + 1)), 0)
    if not count:
        what = "line is not a path and the coordinates of 5 or 68 points; numbers found"
        raise InputError(where, what, len(words))
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise InputError(where, "path does not lie below the input folder", name)
    try:
        return Face(name, five_points(np.array(words[:count], np.float64)))
    except ValueError as error:
        raise InputError(where, "coordinates cannot be used", error) from error


def _check_targets(names: Sequence[str], output: Output, path: Path) -> None:
    """Refuse two faces that would be one file."""
    hashes = np.fromiter((hash(output.target(name)) for name in names), np.int64, len(names))
    if len(np.unique(hashes)) == len(names):  # a table of millions of paths would fill memory
        return
    first: dict[Path, int] = {}
    for number, name in enumerate(names, start=1):
        target = output.target(name)
        if first.setdefault(target, number) != number:
            what = f"would be written to the same place as line {first[target]}"
            raise InputError(f"{path}:{number}", what, target)


def align_file(face: Face, output: Output) -> None:
    """Write one aligned face; its file is complete or absent.

    Raises:
        InputError: the picture cannot be read, or its landmarks are degenerate.
        OSError: the face cannot be written.
    """
    import cv2

    source, target = output.source / face.name, output.target(face.name)
    image = read_rgb(source)
    try:
        aligned = align(image, face.point_52, output.size)
    except ValueError as error:
        raise InputError(source, "cannot be aligned", error) from error
    options = [cv2.IMWRITE_JPEG_QUALITY, output.quality] if output.suffix == ".jpg" else []
    encoded, code = cv2.imencode(output.suffix, aligned[..., ::-1], options)
    if not encoded:
        raise OSError(errno.EIO, "image could not be encoded", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.tmp")
    partial.write_bytes(code.tobytes())
    os.replace(partial, target)


def _align_chunk(faces: Sequence[Face], output: Output) -> list[tuple[str, str]]:
    """State of each face (done, before, failed), and the complaint about it."""
    return [_state(face, output) for face in faces]


def _state(face: Face, output: Output) -> tuple[str, str]:
    if output.target(face.name).exists():
        return "before", ""
    try:
        align_file(face, output)
    except InputError as error:
        return "failed", str(error)
    return "done", ""


def _run(
    output: Output, chunks: Iterable[Sequence[Face]], workers: int
) -> Iterator[list[tuple[str, str]]]:
    """Results of the chunks in the order they end; a few chunks wait for each worker.

    Raises:
        BrokenProcessPool: a worker died.
        OSError: a face cannot be written.
    """
    if not workers:
        yield from (_align_chunk(chunk, output) for chunk in chunks)
        return
    # Forked, as the data workers are: spawned ones would load PyTorch first.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, _begin_worker)
    waiting: set[Future[list[tuple[str, str]]]] = set()
    try:
        for chunk in chunks:
            waiting.add(pool.submit(_align_chunk, chunk, output))
            if len(waiting) >= 4 * workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in wait(waiting).done)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """One OpenCV thread, and an end when the parent is gone, however it went."""
    import cv2

    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_end([parent.sentinel])
        os._exit(1)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder, made when absent, for this run; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(folder, "another run is writing there") from None
                time.sleep(0.05)
            except OSError:  # a file system without locks
                get_logger(__name__).warning("%s cannot be locked: start no second run", folder)
                break
        yield


def _same_settings(output: Output) -> None:
    """Refuse to mix faces of two kinds in one folder."""
    path = output.out / SETTINGS
    settings = {name: getattr(output, name) for name in ("size", "suffix", "quality")}
    if not path.exists():
        _write_text(path, json.dumps(settings) + "\n")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(path, "is no JSON", error) from error
    for name, value in settings.items():
        before = found.get(name) if isinstance(found, dict) else found
        if before != value:
            what = f"the folder was begun with other settings; {name} is {value} here and"
            raise InputError(path, what, before)


def _report_failed(out: Path, failed: Sequence[str], allow: bool) -> None:
    """Write `failed.txt`, a complaint a line, or remove an old one when nothing failed."""
    path = out / FAILED
    if not failed:
        path.unlink(missing_ok=True)
        return
    _write_text(path, "".join(f"{complaint}\n" for complaint in sorted(failed)))
    if not allow:
        what = "lists faces that cannot be aligned, allow_failed=true goes on without them"
        raise InputError(path, what, len(failed))
    get_logger(__name__).warning("%d faces cannot be aligned, see %s", len(failed), path)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@hydra.main(version_base=None, config_path="../configs", config_name="align_faces")
def main(cfg: AlignFacesConfig) -> None:
    setup_logging(rank=0)
    align_faces(cfg)


if __name__ == "__main__":
    exit_on_bad_input(main)
