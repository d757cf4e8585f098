"""A sharded model during an export: its ranks describe, gather and run it together."""

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
from .fsdp import Unit, find_fsdp_modules, find_mixed_precision, find_ranks
from .gathered_walk import find_sharded_units
from .leader import Call, Team

T = TypeVar("T")


class ShardedModel:
    """The actions of one rank; each is a collective call.

    Args:
        model: the model.
        units: the units of the model.
        check: called on all ranks before a forward gathers a unit; raises on all if one rank has
            failed.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], check: Callable[[], None]) -> None:
        self._model = model
        self._units = units
        self._check = check
        for unit in units:
            unit.initialise()  # now, since the hooks that it registers have to stay

    def describe(self, only: Only, sigma_exact: bool) -> Description:
        """List what would be frozen.

        Raises:
            FreezeError: as `frozen_parametrizations`, on all ranks.
        """
        return describe_sharded(self._model, only, sigma_exact)

    def gather(self, only: Only) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the plain state dict and all buffers; both empty on other ranks than the first.

        Raises:
            FreezeError: as `frozen_parametrizations`, on all ranks.
        """
        return gather_state(self._model, only)

    def run(self, inputs: InputSet, drops_weights: bool) -> Reference:
        """Return the outputs of the model in eval mode, and leave the model as it was.

        Args:
            inputs: the inputs, the same on every rank.
            drops_weights: as for `run_reference`.

        Raises:
            SnExportError: if it rejects the inputs, or another rank has failed.
        """
        hooks = [
            module.register_forward_pre_hook(lambda *_: self._check(), prepend=True)
            for module in find_fsdp_modules(self._model)
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
    """The state of a model whose parameters FSDP replaces in each forward."""

    def __init__(self, model: nn.Module, units: Sequence[Unit]) -> None:
        self._take_back = [unit.trace() for unit in units]
        super().__init__(model.modules(), with_objects=True)

    def reset(self) -> None:
        """Give the next forward the state that the first one had, with all units sharded."""
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
    """The network that a factory builds, into which the values of a sharded model are loaded.

    It is first built on the meta device, so that its memory is not taken twice. That is not enough
    for a factory that reads values, for handwritten norms, which are recognised by their results,
    and for a tensor in a plain attribute, whose value the factory alone knows. Then the factory is
    called again, and chooses the device itself.

    Args:
        factory: returns the network, with or without its reparametrizations.
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
            selection: which reparametrizations of the network the plain values replace.
            state: the plain state dict.
            buffers: values by name of buffers that are not in it; further ones are ignored.

        Raises:
            ExportError: if ``state`` is not that of this network.
        """
        network, self._on_meta = self._on_meta, None
        if network is not None:
            with contextlib.suppress(Exception):  # raised again below unless meta was the cause
                self._fill(network, selection, state, buffers)
                if not any(tensor.is_meta for _, tensor in _list_tensors(network)):
                    return network
            del network  # frees its tensors before others are made
        network = self._real or self._build()
        self._fill(network, selection, state, buffers)
        for name, tensor in _list_tensors(network):
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
            raise _report_misfit(f"there is no '{absent[0]}' in it")
        plan = Plan(found, lambda _: [state[name] for name in names])
        plan.edits.apply()
        parameters = dict(network.named_parameters(remove_duplicate=False))
        kept: dict[int, nn.Parameter] = {}  # by id of the value, so that tied parameters stay one

        def loaded(name: str, value: Any) -> Any:
            if name not in parameters or not isinstance(value, Tensor):
                return value
            return kept.setdefault(id(value), nn.Parameter(value, requires_grad=False))

        try:
            network.load_state_dict({n: loaded(n, v) for n, v in state.items()}, assign=True)
        except RuntimeError as error:
            raise _report_misfit(" ".join(str(error).split())) from error
        for name, _ in list(network.named_buffers(remove_duplicate=False)):
            if name in buffers and name not in state:
                path, _, last = name.rpartition(".")
                network.get_submodule(path)._buffers[last] = buffers[name]


def _report_misfit(reason: str) -> ExportError:
    return ExportError(
        "model_factory must build the network that is sharded, without fully_shard, with or "
        f"without its reparametrizations; the state of that does not fit what it builds: {reason}"
    )


def _list_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()
    held = Preserved(network.modules(), with_objects=True).tensors
    yield from ((f"a tensor of shape {tuple(t.shape)} in an attribute", t) for t in held)


class GatheredNetwork:
    """The sharded model as the first rank uses it in an export.

    Args:
        call: runs an action of `ShardedModel` on all ranks.
        factory: builds the network without `fully_shard`.
        only: what is frozen, as for `frozen_parametrizations`.
    """

    def __init__(self, call: Call, factory: Callable[[], nn.Module], only: Only) -> None:
        self._call = call
        self._factory = factory
        self._only = only

    @cached_property
    def network(self) -> nn.Module:
        """The plain network on the CPU, gathered at the first access."""
        network = PlainNetwork(self._factory)
        state, buffers = self._call("gather", self._only)
        return network.load(Selection(self._only), state, buffers)

    def describe(self, sigma_exact: bool) -> Description:
        """List what is frozen; see `ShardedModel.describe`."""
        found: Description = self._call("describe", self._only, sigma_exact)
        return found

    def run(self, inputs: InputSet) -> Reference:
        """Return the outputs of the sharded model, which runs on every rank.

        If it fails, a second run keeps all weights, since the model may have needed one that was
        dropped. All ranks begin that run together: a rank that ran again on its own would gather
        another unit than the others.
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
        factory: builds the network without `fully_shard`; called on the first rank alone.
        only: what is frozen, as for `frozen_parametrizations`.
        export: makes the result; called on the first rank alone.
        share: makes of the result what the other ranks return.

    Raises:
        ExportError: if not all ranks call, or one is interrupted.
        Exception: on every rank, the error that ``export`` raises.
    """
    units = find_sharded_units(model)
    team = Team(find_ranks(units.values()))
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
