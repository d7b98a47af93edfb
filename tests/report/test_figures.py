"""Figures are drawn from the numbers, whole, and with the same bytes from the same numbers."""

from pathlib import Path

import pandas as pd

from mochi.config import Experiment
from mochi.report import figures

MOCHI = "mochi-16-24-8"


def test_figures(tiny: Experiment, results: Path) -> None:
    for method, seed in (("random-init", 0), (MOCHI, 0), (MOCHI, 1)):
        folder = results / "results/tiny" / method / f"seed{seed}" / "pretrain"
        folder.mkdir(parents=True)
        epochs = [] if method == "random-init" else [0, 1]
        rows = [
            {
                "epoch": epoch, "loss": 4.0 - epoch + seed, "chance": 4.6, "queue_fill": 1.0,
                "accuracy": 0.2, "accuracy_with_synthetics": 0.1, "false_negatives": 0.06,
                "false_parents_any": 0.1 if epoch else None, "false_parents_all": 0.01 if epoch else None,
            }
            for epoch in epochs
        ]  # fmt: skip
        pd.DataFrame(rows, columns=None if rows else ["epoch"]).to_csv(folder / "metrics.csv", index=False)
        matching = [
            {"epoch": e, "place": p, "probability": 0.1 / (p + 1)} for e in epochs for p in range(9)
        ]
        columns = ["epoch", "place", "probability"]
        pd.DataFrame(matching, columns=columns).to_csv(folder / "matching.csv", index=False)
    for name in ("once", "again"):
        figures.run(tiny, results / "results", results / name)
    for name in ("accuracy", "training", "negatives"):
        once, again = (results / folder / f"{name}.svg" for folder in ("once", "again"))
        assert once.read_bytes() == again.read_bytes()
        assert once.read_text().count("<path") > 10
        assert (results / "once" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
