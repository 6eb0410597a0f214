"""What a reader sees in a drawing of matplotlib, read from its artists."""

import numpy as np
from matplotlib.axes import Axes


def undrawn(axis: Axes) -> list[str]:
    """Names of the legend that no line, marker or area within the axes stands for."""
    legend = axis.get_legend()
    names = [] if legend is None else [text.get_text() for text in legend.get_texts()]
    return [name for name in names if not any(_in_view(axis, artist) for artist in axis.get_children()
                                              if artist.get_label() == name)]  # fmt: skip


def _in_view(axis: Axes, artist: object) -> bool:
    """Whether a marker, or two ends of a line, or an area's corners lie within the axes."""
    frame = axis.viewLim
    if hasattr(artist, "get_xydata"):
        points = np.asarray(artist.get_xydata())
        least = 1 if artist.get_marker() not in (None, "None", "") else 2
    else:
        points, least = np.concatenate([path.vertices for path in artist.get_paths()]), 3
    return sum(frame.contains(x, y) for x, y in points) >= least


def assert_names_are_apart(axis: Axes, points: dict[str, tuple[float, float]]) -> None:
    """Each point has its name; no name lies on another one or leaves the axes; without a line, no point is nearer."""
    axis.figure.draw_without_rendering()
    boxes = {t.get_text(): t.get_window_extent() for t in axis.texts if str(t.get_gid()).startswith("name-")}
    frame = axis.get_window_extent()
    assert sorted(boxes) == sorted(points)
    pixels = axis.transData.transform(list(points.values()))
    tied = [tuple(line.get_xydata()[0]) for line in axis.get_lines() if line.get_linewidth() < 1]
    for own, (name, point) in zip(pixels, points.items(), strict=True):
        box = boxes[name]
        assert box.count_overlaps(list(boxes.values())) == 1, name  # itself
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1, name
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1, name
        away = np.hypot(*(np.clip([own, *pixels], box.min, box.max) - [own, *pixels]).T)
        assert point in tied or away.min() >= away[0] - 1, name


def whole_ticks(axis: Axes) -> bool:
    """Whether each tick of the x axis is at a whole number."""
    low, high = sorted(axis.get_xlim())
    return all(float(tick).is_integer() for tick in axis.get_xticks() if low <= tick <= high)
