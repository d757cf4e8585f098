"""Run a module's own code on copies of all that it might write, and on inputs made for it.

A `Probe` runs a subclass of one of torch's layers, and sees what weight it hands to torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...running import (
    call_without_subclasses,
    restore_container,
    run_without_trace,
    undo_on_exit,
    undoing,
)
from .source_code import find_torch_base

T = TypeVar("T")


def compute_in_sandbox(run: Callable[[], T], modules: Iterable[nn.Module]) -> T:
    """Return ``run()`` with ``modules`` in eval mode and on copies of their tensors.

    `sn_export.running.run_without_trace` swaps buffers for copies. Handwritten spectral norms keep
    their singular vectors in parameters too, and write them through ``.data``, so here the
    parameters are swapped as well.

    Args:
        run: calls code of the modules, without gradients.
        modules: the modules whose code may run; not their children, unless listed.
    """
    modules = list(modules)

    def on_copies() -> T:
        copies: dict[int, nn.Parameter] = {}
        for module in modules:
            parameters = module._parameters
            for name, parameter in parameters.items():
                if parameter is not None and not is_lazy(parameter):
                    copy = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                    parameters[name] = copies.setdefault(id(parameter), copy)
        return run()

    with torch.inference_mode(False), torch.no_grad():
        return run_without_trace(on_copies, modules, parameters=False)


def make_placeholders(module: nn.Module, make: Callable[[], object] = object) -> list[object]:
    """Return as many objects as ``module`` needs arguments, to run its forward up to their use."""
    parameters = inspect.signature(module.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return [make() for _ in range(max(len(required), variadic))]


class AbsorbingArgument:
    """An argument whose methods, attributes and products are itself; no function of torch takes it.

    A forward that reshapes or scales its input gets past that with it.
    """

    __iter__ = None  # by __getitem__ it would go on for ever

    def _itself(self, *_: object, **__: object) -> AbsorbingArgument:
        return self

    def __getattr__(self, name: str) -> AbsorbingArgument:
        """Return itself, but no protocol, such as that of tensor subclasses."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    __getitem__ = __call__ = _itself
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = _itself


