"""How negatives count: a rule of `mochi.contrast.rules` with its settings, and masks.

The only settings that import upwards: a rule's settings and its mathematics are one file, which imports
torch only when it computes. A rule is imported when an experiment selects it.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self, TypeVar, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from mochi.config.reading import unknown_key
from mochi.config.sections import Real, Section
from mochi.contrast import rules
from mochi.contrast.rules import Mask, Rule
from mochi.errors import guess

_Part = TypeVar("_Part", bound=Rule | Mask)


class Negatives(Section):
    """A rule of negatives and its settings. Its fields are those of the rule, see `section_of`."""

    rule: str
    """The name of a file in mochi/contrast/rules/; the other keys are the settings in it."""

    def make(self) -> Rule:
        """The rule with its mathematics."""
        return _find(self.rule, Rule)(**self.model_dump(exclude={"rule"}))

    @model_validator(mode="after")
    def _settings_are_in_their_ranges(self) -> Self:
        if type(self) is not Negatives:
            self.make()
        return self


@cache
def section_of(name: str) -> type[Negatives]:
    """The keys of a rule: the fields of its dataclass.

    Raises:
        ValueError: no such rule.
    """
    rule = _find(name, Rule)
    hints = get_type_hints(rule, include_extras=True)
    fields: dict[str, Any] = {"rule": (Literal[name], ...)} | {
        field.name: (
            Real if hints[field.name] is float else hints[field.name],
            ... if field.default is dataclasses.MISSING else field.default,
        )
        for field in dataclasses.fields(rule)
    }
    return create_model(rule.__name__, __base__=Negatives, __doc__=rule.__doc__, **fields)


def _read(value: object) -> object:
    """`{rule: NAME, ...}` as a section of that rule."""
    if isinstance(value, Negatives):
        return value
    if not isinstance(value, Mapping):
        text = f"found {value!r}; expected a rule with its settings, as in {{rule: mochi, ...}}"
        raise ValueError(text)  # noqa: TRY004 - pydantic collects these alone
    name = value.get("rule")
    if not isinstance(name, str):
        found = "missing" if name is None else f"found {name!r}"
        allowed = ", ".join(rules.names_of(Rule))
        raise _mistakes(
            {"rule": f"{found}; expected a name, as in {{rule: mochi, ...}}; allowed: {allowed}"}
        )
    try:
        section = section_of(name)
    except ValueError as error:
        raise _mistakes({"rule": str(error)}) from None
    keys = list(section.model_fields)
    if unknown := {key: unknown_key(key, keys) for key in map(str, value) if key not in keys}:
        raise _mistakes(unknown)
    return section.model_validate(value)


def _mistakes(texts: Mapping[str, str]) -> ValidationError:
    """Key -> message, as one error."""
    lines = [
        InitErrorDetails(
            type=PydanticCustomError("value_error", "{text}", {"text": text}), loc=(key,), input=None
        )
        for key, text in texts.items()
    ]
    return ValidationError.from_exception_data("negatives", lines)


NegativesOfARule = Annotated[SerializeAsAny[Negatives], BeforeValidator(_read)]


def make_mask(name: str) -> Mask:
    """A mask with its mathematics.

    Raises:
        ValueError: no such mask.
    """
    return _find(name, Mask)()


def _known(names: list[str]) -> list[str]:
    """Masks in a canonical order, because their order does not matter."""
    for name in names:
        make_mask(name)
    return sorted(set(names))


Masks = Annotated[list[str], AfterValidator(_known)]


def _find(name: str, kind: type[_Part]) -> type[_Part]:
    """The rule or mask of that name.

    Raises:
        ValueError: there is none.
    """
    definition = rules.find(name) if name in rules.names() else None
    if definition is not None and issubclass(definition, kind):
        return definition
    note = ""
    if definition is not None:
        note = f"a mask, so write masks: [{name}]" if kind is Rule else f"a rule, so write {{rule: {name}}}"
    raise ValueError(guess(name, rules.names_of(Rule if kind is Rule else Mask), note))


PLAIN = section_of("moco")(rule="moco")
"""MoCo's: every negative counts by its similarity."""

FORMER_KEYS = {
    "mixing": "negatives: {rule: mochi, num_hardest: ..., num_pair_synthetics: ..., ...}",
    "class_oracle": "masks: [class_oracle]",
}
"""Keys of version 0.1 and their replacements."""


def former_key(key: str, value: object) -> str:
    """What to write instead of a key of version 0.1."""
    now = FORMER_KEYS[key]
    if isinstance(value, Mapping):
        settings = "".join(f", {name}: {json.dumps(own)}" for name, own in value.items())
        now = f"negatives: {{rule: mochi{settings}}}"
    elif not value:
        now = "nothing: leave it out"
    return f"found a key of version 0.1; write {now}"
