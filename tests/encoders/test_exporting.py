"""Exported encoders load strictly in other programs; exporting and importing changes no value."""

import pickle
import shlex
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
import yaml
from torch import Tensor, nn

from mochi import load_encoder
from mochi.config import Encoder
from mochi.encoders import build
from mochi.encoders.exporting import Format, export_encoder
from mochi.encoders.files import (
    EncoderError,
    EncoderInfo,
    digest,
    read_encoder,
    save_encoder,
    write_tensors,
)
from mochi.encoders.importing import Choices, import_checkpoint

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FORMATS: tuple[Format, ...] = ("torchvision", "timm", "detectron2", "moco")


def saved(folder: Path, architecture: str = "resnet18", stem: str = "imagenet", width: int = 64) -> Path:
    config = Encoder.model_validate({"architecture": architecture, "stem": stem, "width": width})
    encoder = build(config, seed=1)
    encoder(IMAGES)  # statistics that are not the initial ones
    save_encoder(folder / "X.safetensors", encoder, EncoderInfo.of(config, method="moco-v2"))
    return folder / "X.safetensors"


def features(module: nn.Module) -> Tensor:
    with torch.no_grad():
        vectors: Tensor = module.eval().double()(IMAGES.double())
    return vectors


def values_digest(path: Path) -> str:
    return digest(read_encoder(path).tensors)


@pytest.mark.parametrize("format", FORMATS)
def test_an_exported_and_imported_encoder_is_the_same(format: Format, tmp_path: Path) -> None:
    path = saved(tmp_path)
    export_encoder(path, format, tmp_path / "exported")
    import_checkpoint(str(tmp_path / "exported"), tmp_path / "again.safetensors")
    assert values_digest(tmp_path / "again.safetensors") == values_digest(path)
    again = load_encoder(tmp_path / "again.safetensors")
    assert torch.equal(features(again), features(load_encoder(path)))


