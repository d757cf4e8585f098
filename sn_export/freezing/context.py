"""The with-block: plan, apply, and undo whatever happens."""

from __future__ import annotations

import gc
import logging
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from torch import nn

from ..errors import (
    FreezeError,
    FrozenWeightChangedWarning,
    SpectralNormNotAppliedWarning,
    SpectralNormNotRecognisedWarning,
)
from .kinds import SPECTRAL_NORM
from .plan import Found, Plan, walk
from .site import Kind, SpectralNormInfo
from .suspects import SpectralNormSuspect, describe_suspects, suspects_in

M = TypeVar("M", bound=nn.Module)

_logger = logging.getLogger("sn_export")
_holders: dict[int, _Freezing] = {}  # id of a module -> the block that holds it frozen


def frozen_spectral_norm(model: M) -> AbstractContextManager[M]:
    """Freeze every spectral norm of ``model`` for the length of a with-block.

    ::

        with frozen_spectral_norm(model) as plain:  # the same object
            torch.onnx.export(plain, args, "model.onnx")

    Inside, each tensor under `torch.nn.utils.spectral_norm` (hooks and subclasses),
    `torch.nn.utils.parametrizations.spectral_norm` (anywhere in a chain), or a handwritten
    spectral norm (wrappers that set the weight of a layer, layers that normalise it in forward,
    and what `register_spectral_norm` has made known) is a plain
    `torch.nn.Parameter` without grad that holds, bit for bit, the weight an eval-mode
    forward would use now; the classes and the state dict are those of the network without
    spectral norm. No power iteration is run, no random number drawn, no mode changed, and
    nothing but the weights under spectral norm is copied.

    Afterwards, also after an exception, the model is what it was: the same parameters,
    buffers, hooks, classes and containers, in the same order. What else was changed inside
    stays: hooks, attributes, train/eval mode. Blocks nest; the inner one finds nothing to do.

    Args:
        model: any module; it may itself carry spectral norm.

    Returns:
        A context manager that yields ``model``.

    Raises:
        TypeError: if ``model`` is not a `torch.nn.Module`.
        FreezeError: on entering, if a tensor cannot be frozen (on the meta device, not
            initialised, in a ScriptModule, held by another thread's block); nothing has
            changed then.

    Warns:
        SpectralNormNotAppliedWarning: on entering, if a hook is never run by the network, so
            that the weight in use is not normalised; it is frozen as it is in use.
        SpectralNormNotRecognisedWarning: on entering, if a module looks like a handwritten
            spectral norm that cannot be frozen; it is left as it is (`find_suspects`).
        FrozenWeightChangedWarning: on leaving, if a frozen weight was edited, or the model
            was moved to another dtype or device. Such changes are discarded.
    """
    return _block(require_module(model), SPECTRAL_NORM)


def find_spectral_norm(model: nn.Module) -> list[SpectralNormInfo]:
    """List the tensors that `frozen_spectral_norm` would freeze, in the order of the modules.

    Args:
        model: any module. It is not changed; no power iteration is run.

    Returns:
        One `SpectralNormInfo` for each tensor.

    Raises:
        TypeError: if ``model`` is not a `torch.nn.Module`.
        FreezeError: if spectral norm sits where it cannot be read, as in a ScriptModule, or an
            adapter fails.

    Warns:
        SpectralNormNotRecognisedWarning: if a module looks like a handwritten spectral norm that
            is not known (`find_suspects`); it is not in the list.
    """
    found = list(walk(require_module(model), SPECTRAL_NORM))
    _warn_of_suspects(model, found, stacklevel=2)
    return _described(found)


def described(model: nn.Module) -> list[SpectralNormInfo]:
    """Return what `find_spectral_norm` returns, without a warning."""
    return _described(walk(model, SPECTRAL_NORM))


def find_suspects(model: nn.Module) -> list[SpectralNormSuspect]:
    """List the modules that look like a handwritten spectral norm that is not known.

    `frozen_spectral_norm` leaves them as they are. `register_spectral_norm` makes one known.

    Args:
        model: any module. It is not changed.

    Returns:
        One `SpectralNormSuspect` for each module, in the order of ``named_modules``.

    Raises:
        TypeError: if ``model`` is not a `torch.nn.Module`.
        FreezeError: if spectral norm sits where it cannot be read, as in a ScriptModule, or an
            adapter fails.
    """
    return suspects_in(model, walk(require_module(model), SPECTRAL_NORM))


def _described(found: Iterable[Found]) -> list[SpectralNormInfo]:
    return [site.describe() for _, sites in found for site in sites]


def _warn_of_suspects(model: nn.Module, found: Iterable[Found], stacklevel: int) -> None:
    suspects = suspects_in(model, found)
    if suspects:
        text = describe_suspects(suspects)
        warnings.warn(text, SpectralNormNotRecognisedWarning, stacklevel=stacklevel + 1)


