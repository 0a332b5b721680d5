"""Pictures of `predict`: two faces and their similarity, groups of faces, the feature of one face.

Letters: N pictures, D embedding width, H W size of a face. Lengths on a page are pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.log import InputError
from face_lfr.data.transforms import read_rgb
from face_lfr.pictures import Faces

DPI = 110
MARGIN, GAP, LINE = 16, 8, 17
CELL = 96  # side of a face in a group
PANEL = 250  # height of a face in a pair
TALLEST = 640  # rows of a photo that is drawn
LETTERS = 14  # of a name below a face in a group
NARROWEST = 620
BLUE, RED, GREY = "#0072B2", "#D55E00", "#56768C"  # Okabe and Ito


class Panel(NamedTuple):
    """A picture uint8 (H, W, 3) with lines below it, and points to mark in it, (K, 2)."""

    image: np.ndarray
    lines: Sequence[str]
    points: np.ndarray | None = None


class Group(NamedTuple):
    """A row of faces: what it is, the faces, and how many there are beyond those."""

    title: str
    faces: Sequence[Panel]
    more: int = 0


def draw_prediction(
    faces: Faces,
    vector_ND: np.ndarray,
    result: dict[str, Any],
    path: Path,
    rows: int = 12,
    columns: int = 10,
) -> None:
    """Write the picture of what `predict.json` says.

    Args:
        faces: the pictures, in the order of `result["pictures"]`; those drawn are read again.
        vector_ND: their unit rows.
        result: the content of `predict.json`.
        path: of the PNG.
        rows: groups drawn at most.
        columns: faces of a group drawn at most.

    Raises:
        InputError: matplotlib is not installed.
    """
    if result["mode"] == "folder":
        title = result["verdict"]
        if result["threshold"] is not None:
            title += f"\nabove {result['threshold']:.3f}, {result['linkage']} linkage"
        draw_groups(choose_groups(faces, result, rows, columns), path, title)
        return
    panels = [_panels(faces, result, row) for row in range(len(faces))]
    if result["mode"] == "pair":
        draw_pair(panels[0], panels[1], result, path)
    else:
        draw_feature(panels[0], vector_ND[0], result["embedding"], path)


def _panels(faces: Faces, result: dict[str, Any], row: int) -> list[Panel]:
    """The face as the network's transform stores it, behind the photo it was cut from."""
    entry = result["pictures"][row]
    name = "/".join(Path(entry["path"]).parts[-2:])
    lines = [_short(name, 38), f"norm {entry['norm']:.3g}{_quality(entry)}"]
    face = Panel(faces.transform.fit(faces.read(row)), lines)
    point_52 = faces.pictures[row].point_52
    if point_52 is None:
        return [face]
    photo, factor = _smaller(read_rgb(faces.pictures[row].path))
    return [Panel(photo, ["landmarks of the alignment"], (point_52 + 0.5) * factor - 0.5), face]


def _quality(entry: dict[str, Any]) -> str:
    return "" if entry["quality"] is None else f", quality {entry['quality']:.3f}"


def _smaller(image_HWC: np.ndarray) -> tuple[np.ndarray, float]:
    import cv2

    factor = TALLEST / max(image_HWC.shape[:2])
    if factor >= 1:
        return image_HWC, 1.0
    size = [max(1, round(side * factor)) for side in image_HWC.shape[1::-1]]
    return np.asarray(cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA)), factor


def choose_groups(faces: Faces, result: dict[str, Any], rows: int, columns: int) -> list[Group]:
    """Rows for `draw_groups`: the largest groups, then all pictures that are alone.

    In a group the picture most similar to the mean comes first. Without groups the pictures are
    drawn in their order, each with the similarity of the nearest other.
    """
    entries = result["pictures"]
    if result["clusters"] is None:
        parts = [
            range(start, min(start + columns, len(entries)))
            for start in range(0, len(entries), columns)
        ]
        kept = [_group(faces, entries, part, columns, "") for part in parts[:rows]]
        return _say_more(kept, sum(map(len, parts[rows:])), "pictures")
    members: dict[int, list[int]] = {}
    for row, entry in enumerate(entries):
        members.setdefault(entry["cluster"], []).append(row)
    order = sorted(members, key=lambda label: (-len(members[label]), label))
    shown = [label for label in order if len(members[label]) > 1]
    alone = [members[label][0] for label in order if len(members[label]) == 1]
    groups = []
    for label in shown[:rows]:
        part = sorted(members[label], key=lambda row: -entries[row]["similarity_to_mean"])
        title = f"person {label}: {len(part)} pictures"
        groups.append(_group(faces, entries, part, columns, title))
    groups = _say_more(groups, len(shown[rows:]), "persons")
    if alone:
        groups.append(_group(faces, entries, alone, columns, f"in a single picture: {len(alone)}"))
    return groups


