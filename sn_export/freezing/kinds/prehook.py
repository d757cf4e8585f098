"""Pre-hooks of one's own that set the weight, such as copies of the hook of PyTorch 0.4.

::

    class SpectralNorm:
        def compute_weight(self, module): ...  # reads weight_orig and weight_u, iterates always
        def __call__(self, module, inputs):
            setattr(module, self.name, self.compute_weight(module))

Like wrappers they are recognised by what the layer holds, and by the weight that they set when run.
Those of i-ResNet take the norm of a convolution as an operator, and assert the input's shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...running import have_same_bits
from ..edits import Edits
from ..introspection.candidates import Candidate, find_missing_weights, is_named_as_vector
from ..introspection.sandbox import AlwaysEqualArgument
from ..introspection.source_code import collect_names, is_mentioned
from ..site import find_owner_of_state_hook
from .handwritten import Answer, HandwrittenSite
from .hook import find_hooks


class PrehookSite(HandwrittenSite):
    """A weight that a pre-hook of the user's sets on the layer."""

    __slots__ = ("key",)
    kind = "prehook"

    def __init__(self, path: str, module: nn.Module, tensor: str, answer: Answer, key: int) -> None:
        super().__init__(path, module, tensor, answer, module)
        self.key = key

    @property
    def caller(self) -> nn.Module:
        """The module itself: its call runs the pre-hook."""
        return self.module

    def plan(self, edits: Edits, frozen: Tensor) -> None:
        """Take away the hook and what it computes from, and store the weight."""
        module = self.module
        hook = module._forward_pre_hooks[self.key]
        edits.remove(module._forward_pre_hooks, (self.key,))
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            keys = [k for k, entry in hooks.items() if find_owner_of_state_hook(entry) is hook]
            edits.remove(hooks, keys)
        if self.key in module._forward_pre_hooks_with_kwargs:
            edits.remove(module._forward_pre_hooks_with_kwargs, (self.key,))
        self.take_away(edits)
        self.register(edits, frozen)


def find_prehooks(path: str, module: nn.Module) -> list[PrehookSite]:
    """Return the sites of the weights that foreign pre-hooks of ``module`` set."""
    known = {site.tensor for site in find_hooks(path, module)}
    sites = []
    for missing in find_missing_weights(module, operators=True):
        if missing.tensor in known or not any(map(is_named_as_vector, missing.state)):
            continue
        for key, hook in module._forward_pre_hooks.items():
            if not is_mentioned(missing.raw, collect_names(hook)):
                continue  # somebody else's, which must not run for this
            value = _confirm(module, missing, key)
            if value is not None:
                answer = Answer(missing.raw, value, missing.state)
                sites.append(PrehookSite(path, module, missing.tensor, answer, key))
                break
    return sites


def _confirm(module: nn.Module, missing: Candidate, key: int) -> Tensor | None:
    hook: Any = module._forward_pre_hooks[key]
    owner = getattr(hook, "__self__", hook)
    is_module = isinstance(owner, nn.Module)
    modules = [module, owner] if is_module and owner is not module else [module]
    holder = None if is_module else owner
    takes_kwargs = key in module._forward_pre_hooks_with_kwargs
    marker = torch.empty(0)

    def run(*inputs: object) -> Tensor | None:
        module.__dict__[missing.tensor] = marker  # not what an earlier forward left
        hook(module, inputs, {}) if takes_kwargs else hook(module, inputs)
        value = getattr(module, missing.tensor, None)
        return value.clone() if isinstance(value, Tensor) and value is not marker else None

    def ask() -> Tensor:
        value: Tensor = hook.compute_weight(module, do_power_iteration=False)
        return value

    value = missing.confirm(run, modules, holder)
    if value is not None or not hasattr(hook, "compute_weight"):
        return value
    # A hook that asserts the shape of its input; if it does more with it, the two differ.
    value = missing.confirm(lambda: run(AlwaysEqualArgument()), modules, holder)
    alone = missing.confirm(ask, modules, holder)
    return (
        value if value is not None and alone is not None and have_same_bits(value, alone) else None
    )
