"""An untrained encoder of the tiny experiment, and what it makes of train and val, taken by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mochi.config import Experiment, resolve
from mochi.data.format import open_dataset
from mochi.data.views.loading import Loading, centre_crops
from mochi.evaluation.features import load_encoder
from mochi.pretraining import stage as pretrain
from mochi.runtime.precision import autocast

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def encoder_file(tiny: Experiment, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    pretrain.run(resolve(tiny, "random-init", 0), tiny_data, folder, folder)
    return folder / "encoder.safetensors"


@pytest.fixture(scope="session")
def by_hand(tiny: Experiment, tiny_data: Path, encoder_file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Split -> features and labels of its images, one image at a time."""
    encoder = load_encoder(encoder_file, tiny.encoder, CPU)
    found = {}
    for name in ("train", "val"):
        split = open_dataset(tiny_data).split(name)
        crops = centre_crops(split, Loading(1, CPU), resize=16, image_size=16)
        with torch.inference_mode(), autocast(CPU, "auto"):
            rows = [encoder(crop.images).float() for crop in crops]
        found[name] = torch.cat(rows).clone(), torch.from_numpy(split.labels.copy())
    assert (len(found["train"][1]), len(found["val"][1])) == (160, 64)
    return found
