"""Pre-hooks of one's own that set the weight, such as copies of the hook of PyTorch 0.4.

::

    class SpectralNorm:
        def compute_weight(self, module): ...  # reads weight_orig and weight_u, iterates always
        def __call__(self, module, inputs):
            setattr(module, self.name, self.compute_weight(module))

Like wrappers they are told by what stands in the layer, and by what has been set once they ran.
Those of i-ResNet take the norm of a convolution as an operator, and assert the input's shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...running import same_bits
from ..edits import Edits
from ..introspection.sandbox import AlwaysEqualArgument, compute_in_sandbox, copied_attributes
from ..introspection.singular_vectors import is_multiple, missing_weights
from ..introspection.source_code import mentioned, names_in
from ..names import is_named_as_vector
from ..site import plan_registration
from .handwritten_site import Answer, HandwrittenSite
from .hook import find_hooks
from .state_hooks import is_state_hook_of


class PrehookSite(HandwrittenSite):
    """A weight that a pre-hook of the user's sets on the layer."""

    __slots__ = ("key",)
    kind = "prehook"

    def __init__(self, path: str, module: nn.Module, tensor: str, answer: Answer, key: int) -> None:
        super().__init__(path, module, tensor, answer, module)
        self.key = key

    @property
    def caller(self) -> nn.Module:
        """The module, whose pre-hook it is."""
        return self.module

    def plan(self, edits: Edits, frozen: Tensor) -> None:
        """Take away the hook and what it computes from, and store the weight."""
        module = self.module
        hook = module._forward_pre_hooks[self.key]
        edits.remove(module._forward_pre_hooks, (self.key,))
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            edits.remove(hooks, [k for k, entry in hooks.items() if is_state_hook_of(entry, hook)])
        if self.key in module._forward_pre_hooks_with_kwargs:
            edits.remove(module._forward_pre_hooks_with_kwargs, (self.key,))
        self.take_away(edits)
        plan_registration(edits, module, self.tensor, frozen)


def find_prehooks(path: str, module: nn.Module) -> list[PrehookSite]:
    """Return the sites of the weights that foreign pre-hooks of ``module`` set."""
    known = {site.tensor for site in find_hooks(path, module)}
    sites = []
    for weight in missing_weights(module, operators=True):
        if weight.tensor in known or not any(map(is_named_as_vector, weight.state)):
            continue
        for key, hook in module._forward_pre_hooks.items():
            if not mentioned(weight.raw, names_in(hook)):
                continue  # somebody else's, which must not run for this
            value = _ask(module, weight.tensor, key)
            if value is None or value.shape != weight.value.shape:
                continue
            if weight.is_matrix or is_multiple(weight.value, value):
                answer = Answer(weight.raw, value, weight.state)
                sites.append(PrehookSite(path, module, weight.tensor, answer, key))
                break
    return sites


def _ask(module: nn.Module, tensor: str, key: int) -> Tensor | None:
    hook: Any = module._forward_pre_hooks[key]
    takes_kwargs = key in module._forward_pre_hooks_with_kwargs
    marker = torch.empty(0)

    def run(*inputs: object) -> Tensor | None:
        module.__dict__[tensor] = marker  # what an earlier forward left tells nothing
        hook(module, inputs, {}) if takes_kwargs else hook(module, inputs)
        value = getattr(module, tensor, None)
        return value.clone() if isinstance(value, Tensor) and value is not marker else None

    value = _answer(module, hook, run)
    if value is not None or not hasattr(hook, "compute_weight"):
        return value
    # One that asserts the shape of its input; should it do more with that, the two differ.
    value = _answer(module, hook, lambda: run(AlwaysEqualArgument()))
    alone = _answer(module, hook, lambda: hook.compute_weight(module, do_power_iteration=False))
    return value if value is not None and alone is not None and same_bits(value, alone) else None


def _answer(module: nn.Module, hook: Any, run: Callable[[], Tensor | None]) -> Tensor | None:
    owner = getattr(hook, "__self__", hook)
    modules = [module, owner] if isinstance(owner, nn.Module) and owner is not module else [module]
    try:
        if isinstance(owner, nn.Module):
            return compute_in_sandbox(run, modules)
        with copied_attributes(owner):
            return compute_in_sandbox(run, modules)
    except Exception:  # another hook, which wanted an input
        return None
