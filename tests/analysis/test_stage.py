"""The stage on the tiny encoder's images compared with features computed by hand, and on unusual data
sets.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from mochi.analysis import stage
from mochi.analysis.geometry import alignment, uniformity
from mochi.config import Experiment, analysis_run
from mochi.config.datasets import Folder
from mochi.data.format import open_dataset
from mochi.data.ingest.prepare import prepare
from mochi.data.views.loading import Loading, centre_crops
from mochi.encoders import build_untrained
from mochi.encoders.files import EncoderError, load_encoder, save_encoder
from mochi.encoders.heads import projection_head
from mochi.provenance.wanted import analyzed
from tests.evaluation.runs import write_images
from tests.tiny import MOCHI

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)


def analyze(tiny: Experiment, data: Path, folder: Path, method: str = MOCHI) -> dict[str, Any]:
    """Run the stage on an untrained encoder and head; analysis.json."""
    folder.mkdir(exist_ok=True)
    save_encoder(folder / "encoder.safetensors", build_untrained(tiny.encoder, seed=0))
    if not (folder / "head.safetensors").exists():
        torch.manual_seed(0)
        save_file(projection_head(64, 16, "mlp").state_dict(), folder / "head.safetensors")
    names = {"encoder": "encoder.safetensors", "head": "head.safetensors"}
    inputs = {name: folder / file for name, file in names.items()} | {"data": data / "manifest.json"}
    result = replace(analyzed(tiny, method, 0), folder=folder / "out", inputs=inputs)
    stage.run(analysis_run(tiny, method, 0), result)
    assert result.why_stale() is None
    for picture in ("neighbours.jpg", "map.jpg"):
        with Image.open(result.folder / picture) as opened:
            opened.load()
    found: dict[str, Any] = json.loads((result.folder / "analysis.json").read_text())
    return found


def test_the_analysis_equals_one_of_features_computed_by_hand(
    tiny: Experiment, tiny_data: Path, tmp_path: Path
) -> None:
    found = analyze(tiny, tiny_data, tmp_path)
    dataset = open_dataset(tiny_data)
    split = dataset.split("val")
    encoder = load_encoder(tmp_path / "encoder.safetensors", tiny.encoder, CPU)
    head = stage.load_head(tmp_path / "head.safetensors", 64, 16, "mlp")
    with torch.no_grad():
        crops = centre_crops(split, Loading(1, CPU), resize=16, image_size=16)
        features = torch.cat([encoder(crop.images) for crop in crops])
        spaces = {"pooled": F.normalize(features), "embedded": F.normalize(head(features))}
    labels = torch.from_numpy(split.labels.copy())
    assert (found["split"], found["num_images"], found["num_labelled"]) == ("val", 64, 64)
    for name, space in spaces.items():
        values = found["spaces"][name]
        assert values["dim"] == space.shape[1]
        assert values["alignment"] == pytest.approx(alignment(space, labels), abs=1e-4)
        assert values["uniformity"] == pytest.approx(uniformity(space), abs=1e-4)
        query = found["queries"][0]
        similarity = space @ space[0]
        order = [row for row in similarity.argsort(descending=True).tolist() if row][:6]
        assert [near["similarity"] for near in query[name]] == pytest.approx(
            similarity[order].tolist(), abs=1e-3
        )
        assert query["class"] == dataset.classes[labels[0]]
        assert {near["class"] for near in query[name]} <= set(dataset.classes)


def test_a_row_without_a_head_has_one_space(tiny: Experiment, tiny_data: Path, tmp_path: Path) -> None:
    assert set(analyze(tiny, tiny_data, tmp_path, "random-init")["spaces"]) == {"pooled"}


@pytest.mark.parametrize(
    ("counts", "labelled", "split"),
    [
        ({"train/a": 1}, 1, "train"),
        ({"train/a": 3, "val/a": 1}, 1, "val"),
        ({"train/a": 3}, 3, "train"),
        ({"train/unlabelled": 12}, 0, "train"),
        ({"train/<script>": 4, "train/é ü": 4, "val/<script>": 2, "val/é ü": 2}, 4, "val"),
    ],
)
def test_few_images_one_class_no_labels_no_val(
    counts: dict[str, int], labelled: int, split: str, tiny: Experiment, tmp_path: Path
) -> None:
    write_images(tmp_path / "images", counts)
    data = tmp_path / "prepared"
    prepare(Folder(source="folder", name="mine", path=str(tmp_path / "images")), data, jobs=1)
    found = analyze(tiny, data, tmp_path / "run")
    assert (found["split"], found["num_labelled"]) == (split, labelled)
    values = found["spaces"]["pooled"]
    assert (values["uniformity"] is None) == (found["num_images"] == 1)
    assert (values["alignment"] is None) == (labelled < 2)


def test_a_head_of_another_shape_is_refused(tiny: Experiment, tiny_data: Path, tmp_path: Path) -> None:
    save_file(projection_head(64, 16, "linear").state_dict(), tmp_path / "head.safetensors")
    with pytest.raises(EncoderError, match=r"head\.safetensors: found .*; expected a mlp head"):
        analyze(tiny, tiny_data, tmp_path)
