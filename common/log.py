"""Errors of the user, log lines, metric files, progress bars and throughput."""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import math
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rich import progress as bars
from rich.console import Console
from rich.text import Text


class InputError(ValueError):
    """Bad input of the user; reads "<file or key>: <what is wrong>: <value>", always on one line.

    A DataLoader rebuilds the exception of a worker from its traceback as the only argument; the
    message of the worker is taken out of that text again.
    """

    def __init__(self, where: object, what: str = "", value: object = ""):
        if not what and "Original Traceback" in str(where):
            where = str(where).rstrip().splitlines()[-1].partition("InputError: ")[2]
        self.where, self.what, self.value = str(where), what, str(value)
        parts = (" ".join(part.split()) for part in (self.where, self.what, self.value))
        super().__init__(": ".join(part for part in parts if part))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:
        return type(self), (self.where, self.what, self.value)


def exit_on_bad_input(main: Callable[[], object]) -> None:
    """Run a Hydra `main`; bad input ends as one line on stderr and exit code 2.

    Bad input is an `InputError`, a configuration that does not compose, a `_target_` that is not
    there or refuses its arguments, and a file or folder that the system refuses. Everything else is
    a programming error and keeps its traceback. HYDRA_FULL_ERROR=1 in the environment shows the
    traceback of bad input as well.
    """
    user_wants_all = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print and exit with code 1 by itself
    try:
        with redirect_stderr(_WithoutHydra(sys.stderr)):
            main()
    except Exception as error:
        message = _describe(error)
        if message is None:
            raise
        if user_wants_all and user_wants_all != "0":
            traceback.print_exc()
        sys.stderr.write(f"error: {message}\n")
        sys.exit(2)
    finally:
        if user_wants_all is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = user_wants_all
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _leave()


def _leave() -> None:
    """End one of several processes with code 0, without tearing the interpreter down."""
    # Threads of gloo could abort it, and torchrun takes that for a failed training.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _WithoutHydra:
    """A stream that swallows the line Hydra writes before it raises what the job raised."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        if text.startswith("Error executing job with overrides"):
            return len(text)
        return int(self.stream.write(text) or 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _describe(error: BaseException) -> str | None:
    """The one line for the user, or None for a programming error."""
    from hydra.errors import (
        HydraException,
        InstantiationException,
        MissingConfigException,
        OverrideParseException,
    )
    from omegaconf.errors import OmegaConfBaseException

    cause, text = error.__cause__, str(error).strip()
    if isinstance(error, InputError):
        return text
    if isinstance(error, OSError) and isinstance(error.filename, str | Path):
        return str(InputError(error.filename, error.strerror or type(error).__name__))
    if isinstance(error, OmegaConfBaseException):
        key, what = error.full_key or "config", str(error.msg or error).splitlines()[0]
        typed = (word.partition("=")[2] for word in sys.argv if word.startswith(f"{key}="))
        return str(InputError(key, what, error.value or next(typed, "")))
    if isinstance(cause, InputError | OmegaConfBaseException) and isinstance(error, HydraException):
        return _describe(cause)
    if isinstance(error, InstantiationException) and cause is not None:
        # A TypeError with one frame was raised by the call itself: a wrong argument name.
        wrong_call = isinstance(cause, TypeError) and _depth(cause.__traceback__) == 1
        if not (wrong_call or isinstance(cause, ValueError | ImportError)):
            return None
        key = text.partition("full_key:")[2].strip() or "config"
        return str(
            InputError(key, text.splitlines()[0].partition(", set env")[0].rstrip(":"), cause)
        )
    if isinstance(error, MissingConfigException) and error.options is not None:
        name = error.missing_cfg_file or "config"
        what = f"is not there, only {', '.join(error.options)}"
        if not error.options:  # its choices lie in folders
            what = f"is not there; see the files below configs/{name.partition('/')[0]}"
        return str(InputError(name, what))
    if isinstance(error, OverrideParseException):
        return str(InputError(error.override, "cannot be parsed", text.splitlines()[0]))
    return " ".join(text.split()) if isinstance(error, HydraException) else None


def _depth(trace: TracebackType | None) -> int:
    count = 0
    while trace is not None:
        trace, count = trace.tb_next, count + 1
    return count


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to the stderr of the moment, which a live progress bar replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; say `get_logger(__name__)`."""
    return logging.getLogger(name)


def setup_logging(rank: int) -> None:
    """Send log lines to stderr: everything from INFO on rank 0, warnings from the others."""
    handler = _StderrHandler(sys.stderr)
    where = "" if rank == 0 else f" rank {rank}"
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s{where} %(levelname).1s %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        # Exactly the plain type: file handlers and the capture of pytest stay.
        if type(old) in (logging.StreamHandler, _StderrHandler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)


