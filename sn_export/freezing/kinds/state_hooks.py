"""What reparametrizations of torch register on a module's state dict, beside what they compute."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm

_COMPATIBILITY = "weight_norm.<locals>._weight_norm_compat_hook"


def is_weight_norm_state_hook(entry: Any, tensor: str) -> bool:
    """Whether ``entry`` translates old checkpoints of ``tensor`` for the weight_norm of chains."""
    function = getattr(entry, "hook", entry)
    if getattr(function, "__qualname__", "") != _COMPATIBILITY:
        return False
    if function.__module__ != parametrizations.__name__:
        return False
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return "name" in cells and cells["name"].cell_contents == tensor


def is_spectral_norm_state_hook(entry: Any, tensor: str) -> bool:
    """Whether ``entry`` translates checkpoints of ``tensor`` for the hook of spectral norm."""
    owner = getattr(getattr(entry, "hook", entry), "fn", None)
    return isinstance(owner, SpectralNorm) and owner.name == tensor


def is_state_hook_of(entry: Any, hook: Any) -> bool:
    """Whether ``entry`` serves the pre-hook ``hook``, in the way of torch's spectral norm."""
    return getattr(getattr(entry, "hook", entry), "fn", None) is hook


def new_state_hooks(
    module: nn.Module, tensor: str, since: int
) -> list[tuple[dict[Any, Any], list[Any]]]:
    """Return the containers of such hooks with the keys of those registered for ``tensor``.

    Removing spectral norm leaves one behind: torch looks for it by a class that it wraps.

    Args:
        module: where to look.
        tensor: what they are for.
        since: the first key that counts; keys grow with each hook registered anywhere.
    """
    return [
        (
            hooks,
            [
                key
                for key, entry in hooks.items()
                if key >= since
                and (
                    is_spectral_norm_state_hook(entry, tensor)
                    or is_weight_norm_state_hook(entry, tensor)
                )
            ],
        )
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks)
    ]
