"""Ask a module's own code for a weight, on copies of everything that it might write."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...running import restore_container, undo_on_exit, undoing, without_trace

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
