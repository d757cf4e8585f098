"""The plain network of a model on several ranks: its state, and what a factory builds with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ExportError
from ..freezing import Only, Plan, Selection
from ..running import Preserved, preserved_globals, unwrap_model
from .block import frozen_parametrizations
from .fsdp import ranks_of
from .gathered_walk import sharded_units


def gather_plain_state_dict(model: nn.Module, only: Only = None) -> dict[str, Tensor]:
    """Return the state dict of the plain network on rank 0, for those who save or convert it.

    ::

        state = gather_plain_state_dict(model)  # on every rank
        if dist.get_rank() == 0:
            torch.save(state, "plain.pt")

    It is called on every rank of a model under `torch.distributed.fsdp.fully_shard`; one tensor
    after the other is gathered, so that another rank holds no more than two layers.

    Args:
        model: any module, on any number of ranks. It is as before afterwards.
        only: which reparametrizations are left out, as for `frozen_parametrizations`.

    Returns:
        On rank 0 (and in a single process) every parameter and persistent buffer on the CPU, in
        memory of its own, under the names that the network has without the reparametrizations;
        an empty dict on the other ranks.

    Raises:
        TypeError, ValueError, FreezeError: as `frozen_parametrizations`.
    """
    return gather_state(model, only)[0]


def gather_state(model: nn.Module, only: Only) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the plain state dict, and all buffers of the plain network by name, on the first rank.

    Args:
        model: as for `gather_plain_state_dict`; both are empty on the other ranks.
        only: likewise.
    """
    ranks = ranks_of(sharded_units(model).values()) or [0]
    is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == ranks[0]
    known: dict[int, Any] = {}  # of tied tensors there is one

    def whole(value: Any) -> Any:
        if id(value) not in known:
            tensor = value  # a module may have put anything into its state
            if hasattr(tensor, "full_tensor"):  # a DTensor, whose import takes half a second
                tensor = tensor.full_tensor()
            if isinstance(tensor, Tensor) and is_first:
                tensor = tensor.detach().to("cpu", copy=True)
            known[id(value)] = tensor if is_first else None
        return known[id(value)]

    with frozen_parametrizations(model, only), torch.no_grad():
        # Both hold what they name until the end, so that no id stands for two.
        state, named = (
            model.state_dict(keep_vars=True),
            dict(model.named_buffers(remove_duplicate=False)),
        )
        gathered = {name: whole(value) for name, value in state.items()}
        buffers = {name: whole(buffer) for name, buffer in named.items()}
    return (gathered, buffers) if is_first else ({}, {})


def refuse_sharded(model: nn.Module) -> None:
    """Raise if ``model`` is under `fully_shard`: no exporter takes shards. A local call.

    Raises:
        ExportError: with the way to a network that can be exported.
        FreezeError: if it is under FullyShardedDataParallel.
    """
    if sharded_units(model):
        raise ExportError(
            f"{type(model).__name__} is under fully_shard, and this rank holds a piece of it: call "
            "export_onnx on every rank with model_factory=, a function without arguments that "
            "builds the network without fully_shard"
        )


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
