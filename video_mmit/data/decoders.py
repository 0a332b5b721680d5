"""Decoding single frames of video files with decord, OpenCV or PyAV.

Shapes: n frames asked for, H rows, W columns, C channels.
"""

import codecs
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.log import InputError

BOXES = {
    b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"uuid", b"udta", b"meta", b"moof",
    b"mfra", b"sidx", b"styp", b"pdin",
}  # fmt: skip
Decode = Callable[[np.ndarray], np.ndarray]


class DecodedClip:
    """An opened video.

    Args:
        path: named by the errors.
        frames: how many there are.
        decode: (n, H, W, C) from sorted positions without repeats.

    Raises:
        InputError: there is no frame.
    """

    def __init__(self, path: str | Path, frames: int, decode: Decode):
        if frames < 1:
            raise InputError(path, "has no frame")
        self.path, self.frames, self.decode = path, frames, decode

    def read(self, index: np.ndarray) -> np.ndarray:
        """Frames at 0-based positions, (n, H, W, C) uint8; every frame is decoded once.

        Raises:
            ValueError: no position, or a negative one.
            InputError: names the file that cannot be decoded or has fewer frames.
        """
        wanted, back = np.unique(np.asarray(index, dtype=np.int64).ravel(), return_inverse=True)
        if not len(wanted) or wanted[0] < 0:
            raise ValueError(f"index={index} must hold positions from 0 on")
        if wanted[-1] >= self.frames:
            raise InputError(self.path, f"has {self.frames} frames, none at position", wanted[-1])
        frames_nHWC = self.decode(wanted)
        # Most callers ask for sorted positions without repeats: spare them the copy.
        same = np.array_equal(back, np.arange(len(wanted)))
        return frames_nHWC if same else frames_nHWC[back]

    def close(self) -> None:
        """Let go of the file; a later `read` raises ValueError."""
        self.decode = _closed


def _closed(wanted: np.ndarray) -> np.ndarray:
    raise ValueError(f"the clip is closed; frames {wanted} were asked for")


