"""Read pickles without running code in them.

A pickle is a program for a small stack machine. This one supports containers, numbers, text, numpy's
arrays and torch's tensors; every other class or function stays a name. A file cannot make it import, call
or set anything. Work and memory are bounded by the size of the file.

Source: Python's Lib/pickletools.py (the machine and its opcodes); torch/_utils.py and numpy's
multiarray (what their pickles call).
"""

import mmap
import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

_MAX_OPERATIONS = 20_000_000
_MIN_BUDGET = 1_000_000

Array = NDArray[Any]


class PickleError(ValueError):
    """Not a pickle, a corrupt one, or one that requests more than its size allows."""


@dataclass(frozen=True)
class Name:
    """A class or function, kept as a name."""

    text: str


@dataclass(eq=False)
class Placeholder:
    """An object of an unknown class, with its content in the pickle."""

    kind: str
    arguments: object = ()
    state: object = None
    items: dict[object, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """Data stored elsewhere in the file."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage; the reader of the file builds a tensor from it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or not all(type(n) is int and n >= 0 for n in numbers):
            raise PickleError(f"a tensor of size {self.size} and stride {self.stride}")
        numel = prod(self.size)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if numel > self.storage.numel or (numel and last >= self.storage.numel):
            raise PickleError(f"a tensor of size {self.size} in a storage of {self.storage.numel} numbers")


@dataclass
class _Dtype:
    """numpy's dtype, whose byte order is set in a second step."""

    kind: str
    order: str = "<"

    def numpy(self) -> np.dtype[Any] | None:
        """None if it is not a number type."""
        if self.kind not in {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}:
            return None
        return np.dtype(self.kind).newbyteorder(">" if self.order == ">" else "<")


class _Array:
    """numpy's array, whose content is set in a second step."""

    value: object = None


Persistent = Callable[[object], object]


def read(file: mmap.mmap, persistent: Persistent | None = None) -> Any:
    """Read the object at the current position of `file` and leave the position after it.

    Args:
        file: read from its current position.
        persistent: resolves an id of an object outside the pickle; None: gives a placeholder.

    Raises:
        PickleError: see the class.
    """
    machine = _Machine(len(file), persistent or (lambda found: Placeholder("persistent id", found)))
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(cast("IO[bytes]", file))):
            if number > _MAX_OPERATIONS:
                raise PickleError(f"more than {_MAX_OPERATIONS} operations")
            machine.run(opcode.name, argument)
        return _finished(machine.stack[-1])
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise PickleError(f"{type(error).__name__}: {error}"[:300]) from None


def _finished(value: object) -> object:
    return value.value if isinstance(value, _Array) else value


