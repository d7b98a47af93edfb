"""Checkpoints of other projects: the imported encoder computes the same as theirs, or the file is refused."""

import argparse
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mochi import load_encoder
from mochi.config import Encoder
from mochi.encoders import build
from mochi.encoders.exporting import _detectron2_name
from mochi.encoders.files import EncoderError, EncoderInfo, digest, read_encoder, read_info, save_encoder
from mochi.encoders.importing import Choices, import_checkpoint
from mochi.pixels import IMAGENET_MEAN, IMAGENET_STD
from tests.commands import refused, run

# Only names and shapes matter, so it is narrow.
CONFIG = Encoder(architecture="resnet18", stem="imagenet", width=8)
Tensors = dict[str, Tensor]


def weights(config: Encoder = CONFIG, seed: int = 0) -> Tensors:
    """An encoder whose statistics and biases are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = build(config, seed=seed).state_dict()
    for name, value in tensors.items():
        if value.ndim == 1:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        if name.endswith("num_batches_tracked"):
            value.fill_(7)
    return tensors


QUERY_WEIGHTS = weights()
MOMENTUM_WEIGHTS = weights(seed=1)
QUERY_DIGEST = digest(QUERY_WEIGHTS)


def below(prefix: str, tensors: Tensors = QUERY_WEIGHTS) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def renamed(change: Callable[[str], str], tensors: Tensors = QUERY_WEIGHTS) -> Tensors:
    return {change(name): value for name, value in tensors.items()}


def numbered(first: int) -> Callable[[str], str]:
    """The names in nn.Sequential(*list(resnet.children())[:-1])."""

    def change(name: str) -> str:
        head, _, rest = name.partition(".")
        number = {"conv1": 0, "bn1": 1}.get(head)
        return f"{number if number is not None else first + int(head[-1]) - 1}.{rest}"

    return change


def detectron2(tensors: Tensors = QUERY_WEIGHTS) -> dict[str, Any]:
    """moco detection/convert-pretrain-to-detectron2.py, line by line."""
    model = {}
    for name, value in tensors.items():
        k = name
        if "layer" not in k:
            k = "stem." + k
        for t in (1, 2, 3, 4):
            k = k.replace(f"layer{t}", f"res{t + 1}")
        for t in (1, 2, 3):
            k = k.replace(f"bn{t}", f"conv{t}.norm")
        k = k.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        model[k] = value.numpy()
    return {"model": model, "__author__": "MOCO", "matching_heuristics": True}


def stem_weights(stem: str) -> Tensors:
    return weights(Encoder.model_validate({"architecture": "resnet18", "stem": stem, "width": 8}))


def without(part: str) -> Tensors:
    return {name: value for name, value in QUERY_WEIGHTS.items() if part not in name}


UNRELATED = torch.zeros(3, 2)  # part of no encoder
MOCO = {
    **below("module.encoder_q."),
    **below("module.encoder_k.", MOMENTUM_WEIGHTS),
    "module.queue": UNRELATED,
}
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "torchvision": ({**QUERY_WEIGHTS, "fc.weight": UNRELATED}, "torchvision"),
    "module twice": ({"state_dict": below("module.module.")}, "a ResNet's backbone"),
    "moco": (
        {"arch": "resnet18", "state_dict": {**MOCO, "module.encoder_q.fc.0.weight": UNRELATED}},
        "MoCo",
    ),
    "moco-v3": (
        {
            "state_dict": {
                **below("module.base_encoder."),
                **below("module.momentum_encoder.", MOMENTUM_WEIGHTS),
            }
        },
        "MoCo-v3",
    ),
    "lightly": (
        {
            "state_dict": below("backbone.", renamed(numbered(4)))
            | below("backbone_momentum.", MOMENTUM_WEIGHTS)
        },
        "lightly",
    ),
    "lightly's benchmarks": (
        {
            "state_dict": below("backbone.", MOMENTUM_WEIGHTS)
            | below("query_backbone.")
            | {"projection_head.0": UNRELATED}
        },
        "lightly",
    ),
    "solo-learn": (
        {
            "state_dict": below("backbone.")
            | below("momentum_backbone.", MOMENTUM_WEIGHTS)
            | {"projector.0.bias": UNRELATED}
        },
        "solo-learn",
    ),
    "VISSL": (
        {
            "classy_state_dict": {
                "base_model": {
                    "model": {"trunk": below("_feature_blocks."), "heads": {"0.clf.weight": UNRELATED}}
                }
            }
        },
        "VISSL",
    ),
    "mmpretrain": (
        {"meta": {}, "state_dict": below("backbone.") | {"neck.fc.weight": UNRELATED}},
        "mmpretrain",
    ),
    "mmselfsup": (
        {"state_dict": below("encoder_q.0.") | below("encoder_k.0.", MOMENTUM_WEIGHTS)},
        "mmselfsup",
    ),
}


def imported(file: Path, **choices: Any) -> Tensors:
    out = file.with_name("out.safetensors")
    import_checkpoint(str(file), out, Choices(**choices))
    assert read_info(out) is not None
    return read_encoder(out).tensors


def features(tensors: Tensors, pixels: Tensor) -> Tensor:
    encoder = build(CONFIG).double().eval()
    encoder.load_state_dict(tensors)
    with torch.no_grad():
        return encoder(pixels)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_recognised(name: str, zipped: bool, tmp_path: Path) -> None:
    content, origin = LAYOUTS[name]
    file = tmp_path / "x.pth"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    assert digest(imported(file)) == QUERY_DIGEST
    info = read_info(tmp_path / "out.safetensors")
    assert info is not None
    assert (info.architecture, info.stem, info.width, info.method) == ("resnet18", "imagenet", 8, origin)
    assert info.source == f"x.pth sha256:{hashlib.sha256((tmp_path / 'x.pth').read_bytes()).hexdigest()}"


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_detectron2s_pickles_are_recognised(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(detectron2(), protocol))
    assert digest(imported(tmp_path / "x.pkl")) == QUERY_DIGEST


def test_lightlys_own_resnets_are_recognised(tmp_path: Path) -> None:
    own = renamed(lambda name: numbered(2)(name).replace("downsample", "shortcut"), stem_weights("full"))
    torch.save({"state_dict": below("backbone.", own)}, tmp_path / "x.ckpt")
    assert digest(imported(tmp_path / "x.ckpt")) == digest(stem_weights("full"))


def c4_detector(prefix: str = "", tensors: Tensors = QUERY_WEIGHTS) -> Tensors:
    return {
        f"{prefix}{'roi_heads' if name.startswith('res5') else 'backbone'}.{name}": torch.as_tensor(value)
        for name, value in detectron2(tensors)["model"].items()
    }


def test_the_last_stage_of_a_c4_detector_is_read_from_its_region_heads(tmp_path: Path) -> None:
    content = c4_detector()
    content |= {"pixel_mean": torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)}
    content |= {"pixel_std": torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)}
    torch.save({"model": content}, tmp_path / "x.pth")
    assert digest(imported(tmp_path / "x.pth")) == QUERY_DIGEST


def test_the_stages_of_two_detectors_are_not_mixed(tmp_path: Path) -> None:
    both = c4_detector("modelStudent.") | c4_detector("modelTeacher.", MOMENTUM_WEIGHTS)
    for content in (both, dict(reversed(both.items()))):
        torch.save({"model": content}, tmp_path / "x.pth")
        assert digest(imported(tmp_path / "x.pth", channel_order="RGB")) == QUERY_DIGEST
        found = imported(tmp_path / "x.pth", which="momentum", channel_order="RGB")
        assert digest(found) == digest(MOMENTUM_WEIGHTS)


def test_names_outside_an_encoder_are_no_part_of_it(tmp_path: Path) -> None:
    """Below its prefix, these names would be unknown tensors of the encoder."""
    others = {"layer9.weight": UNRELATED, "norm.weight": UNRELATED, "0.weight": UNRELATED}
    torch.save(below("backbone.") | others, tmp_path / "x.pth")
    assert digest(imported(tmp_path / "x.pth")) == QUERY_DIGEST
    torch.save(below("backbone.") | below("backbone.", others), tmp_path / "x.pth")
    with pytest.raises(EncoderError, match=r"layer9.weight: expected no such tensor"):
        imported(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("prefix", "other", "expected"),
    [
        ("module.momentum_encoder.", "", "MoCo-v3"),
        ("module.encoder_k.", "", "MoCo"),
        ("encoder_q.0.", "", "mmselfsup"),
        ("encoder_k.module.0.", "", "mmselfsup"),
        ("backbone.", "projection_head.0.weight", "lightly"),
        ("query_backbone.", "", "lightly"),
        ("backbone.", "momentum_backbone.fc.weight", "solo-learn"),
        ("backbone.", "projector.0.bias", "solo-learn"),
        ("backbone.", "momentum_projector.0.bias", "solo-learn"),
        ("backbone.", "classifier.bias", "solo-learn"),
        ("net.", "classifier.bias", "a ResNet's backbone"),
        ("backbone.", "neck.fc.weight", "mmpretrain"),
        ("backbone.", "head.fc.weight", "mmpretrain"),
        ("backbone.", "data_preprocessor.mean", "mmpretrain"),
        ("net.", "head.fc.weight", "a ResNet's backbone"),
        ("backbone.", "", "a ResNet's backbone"),
        ("module.", "", "torchvision"),
        ("state_dict.module.", "", "torchvision"),
    ],
)
def test_the_project_is_recognised_by_the_names(
    prefix: str, other: str, expected: str, tmp_path: Path
) -> None:
    """solo-learn's stem pads differently; the others only name the row's method."""
    torch.save(below(prefix) | ({other: UNRELATED} if other else {}), tmp_path / "x.pth")
    imported(tmp_path / "x.pth")
    info = read_info(tmp_path / "out.safetensors")
    assert info is not None
    assert info.method == expected


def test_the_pixels_of_a_detector_count_more_than_its_author(tmp_path: Path) -> None:
    content = {f"backbone.{name}": torch.as_tensor(value) for name, value in detectron2()["model"].items()}
    content |= {"pixel_mean": torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)}
    content |= {"pixel_std": torch.tensor([57.375, 57.12, 58.395]).view(3, 1, 1)}
    torch.save({"model": content, "__author__": "MOCO"}, tmp_path / "x.pth")
    converted = imported(tmp_path / "x.pth")
    assert torch.equal(converted["conv1.weight"], QUERY_WEIGHTS["conv1.weight"].flip(1))


@pytest.mark.parametrize("architecture", ["resnet10", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_the_architecture_follows_from_the_shapes(architecture: str, tmp_path: Path) -> None:
    config = Encoder(architecture=architecture, stem="imagenet", width=16)
    save_file(build(config, seed=0).state_dict(), tmp_path / "x.safetensors")
    imported(tmp_path / "x.safetensors")
    assert load_encoder(tmp_path / "out.safetensors").config == config


def test_the_momentum_encoder_can_be_imported(tmp_path: Path) -> None:
    for name in ("moco", "moco-v3", "lightly's benchmarks", "solo-learn", "mmselfsup"):
        torch.save(LAYOUTS[name][0], tmp_path / "x.pth")
        assert digest(imported(tmp_path / "x.pth", which="momentum")) == digest(MOMENTUM_WEIGHTS), name


def test_one_of_several_encoders_is_chosen_by_its_prefix(tmp_path: Path) -> None:
    torch.save({"left": QUERY_WEIGHTS, "right": MOMENTUM_WEIGHTS}, tmp_path / "x.pth")
    with pytest.raises(EncoderError, match=r"2 encoders for --which query; .* --which left, right"):
        imported(tmp_path / "x.pth")
    for which in ("right", "right."):
        assert digest(imported(tmp_path / "x.pth", which=which)) == digest(MOMENTUM_WEIGHTS)


def test_a_momentum_encoder_alone_is_imported_without_asking(tmp_path: Path) -> None:
    torch.save(below("momentum_encoder."), tmp_path / "x.pth")
    assert digest(imported(tmp_path / "x.pth")) == QUERY_DIGEST
    assert digest(imported(tmp_path / "x.pth", which="momentum")) == QUERY_DIGEST
    torch.save(below("encoder."), tmp_path / "x.pth")
    with pytest.raises(EncoderError, match="contains 0 encoders for --which momentum; omit --which"):
        imported(tmp_path / "x.pth", which="momentum")


def test_used_and_unused_tensors_are_listed(tmp_path: Path) -> None:
    torch.save(LAYOUTS["moco"][0], tmp_path / "x.pth")
    lines = import_checkpoint(str(tmp_path / "x.pth"), tmp_path / "out.safetensors")
    assert lines[0].endswith("torch zip, MoCo: 120 of 242 tensors, with prefix state_dict.module.encoder_q")
    assert lines[1:4] == [
        "  not used: state_dict.module.encoder_k (120 tensors)",
        "  not used: state_dict.module.queue (1 tensor)",
        "  not used: state_dict.module.encoder_q.fc (1 tensor)",
    ]
    assert lines[-1].endswith(f"120 tensors, sha256 of their values {QUERY_DIGEST[:16]}")


def test_tensors_are_read_from_a_pickled_model(tmp_path: Path) -> None:
    model = build(CONFIG)
    model.load_state_dict(QUERY_WEIGHTS)
    torch.save({"model": model, "args": argparse.Namespace(lr=1.0)}, tmp_path / "x.pth")
    assert digest(imported(tmp_path / "x.pth")) == QUERY_DIGEST


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    content = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in QUERY_WEIGHTS.items()
    }
    torch.save(content, tmp_path / "x.pth")
    lines = import_checkpoint(str(tmp_path / "x.pth"), tmp_path / "out.safetensors")
    assert f"note: converted to float32 from {str(dtype)[6:]}" in lines
    expected = {name: value.to(QUERY_WEIGHTS[name].dtype) for name, value in content.items()}
    assert digest(read_encoder(tmp_path / "out.safetensors").tensors) == digest(expected)


def test_files_with_other_heads_give_the_same_encoder(tmp_path: Path) -> None:
    torch.save({**QUERY_WEIGHTS, "fc.weight": torch.zeros(5, 64)}, tmp_path / "x.pth")
    without_counters = {k: v for k, v in QUERY_WEIGHTS.items() if "num_batches" not in k}
    torch.save({"model": without_counters, "head.bias": UNRELATED}, tmp_path / "y.pth")
    first, second = imported(tmp_path / "x.pth"), imported(tmp_path / "y.pth")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in without_counters)
    assert second["bn1.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("content", "choices", "message"),
    [
        (
            QUERY_WEIGHTS,
            {"architecture": "resnet50"},
            r"not a resnet50 (.|\n)*shapes fit a resnet18 with stem .* best\. .* their prefix is none\.",
        ),
        (
            dict(list(QUERY_WEIGHTS.items())[::2]),
            {},
            r"not a resnet18 .*; 6\d of 120 tensors do not fit:\n  .*found no",
        ),
        (
            without("running"),
            {},
            r"40 of 120 (.|\n)*bn1.running_mean: expected \[8\], found no such tensor",
        ),
        (
            {name: value for name, value in QUERY_WEIGHTS.items() if name != "conv1.weight"},
            {},
            r"1 of 120 tensors do not fit:\n  conv1.weight: expected \[8, 3, 7, 7\], found no such tensor",
        ),
        (
            weights(CONFIG.model_copy(update={"width": 7})),
            {"architecture": "resnext50_32x4d"},
            "--architecture: .*width: found 7; resnext50_32x4d needs a multiple of 16",
        ),
        (
            without("layer3.1.conv2"),
            {},
            r"1 of 120 tensors do not fit:\n  layer3.1.conv2.weight: expected \[32",
        ),
        (
            {**QUERY_WEIGHTS, "layer1.0.conv4.weight": UNRELATED},
            {},
            "layer1.0.conv4.weight: expected no such tensor",
        ),
        ({**QUERY_WEIGHTS, "bn1.bias": torch.full((8,), torch.inf)}, {}, "bn1.bias: found NaN or Inf"),
        ({"a": UNRELATED}, {}, r"contains no known encoder: found a \(1\); expected the names of a ResNet"),
        ({"x": 1}, {}, "contains no known encoder: found no tensors"),
        (
            {f"{name}.{n}": UNRELATED for n in range(2) for name in "abcdefghi"},
            {},
            r"found a \(2\), b \(2\), c \(2\), d \(2\), e \(2\), f \(2\), g \(2\), h \(2\); expected the",
        ),
        ({"conv1_w": UNRELATED}, {}, r"Caffe2's ResNets have their strides in the 1x1 convolutions"),
        ({"res2_0_branch2a_w": UNRELATED}, {}, r"Caffe2's ResNets have their strides in the 1x1"),
        (
            {**QUERY_WEIGHTS, "conv1.weight": torch.zeros(8, 3, 5, 5)},
            {},
            r"conv1.weight: found \[8, 3, 5, 5\]",
        ),
        (QUERY_WEIGHTS, {"stem": "half"}, "is not the first convolution of the stem half"),
        (
            QUERY_WEIGHTS,
            {"architecture": "resnet51"},
            r"--architecture: found 'resnet51'; did you mean 'resnet",
        ),
        (
            QUERY_WEIGHTS,
            {"architecture": "timm:vit"},
            "--architecture: found 'timm:vit'; allowed: resnet10, ",
        ),
        (stem_weights("full"), {"stem": "ful"}, "--stem: found 'ful'; did you mean 'full'"),
        (QUERY_WEIGHTS, {"which": "momentum"}, "contains 0 encoders for --which momentum"),
        (QUERY_WEIGHTS, {"which": "student"}, r"--which: found 'student'; .*x\.pth: \(no prefix\)"),
        (
            {k: v.to(torch.int8) for k, v in QUERY_WEIGHTS.items()},
            {},
            "found torch.int8; expected floating-point",
        ),
        (QUERY_WEIGHTS, {"mean": [0.4851, 0.456, 0.406]}, r"RGB mean \[0.4851, 0.456, 0.406\], here"),
        (QUERY_WEIGHTS, {"mean": [0.5, 0.5, 0.5]}, r"RGB mean \[0.5, 0.5, 0.5\], here .* zeros are padded"),
        (QUERY_WEIGHTS, {"std": [1.0]}, r"--std: found \[1.0\]; expected three finite numbers"),
        (
            {"backbone": stem_weights("full"), "projector.0": UNRELATED},
            {},
            "solo-learn's 3x3 stem pads images by 2",
        ),
    ],
)
def test_a_checkpoint_that_does_not_match_is_refused(
    content: Any, choices: dict[str, Any], message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        imported(tmp_path / "x.pth", **choices)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            UNRELATED,
            r"found a single tensor of shape \[3, 2\], without a name; expected the names of a ResNet",
        ),
        ([UNRELATED, UNRELATED], r"found 0 \(1\), 1 \(1\); expected the names of a ResNet"),
    ],
)
def test_tensors_without_names_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(EncoderError, match=message):
        imported(tmp_path / "x.pth")


def test_an_output_with_the_suffix_of_another_format_is_refused(tmp_path: Path) -> None:
    torch.save(QUERY_WEIGHTS, tmp_path / "x.pth")
    with pytest.raises(
        EncoderError, match=r"--out: found .*u\.pth; expected a name that ends in \.safetens"
    ):
        import_checkpoint(str(tmp_path / "x.pth"), tmp_path / "u.pth")
    assert not (tmp_path / "u.pth").exists()


def test_a_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="is a URL; only local files are read"):
        import_checkpoint("https://example.org/x.pth", tmp_path / "out.safetensors")


def test_the_stride_of_a_small_stem_must_be_given(tmp_path: Path) -> None:
    torch.save(stem_weights("half"), tmp_path / "x.pth")
    lines = import_checkpoint(str(tmp_path / "x.pth"), tmp_path / "out.safetensors")
    assert any(
        "taken as stem full (stride 1); --stem half for stride 2; a max-pool after" in line
        for line in lines
    )
    imported(tmp_path / "x.pth", stem="half")
    assert load_encoder(tmp_path / "out.safetensors").config.stem == "half"


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_another_normalisation_is_folded_into_the_first_convolution(order: str, tmp_path: Path) -> None:
    """As in detectron2's own models: bytes minus ImageNet's mean, not divided. The border is equal too."""
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({**detectron2(), "__author__": "Model Zoo"}))
    numbers = [103.53, 116.28, 123.675] if order == "BGR" else [123.675, 116.28, 103.53]
    with pytest.raises(EncoderError, match="does not say whether it was trained on RGB or BGR"):
        imported(tmp_path / "x.pkl")
    converted = imported(tmp_path / "x.pkl", channel_order=order, mean=numbers, std=[1.0, 1.0, 1.0])
    if order == "BGR":
        assert digest(imported(tmp_path / "x.pkl", channel_order="BGR")) == digest(converted)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).double()
    channels = images.flip(1) if order == "BGR" else images
    theirs = channels - torch.tensor(numbers).double()[:, None, None]
    mean, std = (torch.tensor(value).double()[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    expected = features(QUERY_WEIGHTS, theirs)
    torch.testing.assert_close(
        features(converted, (images / 255 - mean) / std), expected, rtol=1e-5, atol=1e-6
    )


def test_the_first_convolution_of_a_bgr_encoder_is_reversed(tmp_path: Path) -> None:
    torch.save(QUERY_WEIGHTS, tmp_path / "x.pth")
    converted = imported(tmp_path / "x.pth", channel_order="BGR")
    assert torch.equal(converted["conv1.weight"], QUERY_WEIGHTS["conv1.weight"].flip(1))


@pytest.mark.parametrize("lost", ["pixel_mean", "pixel_std"])
def test_a_detector_must_state_both_numbers_of_its_pixels(lost: str, tmp_path: Path) -> None:
    content = {f"backbone.{name}": torch.as_tensor(value) for name, value in detectron2()["model"].items()}
    content |= {"pixel_mean": torch.full((3, 1, 1), 116.28), "pixel_std": torch.ones(3, 1, 1)}
    del content[lost]
    torch.save({"model": content}, tmp_path / "x.pth")
    with pytest.raises(EncoderError, match=r"does not say whether .* \(__author__: missing\)"):
        imported(tmp_path / "x.pth")


def test_a_small_difference_of_the_standard_deviation_is_folded_too(tmp_path: Path) -> None:
    torch.save(QUERY_WEIGHTS, tmp_path / "x.pth")
    std = [0.2291, 0.224, 0.225]
    converted = imported(tmp_path / "x.pth", std=std)
    ratio = torch.tensor(IMAGENET_STD, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
    expected = (QUERY_WEIGHTS["conv1.weight"].double() * ratio[:, None, None]).float()
    assert torch.equal(converted["conv1.weight"], expected)
    assert not torch.equal(expected, QUERY_WEIGHTS["conv1.weight"])


@pytest.mark.parametrize("author", ["torchvision", "MoCo", "mochi", "VISSL"])
def test_authors_whose_encoders_were_trained_on_rgb(author: str, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({**detectron2(), "__author__": author}))
    assert digest(imported(tmp_path / "x.pkl")) == QUERY_DIGEST
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({**detectron2(), "__author__": "Model Zoo"}))
    chosen, zoo = (imported(tmp_path / name, channel_order="BGR") for name in ("x.pkl", "zoo.pkl"))
    assert digest(chosen) == digest(zoo) != QUERY_DIGEST


def notes(lines: list[str]) -> list[str]:
    """What the file "does not show" or "does not say"."""
    return [" ".join(line.split()[3:6]) for line in lines if line.startswith("note: ")]


def test_only_what_was_assumed_or_changed_is_noted(tmp_path: Path) -> None:
    file, out = tmp_path / "x.pth", tmp_path / "out.safetensors"
    torch.save(QUERY_WEIGHTS, file)
    assert notes(import_checkpoint(str(file), out)) == ["does not say"]
    assert notes(import_checkpoint(str(file), out, Choices(channel_order="RGB"))) == []
    torch.save(stem_weights("half"), file)
    rgb = Choices(channel_order="RGB")
    assert notes(import_checkpoint(str(file), out, rgb)) == ["does not show"]
    assert notes(import_checkpoint(str(file), out, rgb._replace(stem="half"))) == []
    lines = import_checkpoint(str(out), tmp_path / "again.safetensors")
    assert notes(lines) == []
    assert lines[0].startswith(f"{out}: safetensors, this project: 120 of 120 tensors, without a prefix")


def test_an_encoder_file_keeps_its_metadata(tmp_path: Path) -> None:
    file, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    encoder = build(CONFIG)
    encoder.load_state_dict(QUERY_WEIGHTS)
    info = EncoderInfo.of(CONFIG, image_size=32, std=(0.5, 0.5, 0.5), experiment="e", code_digest="c")
    save_encoder(file, encoder, info)
    for chosen, size in ((None, 32), (96, 96)):
        import_checkpoint(str(file), out, Choices(image_size=chosen))
        written = read_info(out)
        assert written is not None
        assert str(written.source).startswith("x.safetensors sha256:")
        changed = {"image_size": size, "std": IMAGENET_STD, "source": written.source}
        assert written == info.model_copy(update=changed)
    with pytest.raises(EncoderError, match="is not a resnet50"):
        import_checkpoint(str(file), out, Choices(architecture="resnet50"))
    import_checkpoint(str(file), out, Choices(stem="imagenet"))
    with pytest.raises(EncoderError, match=r"--stem: found half; .* has stem imagenet; omit --stem"):
        import_checkpoint(str(file), out, Choices(stem="half"))


def test_an_encoder_file_is_converted_by_the_normalisation_in_its_metadata(tmp_path: Path) -> None:
    encoder = build(CONFIG)
    encoder.load_state_dict(QUERY_WEIGHTS | {"conv1.weight": QUERY_WEIGHTS["conv1.weight"].flip(1)})
    info = EncoderInfo.of(
        CONFIG, channel_order="BGR", mean=IMAGENET_MEAN[::-1], std=IMAGENET_STD[::-1], method="m", seed=3
    )
    save_encoder(tmp_path / "x.safetensors", encoder, info)
    with pytest.raises(EncoderError, match="trained on BGR"):
        load_encoder(tmp_path / "x.safetensors")
    assert digest(imported(tmp_path / "x.safetensors")) == QUERY_DIGEST
    converted = read_info(tmp_path / "out.safetensors")
    assert converted is not None
    assert (converted.channel_order, converted.mean, converted.method, converted.seed) == (
        "RGB", IMAGENET_MEAN, "m", 3,
    )  # fmt: skip


def test_detectron2s_names_are_those_of_its_converter() -> None:
    assert {_detectron2_name(name) for name in QUERY_WEIGHTS} == detectron2()["model"].keys()


def test_import_and_export_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of MoCo is imported and exported to detectron2."""
    monkeypatch.chdir(tmp_path)
    torch.save(LAYOUTS["moco"][0], "x.pth")
    pixels = ("--channel-order", "RGB", "--mean", "123.675,116.28,103.53", "--std", "58.395,57.12,57.375")
    choices = ("--which", "momentum", "--image-size", "224")
    done = run("import", "x.pth", "--out", "X.safetensors", *choices, *pixels)
    assert done.returncode == 0, done.stderr
    assert "not used: state_dict.module.queue (1 tensor)" in done.stdout
    assert "the file does not say how its pixels" not in done.stdout
    info = read_info(Path("X.safetensors"))
    assert info is not None
    assert info.image_size == 224
    done = run("export", "X.safetensors", "--format", "detectron2", "--out", "x.pkl")
    assert done.returncode == 0, done.stderr
    assert "MODEL.RESNETS.STRIDE_IN_1X1: False" in done.stdout
    assert digest(imported(tmp_path / "x.pkl")) == digest(MOMENTUM_WEIGHTS)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("import https://example.org/x.pth", "only local files are read"),
        ("import x.pth --mean grey", "--mean: found 'grey'"),
        ("export X.safetensors --format timm", "64 wide"),
        ("export x.pth --format timm", "cannot be read as safetensors"),
    ],
)
def test_import_and_export_refuse(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(QUERY_WEIGHTS, "x.pth")
    import_checkpoint("x.pth", Path("X.safetensors"))
    assert message in refused(*command.split(), "--out", "none")
    assert not Path("none").exists()


@pytest.mark.parametrize("std", [(0.2, 0.0, 0.2), (0.2, float("nan"), 0.2), (float("inf"), 0.2, 0.2)])
def test_a_standard_deviation_must_be_finite_and_positive(std: tuple[float, ...], tmp_path: Path) -> None:
    torch.save(QUERY_WEIGHTS, tmp_path / "c.pth")
    with pytest.raises(EncoderError, match="expected three finite numbers above 0"):
        import_checkpoint(str(tmp_path / "c.pth"), tmp_path / "e.safetensors", Choices(std=std))


@pytest.mark.parametrize("mean", [(0.0, 0.0, 0.0), (-1.0, 0.456, 0.406)])
def test_a_mean_may_be_zero_or_negative(mean: tuple[float, ...], tmp_path: Path) -> None:
    """It is refused as different from this project's, not as no number."""
    torch.save(QUERY_WEIGHTS, tmp_path / "c.pth")
    with pytest.raises(EncoderError, match="trained on images with the RGB mean"):
        import_checkpoint(str(tmp_path / "c.pth"), tmp_path / "e.safetensors", Choices(mean=mean))


def test_converted_pixels_are_listed(tmp_path: Path) -> None:
    torch.save(QUERY_WEIGHTS, tmp_path / "c.pth")
    order = "conv1's input channels reversed from BGR to RGB"
    deviation = "the standard deviation [0.2, 0.2, 0.2] folded into conv1; here it is [0.229, 0.224, 0.225]"
    std = (0.2, 0.2, 0.2)
    for choices, listed in (
        (Choices(), []),
        (Choices(channel_order="BGR", mean=IMAGENET_MEAN[::-1]), [order]),
        (Choices(channel_order="RGB", mean=IMAGENET_MEAN, std=std), [deviation]),
    ):
        lines = "\n".join(import_checkpoint(str(tmp_path / "c.pth"), tmp_path / "e.safetensors", choices))
        assert [each for each in (order, deviation) if each in lines] == listed


def test_a_negative_variance_is_refused(tmp_path: Path) -> None:
    torch.save({**QUERY_WEIGHTS, "bn1.running_var": -QUERY_WEIGHTS["bn1.running_var"]}, tmp_path / "c.pth")
    with pytest.raises(EncoderError, match=r"bn1\.running_var: found a variance below 0"):
        import_checkpoint(str(tmp_path / "c.pth"), tmp_path / "e.safetensors")


def test_the_input_file_is_never_overwritten(tmp_path: Path) -> None:
    torch.save(QUERY_WEIGHTS, tmp_path / "c.pth")
    before = (tmp_path / "c.pth").read_bytes()
    with pytest.raises(EncoderError, match="the file that is read"):
        import_checkpoint(str(tmp_path / "c.pth"), tmp_path / "c.pth")
    assert (tmp_path / "c.pth").read_bytes() == before
