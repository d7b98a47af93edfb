"""An untrained encoder, what it makes of train and val taken by hand, and a set with unlabelled images."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mochi.config import Experiment
from mochi.config.datasets import Folder
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.views.loading import Loading, centre_crops
from mochi.encoders import build_untrained
from mochi.encoders.files import load_encoder, save_encoder
from tests.evaluation.runs import write_images

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The format that `auto` chooses, whatever this processor has: numbers are compared."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)


@pytest.fixture(scope="session")
def encoder_file(tiny: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(file, build_untrained(tiny.encoder, seed=0))
    return file


@pytest.fixture(scope="session")
def by_hand(tiny: Experiment, tiny_data: Path, encoder_file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Split -> features in float32 and labels of its images, one image at a time."""
    encoder = load_encoder(encoder_file, tiny.encoder, CPU)
    found = {}
    for name in ("train", "val"):
        split = open_dataset(tiny_data).split(name)
        crops = centre_crops(split, Loading(1, CPU), resize=16, image_size=16)
        with torch.inference_mode():
            rows = [encoder(crop.images) for crop in crops]
        found[name] = torch.cat(rows).clone(), torch.from_numpy(split.labels.copy())
    assert (len(found["train"][1]), len(found["val"][1])) == (160, 64)
    return found


@pytest.fixture(scope="session")
def partly_labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set of noise, small enough to read: 24 labelled images of train in two classes, 9 without
    a label, and 8 of val."""
    root = tmp_path_factory.mktemp("partly labelled")
    counts = {"train/unlabelled": 9, "train/a": 10, "train/z": 14, "val/a": 4, "val/z": 4}
    write_images(root / "images", counts)
    prepared = root / "prepared"
    prepare(Folder(source="folder", name="mine", path=str(root / "images")), prepared, jobs=1)
    split = open_dataset(prepared).split("train")
    assert (len(split), len(split.labelled)) == (33, 24)
    return prepared
