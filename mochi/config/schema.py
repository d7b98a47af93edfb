"""The keys of an experiment file as a JSON Schema, for editors and for the documentation."""

import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, Field, create_model

from mochi.config.evaluation import settings_of, task_names
from mochi.config.experiment import Experiment
from mochi.config.negatives import section_of
from mochi.config.sections import CountOrZero, Section
from mochi.config.training import Augmentation, Contrastive
from mochi.contrast.rules import Mask, Rule, find, names_of


def _optional(
    name: str, about: str, model: type[BaseModel], *, with_defaults: bool = False, **more: Any
) -> type[Section]:
    """A section with the keys of `model`, all optional; None: another section has the default."""
    fields: dict[str, Any] = {
        key: (
            field.rebuild_annotation(),
            Field(
                field.get_default() if with_defaults and not field.is_required() else None,
                description=field.description,
            ),
        )
        for key, field in model.model_fields.items()
        if key != "objective"
    }
    section: type[Section] = create_model(name, __base__=Section, __doc__=about, **(fields | more))
    return section


PRETRAIN_KEYS = _optional(
    "Pretrain", "The recipe that every method shares.", Contrastive, with_defaults=True
)
METHOD_KEYS = _optional(
    "Method",
    "A row of the table: what differs from `pretrain`.",
    Contrastive,
    objective=(
        str,
        Field(
            "contrastive", description="contrastive, supervised, none (untrained) or file (with `path`)."
        ),
    ),
    path=(str, Field(None, description="Of the encoder file, for the objective file.")),
    seeds=(list[CountOrZero], Field(None, description="Instead of the experiment's.")),
    augmentation=(
        _optional("MethodAugmentation", "What differs from `augmentation`.", Augmentation),
        Field(None, description="What differs from the experiment's."),
    ),
)


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of an experiment file."""
    whole = Experiment.model_json_schema()
    for key, model in (("pretrain", PRETRAIN_KEYS), ("methods", METHOD_KEYS)):
        keys = model.model_json_schema()
        for section in (keys, *keys["$defs"].values()):
            for each in section["properties"].values():
                if each.get("default", ...) is None:
                    del each["default"]  # not a default: the shared recipe or the section has the value
        whole["$defs"] |= keys.pop("$defs", {}) | {model.__name__: keys}
        reference = {"$ref": f"#/$defs/{model.__name__}"}
        about = whole["properties"][key].get("description")
        whole["properties"][key] = (
            reference if key == "pretrain" else {"type": "object", "additionalProperties": reference}
        ) | ({"description": about} if about else {})
    _add_tasks(whole)
    _add_rules(whole)
    _name_bounds(whole)
    return whole


def _add_tasks(whole: dict[str, Any]) -> None:
    """The tasks as entries of `evaluation`: by their own names, and by others that say which task."""
    evaluation = whole["$defs"]["Evaluation"]
    references = []
    for name in task_names():
        keys = settings_of(name).model_json_schema()
        keys["required"].remove("task")  # the default is the name of the entry
        whole["$defs"] |= keys.pop("$defs", {}) | {keys["title"]: keys}
        references.append({"$ref": f"#/$defs/{keys['title']}"})
        evaluation["properties"][name] = references[-1] | {"description": keys["description"]}
    evaluation["additionalProperties"] = {"anyOf": references}


def _add_rules(whole: dict[str, Any]) -> None:
    """The rules of negatives, each with its own keys, and the names of the masks."""
    rules = {}
    for name in names_of(Rule):
        keys = section_of(name).model_json_schema()
        about = {"rule": "Selects these keys.", **_descriptions(find(name))}
        for key, value in keys["properties"].items():
            value["description"] = about[key]
        rules[keys["title"]] = keys
    del whole["$defs"]["Negatives"]
    whole["$defs"] |= rules
    for model in (PRETRAIN_KEYS, METHOD_KEYS):
        keys = whole["$defs"][model.__name__]["properties"]
        keys["negatives"] |= {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in rules]}
        keys["negatives"].pop("$ref", None)
        keys["masks"] |= {"items": {"enum": names_of(Mask)}}


_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def _name_bounds(node: Any) -> None:
    """Bounds by JSON Schema's names: pydantic writes its own where a type has a validator."""
    if isinstance(node, list):
        for each in node:
            _name_bounds(each)
    if isinstance(node, dict):
        for name, standard in _BOUNDS.items():
            if isinstance(node.get(name), int | float):
                node[standard] = node.pop(name)
        for each in node.values():
            _name_bounds(each)


def _descriptions(part: type[Rule | Mask]) -> dict[str, str]:
    """Field -> docstring below it, in the class or the class that it inherits the field from."""
    descriptions = {}
    for each in reversed(part.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, below in pairwise(tree.body):
            match statement, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    descriptions[name] = inspect.cleandoc(text)
    return descriptions