def require_module(model: M) -> M:
    """Return ``model`` if it is a module, and raise a TypeError that says what it is if not."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model


@contextmanager
def _block(model: M, kinds: Iterable[Kind]) -> Iterator[M]:
    freezing = _Freezing(model, kinds)
    # Leaving can be repeated from any point, and does nothing once it is done. So an
    # interrupt that stops it, even at its first instruction, only moves it one level out.
    try:
        try:
            try:
                freezing.enter()
                yield model
            finally:
                freezing.leave()
        finally:
            freezing.leave()
    finally:
        freezing.leave()
        freezing.complain()


class _Freezing:
    """The state of one block."""

    def __init__(self, model: nn.Module, kinds: Iterable[Kind]) -> None:
        self.thread = threading.get_ident()
        self._model = model
        self._kinds = tuple(kinds)
        self._plan: Plan | None = None
        self._is_frozen = False
        self._claimed: list[int] = []
        self._complaints: list[str] = []
        self._gc_was_enabled: bool | None = None

    def enter(self) -> None:
        """Plan, then apply."""
        self._pause_gc()
        _refuse_held(self._model)
        found = list(walk(self._model, self._kinds))
        self._claim(found)
        plan = Plan(found)
        self._plan = plan
        unused = [w.site.name for w in plan.weights if not w.site.is_applied]
        if unused:
            warnings.warn(_unused(unused), SpectralNormNotAppliedWarning, stacklevel=4)
        _warn_of_suspects(self._model, found, stacklevel=4)
        plan.edits.apply()
        self._is_frozen = True
        _logger.debug("froze %d tensors", len(plan.weights))
        self._resume_gc()

    def leave(self) -> None:
        """Undo what `enter` did, as far as it came."""
        plan = self._plan
        if plan is not None:
            self._pause_gc()
            if not self._is_frozen:
                plan.edits.roll_back()
            else:
                if not plan.finished:
                    self._complaints = _complaints(plan)
                    plan.finished = True
                _undo(plan)
            self._plan = None
        self._release()
        self._resume_gc()

    def complain(self) -> None:
        """Warn about changes that were discarded."""
        for message in self._complaints:
            warnings.warn(message, FrozenWeightChangedWarning, stacklevel=4)

    # No lock: claiming is one atomic operation for each module, and an interrupt between
    # acquiring and releasing cannot leave anything locked.

    def _claim(self, found: Iterable[Found]) -> None:
        self._claimed = [id(module) for module, sites in found if sites]
        for module_id in self._claimed:
            holder = _holders.setdefault(module_id, self)
            if holder.thread != self.thread:
                _refuse_held(self._model)

    def _release(self) -> None:
        for module_id in self._claimed:
            if _holders.get(module_id) is self:
                del _holders[module_id]

    # A plan is thousands of small objects that all live until the block ends; collections
    # in between find nothing and cost a third of the time.

    def _pause_gc(self) -> None:
        if self._gc_was_enabled is None:
            self._gc_was_enabled = gc.isenabled()
        gc.disable()

    def _resume_gc(self) -> None:
        if self._gc_was_enabled:
            gc.enable()
        self._gc_was_enabled = None


def _undo(plan: Plan) -> None:
    plan.edits.restore()
    for weight in plan.edited:  # it may have been put somewhere else under its name
        module = weight.site.module
        for container in (module._parameters, module._buffers, module.__dict__):
            plan.edits.forget(container, weight.site.tensor)
    if plan.moved:
        plan.residence.restore()
    for weight, training in zip(plan.weights, plan.modes, strict=True):
        if weight.site.module.training != training:
            weight.site.follow_mode(weight.site.module.training)


def _unused(names: list[str]) -> str:
    return (
        f"the spectral norm of {_list(names)} is never applied: torch.nn.MultiheadAttention "
        "reads the weight of out_proj without calling it, so the hook does not run. It is "
        "frozen at the weight in use. Apply torch.nn.utils.parametrizations.spectral_norm "
        "to out_proj instead"
    )


def _complaints(plan: Plan) -> list[str]:
    changed = [(weight, change) for weight in plan.weights if (change := weight.change())]
    plan.edited = [weight for weight, _ in changed]
    moved = [weight.site.name for weight, change in changed if change == "moved"]
    edited = [weight.site.name for weight, change in changed if change == "edited"]
    plan.moved = bool(moved)
    messages = []
    if moved:
        messages.append(
            f"the model was moved to another dtype or device while {_list(moved)} was frozen; "
            "it is back as it was. Move it before entering the block, or move a copy made "
            "inside it"
        )
    if edited:
        messages.append(
            f"the frozen {_list(edited)} was changed inside the block; the change is "
            "discarded. Change the model outside the block instead"
        )
    return messages


def _list(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _refuse_held(model: nn.Module) -> None:
    if not _holders:
        return
    here = threading.get_ident()
    for path, module in model.named_modules():
        holder = _holders.get(id(module))
        if holder is not None and holder.thread != here:
            raise FreezeError(
                path or type(module).__name__,
                "a block in another thread holds it frozen",
                "Leave that block first, or give each thread its own copy of the model",
            )
