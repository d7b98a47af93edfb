"""Settings for every test, and the tiny experiment with its data."""

import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import settings

from mochi.config import Experiment, load_experiment
from mochi.config.datasets import Folder
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from tests.project import Project
from tests.tiny import FILE

# No deadline: timings vary. The same examples every time: a failing test keeps failing.
settings.register_profile("mochi", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("mochi")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="do not hide the GPUs of this host (make test-gpu)")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from the other tests, which compare numbers and bytes of the CPU."""
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small tensors are slow on many threads, and results depend on the number of threads."""
    import torch  # here, because the process that only distributes tests does not need it

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Experiment:
    """The experiment of tests/tiny.yaml."""
    return load_experiment(FILE)


@pytest.fixture(scope="session")
def tiny_data(tiny: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its prepared data set."""
    folder = tmp_path_factory.mktemp("data") / tiny.dataset.name
    prepare(tiny.dataset, folder, jobs=1)
    return folder


@pytest.fixture(scope="session")
def partly_labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared data set of noise: in train 24 labelled images of two classes and 9 without a
    label, in val 8 images.
    """
    from tests.evaluation.runs import write_images  # here: it imports torch

    root = tmp_path_factory.mktemp("partly labelled")
    counts = {"train/unlabelled": 9, "train/a": 10, "train/z": 14, "val/a": 4, "val/z": 4}
    write_images(root / "images", counts)
    prepared = root / "prepared"
    prepare(Folder(source="folder", name="mine", path=str(root / "images")), prepared, jobs=1)
    split = open_dataset(prepared).split("train")
    assert (len(split), len(split.labelled)) == (33, 24)
    return prepared


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project with the finished tiny experiment, in a folder whose name has a space and an accent.

    Copy it before you change anything.
    """
    # Workers of a test run share it: the first one creates it, the others wait.
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "a clone" / "mochi é"
    with (shared / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            project = Project.new(folder)
            done = project.snakemake()
            assert done.returncode == 0, done.stderr[-4000:]
    return Project(folder)


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the finished project for the tests of one file. They may run it but change no setting."""
    return finished.copy(tmp_path_factory.mktemp("project") / "mochi é")


@pytest.fixture
def copy(project: Project, tmp_path: Path) -> Project:
    """A copy that one test may change."""
    return project.copy(tmp_path / "copy")
