"""A simulated GPU: CPU tensors that report to be on a GPU.

The project's code runs unchanged, with real values and a real backward pass. Every call of torch passes
through `SimulatedGpu`, which stores the reported device of each tensor, and

- raises `DeviceError` where a GPU would: operands on two devices, a generator or an index on the wrong
  device, `.numpy()` of GPU memory;
- records each call that makes the host wait for the GPU, with the line of the project that made it:
  reading a value back, and every copy that is not both from pinned memory and non-blocking.

Speed, memory, and the rounding of GPU kernels are not simulated.
"""

import contextlib
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from sys import _getframe
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

import mochi
from mochi.runtime import cuda_graphs

_PACKAGE = str(Path(mochi.__file__).parent) + "/"
_RealGenerator = torch.Generator
_RealAutocast = torch.autocast

# Calls that read values of the tensor, or whose result size depends on values.
_READS = {
    "item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__format__", "is_nonzero", "equal",
    "allclose", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive",
}  # fmt: skip

# Calls that compare two tensors without reading them.
_NO_OPERATION = {"_has_compatible_shallow_copy_type", "_make_subclass", "is_same_size"}

# Calls whose result shares the memory of the first argument, so that it is pinned as well.
_VIEWS = {
    "view", "reshape", "unbind", "split", "__getitem__", "narrow", "unflatten", "flatten", "permute",
    "detach",
}  # fmt: skip

_INDEXING = {"__getitem__", "__setitem__", "index_put_", "index_put"}


class DeviceError(RuntimeError):
    """A call that a GPU would refuse."""