@pytest.mark.parametrize(
    ("architecture", "stem"),
    [
        ("resnet18", "imagenet"),
        ("resnet50", "imagenet"),
        ("resnext50_32x4d", "imagenet"),
        ("resnet10", "imagenet"),
        ("resnet18", "half"),
        ("resnet10", "full"),
    ],
)
def test_torchvision_and_timm_load_it_strictly(architecture: str, stem: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    path = saved(tmp_path, architecture, stem=stem)
    expected = features(load_encoder(path))
    names: dict[str, Any] = {
        "models": torchvision.models, "timm": timm, "nn": nn, "torch": torch, "safetensors": safetensors,
    }  # fmt: skip
    (tmp_path / 'it\'s "odd"').mkdir()
    for program in FORMATS[:2]:
        lines = export_encoder(path, program, tmp_path / 'it\'s "odd"/x y')
        line = next(line for line in lines if line.startswith("  load: ")).removeprefix("  load: ")
        with torch.random.fork_rng():
            exec(line, names)  # noqa: S102 (what the user is told to run)
        torch.testing.assert_close(features(names["model"]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stem", ["half", "full"])
def test_a_small_stem_is_exported_and_imported(stem: str, tmp_path: Path) -> None:
    path = saved(tmp_path, stem=stem)
    export_encoder(path, "torchvision", tmp_path / "exported")
    import_checkpoint(str(tmp_path / "exported"), tmp_path / "again.safetensors", Choices(stem=stem))
    assert values_digest(tmp_path / "again.safetensors") == values_digest(path)


@pytest.mark.parametrize("format", FORMATS)
def test_the_normalisation_is_stated_once(format: Format, tmp_path: Path) -> None:
    lines = export_encoder(saved(tmp_path), format, tmp_path / "exported")
    stated = "  images: RGB in [0, 1], minus [0.485, 0.456, 0.406], divided by [0.229, 0.224, 0.225]"
    assert lines[2:] == ([] if format == "detectron2" else [stated])
    assert ("MODEL.PIXEL_MEAN: [123.675, 116.28, 103.53]" in lines[1]) == (format == "detectron2")


def test_the_line_to_load_a_file_quotes_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    monkeypatch.chdir(tmp_path)
    programs: tuple[tuple[Format, str], ...] = (("moco", "pth.tar"), ("detectron2", "pkl"))
    for program, suffix in programs:
        file_name = f'it\'s: a "test", é #1.{suffix}'
        line = export_encoder(path, program, Path(file_name))[1].removeprefix("  load: ")
        if program == "moco":
            assert shlex.split(line) == ["main_lincls.py", "--arch", "resnet18", "--pretrained", file_name]
        else:
            assert yaml.safe_load(f"{{{line}}}")["MODEL.WEIGHTS"] == file_name


@pytest.mark.parametrize(
    ("architecture", "width", "expected"),
    [
        ("resnet18", 64, {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}),
        ("resnet50", 64, {}),
        ("resnet50", 32, {"WIDTH_PER_GROUP": 32, "STEM_OUT_CHANNELS": 32, "RES2_OUT_CHANNELS": 128}),
        ("resnet101", 64, {"DEPTH": 101}),
        ("resnext50_32x4d", 64, {"NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}),
        ("wide_resnet50_2", 64, {"WIDTH_PER_GROUP": 128}),
    ],
)
def test_detectron2_is_told_what_differs_from_its_defaults(
    architecture: str, width: int, expected: dict[str, int], tmp_path: Path
) -> None:
    path = saved(tmp_path, architecture, width=width)
    line = export_encoder(path, "detectron2", tmp_path / "x.pkl")[1]
    settings = yaml.safe_load("{" + line.removeprefix("  load: ") + "}")
    start = "MODEL.RESNETS."
    found = {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}
    assert found == {"STRIDE_IN_1X1": False, **expected}


@pytest.mark.parametrize(
    ("format", "name", "expected"),
    [
        ("torchvision", "x.safetensors", r"\.pth or \.pt or \.tar"),
        ("timm", "x.pth", r"\.safetensors"),
        ("detectron2", "x.pth", r"\.pkl"),
        ("moco", "x.pkl", r"\.pth or \.pt or \.tar"),
    ],
)
def test_the_suffix_of_another_format_is_refused(
    format: Format, name: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(
        EncoderError, match=rf"--out: found .*{name}; expected a name that ends in {expected}"
    ):
        export_encoder(saved(tmp_path), format, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_main_lincls_misses_only_its_classifier(tmp_path: Path) -> None:
    """The lines of MoCo's main_lincls.py that load a checkpoint."""
    export_encoder(saved(tmp_path), "moco", tmp_path / "x.pth")
    model = torchvision.models.resnet18()
    checkpoint = torch.load(tmp_path / "x.pth", weights_only=True)
    assert checkpoint["arch"] == "resnet18", "as main_moco.py saves it"
    state_dict = checkpoint["state_dict"]
    for k in list(state_dict.keys()):
        if k.startswith("module.encoder_q") and not k.startswith("module.encoder_q.fc"):
            state_dict[k[len("module.encoder_q.") :]] = state_dict[k]
        del state_dict[k]
    found = model.load_state_dict(state_dict, strict=False)
    assert set(found.missing_keys) == {"fc.weight", "fc.bias"}
    assert not found.unexpected_keys


def test_timms_file_says_that_its_tensors_are_torchs(tmp_path: Path) -> None:
    """transformers refuses a file without this."""
    export_encoder(saved(tmp_path), "timm", tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_detectron2_file_has_detectron2s_names_and_arrays(tmp_path: Path) -> None:
    path = saved(tmp_path, "resnet50", width=8)
    export_encoder(path, "detectron2", tmp_path / "x.pkl")
    content = pickle.loads((tmp_path / "x.pkl").read_bytes())  # noqa: S301 (written here)
    assert content["matching_heuristics"] is True
    assert content["__author__"] == "MoCHi"
    assert content["model"]["stem.conv1.weight"].shape == (8, 3, 7, 7)
    assert content["model"]["res5.2.conv3.norm.running_var"].shape == (256,)
    assert content["model"]["res2.0.shortcut.norm.weight"].shape == (32,)
    assert len(content["model"]) == len(safetensors.torch.load_file(path))


@pytest.mark.parametrize(
    ("encoder", "format", "message"),
    [
        (("resnet10", "half", 8), "torchvision", "torchvision's ResNets are 64 wide"),
        (("resnet18", "imagenet", 32), "timm", "timm's ResNets are 64 wide"),
        (("resnet18", "half", 64), "moco", r"moco builds ResNets with the 7x7 stem"),
        (("resnet18", "full", 64), "detectron2", "detectron2 builds ResNets with the 7x7 stem"),
        (("resnet10", "imagenet", 64), "detectron2", "detectron2 has no ResNet-10"),
        (("resnet10", "imagenet", 64), "moco", "moco has no ResNet-10"),
    ],
)
def test_an_encoder_that_a_format_cannot_represent_is_refused(
    encoder: tuple[str, str, int], format: Format, message: str, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match=message):
        export_encoder(saved(tmp_path, *encoder), format, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def refusal(path: Path, out: Path) -> str:
    before = path.read_bytes()
    with pytest.raises(EncoderError) as error:
        export_encoder(path, "timm", out)
    assert path.read_bytes() == before
    assert out == path or not out.exists()
    return str(error.value)


def test_a_file_that_is_not_what_it_says_is_not_exported(tmp_path: Path) -> None:
    config = Encoder.model_validate({"architecture": "resnet18", "stem": "imagenet", "width": 64})
    tensors, info = build(config, seed=0).state_dict(), EncoderInfo.of(config)
    path, out = tmp_path / "X.safetensors", tmp_path / "out.safetensors"
    write_tensors(path, tensors, info)
    assert refusal(path, path) == f"--out: found {path}, the file that is read; give another name"
    write_tensors(path, tensors, info.model_copy(update={"channel_order": "BGR"}))
    assert "BGR" in refusal(path, out)
    write_tensors(path, tensors, info.model_copy(update={"mean": (0.5, 0.5, 0.5)}))
    assert "0.5" in refusal(path, out)
    write_tensors(path, {**tensors, "bn1.weight": torch.ones(3)}, info)
    assert "bn1.weight: expected [64], found [3]" in refusal(path, out)
    write_tensors(path, tensors, None)
    assert "has no metadata with the architecture; `mochi import` writes a file that" in refusal(path, out)


def test_a_timm_encoder_loads_in_timm_again(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    encoder = build(Encoder(architecture="timm:resnet14t"), seed=0)
    save_encoder(tmp_path / "X.safetensors", encoder)
    lines = export_encoder(tmp_path / "X.safetensors", "timm", tmp_path / "x.safetensors")
    names: dict[str, Any] = {"timm": timm, "safetensors": safetensors}
    exec(lines[1].removeprefix("  load: "), names)  # noqa: S102 (what the user is told to run)
    torch.testing.assert_close(features(names["model"]), features(encoder))
    with pytest.raises(EncoderError, match="export it with --format timm"):
        export_encoder(tmp_path / "X.safetensors", "moco", tmp_path / "y")
