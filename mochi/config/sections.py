"""Base of the sections of an experiment file."""

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _read_number(value: object) -> object:
    """YAML 1.1 reads `1e-4` as a string, but a number is meant."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Real = Annotated[float, BeforeValidator(_read_number), Field(allow_inf_nan=False)]
PositiveReal = Annotated[Real, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
Name = Annotated[str, Field(pattern=NAME.pattern)]


class Section(BaseModel):
    """Frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    @classmethod
    def section_of(cls, key: str, value: object) -> "type[Section] | None":
        """The section that describes the value of a key that is not a field, such as a name the user chose.

        Messages list its keys. None if the value has no keys of its own.
        """
        del key, value
        return None


def distinct_seeds(seeds: list[int]) -> list[int]:
    """The seeds, which must be distinct.

    Raises:
        ValueError: a seed occurs twice.
    """
    if len(set(seeds)) != len(seeds):
        raise ValueError(
            f"found {seeds}; seeds must be distinct, or their standard deviation is meaningless"
        )
    return seeds
