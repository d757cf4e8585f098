"""A sharded model as its ranks use it together for an export: described, gathered, run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import ExportError, SnExportError
from ..freezing import Only, Selection
from ..running import InputSet, Preserved, Reference, preserved_globals, run_reference, undo_on_exit
from .find import Description, describe_sharded
from .fsdp import Unit, find_mixed_precision, fsdp_modules, ranks_of
from .gathered_walk import sharded_units
from .leader import Call, Team
from .plain_network import PlainNetwork, gather_state

T = TypeVar("T")


class ShardedModel:
    """The actions of one rank; each is a collective call.

    Args:
        model: the model.
        units: those of the model.
        check: called on all ranks before a unit is gathered in a forward; raises on all if one
            rank has failed.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], check: Callable[[], None]) -> None:
        self._model = model
        self._units = units
        self._check = check
        for unit in units:
            unit.initialise()  # now, as it registers hooks that are to stay

    def describe(self, only: Only, sigma_exact: bool) -> Description:
        """Return what would be frozen.

        Raises:
            FreezeError: as `frozen_parametrizations`, on all ranks.
        """
        return describe_sharded(self._model, only, sigma_exact)

    def gather(self, only: Only) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the plain state dict, and all buffers; nothing on other ranks than the first.

        Raises:
            FreezeError: as `frozen_parametrizations`, on all ranks.
        """
        return gather_state(self._model, only)

    def run(self, inputs: InputSet, drops_weights: bool) -> Reference:
        """Return what the model says in eval mode; it is as before afterwards.

        Args:
            inputs: the same on every rank.
            drops_weights: as for `run_reference`.

        Raises:
            SnExportError: if it rejects the inputs, or another rank has failed.
        """
        hooks = [
            module.register_forward_pre_hook(lambda *_: self._check(), prepend=True)
            for module in fsdp_modules(self._model)
        ]
        try:
            with preserved_globals():
                state = _ShardedState(self._model, self._units)
                with undo_on_exit(state.restore):
                    state.begin()
                    said = run_reference(self._model, state, inputs, drops_weights)
        finally:
            for hook in hooks:
                hook.remove()
        return replace(said, outputs=tuple(output.cpu() for output in said.outputs))


class _ShardedState(Preserved):
    """The state of a model whose parameters FSDP takes out and puts in."""

    def __init__(self, model: nn.Module, units: Sequence[Unit]) -> None:
        self._take_back = [unit.trace() for unit in units]
        super().__init__(model.modules(), belongings=True)

    def reset(self) -> None:
        """Give the next forward pass the state that the first one had, with all units sharded."""
        self._settle()
        super().reset()

    def restore(self) -> None:
        """Put everything back, with all units sharded."""
        self._settle()
        super().restore()

    def _settle(self) -> None:
        for take_back in self._take_back:
            take_back()


class GatheredNetwork:
    """A sharded model on its first rank, as an export needs it.

    Args:
        call: runs an action of `ShardedModel` on all ranks.
        factory: builds the network in one process.
        only: what is frozen.
    """

    def __init__(self, call: Call, factory: Callable[[], nn.Module], only: Only) -> None:
        self._call = call
        self._factory = factory
        self._only = only

    @cached_property
    def network(self) -> nn.Module:
        """The plain network on the CPU, gathered when it is first asked for."""
        network = PlainNetwork(self._factory)
        state, buffers = self._call("gather", self._only)
        return network.load(Selection(self._only), state, buffers)

    def describe(self, sigma_exact: bool) -> Description:
        """Return what is frozen, as `ShardedModel.describe` does."""
        found: Description = self._call("describe", self._only, sigma_exact)
        return found

    def run(self, inputs: InputSet) -> Reference:
        """Return what the sharded model says, on every rank.

        It is run again where it may have needed a weight that was dropped. All ranks do that after
        they have agreed: one that began again alone would be at another unit than the others.
        """
        said: Reference
        try:
            said = self._call("run", inputs, True)
        except SnExportError:
            said = self._call("run", inputs, False)
        return said


def lead_export(
    model: nn.Module,
    factory: Callable[[], nn.Module],
    only: Only,
    export: Callable[[GatheredNetwork], T],
    share: Callable[[T], T],
) -> T:
    """Return on every rank of a sharded model what ``export`` returns on the first.

    Args:
        model: the model.
        factory: builds the network in one process; called on the first rank alone.
        only: what is frozen, as for `frozen_parametrizations`.
        export: called on the first rank.
        share: what the other ranks get of the result.

    Raises:
        ExportError: if not all ranks call, or one is interrupted.
        Exception: what ``export`` raises, on every rank.
    """
    units = sharded_units(model)
    team = Team(ranks_of(units.values()))
    sharded = ShardedModel(model, list(dict.fromkeys(units.values())), team.check)
    team.actions = {"describe": sharded.describe, "gather": sharded.gather, "run": sharded.run}
    team.checking = ("run",)

    def lead(call: Call) -> T:
        _require_one_dtype(units.values())
        return export(GatheredNetwork(call, factory, only))

    return team.run(lead, share)


def _require_one_dtype(units: Iterable[Unit]) -> None:
    found = find_mixed_precision(units)
    if found is not None:
        sharded, gathered = found
        raise ExportError(
            f"a mixed precision policy gathers parameters in {gathered}, and the file would "
            f"compute in {sharded}, so that the model's own outputs are no reference for it: load "
            "gather_plain_state_dict(model) into a network in one process, and export that"
        )
