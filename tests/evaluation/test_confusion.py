"""Confusion matrices compared with counts one by one."""

from collections import Counter
from pathlib import Path

import pandas as pd
import torch

from mochi.evaluation.confusion import confusion, write_confusion


def test_every_pair_that_occurs_with_its_count(tmp_path: Path) -> None:
    labels, predicted = torch.randint(5, (2, 200), generator=torch.Generator().manual_seed(0))
    rows = confusion(labels, predicted)
    counted = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    assert rows == [[a, b, counted[a, b]] for a, b in sorted(counted)]

    names = ["a", 'b, "c"', "<script>", "line\nbreak", "é"]
    write_confusion(tmp_path / "confusion.csv", rows, names)
    table = pd.read_csv(tmp_path / "confusion.csv")
    assert table["images"].sum() == 200
    assert table["class"].tolist() == [names[a] for a, _, _ in rows]
    assert table["predicted"].tolist() == [names[b] for _, b, _ in rows]


def test_without_predictions_there_are_no_rows(tmp_path: Path) -> None:
    write_confusion(tmp_path / "confusion.csv", [], ["a"])
    assert (tmp_path / "confusion.csv").read_text() == "class,predicted,images\n"
