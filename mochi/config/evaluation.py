"""Evaluation of encoders: named tasks on frozen features, and detection sets.

A task is a module, or a package, of its name in `mochi/evaluation/tasks/`: its settings, derived from
`Task`, and its mathematics. It is imported by name when an experiment uses it; no registration is needed.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import ConfigDict, PlainValidator, model_validator
from pydantic_core import PydanticKnownError

from mochi.config.datasets import Dataset
from mochi.config.detection import DetectionSet
from mochi.config.sections import NAME, Count, Name, Section
from mochi.errors import guess

if TYPE_CHECKING:
    from mochi.evaluation.features import Frozen

_TASKS = Path(__file__).parents[1] / "evaluation" / "tasks"
_TAKEN = ("pretrain", "analysis", "detection-")
"""Reserved prefixes of task names: their results and logs would share folders."""


class Column(NamedTuple):
    """How tables show one number of a task's metrics.json."""

    name: str
    unit: str = "%"
    higher_is_better: bool = True


class Task(Section):
    """One evaluation of frozen features. Its settings are read by commands that must not wait for torch:
    a task imports torch where it computes.
    """

    task: Name
    """Module in `mochi/evaluation/tasks/`. Default: the name of the entry."""
    dataset: Dataset | None = None
    """Another data set than the experiment's: transfer."""
    image_size: Count | None = None
    """Replaces `evaluation.image_size`."""
    resize: Count | None = None
    """Replaces `evaluation.resize`."""

    @property
    def encodings_of_train(self) -> int:
        """Number of passes over train through the encoder, for time estimates."""
        return 1

    def checkpoint_bytes(self, num_features: int, num_classes: int) -> int:
        """Size of a resume checkpoint; 0 without one."""
        del num_features, num_classes
        return 0

    def columns(self) -> dict[str, Column]:
        """The numbers of metrics.json that tables show, in order; figures show the first."""
        return {"top1": Column("top-1")}

    def evaluate(self, frozen: "Frozen") -> dict[str, Any]:
        """Compute metrics.json from the frozen encoder and its data.

        Every rank runs it, with the same features; the first rank's result is written. What is
        under `predicted`, the (V,) classes of the images of val, becomes confusion.csv instead.
        """
        raise NotImplementedError


def task_names() -> list[str]:
    """The tasks that exist."""
    return sorted(module.name for module in pkgutil.iter_modules([str(_TASKS)]))


def settings_of(task: str) -> type[Task]:
    """The settings of a task: the class in its module that is derived from `Task`.

    Raises:
        ValueError: no such task.
    """
    if task not in (known := task_names()):
        raise ValueError(f"task: {guess(task, known)}")
    module = importlib.import_module(f"mochi.evaluation.tasks.{task}")
    own = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Task)]
    (settings,) = (each for each in own if each.__module__ == module.__name__)
    return settings


def _read_task(value: object) -> Task:
    if isinstance(value, Task):
        return value
    if not isinstance(value, Mapping):
        raise PydanticKnownError("extra_forbidden")
    return settings_of(str(value["task"])).model_validate(dict(value))


class Evaluation(Section):
    """Evaluation of encoders. Every other key is the name of an evaluation."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Annotated[Any, PlainValidator(_read_task)]]

    image_size: Count
    """Side of the centre crop, pixels."""
    resize: Count
    """Short side before the centre crop, pixels."""
    batch_size: Count = 256
    """Images encoded at once, on each GPU."""
    features_on: Literal["auto", "device", "host"] = "auto"
    """Where features are kept. auto: on the device, unless they fill more than half of its free memory."""
    detection: dict[Name, DetectionSet] = {}
    """Detection sets by name; a set's results are in `detection-<name>`."""

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks by name, in the order of the file."""
        return {name: task for name, task in (self.__pydantic_extra__ or {}).items() if task is not None}

    @classmethod
    def section_of(cls, key: str, value: object) -> type[Section] | None:
        """The settings of the task that an entry asks for."""
        try:
            return settings_of(str(value.get("task", key))) if isinstance(value, Mapping) else None
        except ValueError:
            return None

    @model_validator(mode="before")
    @classmethod
    def _entries_name_their_task(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        read = {}
        for key, value in data.items():
            if key in cls.model_fields:
                read[key] = value
            elif value is not None:  # `linear: null` is not an entry
                if isinstance(value, Mapping) and (
                    not NAME.fullmatch(str(key)) or str(key).startswith(_TAKEN)
                ):
                    raise ValueError(
                        f"found a task named {key!r}; allowed: letters, digits, '.', '_' and '-', and no "
                        f"name that begins with {' or '.join(_TAKEN)}"
                    )
                read[key] = {"task": key, **value} if isinstance(value, Mapping) else value
        return read

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        for name, task in {"": None, **self.tasks}.items():
            size = (task and task.image_size) or self.image_size
            resize = (task and task.resize) or self.resize
            if resize < size:
                key = f"{name}.resize" if name else "resize"
                raise ValueError(f"{key}: found {resize}; must be at least image_size = {size}")
        return self

    @model_validator(mode="after")
    def _scenes_of_a_folder_agree(self) -> Self:
        first: dict[Path, str] = {}
        for name, chosen in self.detection.items():
            other = first.setdefault(Path(chosen.data.path), name)
            data, others = chosen.data, self.detection[other].data
            if (data.scenes or others.scenes) and (data.scenes, data.classes) != (
                others.scenes,
                others.classes,
            ):
                raise ValueError(
                    f"detection.{name}.data.path: found {data.path!r}, as in detection.{other}, with other "
                    "`scenes` or `classes`; a folder holds one set of scenes: make them equal, or give "
                    "each a separate path"
                )
        return self
