"""The plan of a block: all that can fail happens here, before the model is touched."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from ..errors import FreezeError, SnExportError
from ..text import describe_error
from .edits import Edits
from .frozen_weight import FrozenWeight, Residence
from .site import Found, Site, get_attributes

Keep = Callable[[Iterable[Tensor]], list[Tensor]]


class Plan:
    """The frozen weights of a model and the edits that put them in place.

    Args:
        found: the modules with their sites.
        keep: takes the values, made one by one, and returns tensors of the same bits.
    """

    def __init__(self, found: Sequence[Found], keep: Keep = list) -> None:
        self.edits = Edits()
        # Phase by phase over all modules: with thousands of small layers this takes two
        # thirds of the time that going module by module takes.
        sites = [site for _, module_sites in found for site in module_sites]
        with torch.inference_mode(False), torch.no_grad():
            values = keep(_compute_value(site) for site in sites)
            weights: dict[tuple[int, str], FrozenWeight] = {}  # two wrappers may share a layer
            places = [(id(site.module), site.tensor) for site in sites]
            for place, site, value in zip(places, sites, values, strict=True):
                if place not in weights:
                    weights[place] = FrozenWeight(site, value)
            self.weights = list(weights.values())
        try:
            for place, site in zip(places, sites, strict=True):
                site.plan(self.edits, weights[place].tensor)
        except BaseException:
            self.edits.cancel()
            raise
        plan_flat_weights(self.edits, self.weights)
        self.residence = self._remember_residence(module for module, _ in found)
        self.modes = [weight.site.attributes["training"] for weight in self.weights]
        self.finished = False  # the body is over; only undoing is left
        self.edited: list[FrozenWeight] = []
        self.next_hook = RemovableHandle.next_id
        self.debris = Edits()  # takes away what was put around edited weights

    def _remember_residence(self, modules: Iterable[nn.Module]) -> Residence:
        """Remember where everything lives that stands in the model while it is frozen."""
        ours = {id(weight.tensor) for weight in self.weights}
        planned = self.edits.get_planned
        places = []
        for attributes in map(get_attributes, modules):
            for container in (attributes["_parameters"], attributes["_buffers"]):
                for name, tensor in planned(container).items():
                    if tensor is not None and id(tensor) not in ours:
                        places.append((container, name, tensor))
        return Residence(places)

    def settle(self) -> None:
        """Bring the containers of the model into the state in which the edits left them.

        Subclasses do so for models that change their own containers while they run. It is called
        before anything is undone, and once more if an interrupt stops it.
        """


def _compute_value(site: Site) -> Tensor:
    value = compute_value(site)
    if value.is_meta:
        _refuse_without_values(site, None)
    return value


def compute_value(site: Site) -> Tensor:
    """Return the value of ``site``, which may be on the meta device.

    Raises:
        FreezeError: if it cannot be computed, or is no tensor.
    """
    try:
        value = site.value()
    except SnExportError:
        raise
    except Exception as error:
        _refuse_without_values(site, error)
        raise FreezeError(
            site.name,
            f"computing its {site.kind} value raised {describe_error(error)}",
            "An eval-mode forward of this module would fail as well",
        ) from error
    if not isinstance(value, Tensor):
        raise FreezeError(
            site.name,
            f"its {site.kind} value is of type {type(value).__name__}, not a tensor",
            "Only tensors can be frozen",
        )
    return value


def _refuse_without_values(site: Site, cause: Exception | None) -> None:
    for source in site.sources:
        if is_lazy(source):
            raise FreezeError(
                site.name,
                "it is not initialised yet",
                "Run one forward pass through the model first",
            ) from cause
        if source.is_meta:
            raise FreezeError(
                site.name,
                "it is on the meta device and has no values",
                "Load the weights first, for example with load_state_dict(..., assign=True)",
            ) from cause


def plan_flat_weights(edits: Edits, weights: Iterable[FrozenWeight]) -> None:
    """Give every recurrent module among the sites a list of flat weights with the frozen ones.

    A new list, so that the module's own list object comes back unchanged. The weak
    references beside it tell the module that its weights are the ones of the last forward.
    """
    recurrent: dict[nn.RNNBase, dict[str, Tensor]] = {}
    for weight in weights:
        module = weight.site.module
        if "_flat_weights" in weight.site.attributes and isinstance(module, nn.RNNBase):
            recurrent.setdefault(module, {})[weight.site.tensor] = weight.tensor
    for module, frozen in recurrent.items():
        _plan_module(edits, module, frozen)


def _plan_module(edits: Edits, module: nn.RNNBase, frozen: dict[str, Tensor]) -> None:
    names = module._flat_weights_names
    flat = [frozen.get(name, w) for name, w in zip(names, module._flat_weights, strict=True)]
    attributes = edits.edit(module.__dict__)
    attributes["_flat_weights"] = flat
    attributes["_flat_weight_refs"] = [None if w is None else weakref.ref(w) for w in flat]
    parameters = edits.edit(module._parameters)
    position = {name: index for index, name in enumerate(names)}
    ordered = sorted(parameters.items(), key=lambda item: position.get(item[0], len(names)))
    parameters.clear()
    parameters.update(ordered)
