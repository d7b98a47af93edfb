"""What every section of an experiment file is made of."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _read_number(value: object) -> object:
    """YAML 1.1 reads `1e-4` as a string; a person means a number."""
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
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """Frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def distinct_seeds(seeds: list[int]) -> list[int]:
    """The seeds, none of them twice.

    Raises:
        ValueError: some seed is.
    """
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"found {seeds}; seeds must be distinct, or a spread over them means nothing")
    return seeds
