"""Warnings of a block: hooks that never run, changes made inside that it discards.

Among them is what a reparametrization that is put on a frozen weight inside the block leaves there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from ..errors import ReparametrizationNotAppliedWarning, SpectralNormNotAppliedWarning
from ..text import quote_names, quote_subject
from .edits import Edits
from .frozen_weight import FrozenWeight
from .info import GROUPS, Group
from .kinds import TORCH
from .kinds.chain import ChainSite, change_class, is_weight_norm_state_hook, list_chains
from .plan import Plan
from .site import Site, find_owner_of_state_hook


def describe_unused(sites: Sequence[Site]) -> list[tuple[str, type[UserWarning]]]:
    """Return the warnings about ``sites`` whose hook never runs, with their categories."""
    messages: list[tuple[str, type[UserWarning]]] = []
    for group in GROUPS:
        category = (
            SpectralNormNotAppliedWarning
            if group == "spectral_norm"
            else ReparametrizationNotAppliedWarning
        )
        of_group = [site for site in sites if site.group == group]
        for reason in dict.fromkeys(site.unapplied for site in of_group):
            names = [site.name for site in of_group if site.unapplied == reason]
            messages.append((_describe_group(group, names, reason), category))
    return messages


def _describe_group(group: Group, names: list[str], reason: str) -> str:
    remedy = (
        "Prune in place, with torch.nn.utils.prune.remove, instead"
        if group == "pruning"
        else f"Apply torch.nn.utils.parametrizations.{group} to it instead"
    )
    return (
        f"the {group.replace('_', ' ')} of {quote_names(names)} is never applied: {reason}, so the "
        f"hook does not run. It is frozen at the weight in use. {remedy}"
    )


def collect_complaints(plan: Plan) -> list[str]:
    """Note what was moved or edited in ``plan``, and return the warnings about it."""
    changed = [(weight, change) for weight in plan.weights if (change := weight.change())]
    plan.edited = [weight for weight, _ in changed]
    plan.debris = Edits()  # anew, should an interrupt bring us here twice
    plan_debris(plan.debris, plan.edited, plan.next_hook)
    keep_other_chains(plan.edits, plan.debris, plan.weights)
    moved = [weight.site.name for weight, change in changed if change == "moved"]
    edited = [weight.site.name for weight, change in changed if change == "edited"]
    messages = []
    if moved:
        messages.append(
            f"the model was moved to another dtype or device while {quote_subject(moved, 'was')} "
            "frozen; it is back as it was. Move it before entering the block, or move a copy made "
            "inside it"
        )
    if edited:
        messages.append(
            f"the frozen {quote_subject(edited, 'was')} changed inside the block; the change is "
            "discarded. Change the model outside the block instead"
        )
    return messages


def plan_debris(edits: Edits, edited: Iterable[FrozenWeight], since: int) -> None:
    """Plan to make the modules of ``edited`` plain again, so that the block can be undone.

    Freezing them once more does that, with the frozen weight as the value: it takes away hooks,
    buffers, parameters and the class. Only torch's kinds are looked for, since no foreign code may
    run here.

    Args:
        edits: where to plan.
        edited: the weights that something was done to.
        since: the key that the next hook would have got when the block began.
    """
    for weight in edited:
        module, tensor = weight.site.module, weight.site.tensor
        for find in TORCH:
            for site in find(weight.site.path, module):
                if site.tensor == tensor:
                    site.plan(edits, weight.tensor)
        # Removing spectral norm leaves its own behind: torch looks for it by a class it wraps.
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            keys = [k for k, e in hooks.items() if k >= since and _is_state_hook(e, tensor)]
            edits.remove(hooks, keys)


def _is_state_hook(entry: Any, tensor: str) -> bool:
    """Whether ``entry`` is a hook that torch's norms put on the state dict for ``tensor``."""
    owner = find_owner_of_state_hook(entry)
    is_spectral = isinstance(owner, SpectralNorm) and owner.name == tensor
    return is_spectral or is_weight_norm_state_hook(entry, tensor)


def keep_other_chains(edits: Edits, debris: Edits, weights: Iterable[FrozenWeight]) -> None:
    """Keep parametrizations of other tensors as they are, if they came or went inside the block.

    They share the class and the dictionary of chains with a tensor that is put back.

    Args:
        edits: those of the block.
        debris: where to plan.
        weights: the frozen weights of the block.
    """
    changed = [entry for entry in edits.list_classes() if type(entry[0]) is not entry[2]]
    if not changed:
        return
    lists: dict[int, nn.ModuleDict] = {}
    tensors: dict[int, set[str]] = {}
    for site in (weight.site for weight in weights):
        tensors.setdefault(id(site.module), set()).add(site.tensor)
        if isinstance(site, ChainSite):
            lists[id(site.module)] = site.lists
    for module, old, planned in changed:
        now = type(module)
        own = lists.get(id(module))
        if own is None:  # a handwritten layer under a parametrization now
            if now.__bases__ == (planned,):
                edits.set_class(module, planned, old=change_class(now, (), {}, (old,)))
            continue
        frozen = tensors[id(module)]
        others = {tensor: chain for tensor, chain in list_chains(module) if tensor not in frozen}
        before = set(edits.get_before(own._modules))
        moved = {t: c for t, c in others.items() if own._modules.get(t) is not c}
        if moved:
            debris.edit(own._modules).update(moved)
        if module._modules.get("parametrizations") is not own:
            debris.edit(module._modules)["parametrizations"] = own
        gone = before - frozen - set(others)
        new = {tensor: vars(now)[tensor] for tensor in others if tensor not in before}
        if gone or new:
            edits.set_class(module, planned, old=change_class(old, gone, new, old.__bases__))
