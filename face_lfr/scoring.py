"""What the trained rows of the synthetic task are worth: images, and videos by aggregator."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import dist
from face_lfr.all_pairs import AllPairs, all_pairs
from face_lfr.data.bins import load_bin
from face_lfr.data.challenge import load_deepglint, load_iqiyi
from face_lfr.data.draws import ImageRows
from face_lfr.engine import Embedding, embed_images
from face_lfr.suite import Job
from face_lfr.verification import verify
from face_lfr.video import VideoFrames, embed_videos, score_videos
from face_lfr.weights import Trained, load_trained

FPRS = (1e-5, 1e-4, 1e-3)
HEADLINE = 1e-4  # the false positive rate of the claims
FREE = "free"  # of any quality network
# Aggregator -> row of the quality network it uses.
AGGREGATORS = {
    "best": "qanpp", "mean_raw": FREE, "mean_l2": FREE, "qan": "qan", "clamped": "qanpp",
    "qanpp": "qanpp", "qanpp_l2": "qanpp",
}  # fmt: skip
TRACKS = ("iqiyi_syn", "iqiyi_clean")  # videos with bad frames, and the same before the damage

Scored = dict[str, VideoFrames]  # frames alone (FREE), and with the qualities of each network


class Images(NamedTuple):
    """How a recogniser does on the image tests of its data set."""

    pairs: AllPairs
    accuracy: float  # of the ten-fold verification

    def tpr(self, fpr: float = HEADLINE) -> float:
        """True positive rate at one of `FPRS`."""
        return next(point.tpr for point in self.pairs.points if point.fpr == fpr)


class Shown(NamedTuple):
    """Frames of a video with their learned quality, and how good they truly are."""

    name: str
    images: list[np.ndarray]
    quality_T: np.ndarray
    weight_T: np.ndarray
    truth_T: np.ndarray


def how(trained: Trained) -> Embedding:
    """Embedding in this process."""
    return Embedding(trained.transform, dist.init(), batch=256)


def measure_images(job: Job, points: int = 60) -> Images:
    """Score a recogniser on all pairs of unseen persons and on the verification pairs."""
    trained = load_trained(job.run_dir, device=dist.init().device)
    track, pairs = load_deepglint(job.data / "glint_syn"), load_bin(job.data / "syn.bin")
    out = job.run_dir / "features"
    feature_ND = _embed(trained, track, out / "glint.npy", job.title)
    found = all_pairs(feature_ND, np.asarray(track.labels_N), FPRS, curve_points=points)
    pair_ND = _embed(trained, pairs.images, out / "pairs.npy", job.title)
    return Images(found, verify(pair_ND, pairs.same_P).accuracy)


def _embed(trained: Trained, images: Any, path: Path, title: str) -> np.ndarray:
    rows: Any = ImageRows(images, trained.transform)
    return embed_images(trained.model, rows, how(trained), path, title)


def frames_of(recogniser: Job, scorers: Mapping[str, Job], track: str) -> Scored:
    """Features of all frames of a track, alone and with the qualities of each network."""
    trained = load_trained(recogniser.run_dir, device=dist.init().device)
    videos = load_iqiyi(recogniser.data / track)
    out = recogniser.run_dir / "features" / track
    plain = embed_videos(videos, trained.model, how(trained), None, None, out)
    found = {FREE: plain}
    for name, scorer in scorers.items():
        rated = load_trained(scorer.run_dir, device=dist.init().device)
        rows: Any = ImageRows(videos.frames, rated.transform)
        single = how(rated)._replace(flip=False)
        quality_N1 = embed_images(rated.model, rows, single, out / f"{name}.npy", scorer.title)
        found[name] = plain._replace(quality_N=np.array(quality_N1[:, 0]))
    return found


def rates(scored: Scored) -> dict[str, float]:
    """True positive rate at `HEADLINE` of every aggregator whose network is there."""
    return {
        method: score_videos(scored[row], method, (HEADLINE,)).pairs.points[0].tpr
        for method, row in AGGREGATORS.items()
        if row in scored
    }


def correlation(frames: VideoFrames, track: Path) -> float:
    """Correlation of the learned quality with how good the frames truly are."""
    truth_N = _truth(frames, track)
    return float(np.corrcoef(np.asarray(frames.quality_N), truth_N)[0, 1])


def some_videos(frames: VideoFrames, track: Path, count: int = 4) -> list[Shown]:
    """Videos spread over the list, with the quality and weight of their frames."""
    videos, quality_N = frames.videos, np.asarray(frames.quality_N)
    weight_N, truth_N = (
        score_videos(frames, "qanpp_l2", (HEADLINE,)).weight_N,
        _truth(frames, track),
    )
    found = []
    for video in np.linspace(0, len(videos.videos) - 1, count).round().astype(int):
        row = np.flatnonzero(videos.video_N == video)
        images = [videos.frames.read(int(i)) for i in row]
        name = videos.videos[video]
        found.append(Shown(name, images, quality_N[row], weight_N[row], truth_N[row]))
    return found


def _truth(frames: VideoFrames, track: Path) -> np.ndarray:
    with (track / "quality.txt").open(encoding="utf-8") as lines:
        truth = {name: float(value) for name, value in (line.split() for line in lines)}
    return np.array([truth[name] for name in frames.videos.frames.names])
