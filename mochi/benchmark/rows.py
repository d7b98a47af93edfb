"""One line of a benchmark: ours beside another way, both measured in one run."""

import statistics
from typing import Any

Row = dict[str, Any]
"""part, ours and beside (medians), unit, ratio (ours / beside), spread of the ratio, runs, note."""


def row(part: str, ours: list[float], beside: list[float], unit: str, *, note: str = "") -> Row:
    """Medians, and the median ratio with its range; pairs were timed one after the other."""
    ratios = [mine / other for mine, other in zip(ours, beside, strict=True)]
    return {
        "part": part,
        "ours": statistics.median(ours) if ours else None,
        "beside": statistics.median(beside) if beside else None,
        "unit": unit,
        "ratio": statistics.median(ratios) if ratios else None,
        "spread": [min(ratios), max(ratios)] if ratios else None,
        "runs": len(ours),
        "note": note,
    }