class _Machine:
    def __init__(self, size: int, persistent: Persistent) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []
        """Stacks below marks."""
        self._memo: dict[int, Any] = {}
        self._persistent = persistent
        self._budget = max(size, _MIN_BUDGET)

    def run(self, operation: str, argument: Any) -> None:  # noqa: PLR0912, PLR0915 (a case an opcode)
        """One operation."""
        stack = self.stack
        match operation:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                self._below.append(stack)
                self.stack = []
            case "POP":
                if stack:
                    stack.pop()
                else:
                    self._above()
            case "POP_MARK":
                self._above()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(operation == "NEWTRUE")
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "LIST" | "FROZENSET" | "TUPLE":
                above = self._above()
                self.stack.append(tuple(map(_finished, above)) if operation == "TUPLE" else above)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(operation[-1])
                values = tuple(map(_finished, stack[-count:]))
                if len(values) < count:
                    raise PickleError("a tuple of more items than the stack has")
                stack[-count:] = [values]
            case "DICT":
                above = self._above()
                self.stack.append({})
                self._set_items(above)
            case "APPEND":
                self._extend([stack.pop()])
            case "APPENDS" | "ADDITEMS":
                above = self._above()
                self._extend(above)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set_items([key, value])
            case "SETITEMS":
                above = self._above()
                self._set_items(above)
            case "GLOBAL":
                stack.append(Name(".".join(argument.split(" ", 1))))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(Name(f"{_text(module)}.{_text(name)}"))
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(Name(f"extension {argument}"))
            case "REDUCE" | "NEWOBJ":
                arguments, kind = stack.pop(), stack.pop()
                stack.append(self._made(kind, arguments))
            case "NEWOBJ_EX":
                stack.pop()  # keyword arguments
                arguments, kind = stack.pop(), stack.pop()
                stack.append(self._made(kind, arguments))
            case "INST":
                above = self._above()
                self.stack.append(self._made(Name(".".join(argument.split(" ", 1))), tuple(above)))
            case "OBJ":
                kind, *above = self._above()
                self.stack.append(self._made(kind, tuple(above)))
            case "BUILD":
                state = stack.pop()
                _build(stack[-1], state)
            case "PERSID":
                stack.append(self._persistent(argument))
            case "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            case "NEXT_BUFFER" | "READONLY_BUFFER":
                raise PickleError("data outside the file")
            case _:  # a number, text or bytes
                stack.append(argument)

    def _above(self) -> list[Any]:
        """Pop everything above the last mark, and the mark."""
        above, self.stack = self.stack, self._below.pop()
        return above

    def _extend(self, values: list[Any]) -> None:
        if isinstance(target := self.stack[-1], list):
            target += map(_finished, values)

    def _set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        items = target.items if isinstance(target, Placeholder) else target
        if isinstance(items, dict):
            for key, value in zip(flat[::2], flat[1::2], strict=True):
                items[_key(key)] = _finished(value)

    def _made(self, kind: object, arguments: Any) -> object:  # noqa: PLR0911, PLR0912 (a case a function)
        """The result of a known function; a placeholder for all others."""
        if not isinstance(kind, Name) or not isinstance(arguments, tuple):
            return Placeholder("unknown", arguments)
        arguments = tuple(map(_finished, arguments))
        match kind.text.removeprefix("numpy.").removeprefix("_core.").removeprefix("core."):
            case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
                return StoredTensor(arguments[0], arguments[1], *map(tuple, arguments[2:4]))
            case "torch._utils._rebuild_tensor_v3":
                storage, offset, size, stride, _, _, dtype = arguments[:7]
                return _retyped(storage, dtype, offset, tuple(size), tuple(stride))
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
                return arguments[0]
            case "torch._tensor._rebuild_from_type_v2":
                return self._made(arguments[0], arguments[2])
            case "torch.nn.parameter.Parameter" if arguments:
                return arguments[0]
            case "torch.Size":
                return self._copied(arguments[0], tuple)
            case "multiarray._reconstruct":
                return _Array()
            case "numeric._frombuffer":
                buffer, dtype, shape, order = arguments
                return _filled(buffer, dtype, shape, order)
            case "dtype":
                return _Dtype(str(arguments[0]).lstrip("<>=|"))
            case "_codecs.encode":
                return self._copied(_text(arguments[0]), lambda text: text.encode("latin1"))
            case "collections.defaultdict":
                return self._copied(arguments[1] if len(arguments) > 1 else (), _pairs)
            case "collections.OrderedDict" | "builtins.dict" | "__builtin__.dict":
                return self._copied(arguments[0] if arguments else (), _pairs)
            case "builtins.set" | "builtins.frozenset" | "builtins.list" | "__builtin__.set":
                return self._copied(arguments[0] if arguments else (), list)
            case "builtins.bytearray":
                return arguments[0] if arguments and isinstance(arguments[0], bytes | bytearray) else b""
        return Placeholder(kind.text, arguments)

    def _copied(self, value: Any, make: Callable[[Any], Any]) -> Any:
        """A copy, if all copies stay within the size of the file: one value can be copied often."""
        self._budget -= len(value)
        if self._budget < 0:
            raise PickleError("copies of more than the file contains")
        return make(value)


def _build(target: object, state: Any) -> None:
    """Set the state of an object."""
    match target:
        case Placeholder():
            target.state = _finished(state)
        case _Dtype():
            target.order = str(state[1])
        case _Array():
            _, shape, dtype, fortran, data = state
            target.value = _filled(data, dtype, shape, "F" if fortran else "C")


def _filled(data: Any, dtype: Any, shape: Any, order: str) -> Array | Placeholder:
    content = data.encode("latin1") if isinstance(data, str) else data
    kind = dtype.numpy() if isinstance(dtype, _Dtype) else None
    if kind is None or not isinstance(content, bytes | bytearray):
        return Placeholder("array of objects")
    shape = tuple(shape)
    if not all(type(n) is int and n >= 0 for n in shape) or prod(shape) * kind.itemsize != len(content):
        raise PickleError(f"an array of shape {shape} in {len(content)} bytes")
    return np.frombuffer(content, kind).reshape(shape, order="F" if order == "F" else "C")


def _retyped(
    storage: Storage, dtype: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> StoredTensor:
    kind = getattr(torch, dtype.text.removeprefix("torch."), None) if isinstance(dtype, Name) else None
    if not isinstance(kind, torch.dtype):
        raise PickleError(f"a tensor of {dtype}")
    bytes_held = storage.numel * storage.dtype.itemsize
    return StoredTensor(Storage(storage.key, kind, bytes_held // kind.itemsize), offset, size, stride)


def _pairs(value: Iterable[Any]) -> dict[object, object]:
    entries = value.items() if isinstance(value, dict) else value
    return {_key(key): item for key, item in entries}


def _key(key: object) -> object:
    """Check that a key is quick to hash: a million nested tuples are not."""
    return key if isinstance(key, str | int | float | bytes | None) else Placeholder("key", key)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise PickleError(f"found {type(value).__name__} where a name was expected")
    return value
