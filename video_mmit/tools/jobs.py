"""Work on many videos in several processes, stopped and taken up again at will.

A video that cannot be read is noted and the others go on; everything else (a full disk, an error
of programming) ends the run. What is finished lies under its final name, so a later run with the
same arguments does the rest.
"""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from common.log import InputError, get_logger, progress
from video_mmit.data.lists import write_text

SUFFIXES = frozenset(".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .ts .webm .wmv".split())
SETTINGS, FAILED, LOCK = "settings.json", "failed.txt", ".lock"
PATIENCE_S = 3.0  # for the workers of a killed run to notice its end


class HasPath(Protocol):
    """An item of work; complaints name its path."""

    @property
    def path(self) -> Path: ...


Item = TypeVar("Item", bound=HasPath)
Result = TypeVar("Result")


def run_jobs(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result | InputError]]:
    """Yield every item with its result, or with the `InputError` it met, in the order they end.

    A worker process that dies with a video, as a decoder may, costs this one video.

    Args:
        work: is called once for each item, in a worker process.
        items: to work on.
        workers: processes; 0 works in this one.

    Raises:
        OSError: a worker met one.
        RuntimeError: a worker met any other error; holds its traceback.
    """
    if not workers:
        for item in items:
            yield item, _attempt(work, item)
        return
    waiting = iter(range(len(items)))
    pool = [_Worker(work, items) for _ in range(min(workers, len(items)))]
    try:
        busy = [worker for worker in pool if worker.take(waiting)]
        while busy:
            ready = wait([worker.end for worker in busy])
            for worker in [worker for worker in busy if worker.end in ready]:
                yield items[worker.number], worker.result()
                if not worker.take(waiting):
                    busy.remove(worker)
    finally:
        for worker in pool:
            worker.stop()


def _attempt(work: Callable[[Item], Result], item: Item) -> Result | InputError:
    try:
        return work(item)
    except InputError as error:
        return error


class _Worker:
    """A process that works on one item at a time and is told its number.

    Forked, as the data workers are: it starts in no time and has `work` and `items` already.
    """

    def __init__(self, work: Callable[[Any], Any], items: Sequence[Any]):
        self.work, self.items = work, items
        self.number = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.end, far = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(self.work, self.items, far), daemon=True
        )
        self.process.start()
        far.close()  # or its end would not be noticed here

    def take(self, waiting: Iterator[int]) -> bool:
        """Begin the next item; False when there is none."""
        for self.number in waiting:
            try:
                self.end.send(self.number)
            except BrokenPipeError:  # died after its last answer
                self._restart()
                self.end.send(self.number)
            return True
        return False

    def result(self) -> Any:
        """What the process answers; after its death a new one takes its place."""
        try:
            kind, value = self.end.recv()
        except (EOFError, ConnectionResetError):
            code = self._restart()
            path = self.items[self.number].path
            return InputError(path, "the process that read it died with code", code)
        if kind == "result":
            return value
        raise value if kind == "system" else RuntimeError(f"a worker failed with\n{value}")

    def _restart(self) -> int | None:
        self.process.join()
        code = self.process.exitcode
        self.end.close()
        self._start()
        return code

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.end.close()


def _serve(work: Callable[[Any], Any], items: Sequence[Any], end: Connection) -> None:
    """Body of a worker process: one OpenCV thread, deaf to Ctrl-C, gone when its parent is."""
    import cv2

    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    while True:
        try:
            number = end.recv()
        except EOFError:
            return
        end.send(_answer(work, items[number]))


def _answer(work: Callable[[Any], Any], item: Any) -> tuple[str, Any]:
    try:
        return "result", _attempt(work, item)
    except OSError as error:
        return "system", error
    except Exception:
        return "other", traceback.format_exc()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class Job(NamedTuple):
    """A video file and what is made of it."""

    path: Path
    target: Path

    @property
    def partial(self) -> Path:
        """Where the target grows; renamed when it is complete."""
        return self.target.with_name(f".{self.target.name}.tmp")


class Tally(NamedTuple):
    """How many videos were finished by this run, were so before, and could not be read."""

    done: int
    before: int
    failed: int


def find_jobs(source: Path, out: Path, target: Callable[[Path], Path]) -> list[Job]:
    """A job for every video below `source`, in a fixed order.

    Args:
        source: folder of videos, at any depth.
        out: folder of the targets.
        target: from the path below `source` to the path below `out`.

    Raises:
        InputError: no such folder, no video in it, `out` lies inside, or two videos of one target.
    """
    if not source.is_dir():
        raise InputError(source, "folder of videos is missing")
    if out.resolve().is_relative_to(source.resolve()):
        raise InputError("out", f"must not lie inside the input folder {source}", out)
    files = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(source)
        for name in names
        if os.path.splitext(name)[1].lower() in SUFFIXES
    )
    jobs = [Job(path, out / target(path.relative_to(source))) for path in files]
    if not jobs:
        raise InputError(source, "holds no video; known suffixes", " ".join(sorted(SUFFIXES)))
    owners: dict[Path, Path] = {}
    for job in jobs:
        other = owners.setdefault(job.target, job.path)
        if other != job.path:
            raise InputError(job.path, f"would be written to the same place as {other}", job.target)
    return jobs


def run_tree(
    jobs: Sequence[Job],
    out: Path,
    work: Callable[[Job], object],
    settings: Mapping[str, Any],
    workers: int,
    allow_failed: bool,
    title: str,
) -> Tally:
    """Make every target that is not there yet; `work` writes `job.partial`, which is renamed here.

    Raises:
        InputError: `out` was begun with other settings or is in use; or videos could not be read
            and `allow_failed` is false (they are listed in `failed.txt`).
    """
    with locked(out):
        _same_settings(out / SETTINGS, settings)
        left = [job for job in jobs if not job.target.exists()]
        before, failed = len(jobs) - len(left), []
        with progress() as bar:
            task = bar.add_task(title, total=len(jobs), completed=before)
            for job, result in run_jobs(work, left, workers):
                if isinstance(result, InputError):
                    failed.append(result)
                    _discard(job.partial)
                else:
                    os.replace(job.partial, job.target)
                bar.advance(task)
        tally = Tally(len(left) - len(failed), before, len(failed))
        get_logger(__name__).info("%s: %d done, %d before, %d failed", out, *tally)
        report_failed(out, failed, allow_failed)
        return tally


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _same_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to mix files of two kinds in one folder."""
    if not path.exists():
        write_text(path, json.dumps(dict(settings), indent=1) + "\n")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(path, "is no JSON", error) from error
    for name, value in settings.items():
        if not isinstance(found, dict) or found.get(name) != value:
            what = f"the folder was begun with other settings; {name} is {value} here and"
            raise InputError(path, what, found.get(name) if isinstance(found, dict) else found)


def report_failed(out: Path, failed: Sequence[InputError], allow: bool) -> None:
    """Write `out/failed.txt`, a complaint a line, or remove an old one when nothing failed.

    Raises:
        InputError: something failed and `allow` is false.
    """
    path = out / FAILED
    if not failed:
        path.unlink(missing_ok=True)
        return
    write_text(path, "".join(sorted(f"{error}\n" for error in failed)))
    if not allow:
        what = "lists videos that cannot be read, allow_failed=true goes on without them"
        raise InputError(path, what, len(failed))
    get_logger(__name__).warning("%d videos cannot be read, see %s", len(failed), path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made when absent, for this run; the lock goes with the process.

    Raises:
        InputError: another run holds it.
    """
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
