"""A sharded model as its ranks use it together for an export: described, gathered, run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ExportError, SnExportError
from ..freezing import Only, Plan, Selection
from ..running import (
    InputSet,
    Preserved,
    Reference,
    preserved_globals,
    run_reference,
    undo_on_exit,
    unwrap_model,
)
from .block import Description, describe_sharded, gather_state
from .fsdp import Unit, find_mixed_precision, fsdp_modules, ranks_of
from .gathered_walk import sharded_units
from .leader import Call, Team

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


class PlainNetwork:
    """What a factory builds, first without values, and later with those of another network.

    It is built on the meta device, so that no memory is taken twice. Some factories read values;
    some handwritten norms are known by what they compute; and a tensor in a plain attribute has the
    value that the factory gives it. Then the factory is called again, on the device it chooses.

    Args:
        factory: returns the network, without its reparametrizations or with them.
    """

    def __init__(self, factory: Callable[[], nn.Module]) -> None:
        self._factory = factory
        self._on_meta: nn.Module | None = None
        self._real: nn.Module | None = None
        try:
            with torch.device("meta"):
                self._on_meta = self._build()
        except Exception:
            self._real = self._build()

    def load(
        self, selection: Selection, state: Mapping[str, Any], buffers: Mapping[str, Tensor]
    ) -> nn.Module:
        """Return the network with plain weights.

        Args:
            selection: what is frozen; where the factory applies that too, the values replace it.
            state: the plain state dict.
            buffers: values of the buffers that are not in it, by name; more do not matter.

        Raises:
            ExportError: if ``state`` is not that of this network.
        """
        network, self._on_meta = self._on_meta, None
        if network is not None:
            with contextlib.suppress(Exception):  # raised again if it has another cause
                self._fill(network, selection, state, buffers)
                if not any(tensor.is_meta for _, tensor in _tensors(network)):
                    return network
            del network  # its tensors go before there are others
        network = self._real or self._build()
        self._fill(network, selection, state, buffers)
        for name, tensor in _tensors(network):
            if tensor.is_meta:
                raise ExportError(f"model_factory leaves '{name}' on the meta device")
        return network

    def _build(self) -> nn.Module:
        with preserved_globals():
            network = self._factory()
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"model_factory must return a torch.nn.Module, got {type(network).__name__}"
            )
        return unwrap_model(network)

    def _fill(
        self,
        network: nn.Module,
        selection: Selection,
        state: Mapping[str, Any],
        buffers: Mapping[str, Tensor],
    ) -> None:
        found = selection.find(network)
        names = [site.name for _, sites in found for site in sites]
        absent = [name for name in names if name not in state]
        if absent:
            raise _unfitting(f"there is no '{absent[0]}' in it")
        plan = Plan(found, lambda _: [state[name] for name in names])
        plan.edits.apply()
        parameters = dict(network.named_parameters(remove_duplicate=False))
        kept: dict[int, nn.Parameter] = {}  # of tied ones there is one

        def loaded(name: str, value: Any) -> Any:
            if name not in parameters or not isinstance(value, Tensor):
                return value
            return kept.setdefault(id(value), nn.Parameter(value, requires_grad=False))

        try:
            network.load_state_dict({n: loaded(n, v) for n, v in state.items()}, assign=True)
        except RuntimeError as error:
            raise _unfitting(" ".join(str(error).split())) from error
        for name, _ in list(network.named_buffers(remove_duplicate=False)):
            if name in buffers and name not in state:
                path, _, last = name.rpartition(".")
                network.get_submodule(path)._buffers[last] = buffers[name]


def _unfitting(reason: str) -> ExportError:
    return ExportError(
        "model_factory must build the network that is sharded, without fully_shard, with or "
        f"without its reparametrizations; the state of that does not fit what it builds: {reason}"
    )


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()
    held = Preserved(network.modules(), belongings=True).tensors
    yield from ((f"a tensor of shape {tuple(t.shape)} in an attribute", t) for t in held)


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