def _group(
    faces: Faces, entries: Sequence[dict[str, Any]], part: Sequence[int], columns: int, title: str
) -> Group:
    alone = not title.startswith("person")
    panels = []
    for row in part[:columns]:
        entry = entries[row]
        if not alone:
            said = f"{entry['similarity_to_mean']:.3f}"
        elif entry["nearest_similarity"] is None:
            said = "nothing to compare"
        else:
            said = f"nearest {entry['nearest_similarity']:.3f}"
        lines = [said, _short(Path(entry["path"]).name, LETTERS)]
        if entry["quality"] is not None:
            lines.insert(1, f"quality {entry['quality']:.2f}")
        panels.append(Panel(faces.transform.fit(faces.read(row)), lines))
    return Group(title, panels, max(0, len(part) - columns))


def _say_more(groups: list[Group], more: int, what: str) -> list[Group]:
    if more and groups:
        title = f"{groups[-1].title}   (and {more} more {what}, not drawn)".strip()
        groups[-1] = groups[-1]._replace(title=title)
    return groups


def draw_groups(groups: Sequence[Group], path: Path, title: str) -> None:
    """A group a row; below each face its lines, of which the first is its similarity.

    Raises:
        ValueError: no group, or one without a face.
        InputError: matplotlib is not installed.
    """
    if not groups or not all(group.faces for group in groups):
        raise ValueError("groups must not be empty")
    most = max(len(group.faces) + (group.more > 0) * 0.8 for group in groups)
    width = max(NARROWEST, 2 * MARGIN + most * (CELL + GAP))
    lines = max(len(panel.lines) for group in groups for panel in group.faces)
    heights = [LINE * bool(group.title) + CELL + LINE * lines + GAP for group in groups]
    first, *notes = title.split("\n")
    top = MARGIN + LINE * (1 + len(notes)) + GAP
    page = _Page(width, top + sum(heights) + MARGIN)
    page.text(MARGIN, MARGIN, first, size=11, weight="bold")
    for number, note in enumerate(notes, start=1):
        page.text(MARGIN, MARGIN + 1.1 * LINE * number, note, size=9, color=GREY)
    for group, height in zip(groups, heights, strict=True):
        under = top + LINE * bool(group.title)
        page.text(MARGIN, top, group.title, size=9, weight="bold", color=GREY)
        for column, panel in enumerate(group.faces):
            left = MARGIN + column * (CELL + GAP)
            page.image(panel.image, left, under, CELL, CELL)
            for number, line in enumerate(panel.lines):
                colour = "black" if number == 0 else GREY
                spot = (left + CELL / 2, under + CELL + 3 + LINE * 0.85 * number)
                page.text(*spot, line, size=7.5, ha="center", color=colour)
        if group.more:
            left = MARGIN + len(group.faces) * (CELL + GAP)
            page.text(left, under + CELL / 2, f"and {group.more} more", size=8, va="center")
        top += height
    page.save(path)


def draw_pair(
    left: Sequence[Panel], right: Sequence[Panel], result: dict[str, Any], path: Path
) -> None:
    """Two faces side by side, and their similarity on a scale with the threshold.

    Raises:
        InputError: matplotlib is not installed.
    """
    panels = [*left, *right[::-1]]  # photos outside, the faces next to each other
    widths = [PANEL * panel.image.shape[1] / panel.image.shape[0] for panel in panels]
    content = sum(widths) + 3 * GAP * (len(widths) - 1)
    width = max(NARROWEST, 2 * MARGIN + content)
    similarity, threshold = result["similarity"], result["threshold"]
    below = 6 * LINE if threshold is None else 7 * LINE
    page = _Page(width, MARGIN + 2 * LINE + PANEL + below + MARGIN)
    colour = GREY if threshold is None else BLUE if similarity > threshold else RED
    said = f"similarity {similarity:.3f}: {result['verdict']}"
    page.text(width / 2, MARGIN, said, size=13, weight="bold", ha="center", color=colour)
    spot, top = (width - content) / 2, MARGIN + 2 * LINE
    for panel, wide in zip(panels, widths, strict=True):
        page.panel(panel, spot, top, wide, PANEL)
        spot += wide + 3 * GAP
    _scale(page, top + PANEL + 3.5 * LINE, width, similarity, result, colour)
    page.save(path)


