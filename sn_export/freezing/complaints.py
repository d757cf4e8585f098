"""What a block warns about: hooks that never run, and changes that it discards."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import ReparametrizationNotAppliedWarning, SpectralNormNotAppliedWarning
from ..text import listed
from .debris import keep_other_chains, plan_debris
from .plan import Plan
from .site import GROUPS, Group, Site
from .undo import Edits

_LISTS = (nn.ParameterList, nn.ParameterDict)


def unused(sites: Sequence[Site]) -> list[tuple[str, type[UserWarning]]]:
    """Return the warnings about ``sites`` whose hook never runs, with their categories."""
    messages: list[tuple[str, type[UserWarning]]] = []
    for group in GROUPS:
        of_group = [site for site in sites if site.group == group]
        in_lists = [site.name for site in of_group if isinstance(site.module, _LISTS)]
        others = [site.name for site in of_group if not isinstance(site.module, _LISTS)]
        category = (
            SpectralNormNotAppliedWarning
            if group == "spectral_norm"
            else ReparametrizationNotAppliedWarning
        )
        for names, reader in (
            (others, "torch.nn.MultiheadAttention reads the weight of out_proj without calling it"),
            (in_lists, "nothing calls a torch.nn.ParameterList or ParameterDict"),
        ):
            if names:
                messages.append((_unused(group, names, reader), category))
    return messages


def _unused(group: Group, names: list[str], reader: str) -> str:
    where = "out_proj" if "out_proj" in reader else "it"
    remedy = (
        "Prune in place, with torch.nn.utils.prune.remove, instead"
        if group == "pruning"
        else f"Apply torch.nn.utils.parametrizations.{group} to {where} instead"
    )
    return (
        f"the {group.replace('_', ' ')} of {listed(names)} is never applied: {reader}, so the "
        f"hook does not run. It is frozen at the weight in use. {remedy}"
    )


def complaints(plan: Plan) -> list[str]:
    """Note what was moved or edited in ``plan``, and return the warnings about it."""
    changed = [(weight, change) for weight in plan.weights if (change := weight.change())]
    plan.edited = [weight for weight, _ in changed]
    plan.debris = Edits()  # anew, should an interrupt bring us here twice
    plan_debris(plan.debris, plan.edited, plan.next_hook)
    keep_other_chains(plan.edits, plan.debris, plan.weights)
    moved = [weight.site.name for weight, change in changed if change == "moved"]
    edited = [weight.site.name for weight, change in changed if change == "edited"]
    plan.moved = bool(moved)
    messages = []
    if moved:
        messages.append(
            f"the model was moved to another dtype or device while {listed(moved)} was frozen; "
            "it is back as it was. Move it before entering the block, or move a copy made "
            "inside it"
        )
    if edited:
        messages.append(
            f"the frozen {listed(edited)} was changed inside the block; the change is "
            "discarded. Change the model outside the block instead"
        )
    return messages
