"""The video protocol: from features and qualities of frames to TPR at an FPR over pairs of videos.

Two ways in. From files, in the form of trojans-face-recognizer (the authors' code): a list of
frames `prefix/<video>/<frame>.jpg`, a list of videos, and for every frame of the list one row of
features and one quality, as `.npy` or as a headerless dump of float32. From folders of frames:
`embed_videos` runs the networks and leaves exactly these files behind.

Either way the frames of a video become one vector (`aggregate`), and all pairs of videos are
compared by cosine (`all_pairs`).

Letters: N frames of all videos, V videos, D embedding width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import dist
from common.log import InputError, progress
from face_lfr.aggregate import METHODS, NEEDS_QUALITY, aggregate
from face_lfr.all_pairs import AllPairs, all_pairs
from face_lfr.data.challenge import Videos, load_frame_lists, read_labels
from face_lfr.data.draws import ImageRows
from face_lfr.engine import Embedding, embed_images

MAGIC = b"\x93NUMPY"
ROWS_AT_ONCE = 65536
FRAME_NORMS = (None, "none", "l2")


class VideoFrames(NamedTuple):
    """What the networks say about N frames.

    Attributes:
        videos: names, labels, and the video of each frame.
        feature_ND: floating, not normalised; may be mapped from a file.
        quality_N: unbounded scores, or None.
    """

    videos: Videos
    feature_ND: np.ndarray
    quality_N: np.ndarray | None


class VideoScore(NamedTuple):
    """Result of one method.

    Attributes:
        pairs: rates and thresholds over all pairs of videos.
        vector_VD: float32 vectors of the videos, not of unit length.
        weight_N: float32 share of each frame in the vector of its video.
    """

    pairs: AllPairs
    vector_VD: np.ndarray
    weight_N: np.ndarray


def load_video_files(
    features: Path,
    images: Path,
    videos: Path,
    labels: Path,
    quality: Path | None = None,
) -> VideoFrames:
    """Read the files of the protocol; features stay on disk until they are used.

    Args:
        features: a row a frame, in the order of `images`; `.npy` (N, D) of any floating type, or
            a headerless dump of N*D float32.
        images: list of frames, `prefix/<video>/<frame>.jpg`.
        videos: list of videos, the first word of each line.
        labels: one whole number a video, as text or `.npy`; -1 is a distractor.
        quality: a number a frame, the same two forms; None for methods without quality.

    Raises:
        InputError: a file is missing, malformed or of another number of rows; a frame's video is
            not in the list or a video has no frame (names the line); a number that is not finite
            (names the line of its frame).
    """
    found = load_frame_lists(images, videos)
    labels_V = read_label_file(Path(labels), len(found.videos))
    found = Videos(found.videos, found.frames, found.video_N, labels_V)
    feature_ND = _floats(Path(features), Path(images), len(found.frames))
    if quality is None:
        return VideoFrames(found, feature_ND, None)
    quality_N1 = _floats(Path(quality), Path(images), len(found.frames))
    if quality_N1.shape[1] != 1:
        raise InputError(quality, "needs one number a frame, it has", quality_N1.shape[1])
    return VideoFrames(found, feature_ND, quality_N1[:, 0])


def _floats(path: Path, images: Path, frames: int) -> np.ndarray:
    """Rows (N, columns) of a file, mapped, every one of them finite."""
    if not path.is_file():
        raise InputError(path, "no such file")
    with path.open("rb") as stream:
        array = _mapped(path, stream.read(len(MAGIC)) == MAGIC, frames)
    if array.dtype.kind != "f":
        raise InputError(path, "must hold floating numbers, not", array.dtype)
    if array.ndim == 0 or len(array) != frames or not array.size:
        what = f"needs a row for each of the {frames} lines of {images}; its shape is"
        raise InputError(path, what, array.shape)
    rows_N = array.reshape(frames, -1)
    for start in range(0, frames, ROWS_AT_ONCE):
        bad = np.flatnonzero(~np.isfinite(rows_N[start : start + ROWS_AT_ONCE]).all(axis=1))
        if bad.size:
            what = "is not finite in the row of the frame at"
            raise InputError(path, what, f"{images}:{start + int(bad[0]) + 1}")
    return rows_N


def _mapped(path: Path, header: bool, frames: int) -> np.ndarray:
    # Copy on write: torch refuses to wrap a read-only array silently.
    if header:
        try:
            loaded: np.ndarray = np.load(path, mmap_mode="c", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(path, "is not a whole .npy file of numbers", error) from error
        return loaded
    size = path.stat().st_size
    if not size or size % (4 * frames):
        what = f"is no dump of float32 with a row for each of {frames} frames; its bytes"
        raise InputError(path, what, size)
    return np.memmap(path, np.dtype("<f4"), mode="c", shape=(frames, size // (4 * frames)))


def read_label_file(path: Path, count: int) -> np.ndarray:
    """Labels (count,) int64 of a text, one whole number a line, or of an `.npy` file.

    Raises:
        InputError: no such file, no whole numbers, one below -1 (a distractor), another count.
    """
    if path.suffix != ".npy":
        return read_labels(path, count)
    if not path.is_file():
        raise InputError(path, "no such file")
    try:
        labels_V: np.ndarray = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(path, "is not a whole .npy file of numbers", error) from error
    if labels_V.dtype.kind not in "iu" or labels_V.shape != (count,):
        what = f"needs {count} whole numbers, one a video; it holds {labels_V.dtype}"
        raise InputError(path, what, labels_V.shape)
    if labels_V.size and labels_V.min() < -1:
        what = "label is below -1, which stands for a distractor"
        raise InputError(path, what, int(labels_V.min()))
    return labels_V.astype(np.int64)


def score_videos(
    frames: VideoFrames,
    method: str,
    fprs: Sequence[float],
    *,
    frame_norm: str | None = None,
    pairs: str = "all",
    world: dist.World | None = None,
) -> VideoScore:
    """Aggregate the frames of each video and compare all pairs of videos.

    Args:
        frames: features, qualities and labels.
        method: one of `aggregate.METHODS`.
        fprs: false positive rates.
        frame_norm: `none` or `l2` in the place of the method's own choice.
        pairs: `all` or `gallery_probe`, see `all_pairs`.
        world: ranks that share the pairs; None is this process alone.

    Raises:
        InputError: an unknown name, a method whose qualities or labels are not there, or what
            `all_pairs` refuses.
    """
    if method not in METHODS:
        raise InputError("method", f"must be one of {', '.join(METHODS)}", method)
    if frame_norm not in FRAME_NORMS:
        raise InputError("frame_norm", "must be none, l2 or null", frame_norm)
    if method in NEEDS_QUALITY and frames.quality_N is None:
        raise InputError("method", "needs the quality of every frame", method)
    if frames.videos.labels_V is None:
        raise InputError(frames.videos.frames.root, "has no labels to score the videos by", "")
    vector_VD, weight_N = aggregate(
        _tensor(frames.feature_ND),
        torch.from_numpy(frames.videos.video_N),
        None if frames.quality_N is None else _tensor(frames.quality_N),
        method,
        frame_norm=frame_norm,
        videos=len(frames.videos.videos),
    )
    zero = (vector_VD == 0).all(dim=1).nonzero().flatten()
    if len(zero):
        raise InputError(frames.videos.videos[int(zero[0])], "the vector of this video is zero", "")
    vectors = vector_VD.numpy()
    device = torch.device("cpu") if world is None else world.device
    labels_V = frames.videos.labels_V
    with progress(world is None or world.main) as bar:
        found = all_pairs(vectors, labels_V, fprs, pairs, device=device, world=world, progress=bar)
    return VideoScore(found, vectors, weight_N.numpy())


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor over the array, which is copied only where torch cannot share it."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def embed_videos(
    videos: Videos,
    recogniser: nn.Module,
    how: Embedding,
    quality: nn.Module | None,
    how_quality: Embedding | None,
    out: Path,
) -> VideoFrames:
    """Features and qualities of all frames; batches run over the borders of videos.

    Collective: the ranks share the frames. `out` then holds the files of the protocol, for
    `load_video_files`: `features.npy`, `quality.npy`, `images.txt`, `videos.txt` and, where there
    are labels, `labels.txt`.

    Args:
        videos: see `load_iqiyi`.
        recogniser: network with `embed`.
        how: its transform, batch and world.
        quality: network with one score an image, or None.
        how_quality: the same for it; its mirror images are never looked at.
        out: folder on storage that all ranks see.

    Raises:
        ValueError: only one of `quality` and `how_quality` is given.
        InputError: a frame cannot be read, or a feature or quality is not finite.
    """
    if (quality is None) != (how_quality is None):
        raise ValueError("quality and how_quality: give both or none")
    dist.together(lambda: _write_lists(videos, out), main_only=True)
    rows = ImageRows(videos.frames, how.transform)
    path = out / "features.npy"
    embed_images(recogniser, rows, how, path, "features of frames")
    feature_ND = _mapped(path, True, len(rows))
    if quality is None or how_quality is None:
        return VideoFrames(videos, feature_ND, None)
    rows = ImageRows(videos.frames, how_quality.transform)
    how_quality = how_quality._replace(flip=False)
    path = out / "quality.npy"
    quality_N1 = embed_images(quality, rows, how_quality, path, "qualities of frames")
    return VideoFrames(videos, feature_ND, np.array(quality_N1[:, 0]))


def _write_lists(videos: Videos, out: Path) -> None:
    """The lists of the protocol; the root's own name is the prefix of every frame."""
    out.mkdir(parents=True, exist_ok=True)
    root = videos.frames.root
    prefix = root.absolute().name or "videos"
    lines = []
    for frame, video in zip(videos.frames.names, videos.video_N, strict=True):
        line = f"{prefix}/{videos.videos[video]}/{frame.rpartition('/')[2]}"
        if line.count("/") != 2 or len(line.split()) != 1:
            raise InputError(root, "frame cannot be listed as prefix/<video>/<frame>", line)
        lines.append(line)
    _write(out / "images.txt", lines)
    _write(out / "videos.txt", list(videos.videos))
    if videos.labels_V is not None:
        _write(out / "labels.txt", [str(label) for label in videos.labels_V])


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
