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


def lines(rows: list[Row]) -> list[str]:
    """Lines to print: one a row."""
    width = max(len(found["part"]) for found in rows)
    text = [f"{'':{width}}      ours    beside  unit      ratio (range)"]
    for found in rows:
        line = f"{found['part']:{width}}"
        if found["ratio"] is not None:
            low, high = found["spread"]
            line += f"  {found['ours']:8.0f}  {found['beside']:8.0f}  {found['unit']:8}"
            line += f"  {found['ratio']:.2f} ({low:.2f} to {high:.2f})"
        text.append(f"{line}  {found['note']}".rstrip())
    return text
