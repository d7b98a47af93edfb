"""Draw docs/idea.svg: a query, its hardest negatives, and the synthetic negatives of MoCHi section 3.

`python docs/draw_idea.py`. Unit vectors in three dimensions, projected around the query: the
distance to the centre is the angle to the query.
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

NUM_NEGATIVES, NUM_HARDEST = 130, 12
QUERY = np.array([0.0, 0.0, 1.0])


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale rows to length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def seen_from_query(vectors: np.ndarray) -> np.ndarray:
    """(M, 3) unit vectors -> (M, 2) degrees from the query (azimuthal equidistant projection)."""
    angle = np.degrees(np.arccos(np.clip(vectors[:, 2], -1, 1)))
    direction = vectors[:, :2] / np.maximum(np.linalg.norm(vectors[:, :2], axis=1, keepdims=True), 1e-9)
    return angle[:, None] * direction


def draw(path: Path) -> None:
    """Write the figure."""
    mpl.rcParams.update({"svg.hashsalt": "mochi", "svg.fonttype": "path", "font.size": 10})
    random = np.random.default_rng(6)
    negatives = unit(random.normal((0, 0, 0.55), 1, (NUM_NEGATIVES, 3)))
    negatives = negatives[negatives @ QUERY < np.cos(np.radians(26))]
    key = unit(np.array([0.13, 0.1, 1.0]))
    hardest = negatives[np.argsort(-negatives @ QUERY)[:NUM_HARDEST]]
    first, second = random.permuted(np.tile(np.arange(NUM_HARDEST), (9, 1)), axis=1)[:, :2].T
    a = random.uniform(0.3, 0.7, (9, 1))
    pairs = unit(a * hardest[first] + (1 - a) * hardest[second])
    third = random.permutation(NUM_HARDEST)[:6]
    b = random.uniform(0.2, 0.5, (6, 1))
    mixes = unit(b * QUERY + (1 - b) * hardest[third])

    figure, axes = plt.subplots(figsize=(7.6, 4.3))
    place = seen_from_query
    for starts, ends in ((hardest[first], hardest[second]), (hardest[third], np.tile(QUERY, (6, 1)))):
        for start, end in zip(starts, ends, strict=True):
            share = np.linspace(0, 1, 30)[:, None]
            axes.plot(*place(unit((1 - share) * start + share * end)).T, color="0.82", lw=0.8, zorder=1)
    radius = np.degrees(np.arccos(hardest @ QUERY)).max() + 1.5
    axes.add_patch(plt.Circle((0, 0), radius, fill=False, ls=(0, (4, 3)), color="0.55", lw=0.9))
    series = (
        (negatives, "o", 14, "0.72", f"negatives in the queue (K = {len(negatives)})"),
        (hardest, "o", 34, "#0b5394", f"the hardest of them (N = {NUM_HARDEST})"),
        (pairs, "D", 34, "#e69138", "synthetic: mixed from two (s = 9)"),
        (mixes, "^", 46, "#38761d", "synthetic: mixed with the query (s' = 6)"),
        (key[None], "P", 80, "#000000", "key: the other view of the image"),
        (QUERY[None], "*", 190, "#cc0000", "query"),
    )
    for vectors, marker, size, colour, label in series:
        axes.scatter(
            *place(vectors).T,
            marker=marker,
            s=size,
            c=colour,
            edgecolors="white",
            lw=0.6,
            label=label,
            zorder=3,
        )
    axes.set(aspect="equal", xlim=(-58, 58), ylim=(-58, 58))
    axes.axis("off")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, labelspacing=1.1)
    axes.set_title("Distance to the centre: angle to the query", y=-0.06, color="0.35", fontsize=9)
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("idea.svg"))