class SimulatedGpu(TorchFunctionMode):
    """The torch function mode; enter it with `simulated_gpu`."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """`call file:line` of the project -> number of waits of the host."""
        self.copies: Counter[str] = Counter()
        """The same for copies that do not wait."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name in {"__get__", "__set__"}:
            return self._attribute(func, name, *args)
        if name == "pin_memory":
            return _pinned(args[0].clone())
        if name in {"to", "cpu", "cuda"}:
            return self._moved(name, args[0], args[1:], kwargs)
        return self._computed(func, name, args, kwargs)

    def _attribute(self, func: Any, name: str, owner: Tensor, *value: Any) -> Any:
        """`tensor.device`, `tensor.grad`, `tensor.data = ...` and the like."""
        attribute = func.__self__
        if name == "__set__":
            func(owner, *value)
            if attribute is Tensor.data:
                _claim(owner, device_of(value[0]))
            return None
        if attribute is Tensor.device and device_of(owner) == "cuda":
            return torch.device("cuda", 0)
        if attribute is Tensor.is_cuda:
            return device_of(owner) == "cuda"
        result = func(owner)
        for tensor in _tensors(result):
            _claim(tensor, device_of(owner))
        return result

    def _moved(self, name: str, tensor: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """`to`, `cpu` and `cuda`."""
        before = after = device_of(tensor)
        non_blocking = bool(kwargs.pop("non_blocking", False))
        rest: list[Any] = []
        if name != "to":
            after = name
        elif kwargs.get("device") is not None:
            after = torch.device(kwargs["device"]).type
        kwargs.pop("device", None)
        for argument in args:
            if isinstance(argument, Tensor):
                after = device_of(argument)
                rest.append(argument.dtype)
            elif isinstance(argument, bool):
                non_blocking = argument
            elif isinstance(argument, str | torch.device):
                after = torch.device(argument).type
            elif isinstance(argument, torch.dtype):
                rest.append(argument)
        result = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        if after != before:
            result = result.clone() if result is tensor else result
            way = "copy to the GPU" if after == "cuda" else "copy to the host"
            # A non-blocking copy to the host also waits, since its reader has to.
            self._note(way, waits=not (non_blocking and _is_pinned(tensor) and after == "cuda"))
        if result is not tensor:
            _claim(result, after)
        return result

    def _computed(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Any other call: the result is on the device of its operands, or on `device`."""
        operands = [*_tensors(args), *_tensors(kwargs)]
        if name in {"numpy", "__array__"} and device_of(args[0]) == "cuda":
            raise DeviceError("can't convert cuda:0 device type tensor to numpy")
        wanted = self._device_argument(name, kwargs)
        device = wanted or self._common_device(name, args, operands)
        reads = name in _READS or (name == "where" and len(args) == 1)
        if reads and any(device_of(tensor) == "cuda" for tensor in operands):
            self._note(name, waits=True)
        generator = kwargs.get("generator")
        if generator is not None and getattr(generator, "claims", "cpu") != device:
            raise DeviceError(f"{name}: a generator on {generator.claims} for a tensor on {device}")
        pinned = bool(kwargs.pop("pin_memory", False))
        result = func(*args, **kwargs)
        known = {id(tensor) for tensor in operands}
        for tensor in _tensors(result):
            if id(tensor) not in known:
                _claim(tensor, device)
                if pinned or (name in _VIEWS and _is_pinned(args[0])):
                    _pinned(tensor)
        return result

    def _device_argument(self, name: str, kwargs: dict[str, Any]) -> str | None:
        """The device type of the argument `device`."""
        if kwargs.get("device") is None:
            return None
        wanted = torch.device(kwargs["device"]).type
        kwargs["device"] = "cpu"
        if wanted == "cuda" and name in {"tensor", "as_tensor", "asarray"}:
            self._note("copy to the GPU", waits=True)
        return wanted

    def _common_device(self, name: str, args: Sequence[Any], operands: Sequence[Tensor]) -> str:
        """The device of all operands; a scalar on the CPU may be combined with any tensor."""
        if name in _INDEXING:
            return self._indexed(name, args)
        if name == "copy_":
            source, target = device_of(args[1]), device_of(args[0])
            if source != target:
                non_blocking = bool(args[2:] and args[2])
                self._note(
                    f"copy_ from {source} to {target}", waits=not (non_blocking and _is_pinned(args[1]))
                )
            return target
        devices = {device_of(tensor) for tensor in operands if tensor.dim() or device_of(tensor) == "cuda"}
        if len(devices) > 1 and name not in _NO_OPERATION:
            found = [(tuple(tensor.shape), device_of(tensor)) for tensor in operands]
            raise DeviceError(f"{name}: expected all tensors to be on the same device, found {found}")
        return devices.pop() if devices else "cpu"

    def _indexed(self, name: str, args: Sequence[Any]) -> str:
        """The device of an indexed tensor. Indices on the CPU are allowed, and copied with a wait."""
        device = device_of(args[0])
        for index in _tensors(args[1]):
            if device == "cpu" and device_of(index) == "cuda":
                raise DeviceError(f"{name}: indices on the GPU, the indexed tensor on the CPU")
            if device == "cuda" and (device_of(index) == "cpu" or index.dtype == torch.bool):
                self._note(f"{name} by an index on the CPU or a mask", waits=True)
        value = args[2] if len(args) > 2 else None
        if isinstance(value, Tensor) and value.dim() and device_of(value) != device:
            if any(True for _ in _tensors(args[1])):
                raise DeviceError(f"{name}: a value on {device_of(value)}, self on {device}")
            self._note(f"copy in {name}", waits=True)
        return device

    def _note(self, what: str, *, waits: bool) -> None:
        frame: types.FrameType | None = _getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        where = "?" if frame is None else f"{frame.f_code.co_filename[len(_PACKAGE) :]}:{frame.f_lineno}"
        (self.waits if waits else self.copies)[f"{what} {where}"] += 1


def _claim(tensor: Tensor, device: str) -> None:
    tensor.__dict__["_claims"] = device


def device_of(tensor: Tensor) -> str:
    """The reported device; in a backward pass, a new tensor is a gradient on the GPU."""
    unseen = "cpu" if torch._C._current_graph_task_id() == -1 else "cuda"
    return str(tensor.__dict__.get("_claims", unseen))


def _pinned(tensor: Tensor) -> Tensor:
    tensor.__dict__["_pinned"] = True
    return tensor


def _is_pinned(tensor: Tensor) -> bool:
    return bool(tensor.__dict__.get("_pinned", False))


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested sequences and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Generator(_RealGenerator):
    """Stores the requested device."""

    claims: str

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        generator = super().__new__(cls)
        generator.claims = torch.device(device).type
        return generator

    def __init__(self, device: Any = "cpu") -> None:
        pass


class _Autocast(_RealAutocast):
    """Autocast on the CPU, whatever the requested device."""

    def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True, **options: Any) -> None:
        super().__init__("cpu", dtype, enabled, **options)


class _Stream:
    """All queued work is already done."""

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: "_Stream") -> None:
        """There is nothing to wait for."""

    def is_capturing(self) -> bool:
        """No CUDA graph."""
        return False


def _no_graph() -> NoReturn:
    """Stages then launch kernels one by one."""
    raise RuntimeError("a simulated GPU records nothing")


def _replacements() -> list[tuple[Any, str, Any]]:
    """(object, attribute, its value on a machine with a GPU)."""
    init, iterate = DataLoader.__init__, DataLoader.__iter__

    def unpinned(self: Any, *args: Any, pin_memory: bool = False, **options: Any) -> None:
        init(self, *args, **options)
        self.__dict__["pins"] = pin_memory

    def pinning(self: Any) -> Iterator[Any]:
        for batch in iterate(self):
            if self.__dict__["pins"]:
                for tensor in _tensors(batch):
                    _pinned(tensor)
            yield batch

    properties = types.SimpleNamespace(name="simulated", uuid="00000000", total_memory=80 << 30)
    return [
        (torch, "Generator", _Generator),
        (torch, "autocast", _Autocast),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "get_device_properties", lambda device=0: properties),
        (torch.cuda, "mem_get_info", lambda device=0: (1 << 30, 2 << 30)),
        (torch.cuda, "get_device_name", lambda device=0: "simulated"),
        (torch.cuda, "is_bf16_supported", lambda **options: True),
        (torch.cuda, "synchronize", lambda *device: None),
        (torch.cuda, "manual_seed_all", lambda seed: None),
        (torch.cuda, "CUDAGraph", _no_graph),
        (cuda_graphs, "_WARM_UP_CALLS", 1),  # of captures, which fail
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "current_stream", _Stream),
        (torch.accelerator, "current_stream", _Stream),
        (Tensor, "record_stream", lambda tensor, stream: None),
        (DataLoader, "__init__", unpinned),
        (DataLoader, "__iter__", pinning),
    ]


@contextlib.contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """One GPU in this process, which `pick_device` finds."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in _replacements():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        deterministic = torch.are_deterministic_algorithms_enabled()
        stack.callback(torch.use_deterministic_algorithms, deterministic)
        for owner, name in (
            (torch.utils.deterministic, "fill_uninitialized_memory"),
            (torch.backends.cudnn.conv, "fp32_precision"),  # type: ignore[attr-defined]
            (torch.backends.cuda.matmul, "fp32_precision"),
            (torch.backends.cudnn, "benchmark"),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
        yield stack.enter_context(SimulatedGpu())
