"""A network in one process with the weights of a sharded one, as a factory builds it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..freezing import Plan, Selection
from ..running import Preserved, preserved_globals, unwrap_model


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