class AlwaysEqualArgument(AbsorbingArgument):
    """An argument that is equal to whatever a hook asserts of it."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


@undoing
def copied_attributes(holder: Any) -> Iterator[None]:
    """Let ``holder``, such as a hook, write its attributes and their tensors; put all back."""
    attributes: dict[str, Any] = getattr(holder, "__dict__", {})
    content = attributes.copy()
    with undo_on_exit(lambda: restore_container(attributes, content)):
        tensors = {name: t for name, t in content.items() if isinstance(t, Tensor)}
        attributes.update({name: t.detach().clone() for name, t in tensors.items()})
        yield


_FUNCTIONS: dict[type[nn.Module], tuple[Callable[..., Any], int]] = {
    # the function that the layer ends in, and the position of the weight
    nn.Linear: (F.linear, 1),
    nn.Conv1d: (F.conv1d, 1),
    nn.Conv2d: (F.conv2d, 1),
    nn.Conv3d: (F.conv3d, 1),
    nn.ConvTranspose1d: (F.conv_transpose1d, 1),
    nn.ConvTranspose2d: (F.conv_transpose2d, 1),
    nn.ConvTranspose3d: (F.conv_transpose3d, 1),
    nn.Embedding: (F.embedding, 1),
}


@dataclass(frozen=True)
class Used:
    """What a forward pass did with the probe.

    Attributes:
        value: the weight that torch's function was given.
        is_all: whether the forward is that of torch's layer, but for the weight: the same
            function with the same arguments, and its result returned as it is.
    """

    value: Tensor
    is_all: bool


class Probe:
    """A layer that derives from one of torch's, and an input that it takes."""

    def __init__(self, module: nn.Module, base: type[nn.Module]) -> None:
        self._module = module
        self._base = base
        self._function, self._position = _FUNCTIONS[base]

    @classmethod
    def of(cls, module: nn.Module) -> Probe | None:
        """Return the probe for ``module``, if it derives from a layer that is known here."""
        base = find_torch_base(type(module))
        return cls(module, base) if base in _FUNCTIONS else None

    def compute_weight(self, raw: str) -> Used | None:
        """Return what an eval-mode forward uses in place of the parameter ``raw``.

        None if it cannot be run on the probe alone, or uses no single weight.
        """
        try:
            return compute_in_sandbox(lambda: self._run(raw), [self._module])
        except Exception:
            return None

    def _run(self, raw: str) -> Used | None:
        module = self._module
        calls, result, probe = self._record(type(module).forward)
        if len(calls) != 1:
            return None
        (call,) = calls
        value = call.arguments[self._position]
        if not isinstance(value, Tensor):
            return None
        if raw != "weight":
            return Used(value.clone(), False)
        module._parameters["weight"] = nn.Parameter(value.detach(), requires_grad=False)
        expected, _, plain_probe = self._record(self._base.forward)
        is_all = (
            len(expected) == 1
            and result is call.result
            and call.arguments[0] is probe
            and expected[0].arguments[0] is plain_probe
            and all(map(_is_equal, call.arguments[2:], expected[0].arguments[2:]))
        )
        return Used(value.clone(), is_all)

    def _record(self, forward: Callable[..., Any]) -> tuple[list[_Call], Any, Tensor]:
        probe = self.make_example().as_subclass(_Recorder)
        probe.function, probe.calls = self._function, []
        result = forward(self._module, probe)
        return probe.calls, result, probe

    def make_example(self) -> Tensor:
        """Return an input that the layer takes."""
        module: Any = self._module
        weight = next(p for p in module._parameters.values() if p is not None and p.ndim >= 2)
        options: dict[str, Any] = {"device": weight.device}
        if self._base is nn.Embedding:
            return torch.zeros(1, dtype=torch.long, **options)
        options["dtype"] = weight.dtype
        if self._base is nn.Linear:
            return torch.ones(1, module.in_features, **options)
        sizes = [
            max(2, d * (k - 1) + 1)
            for k, d in zip(module.kernel_size, module.dilation, strict=True)
        ]
        return torch.ones(1, module.in_channels, *sizes, **options)


@dataclass(frozen=True)
class _Call:
    arguments: tuple[Any, ...]
    result: Any


class _Recorder(Tensor):
    """An input that notes what one function of torch is given together with it."""

    function: Callable[..., Any]
    calls: list[_Call]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function, and remember its arguments in the order of its signature."""
        kwargs = kwargs or {}
        # In C, so that no interrupt finds subclasses switched off and leaves them so.
        result = call_without_subclasses(func, types, args, kwargs)
        probe = args[0] if args else kwargs.get("input")
        if isinstance(probe, _Recorder) and func is probe.function:
            probe.calls.append(_Call(_order_arguments(func, args, kwargs), result))
        return result


_ORDER: dict[Callable[..., Any], tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    F.embedding: (
        "input",
        "weight",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    ),
    **dict.fromkeys(
        (F.conv1d, F.conv2d, F.conv3d),
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    ),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    ),
}
# What a call means that leaves an argument out, in the spelling that torch's layers use.
_DEFAULTS: dict[str, Any] = {
    "bias": None,
    "stride": 1,
    "padding": 0,
    "output_padding": 0,
    "dilation": 1,
    "groups": 1,
    "padding_idx": None,
    "max_norm": None,
    "norm_type": 2.0,
    "scale_grad_by_freq": False,
    "sparse": False,
}


def _order_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    names = _ORDER[function]
    given = dict(zip(names, args, strict=False)) | kwargs
    return tuple(given.get(name, _DEFAULTS.get(name)) for name in names)


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if isinstance(a, tuple) != isinstance(b, tuple):  # 1 stands for (1, 1)
        pair, single = (a, b) if isinstance(a, tuple) else (b, a)
        return all(entry == single for entry in pair)
    return bool(a == b)
