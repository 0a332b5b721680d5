"""Painter of the synthetic people: three bands of clothing, covered in some of the frames.

Shapes: T frames, H rows, W columns, h rows of a region, K styles, V cameras, 3 = colour (blue,
green, red in [0, 1]) or region (upper, middle, lower).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

MARGIN = 3  # columns of background on both sides of a person
JITTER = 2  # columns a person moves about
HATCH_PERIOD = 6
NOISE = 0.04
GAIN = (0.85, 1.15)  # brightness of a frame
PLAIN, ROWS, COLUMNS = 0, 1, 2  # stripe orientations


def clean_frames(
    rng: np.random.Generator, frames: int, cover: float, keep: float, *, together: bool
) -> np.ndarray:
    """Mask (T, 3) of the frames in which a region is uncovered.

    A two-state chain per region: with probability `keep` a frame repeats the state before it,
    otherwise the state is drawn anew, so that `cover` is its stationary probability. At least one
    frame of every region is clean. `together` runs one chain for all three regions.
    """
    chains = 1 if together else 3
    fresh = rng.random((frames, chains)) < cover
    kept = rng.random((frames, chains)) < keep
    covered = fresh.copy()
    for t in range(1, frames):
        covered[t] = np.where(kept[t], covered[t - 1], fresh[t])
    rescued = rng.integers(frames, size=chains)
    for chain in np.flatnonzero(covered.all(axis=0)):
        covered[rescued[chain], chain] = False
    return np.repeat(~covered, 3 // chains, axis=1)


class Clothes(NamedTuple):
    """N styles: `colours` (N, 2, 3), `stripes` (N,) orientation, `periods` (N,) pixels."""

    colours: np.ndarray
    stripes: np.ndarray
    periods: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int) -> Self:
        """Two random colours, an orientation (or none) and a period of 2 to 4 pixels each."""
        colours = rng.uniform(0.1, 0.9, (count, 2, 3))
        return cls(colours, rng.integers(3, size=count), rng.integers(2, 5, size=count))


@dataclass(frozen=True)
class Painter:
    """Clothing styles and cameras of one data set, and how to draw a tracklet with them.

    `colours` (K, 2, 3), `stripes` (K,) orientation, `periods` (K,) pixels; `cameras` (V, 3) gains.
    """

    height: int
    width: int
    colours: np.ndarray
    stripes: np.ndarray
    periods: np.ndarray
    cameras: np.ndarray
    contrast: float
    nohatch: float

    @classmethod
    def draw(
        cls,
        rng: np.random.Generator,
        height: int,
        width: int,
        styles: int,
        views: int,
        *,
        contrast: float,
        nohatch: float,
    ) -> Self:
        """Random styles (two colours, stripe orientation, period 2-4) and camera colour gains."""
        cameras = rng.uniform(0.8, 1.2, (views, 3))
        return cls(height, width, *Clothes.draw(rng, styles), cameras, contrast, nohatch)

    @property
    def edges(self) -> tuple[int, int, int, int]:
        """Region borders in rows: 0, 24, 40, 56 of 56, which is 3:2:2 at a stride of 8."""
        return 0, round(self.height * 24 / 56), round(self.height * 40 / 56), self.height

    def tracklet(
        self,
        rng: np.random.Generator,
        style_3: Sequence[int] | np.ndarray,
        clean_T3: np.ndarray,
        view: int,
        cover: str = "style",
    ) -> np.ndarray:
        """Draw one person in one camera: uint8 (T, H, W, 3), blue first.

        Args:
            rng: of everything random in the images.
            style_3: clothing of the three regions.
            clean_T3: where the person's own clothing shows.
            view: camera, 0..V-1.
            cover: "style" (foreign clothing, mostly hatched) or "blur_dark".
        """
        frames = len(clean_T3)
        image_THW3 = np.empty((frames, self.height, self.width, 3))
        image_THW3[:] = rng.uniform(0.1, 0.9, 3)  # background of the tracklet
        left_T = MARGIN + rng.integers(-JITTER, JITTER + 1, size=frames)
        spoil = self._foreign if cover == "style" else self._blur_dark
        inside_T1W1 = self._inside(left_T)
        for region, (top, bottom) in enumerate(zip(self.edges, self.edges[1:], strict=False)):
            own_T = np.full(frames, style_3[region])
            own_ThW3 = self._texture(rng, self._worn(own_T), left_T, bottom - top)
            bad_ThW3 = spoil(rng, own_T, own_ThW3, left_T)
            shown_ThW3 = np.where(clean_T3[:, region, None, None, None], own_ThW3, bad_ThW3)
            band_ThW3 = image_THW3[:, top:bottom]
            image_THW3[:, top:bottom] = np.where(inside_T1W1, shown_ThW3, band_ThW3)
        image_THW3 *= self.cameras[view] * rng.uniform(*GAIN, (frames, 1, 1, 1))
        image_THW3 += rng.normal(0, NOISE, image_THW3.shape)
        return (image_THW3.clip(0, 1) * 255).round().astype(np.uint8)

    def _inside(self, left_T: np.ndarray) -> np.ndarray:
        column_TW = np.arange(self.width) - left_T[:, None]
        inside_TW = (column_TW >= 0) & (column_TW < self.width - 2 * MARGIN)
        return inside_TW[:, None, :, None]

    def _worn(self, style_T: np.ndarray) -> Clothes:
        return Clothes(self.colours[style_T], self.stripes[style_T], self.periods[style_T])

    def _texture(
        self, rng: np.random.Generator, clothes: Clothes, left_T: np.ndarray, rows: int
    ) -> np.ndarray:
        """Clothing (T, h, W, 3), a style per frame, with a new stripe phase in every frame."""
        frames = len(left_T)
        stripes_T11 = clothes.stripes[:, None, None]
        row_1h1 = np.arange(rows)[None, :, None]
        column_T1W = (np.arange(self.width) - left_T[:, None])[:, None, :]
        phase_T11 = rng.integers(12, size=(frames, 1, 1))  # 12 = lcm of the periods
        place_ThW = np.where(stripes_T11 == ROWS, row_1h1, column_T1W) + phase_T11
        period_T11 = clothes.periods[:, None, None]
        second_ThW = (place_ThW % period_T11 >= period_T11 / 2) & (stripes_T11 != PLAIN)
        colour_T23 = clothes.colours
        return np.where(second_ThW[..., None], colour_T23[:, None, None, 1],
                        colour_T23[:, None, None, 0])  # fmt: skip

    def _foreign(
        self,
        rng: np.random.Generator,
        own_T: np.ndarray,
        own_ThW3: np.ndarray,
        left_T: np.ndarray,
    ) -> np.ndarray:
        """Colours of another style in a pattern of its own, mostly under a diagonal hatch."""
        (frames, rows), styles = own_ThW3.shape[:2], len(self.periods)
        other_T = (own_T + rng.integers(1, styles, size=frames)) % styles
        odd = Clothes.draw(rng, frames)._replace(colours=self.colours[other_T])
        cover_ThW3 = self._texture(rng, odd, left_T, rows)
        sign_T = rng.choice((-1.0, 1.0), size=frames) * (rng.random(frames) >= self.nohatch)
        phase_T11 = rng.integers(HATCH_PERIOD, size=(frames, 1, 1))
        diagonal_hW = np.arange(rows)[:, None] + np.arange(self.width)
        line_ThW = (diagonal_hW + phase_T11) % HATCH_PERIOD < HATCH_PERIOD // 2
        return cover_ThW3 + (self.contrast * sign_T[:, None, None] * line_ThW)[..., None]

    def _blur_dark(
        self,
        rng: np.random.Generator,
        own_T: np.ndarray,
        own_ThW3: np.ndarray,
        left_T: np.ndarray,
    ) -> np.ndarray:
        """The own clothing without its stripes, two thirds of its rows four times darker."""
        rows = own_ThW3.shape[1]
        bad_ThW3 = np.broadcast_to(own_ThW3.mean(axis=(1, 2), keepdims=True), own_ThW3.shape).copy()
        depth = -(-2 * rows // 3)
        top_T = rng.integers(rows - depth + 1, size=len(own_ThW3))
        row_Th = np.arange(rows) - top_T[:, None]
        dark_Th = (row_Th >= 0) & (row_Th < depth)
        bad_ThW3[dark_Th] *= 0.25
        return bad_ThW3