def _scale(
    page: "_Page", top: float, width: float, similarity: float, result: dict[str, Any], colour: str
) -> None:
    """Cosines from -1 to 1; what lies right of the threshold counts as the same person."""
    start, length, thick = 3.0 * MARGIN, width - 6 * MARGIN, 12

    def place(value: float) -> float:
        return start + length * (value + 1) / 2

    threshold = result["threshold"]
    if threshold is None:
        page.box(start, top, length, thick, "#D0D0D0")
    else:
        page.box(start, top, place(threshold) - start, thick, RED, 0.35)
        page.box(place(threshold), top, place(1) - place(threshold), thick, BLUE, 0.35)
        page.line(place(threshold), top - 5, top + thick + 5, "black")
        rate = "" if result["fpr"] is None else f" (FPR {result['fpr']:g})"
        edge = min(max(place(threshold), start + 70), place(1) - 70)
        said = f"threshold {threshold:.3f}{rate}"
        page.text(edge, top + thick + LINE * 1.4, said, size=8, ha="center")
    for tick in (-1, -0.5, 0, 0.5, 1):
        page.text(place(tick), top + thick + 5, f"{tick:g}", size=7.5, ha="center", color=GREY)
    page.dot(place(similarity), top + thick / 2, colour)


def draw_feature(
    panels: Sequence[Panel], vector_D: np.ndarray, facts: dict[str, Any], path: Path
) -> None:
    """A face and the numbers of its unit feature.

    Raises:
        InputError: matplotlib is not installed.
    """
    widths = [PANEL * panel.image.shape[1] / panel.image.shape[0] for panel in panels]
    content, chart = sum(widths) + 3 * GAP * len(widths), 460
    width, height = MARGIN + content + 3 * MARGIN + chart + MARGIN, PANEL + 3 * LINE + 2 * MARGIN
    page = _Page(width, height)
    spot = float(MARGIN)
    for panel, wide in zip(panels, widths, strict=True):
        page.panel(panel, spot, MARGIN, wide, PANEL)
        spot += wide + 3 * GAP
    box = (spot + 3 * MARGIN) / width, (height - MARGIN - PANEL) / height
    axes = page.figure.add_axes((*box, chart / width, (PANEL - 2 * LINE) / height))
    axes.vlines(range(len(vector_D)), 0, vector_D, color=BLUE, lw=min(4.0, 300 / len(vector_D)))
    axes.axhline(0, color=GREY, lw=0.8)
    axes.set_title(
        f"unit feature, {facts['width']} numbers; cosine to the mirror image's "
        f"{facts['mirror_cosine']:.3f}", size=9,
    )  # fmt: skip
    axes.set_xlim(-0.5, len(vector_D) - 0.5)
    axes.tick_params(labelsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)
    page.save(path)


def _short(name: str, letters: int) -> str:
    """The end of a name, which tells files apart."""
    return name if len(name) <= letters else "\N{HORIZONTAL ELLIPSIS}" + name[1 - letters :]


class _Page:
    """A white page in pixels, the origin at the upper left."""

    def __init__(self, width: float, height: float):
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            what = "not installed: pip install 'vision-tasks[lfr]'"
            raise InputError("matplotlib", what) from error
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self._limit()
        self.axes.set_axis_off()

    def _limit(self) -> None:
        self.axes.set(xlim=(0, self.width), ylim=(self.height, 0))

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Names of files are no formulas: a $ stays a $."""
        self.axes.text(x, y, text, parse_math=False, **{"va": "top"} | style)

    def image(self, image: np.ndarray, x: float, y: float, width: float, height: float) -> None:
        smooth = "hanning" if height < image.shape[0] else "nearest"
        extent = (x, x + width, y + height, y)
        self.axes.imshow(image, extent=extent, interpolation=smooth, aspect="auto")
        self._limit()  # imshow moves the limits to its picture

    def panel(self, panel: Panel, x: float, y: float, width: float, height: float) -> None:
        self.image(panel.image, x, y, width, height)
        if panel.points is not None:
            rows, columns = panel.image.shape[:2]
            spot_K2 = (panel.points + 0.5) * (width / columns, height / rows) + (x, y)
            self.axes.plot(*spot_K2.T, "o", ms=4.5, color=RED, mec="white", mew=1.0)
        for number, line in enumerate(panel.lines):
            self.text(x + width / 2, y + height + 4 + LINE * number, line, size=8, ha="center")

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, alpha: float = 1.0
    ) -> None:
        from matplotlib.patches import Rectangle

        patch = Rectangle((x, y), width, height, facecolor=colour, alpha=alpha, linewidth=0)
        self.axes.add_patch(patch)

    def line(self, x: float, top: float, bottom: float, colour: str) -> None:
        self.axes.plot([x, x], [top, bottom], color=colour, lw=1.4)

    def dot(self, x: float, y: float, colour: str) -> None:
        self.axes.plot(x, y, "o", ms=9, color=colour, mec="white", mew=1.5, zorder=5)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path, dpi=DPI)