def inspect(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        InputError: it is missing or empty, or is what decoders take for another or a shorter video
            without an error: text, which FFmpeg draws, and AVI, WebM or MP4 files without their
            end.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(4096)
            stated = _stated_boxes(file, size) if head[4:8] == b"ftyp" else _stated_size(head)
    except OSError as error:
        raise InputError(path, "video cannot be read", error.strerror or "") from error
    if not size:
        raise InputError(path, "video is empty", "0 bytes")
    if _is_text(head):
        raise InputError(path, "is text, no video", head[:40].decode(errors="replace"))
    if stated > size:
        raise InputError(path, f"video is cut off, states {stated} bytes and has", size)
    return head


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _stated_size(head: bytes) -> int:
    """Bytes the container states, 0 when it states none or is neither AVI nor Matroska (WebM)."""
    if head[:4] == b"RIFF":
        size = int.from_bytes(head[4:8], "little")
        return 0 if size == 0xFFFFFFFF else 8 + size
    if head[:4] != b"\x1a\x45\xdf\xa3":
        return 0
    size, start = _variable_int(head, 4)
    segment = start + size
    if head[segment : segment + 4] != b"\x18\x53\x80\x67":
        return 0
    size, start = _variable_int(head, segment + 4)
    unknown = 2 ** (7 * (start - segment - 4)) - 1
    return 0 if size == unknown else start + size


def _stated_boxes(file: BinaryIO, size: int) -> int:
    """Bytes that the boxes of an MP4 file add up to, as far as boxes of a known kind follow."""
    end = 0
    while end < size:
        file.seek(end)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if header[4:8] not in BOXES or length < 8:  # 0: until the end of the file
            break
        end += length
    return end


def _variable_int(data: bytes, at: int) -> tuple[int, int]:
    """An EBML integer and the position behind it; leading zero bits say how many bytes follow."""
    length = 9 - data[at].bit_length() if at < len(data) else 9
    bits = 7 * length
    return int.from_bytes(data[at : at + length], "big") & ((1 << bits) - 1), at + length


def open_decord(path: str) -> DecodedClip:
    """Open with decord, which seeks to the key frame before a position."""
    import decord
    from decord._ffi.base import DECORDLimitReachedError

    decord.logging.set_level(decord.logging.QUIET)  # else FFmpeg writes to stderr
    broken = (decord.DECORDError, DECORDLimitReachedError, RuntimeError)
    try:
        with _stderr_closed():
            reader = decord.VideoReader(path, num_threads=1)
        frames = len(reader)
    except broken as error:
        raise InputError(path, "video cannot be opened", _reason(error)) from None

    def decode(wanted: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(reader.get_batch(wanted.tolist()).asnumpy())
        except broken as error:
            raise InputError(path, "video cannot be decoded", _reason(error)) from None

    return DecodedClip(path, frames, decode)


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """Drop what decord writes to the descriptor: its own message cannot be switched off."""
    try:
        saved = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _reason(error: Exception) -> str:
    """First line of an exception, without decord's time, source file and stack trace."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return re.sub(r"^(\[[\d:]+\] \S+:\d+: )+", "", line)


def open_opencv(path: str, head: bytes) -> DecodedClip:
    """Open with OpenCV, which decodes from the start; `head` is what `inspect` returned."""
    import cv2

    with _capture(path) as capture:
        frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if not (head[:4] == b"RIFF" or head[4:8] == b"ftyp"):
            # Other containers state a length in time: OpenCV would estimate the count from it.
            frames = 0
            while capture.grab():
                frames += 1

    def decode(wanted: np.ndarray) -> np.ndarray:
        with _capture(path) as capture:
            return stack(_grab(capture, path, wanted), [path] * len(wanted))

    return DecodedClip(path, frames, decode)


def _grab(capture: Any, path: str, wanted: np.ndarray) -> list[np.ndarray]:
    """RGB frames in the order of the file, because OpenCV's seeks are not exact."""
    import cv2

    position, images = -1, []
    for target in wanted:
        while position < target:
            if not capture.grab():
                raise InputError(path, f"video ends after {position + 1} frames, before", target)
            position += 1
        found, image_HW3 = capture.retrieve()
        if not found:
            raise InputError(path, "video cannot be decoded at position", target)
        images.append(cv2.cvtColor(image_HW3, cv2.COLOR_BGR2RGB))
    return images


@contextmanager
def _capture(path: str) -> Iterator[Any]:
    """An opened video that says nothing on stderr."""
    import cv2

    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    try:
        if not capture.isOpened():
            raise InputError(path, "video cannot be opened")
        yield capture
    finally:
        capture.release()
        cv2.utils.logging.setLogLevel(level)


def open_pyav(path: str) -> DecodedClip:
    """Open with PyAV, decoding from the start."""
    import av

    try:
        with _container(path) as container:
            if not container.streams.video:
                raise InputError(path, "has no video stream")
            stream = container.streams.video[0]
            # Matroska states no count: the packets are counted, without decoding them.
            frames = stream.frames or sum(p.size > 0 for p in container.demux(stream))
    except av.FFmpegError as error:
        raise InputError(path, "video cannot be opened", error.strerror) from None

    def decode(wanted: np.ndarray) -> np.ndarray:
        try:
            return stack(_decode_pyav(path, wanted), [path] * len(wanted))
        except av.FFmpegError as error:
            raise InputError(path, "video cannot be decoded", error.strerror) from None

    return DecodedClip(path, frames, decode)


def _container(path: str) -> Any:
    import av

    # Titles in another encoding are no reason to refuse the frames.
    return av.open(path, metadata_errors="replace")


def _decode_pyav(path: str, wanted: np.ndarray) -> list[np.ndarray]:
    targets, images = set(wanted.tolist()), []
    position = -1
    with _container(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for position, frame in enumerate(container.decode(stream)):
            if position in targets:
                image_HW3 = frame.to_ndarray(format="rgb24")
                images.append(np.rot90(image_HW3, frame.rotation // 90))
            if len(images) == len(targets):
                return images
    raise InputError(path, f"video ends after {position + 1} frames, before", wanted[-1])


def stack(images: Sequence[np.ndarray], paths: Sequence[str | Path]) -> np.ndarray:
    """Images of one size as one array; names the first that differs."""
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise InputError(path, f"frame differs in size from {images[0].shape}", image.shape)
    return np.stack(images)
