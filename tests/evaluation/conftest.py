"""An untrained encoder, and its features computed one image at a time."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mochi.config import Experiment
from mochi.data.format import open_dataset
from mochi.data.views.loading import Loading, centre_crops
from mochi.encoders import build_untrained
from mochi.encoders.files import load_encoder, save_encoder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The format that `auto` chooses, on every CPU: tests compare numbers."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)


@pytest.fixture(scope="session")
def encoder_file(tiny: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(file, build_untrained(tiny.encoder, seed=0))
    return file


@pytest.fixture(scope="session")
def by_hand(tiny: Experiment, tiny_data: Path, encoder_file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Split -> float32 features and labels of its images, computed one image at a time."""
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
