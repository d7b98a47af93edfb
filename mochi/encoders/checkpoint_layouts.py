"""Where the ResNets are in a checkpoint, recognised by the names of its tensors.

| written by | an encoder's names |
| --- | --- |
| torchvision, timm | conv1.weight, bn1.*, layer1.0.conv1.weight, layer1.0.downsample.0.weight |
| MoCo v1, v2, MoCHi | module.encoder_q.*, module.encoder_k.* |
| MoCo-v3 | module.base_encoder.*, module.momentum_encoder.* |
| lightly | backbone.0.weight, backbone.4.0.conv1.weight (its own ResNets: backbone.2.0.*, shortcut) |
| solo-learn | backbone.*, momentum_backbone.* |
| VISSL | classy_state_dict.base_model.model.trunk._feature_blocks.* |
| mmselfsup, mmpretrain | backbone.*; encoder_q.0.*, encoder_k.0.* |
| detectron2 | stem.conv1.weight, stem.conv1.norm.*, res2.0.conv1.weight, res2.0.shortcut.weight |

Any of them may be nested, such as in `state_dict` or `model`, with or without `module.`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_VALUES = r"\.(?:weight|bias|running_mean|running_var|num_batches_tracked)"
_BLOCK = r"(?:conv[1-3]|bn[1-3]|(?:downsample|shortcut)\.[01])"
_NAMINGS = {
    "torchvision": rf"(?:conv1|bn1|layer[1-4]\.\d+\.{_BLOCK}){_VALUES}",
    "numbered": rf"(?:[01]|[2-7]\.\d+\.{_BLOCK}){_VALUES}",
    "detectron2": rf"(?:stem\.conv1(?:\.norm)?|res[2-5]\.\d+\.(?:conv[1-3]|shortcut)(?:\.norm)?){_VALUES}",
}
_PATTERNS = {
    # The shortest prefix: layer1.0.conv1 is not a conv1 below layer1.0.
    naming: re.compile(rf"((?:.*?\.)??)({names})", re.DOTALL)
    for naming, names in _NAMINGS.items()
}
_OF_AN_ENCODER = re.compile(r"(?:conv|bn|norm|layer|stem|res)\d*|[0-7]")
_MOMENTUM = re.compile(
    r"encoder_k|moco_encoder|momentum|teacher|target|(?:^|[._])ema(?:$|[._])", re.IGNORECASE
)
_QUERY_TWIN = re.compile(r"(?:query|student|online)_(?=backbone|encoder)")


@dataclass
class Found:
    """A ResNet in a checkpoint."""

    prefix: str
    """Prefix of its names: "" or a path that ends with a dot."""
    naming: str
    names: dict[str, str]
    """torchvision's name -> path in the checkpoint; an unknown tensor has its own name."""
    is_momentum: bool = False


def find_encoders(paths: Iterable[str]) -> list[Found]:
    """Every ResNet in a checkpoint, in the order of the file."""
    paths = list(paths)
    groups: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for path in paths:
        for naming, pattern in _PATTERNS.items():
            if match := pattern.fullmatch(path):
                groups[naming, match[1]].append((match[2], path))
    found = [
        Found(prefix, naming, {_renamed(rest, naming, named): path for rest, path in named})
        for (naming, prefix), named in groups.items()
        if _has_stages(rest for rest, _ in named)
    ]
    _add_regions(found, groups)
    prefixes = {each.prefix for each in found}
    for each in found:
        known = set(each.names.values())
        for path in paths:
            rest = path.removeprefix(each.prefix)
            below = path.startswith(each.prefix) and path not in known
            if below and _OF_AN_ENCODER.fullmatch(rest.split(".")[0]):
                each.names[rest] = path  # unknown there, and therefore refused
        twins = {_QUERY_TWIN.sub("", prefix) for prefix in prefixes if _QUERY_TWIN.search(prefix)}
        each.is_momentum = bool(_MOMENTUM.search(each.prefix)) or each.prefix in twins
    return found


def _has_stages(names: Iterable[str]) -> bool:
    """Whether there are several stages: a single stage is part of another model."""
    return len({name.split(".")[0] for name in names if name.count(".") > 1}) > 1


def _add_regions(found: list[Found], groups: Mapping[tuple[str, str], list[tuple[str, str]]]) -> None:
    """A C4 detector of detectron2 has res5 in its region heads."""
    for each in found:
        model = each.prefix.rpartition("backbone.")[0]  # a file may have a student and a teacher
        named = groups.get(("detectron2", f"{model}roi_heads."), [])
        each.names |= {_renamed(rest, "detectron2", named): path for rest, path in named}


def _renamed(rest: str, naming: str, named: list[tuple[str, str]]) -> str:
    """torchvision's name."""
    if naming == "detectron2":
        rest = re.sub(r"^stem\.", "", rest)
        rest = re.sub(r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}", rest)
        rest = re.sub(r"conv(\d)\.norm", r"bn\1", rest)
        return rest.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    if naming == "numbered":
        first = min(int(name.split(".")[0]) for name, _ in named if name.count(".") > 1)
        number, _, inside = rest.partition(".")
        if number in ("0", "1"):
            return f"{'bn1' if number == '1' else 'conv1'}.{inside}"
        rest = f"layer{int(number) - first + 1}.{inside}"
    return rest.replace(".shortcut.", ".downsample.")


def origin(found: Found, paths: Iterable[str]) -> str:
    """Which project's names these are, for messages and metadata."""
    prefix, firsts = found.prefix, {path.removeprefix("state_dict.").split(".")[0] for path in paths}
    known = {
        "detectron2": found.naming == "detectron2",
        "VISSL": "_feature_blocks." in prefix,
        "MoCo-v3": "base_encoder." in prefix or "module.momentum_encoder." in prefix,
        "mmselfsup": bool(re.search(r"encoder_[qk]\.(?:module\.)?0\.", prefix)),
        "MoCo": "encoder_q." in prefix or "encoder_k." in prefix,
        "lightly": found.naming == "numbered" or bool(firsts & {"projection_head", "query_backbone"}),
        "solo-learn": bool(firsts & {"momentum_backbone", "projector", "momentum_projector"})
        or ("backbone." in prefix and "classifier" in firsts),
        "mmpretrain": "backbone." in prefix and bool(firsts & {"neck", "head", "data_preprocessor"}),
        "torchvision": prefix.removeprefix("state_dict.").removeprefix("module.") == "",
    }
    return next((name for name, applies in known.items() if applies), "a ResNet's backbone")
