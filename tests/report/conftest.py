"""Results with chosen numbers."""

import json
from pathlib import Path

import pytest

MOCHI = "mochi-16-24-8"
PUBLISHED = """experiment,method,task,metric,value,std,source
tiny,mochi-16-24-8,linear,top1,79.0,0.4,table 1
other,random-init,linear,top1,1.0,,table 9
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three runs with chosen numbers."""
    numbers = {("random-init", 0): 10.0, (MOCHI, 0): 50.0, (MOCHI, 1): 53.0}
    for (method, seed), value in numbers.items():
        for task in ("linear", "knn"):
            folder = tmp_path / "results/tiny" / method / f"seed{seed}" / task
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps({"top1": value, "k": 5}))
    (tmp_path / "published.csv").write_text(PUBLISHED)
    return tmp_path
