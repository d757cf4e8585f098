"""The plan of a block: all that can fail happens here, before the model is touched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import FreezeError, SnExportError
from .frozen import FrozenWeight
from .moved import Residence
from .recurrent import plan_flat_weights
from .site import Kind, Site
from .undo import Edits

_SCRIPTED_SN = re.compile(r"(?P<name>.*)(_orig|\.original)$")


class Plan:
    """The frozen weights of a model and the edits that put them in place."""

    def __init__(self, model: nn.Module, kinds: Iterable[Kind]) -> None:
        self.edits = Edits()
        self.residence = Residence()
        self.weights: list[FrozenWeight] = []
        self.modes: list[tuple[Site, bool]] = []
        self.finished = False  # the body is over; only undoing is left
        self.moved = False
        with torch.inference_mode(False), torch.no_grad():
            for module, sites in walk(model, kinds):
                if sites:
                    self._freeze(module, sites)
                self.residence.note(module)

    def _freeze(self, module: nn.Module, sites: list[Site]) -> None:
        frozen: dict[str, Tensor] = {}
        for site in sites:
            weight = FrozenWeight(site, _value(site))
            site.plan(self.edits, weight.tensor)
            self.weights.append(weight)
            self.modes.append((site, module.training))
            frozen[site.tensor] = weight.tensor
        plan_flat_weights(self.edits, module, frozen)


def walk(model: nn.Module, kinds: Iterable[Kind]) -> Iterator[tuple[nn.Module, list[Site]]]:
    """Yield every module once, parents first, with its sites.

    Raises:
        FreezeError: for a ScriptModule that holds spectral norm.
    """
    kinds = tuple(kinds)
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, torch.jit.ScriptModule):
            _refuse_scripted(path, module)
            continue
        sites = [site for kind in kinds for site in kind(path, module)]
        for site in sites:
            seen.update(map(id, site.hidden))
        yield module, sites
        prefix = path + "." if path else ""
        stack.extend(
            (prefix + name, child)
            for name, child in reversed(module._modules.items())
            if child is not None
        )


def _value(site: Site) -> Tensor:
    try:
        value = site.value()
    except SnExportError:
        raise
    except Exception as error:
        _refuse_without_values(site, error)
        raise FreezeError(
            site.name,
            f"computing its {site.kind} value raised {type(error).__name__}: {error}",
            "An eval-mode forward of this module would fail as well",
        ) from error
    if value.is_meta:
        _refuse_without_values(site, None)
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


def _refuse_scripted(path: str, module: torch.jit.ScriptModule) -> None:
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    for name in sorted(names):
        match = _SCRIPTED_SN.match(name)
        if match is None:
            continue
        stem = match["name"]
        if f"{stem}_u" in names or any(
            n.startswith(f"{stem}.") and n.endswith("._u") for n in names
        ):
            raise FreezeError(
                f"{path}.{name}" if path else name,
                "it belongs to a ScriptModule, whose spectral norm is compiled code",
                "Freeze the Python module first, then script or trace it inside the block",
            )
