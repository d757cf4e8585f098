"""The with-block: plan, apply, and undo whatever happens."""

from __future__ import annotations

import gc
import logging
import threading
import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ContextDecorator
from typing import Generic, TypeVar

from torch import nn

from ..errors import FreezeError, FrozenWeightChangedWarning
from ..running import ClosedOnExit, undo_on_exit
from .interference import collect_complaints, describe_unused
from .plan import Keep, Plan
from .selection import Only, Selection
from .site import Found, Site, require_module
from .suspects import warn_of_suspects

M = TypeVar("M", bound=nn.Module)

# Stack levels of the with statement, seen from `_Freezing.enter` and `_Freezing.complain`.
_ENTERING, _LEAVING = 6, 4
_logger = logging.getLogger("sn_export")
_holders: dict[int, _Freezing] = {}  # id of a module -> the block that holds it frozen
_active: list[_Freezing] = []  # of all threads, in the order of entering


class Planner:
    """Finds what a block freezes and plans how; a subclass does it for models on several ranks.

    Args:
        selection: which tensors are frozen.
        keep: where the frozen weights are kept, as `Plan` takes it; in memory by default.
        complains: whether changes of them that are discarded are warned of.
    """

    def __init__(self, selection: Selection, keep: Keep = list, complains: bool = True) -> None:
        self.selection = selection
        self.keep = keep
        self.complains = complains

    def find(self, model: nn.Module, frozen: Iterable[Site]) -> list[Found]:
        """Return the modules of ``model`` with their sites, as `Selection.find` does."""
        return self.selection.find(model, frozen)

    def plan(self, model: nn.Module, found: Sequence[Found]) -> Plan:
        """Return the plan for ``found``, which is what `find` returned; nothing is changed."""
        return Plan(found, self.keep)


class Block(ClosedOnExit, ContextDecorator, Generic[M]):
    """Freezes a model for the length of a with-block, as often as it is entered.

    Args:
        model: what is frozen.
        planner: finds and plans it.
    """

    def __init__(self, model: M, planner: Planner) -> None:
        self._model = model
        self._planner = planner

    def _recreate_cm(self) -> Block[M]:
        return type(self)(self._model, self._planner)  # as a decorator: one for each call

    def __enter__(self) -> M:  # type: ignore[override]
        return self.closing(_hold_frozen(self._model, self._planner))


def _hold_frozen(model: M, planner: Planner) -> Generator[M]:
    """Hold ``model`` frozen until closed."""
    freezing = _Freezing(model, planner)
    try:
        # Two, so that a second interrupt, of somebody who holds Ctrl-C, finds the model restored.
        with undo_on_exit(freezing.leave), undo_on_exit(freezing.leave):
            freezing.enter()
            yield model
    finally:
        freezing.complain()


class _Freezing:
    """The state of one block."""

    def __init__(self, model: nn.Module, planner: Planner) -> None:
        self.thread = threading.get_ident()
        self._model = model
        self._planner = planner
        self._plan: Plan | None = None
        self._is_frozen = False
        self._has_ended = False
        self._modules: list[nn.Module] = []
        self._claimed: list[int] = []
        self._complaints: list[str] = []
        self._gc_was_enabled: bool | None = None

    def enter(self) -> None:
        """Plan, then apply."""
        self._pause_gc()
        _refuse_held(self._model)
        around = [b._plan for b in _active if b.thread == self.thread and b._plan is not None]
        frozen = (weight.site for plan in around for weight in plan.weights)
        found = self._planner.find(self._model, frozen)
        self._claim(found)
        self._modules = [module for module, _ in found]
        _active.append(self)
        plan = self._planner.plan(self._model, found)
        self._plan = plan
        for text, category in describe_unused(
            [w.site for w in plan.weights if not w.site.is_applied]
        ):
            warnings.warn(text, category, stacklevel=_ENTERING)
        if self._planner.selection.includes_spectral_norm:
            warn_of_suspects(self._model, found, stacklevel=_ENTERING)
        plan.edits.apply()
        self._is_frozen = True
        _logger.debug("froze %d tensors", len(plan.weights))
        self._resume_gc()

    def leave(self) -> None:
        """Undo what `enter` did, as far as it came; not before a later block on it has ended.

        Blocks may overlap without nesting, in generators for example. What a later block
        froze stands on what an earlier one did, so undoing goes backwards in any case.
        """
        self._has_ended = True
        if any(self._carries(block) for block in self._find_later()):
            return
        self._undo()
        for block in reversed([b for b in _active if b._has_ended and b.thread == self.thread]):
            block.leave()
            self._complaints += block._complaints
            block._complaints = []

    def _undo(self) -> None:
        plan = self._plan
        if plan is not None:
            self._pause_gc()
            if not self._is_frozen:
                plan.edits.roll_back()
            else:
                if not plan.finished:
                    plan.settle()
                    self._complaints = collect_complaints(plan)
                    plan.finished = True
                _undo(plan)
            self._plan = None
        self._release()
        if self in _active:
            _active.remove(self)
        self._modules = []
        self._resume_gc()

    def _find_later(self) -> list[_Freezing]:
        active = list(_active)
        return active[active.index(self) + 1 :] if self in active else []

    def _carries(self, later: _Freezing) -> bool:
        claimed = set(self._claimed)
        return later.thread == self.thread and any(id(m) in claimed for m in later._modules)

    def complain(self) -> None:
        """Warn about changes that were discarded."""
        for message in self._complaints if self._planner.complains else ():
            warnings.warn(message, FrozenWeightChangedWarning, stacklevel=_LEAVING)

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
    plan.debris.roll_back()  # of an attempt that was interrupted
    plan.debris.apply()
    plan.edits.restore()
    for weight in plan.edited:  # it may have been put somewhere else under its name
        module = weight.site.module
        for container in (module._parameters, module._buffers, module.__dict__):
            plan.edits.forget(container, weight.site.tensor)
    if plan.edited:
        plan.residence.restore()
    for weight, training in zip(plan.weights, plan.modes, strict=True):
        if weight.site.attributes["training"] != training:
            weight.site.follow_mode(not training)


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


def frozen_spectral_norm(model: M) -> AbstractContextManager[M]:
    """Freeze every spectral norm of a model in one process for the length of a with-block.

    `sn_export.frozen_spectral_norm` promises, takes and raises the same, on any number of ranks.
    """
    return Block(require_module(model), Planner(Selection("spectral_norm")))


def frozen_parametrizations(model: M, only: Only = None) -> AbstractContextManager[M]:
    """Freeze everything that computes a weight, of a model in one process, for a with-block.

    `sn_export.frozen_parametrizations` promises, takes and raises the same, on any number of ranks.
    """
    return Block(require_module(model), Planner(Selection(only)))


def freeze_into(model: M, only: Only, keep: Keep) -> AbstractContextManager[M]:
    """Freeze as `frozen_parametrizations` does, with the weights where ``keep`` puts them.

    No user has this block around code of theirs, so what a forward writes to a frozen weight is
    discarded without a warning: what it gives is held against the model's own outputs.

    Args:
        model: any module.
        only: as for `frozen_parametrizations`.
        keep: takes the weights, each made when it is asked for, and returns tensors of the same
            bits, shapes and dtypes.
    """
    return Block(require_module(model), Planner(Selection(only), keep, complains=False))
