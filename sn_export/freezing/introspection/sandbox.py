"""Ask a module's own code for a weight, on copies of everything that it might write.

A `Candidate` is a weight that the code may normalise; `Candidate.confirm` runs the code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...running import restore_container, undo_on_exit, undoing, without_trace
from ..names import is_named_as_vector, plain_name
from .singular_vectors import fits, is_multiple, is_rescaled

T = TypeVar("T")


def compute_in_sandbox(run: Callable[[], T], modules: Iterable[nn.Module]) -> T:
    """Return ``run()`` with ``modules`` in eval mode and on copies of their tensors.

    `sn_export.running.without_trace` swaps buffers for copies. Handwritten spectral norms keep
    their singular vectors in parameters too, and write them through ``.data``, so here the
    parameters are swapped as well.

    Args:
        run: calls code of the modules, without gradients.
        modules: the modules whose code may run; not their children, unless listed.
    """
    modules = list(modules)

    def on_copies() -> T:
        copies: dict[int, Tensor] = {}
        for module in modules:
            parameters = module._parameters
            for name, parameter in parameters.items():
                if parameter is not None and not is_lazy(parameter):
                    copy = copies.setdefault(id(parameter), _copy(parameter))
                    parameters[name] = copy  # type: ignore[assignment]
        return run()

    with torch.inference_mode(False), torch.no_grad():
        return without_trace(on_copies, modules, parameters=False)


def placeholders(module: nn.Module, make: Callable[[], object] = object) -> list[object]:
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

    __iter__ = None  # it would go on for ever

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
    """Let a hook's object write its attributes, the tensors among them too, and put them back."""
    attributes: dict[str, Any] = getattr(holder, "__dict__", {})
    content = attributes.copy()
    with undo_on_exit(lambda: restore_container(attributes, content)):
        tensors = {name: t for name, t in content.items() if isinstance(t, Tensor)}
        attributes.update({name: t.detach().clone() for name, t in tensors.items()})
        yield


def _copy(parameter: Tensor) -> Tensor:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


@dataclass(frozen=True)
class Candidate:
    """A raw weight with what may be its singular vectors; no family decides without `confirm`.

    Attributes:
        tensor: name of the weight in the plain network.
        raw: name of the parameter that the optimizer trains.
        weight: that parameter.
        state: names of what could be singular vectors and sigma.
        is_certain: whether vectors by their names fit the matrix of a weight that is missing. Then
            the code may do more than to divide.
    """

    tensor: str
    raw: str
    weight: Tensor
    state: tuple[str, ...] = ()
    is_certain: bool = False

    def confirm(
        self, run: Callable[[], Any], modules: Iterable[nn.Module], holder: object = None
    ) -> Tensor | None:
        """Return the normalised weight that the user's code gives, or None.

        Args:
            run: calls that code, which finds copies of what it may write. Whatever it raises
                means that the module is not what it looked like.
            modules: those whose code may run.
            holder: an object with attributes that it may write too, such as a hook.
        """
        try:
            with nullcontext() if holder is None else copied_attributes(holder):
                value = compute_in_sandbox(run, modules)
        except Exception:
            return None
        return value if self.accepts(value) else None

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is the raw weight, normalised.

        Each row or column may have a factor of its own where there are vectors, as heads and
        groups do that are normalised one by one; without vectors that is weight norm.
        """
        if not isinstance(value, Tensor) or value.shape != self.weight.shape:
            return False
        has_vectors = any(map(is_named_as_vector, self.state))
        compare = is_rescaled if has_vectors else is_multiple
        return self.is_certain or compare(self.weight, value)


def missing_weights(layer: nn.Module, operators: bool = False) -> Iterator[Candidate]:
    """Yield the weights that ``layer`` lacks and has the raw parameter of.

    Args:
        layer: where to look.
        operators: take vectors by their names alone, too. Those of a convolution as an operator
            have the sizes of its input and output.
    """
    for raw, value in layer._parameters.items():
        tensor = plain_name(raw)
        if value is None or is_lazy(value) or tensor in layer._parameters or tensor == raw:
            continue
        beside = {
            name: entry
            for container in (layer._parameters, layer._buffers)
            for name, entry in container.items()
            if entry is not None and name != raw and name.startswith(tensor + "_")
        }
        fitting = {name for name, entry in beside.items() if fits(name, entry, value)}
        state = tuple(
            name
            for name, entry in beside.items()
            if entry.numel() == 1 or name in fitting or (operators and _is_flat(name, entry))
        )
        yield Candidate(tensor, raw, value, state, any(map(is_named_as_vector, fitting)))


def _is_flat(name: str, entry: torch.Tensor) -> bool:
    """Whether ``entry`` is named as a vector and is one, or one image; no low-rank factor."""
    is_single = entry.ndim == 1 or (entry.ndim > 1 and entry.shape[0] == 1)
    return is_named_as_vector(name) and is_single and not entry.requires_grad
