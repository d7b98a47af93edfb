"""Peak memory of an evaluation: 1.1 times the features plus a constant."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mochi.config import Experiment, probe_run
from mochi.config.datasets import PhotoPatches
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.evaluation.feature_files import FeatureFiles
from mochi.evaluation.features import Frozen
from mochi.evaluation.resume import ResumePoint
from mochi.provenance.record import Stopwatch
from tests.evaluation.runs import result_in
from tests.processes import context
from tests.tiny import with_protocol

NUM_FEATURES = 2048
CONSTANT = 128 << 20
"""Memory in bytes that an evaluation may need in addition to the features."""
STATUS = Path("/proc/self/status")

pytestmark = pytest.mark.skipif(
    not STATUS.exists(), reason="this system does not report the peak memory of a process"
)


class WideEncoder(nn.Module):
    """Many features of a small image, without cost."""

    num_features = NUM_FEATURES

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).repeat(1, 3)[:, :NUM_FEATURES]


def peak() -> int:
    """Peak memory of this process in bytes, shared libraries and mapped files included."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


def growth(
    experiment: Experiment,
    task: str,
    shared: bool,
    encoder_file: Path,
    small: Path,
    large: Path,
    work: Path,
) -> int:
    """By how much evaluating the large data set, after the small one, raises the peak of this process."""
    torch.set_num_threads(1)
    run = probe_run(experiment, "random-init", 0, task)
    encoder: Any = WideEncoder()
    peaks = []
    for data in (small, large):
        resume_point = ResumePoint(work, result_in(work, experiment, task, encoder_file, data), Stopwatch())
        result = result_in(work, experiment, task, encoder_file, data)
        files = FeatureFiles(work / "features" / data.parent.name, result, [], [result]) if shared else None
        for _ in range(1 + shared):  # the second time from the files of the first run
            frozen = Frozen(run, encoder, open_dataset(data), torch.device("cpu"), 0, resume_point, files)
            run.protocol.evaluate(frozen)
        peaks.append(peak())
    return peaks[1] - peaks[0]


@pytest.fixture(scope="module")
def large_data(tiny: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24,000 images in train, 1,600 in val."""
    assert isinstance(tiny.dataset, PhotoPatches)
    folder = tmp_path_factory.mktemp("large") / "patches"
    prepare(tiny.dataset.model_copy(update={"train_per_photo": 1500, "val_per_photo": 100}), folder, jobs=1)
    return folder


@pytest.mark.parametrize(
    ("task", "protocol", "shared", "rows"),
    [
        ("knn", {"k": 200}, False, 24_000 + 1600),
        ("knn", {"k": 200}, True, 24_000 + 1600),
        ("linear", {"epochs": 1, "lr_drops": [], "batch_size": 256}, False, 24_000 + 1600),
        ("linear", {"epochs": 1, "lr_drops": [], "batch_size": 256, "min_scale": 0.2}, False, 2400 + 1600),
        ("few", {"task": "few_label", "images_per_class": 5, "samples": 1}, False, 24_000 + 1600),
    ],
    ids=["knn", "knn from files", "linear on features", "linear on crops", "few labels"],
)
def test_features_are_in_memory_once(
    task: str,
    protocol: dict[str, Any],
    shared: bool,
    rows: int,
    encoder_file: Path,
    tiny_data: Path,
    large_data: Path,
    tmp_path: Path,
) -> None:
    experiment = with_protocol(task, **protocol)
    arguments = experiment, task, shared, encoder_file, tiny_data, large_data, tmp_path
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        grown = pool.submit(growth, *arguments).result()
    features = rows * NUM_FEATURES * torch.float32.itemsize
    assert grown < 1.1 * features + CONSTANT
    assert grown > features / 2, "it was measured"
