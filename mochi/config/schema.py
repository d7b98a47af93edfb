"""The keys of an experiment file as a JSON Schema, for editors and for the documentation."""

from typing import Any

from pydantic import BaseModel, create_model

from mochi.config.evaluation import settings_of, task_names
from mochi.config.experiment import Experiment
from mochi.config.negatives import section_of
from mochi.config.sections import CountOrZero, Section
from mochi.config.training import Augmentation, SharedRecipe
from mochi.contrast.rules import Mask, Rule, names_of


def _optional(name: str, about: str, *models: type[BaseModel], **more: Any) -> type[Section]:
    """A section with the keys of `models`, all optional."""
    fields: dict[str, Any] = {
        key: (field.rebuild_annotation(), field.get_default() if not field.is_required() else None)
        for model in models
        for key, field in model.model_fields.items()
    }
    section: type[Section] = create_model(name, __base__=Section, __doc__=about, **(fields | more))
    for model in models:
        for key, field in model.model_fields.items():
            section.model_fields[key].description = field.description
    return section


PRETRAIN_KEYS = _optional("Pretrain", "The recipe that every method shares.", SharedRecipe)
METHOD_KEYS = _optional(
    "Method",
    "A row of the table: what differs from `pretrain`.",
    SharedRecipe,
    objective=(str, "contrastive"),
    seeds=(list[CountOrZero], None),
    augmentation=(_optional("MethodAugmentation", "What differs from `augmentation`.", Augmentation), None),
)


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of an experiment file."""
    whole = Experiment.model_json_schema()
    for key, model in (("pretrain", PRETRAIN_KEYS), ("methods", METHOD_KEYS)):
        keys = model.model_json_schema()
        for each in keys["properties"].values():
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
        evaluation["properties"][name] = references[-1]
    evaluation["additionalProperties"] = {"anyOf": references}


def _add_rules(whole: dict[str, Any]) -> None:
    """The rules of negatives, each with its own keys, and the names of the masks."""
    rules = {section.__name__: section.model_json_schema() for section in map(section_of, names_of(Rule))}
    del whole["$defs"]["Negatives"]
    whole["$defs"] |= rules
    for model in (PRETRAIN_KEYS, METHOD_KEYS):
        keys = whole["$defs"][model.__name__]["properties"]
        keys["negatives"] = {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in rules]}
        keys["masks"] = {"type": "array", "items": {"enum": names_of(Mask)}}