class MetricLogger:
    """Writes metrics to the log, to `folder/metrics.jsonl` and to `folder/tensorboard`.

    One JSON object a line with the key `step`. NaN and infinity have no JSON form: they are
    written as null. Every row is flushed. Off the main rank nothing is written. The file is locked
    as long as it is open: two trainings in one folder would also spoil each other's checkpoints.
    The lock goes with the process, so a killed one leaves none; fork data workers before.

    Args:
        folder: the run folder, created when absent.
        main: whether this process is the one that writes.
        tensorboard: also write TensorBoard events (a warning, once, when it is not installed).

    Raises:
        InputError: another process is writing there.
    """

    def __init__(self, folder: Path, main: bool = True, tensorboard: bool = True):
        self.folder, self.main, self.tensorboard = Path(folder), main, tensorboard
        self._events: Any = None
        self._file = None
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "metrics.jsonl"
            self._file = path.open("a", encoding="utf-8")
            _lock(self._file, path)
            _mend(path)

    def log(self, step: int, **values: Any) -> None:
        """Write one row; values are numbers (also of numpy and 0-d tensors), strings or None."""
        if self._file is None:
            return
        row = {key: _plain(value) for key, value in values.items()}
        self._file.write(json.dumps({"step": int(step), **row}, allow_nan=False) + "\n")
        self._file.flush()
        numbers = {key: float(value) for key, value in values.items() if _is_number(value)}
        shown = " ".join(f"{key} {value:.5g}" for key, value in numbers.items())
        get_logger("metrics").info("step %d  %s", step, shown)
        if self.tensorboard:
            self._to_tensorboard(step, numbers)

    def _to_tensorboard(self, step: int, numbers: dict[str, float]) -> None:
        if self._events is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.tensorboard = False
                get_logger(__name__).warning("no TensorBoard files: pip install tensorboard")
                return
            # purge_step hides the rows of an earlier life that this one writes again.
            self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
        for key, value in numbers.items():
            self._events.add_scalar(key, value, step)
        self._events.flush()

    def close(self) -> None:
        """Close the files; a later `log` writes nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_number(value: Any) -> bool:
    return value is not None and not isinstance(value, str)


def _plain(value: Any) -> str | int | float | None:
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _lock(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InputError(path, "another process is training in this folder") from error
    except OSError:  # a file system without locks
        get_logger(__name__).warning("%s cannot be locked: start no second run there", path)


def _mend(path: Path) -> None:
    """Make the file end with a whole row: a killed writer may have left a part of one."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        tail = content[content.rfind(b"\n") + 1 :]
        if not tail:
            return
        if _row(tail) is None:
            file.truncate(len(content) - len(tail))
        else:
            file.write(b"\n")


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, sorted by step.

    A restarted run repeats steps: the later row of a step replaces the earlier one. A torn last
    line is dropped. null (NaN, infinity) stays None.

    Raises:
        InputError: the file is missing, or a line before the last is not a row.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(path, "cannot be read", error.strerror or "") from error
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _row(line)
        if row is not None:
            rows[row["step"]] = row
        elif number < len(lines):
            raise InputError(
                path,
                f"line {number} is not a JSON object with a step",
                line[:80].decode(errors="replace"),
            )
    return [rows[step] for step in sorted(rows)]


class _SpeedColumn(bars.ProgressColumn):
    def render(self, task: bars.Task) -> Text:
        return Text(_speed(task))


class _PlainProgress(bars.Progress):
    """Progress without a terminal: a plain line every `every_s` seconds at most, and a last one."""

    def __init__(self, *columns: bars.ProgressColumn, console: Console, every_s: float = 5.0):
        super().__init__(*columns, console=console, disable=True)
        self.every_s = every_s
        self._said: dict[bars.TaskID, float] = {}

    def advance(self, task_id: bars.TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def update(self, task_id: bars.TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._say(task_id)

    def _say(self, task_id: bars.TaskID) -> None:
        task, now = self._tasks[task_id], time.monotonic()
        last = self._said.get(task_id)
        if last == math.inf or not (task.finished or last is None or now - last >= self.every_s):
            return
        self._said[task_id] = math.inf if task.finished else now
        total = "?" if task.total is None else f"{task.total:.0f}"
        left = "?" if task.time_remaining is None else f"{task.time_remaining:.0f} s"
        line = f"{task.description} {task.completed:.0f}/{total} {_speed(task)}, {left} left\n"
        self.console.file.write(line)
        self.console.file.flush()


def _speed(task: bars.Task) -> str:
    speed = task.finished_speed or task.speed
    return "- it/s" if speed is None else f"{speed:.3g} it/s"


def progress(main: bool = True) -> bars.Progress:
    """A progress bar on stderr with speed and time left; plain lines when that is no terminal.

    Use as a context manager: `with progress(world.main) as bar: for x in bar.track(items): ...`.
    Off the main rank the object takes the same calls and shows nothing.
    """
    console = Console(stderr=True)
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        _SpeedColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    if main and not console.is_terminal:
        return _PlainProgress(*columns, console=console)
    # stdout carries tables that a caller may pipe: the bar must not move them to stderr.
    return bars.Progress(*columns, console=console, disable=not main, redirect_stdout=False)


class Throughput:
    """Items per second over the last `window` updates."""

    def __init__(self, window: int = 100):
        if window < 1:
            raise ValueError(f"window={window} must be at least 1")
        self._seen: deque[tuple[float, float]] = deque(maxlen=window)
        self._start = time.perf_counter()

    def update(self, count: float) -> None:
        """Count items that are done by now."""
        if len(self._seen) == self._seen.maxlen:
            self._start = self._seen[0][0]
        self._seen.append((time.perf_counter(), count))

    def rate(self) -> float:
        """Items per second; 0 before the first update."""
        if not self._seen:
            return 0.0
        seconds = self._seen[-1][0] - self._start
        return sum(count for _, count in self._seen) / max(seconds, 1e-9)
