"""`torch.nn.utils.parametrizations.spectral_norm`, anywhere in a chain of parametrizations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList

from ...errors import FreezeError
from ...preserving import without_trace
from ...sigma import stored_sigma
from ..site import Site, SpectralNormInfo, plan_registration
from ..undo import Edits
from .link import asked_sigma, is_spectral_norm


class ParametrizationSite(Site):
    """A tensor computed by ``module.parametrizations[<name>]``; the whole chain counts."""

    __slots__ = ("chain",)
    kind = "parametrization"

    def __init__(
        self, path: str, module: nn.Module, tensor: str, chain: ParametrizationList
    ) -> None:
        super().__init__(path, module, tensor)
        self.chain = chain

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """Every parameter and buffer of the chain."""
        chain = self.chain
        first, *others = chain._modules.values()
        if not others and type(first) is _SpectralNorm:
            tensors = (*chain._parameters.values(), *chain._buffers.values())
            return tuple(t for t in (*tensors, *first._buffers.values()) if t is not None)
        return (*chain.parameters(), *chain.buffers())

    @property
    def originals(self) -> tuple[Tensor, ...]:
        """The tensors that the first parametrization starts from."""
        chain = self.chain
        if chain.is_tensor:
            return (chain.original,)
        return tuple(getattr(chain, f"original{i}") for i in range(chain.ntensors))

    @property
    def hidden(self) -> tuple[nn.Module, ...]:
        """The chain, and the dictionary around it if there is no other in it."""
        lists = cast(nn.ModuleDict, self.module._modules["parametrizations"])
        return (self.chain, lists) if len(lists._modules) == 1 else (self.chain,)

    @property
    def is_buffer(self) -> bool:
        """A parametrized buffer is a buffer again in the plain network."""
        return not self.chain._parameters

    def value(self) -> Tensor:
        """Run the whole chain in eval mode."""
        if self.tensor not in vars(type(self.module)):
            raise FreezeError(
                self.name,
                f"class {type(self.module).__name__} has no property of its own for it",
                "remove_parametrizations on a deep copy deletes the property that all copies "
                "share; build the model anew and load its state dict",
            )
        modules = list(self.chain._modules.values())
        if all(type(m) is _SpectralNorm and _is_plain(m) for m in modules):
            return self._value_of_known_chain(modules)
        # A chain that ends in a view or a cached tensor must not lend us its memory.
        return without_trace(self._run, self.chain.modules()).clone()

    def _run(self) -> Tensor:
        value: Tensor = self.chain()
        return value

    def _value_of_known_chain(self, modules: list[nn.Module]) -> Tensor:
        modes = [m.training for m in modules]

        def restore_modes() -> None:
            for m, mode in zip(modules, modes, strict=True):
                m.__dict__["training"] = mode

        try:  # twice: an interrupt may stop the first
            try:
                for m in modules:
                    m.__dict__["training"] = False
                return self._run()
            finally:
                restore_modes()
        finally:
            restore_modes()

    def plan(self, edits: Edits, frozen: Tensor) -> None:
        """Take the tensor out of ``parametrizations`` and its property off this instance."""
        module, name = self.module, self.tensor
        lists = cast(nn.ModuleDict, module._modules["parametrizations"])
        edits.remove(lists._modules, (name,))
        current = edits.planned_class(module)
        if edits.of(lists._modules).remaining():
            edits.set_class(module, _without_property(current, name))
        else:
            edits.remove(module._modules, ("parametrizations",))
            edits.set_class(module, current.__bases__[0])
        plan_registration(edits, module, name, frozen)

    def follow_mode(self, training: bool) -> None:
        """Give the chain the mode that ``module.train()`` would have given it."""
        self.module._modules["parametrizations"].__dict__["training"] = training
        for module in self.chain.modules():
            module.__dict__["training"] = training

    def describe(self) -> SpectralNormInfo:
        """Return what `find_spectral_norm` lists; sigma is that of the chain's first SN."""
        norm = self._norm()
        weight = self._input_of(norm)
        return SpectralNormInfo(
            module=self.path,
            tensor=self.tensor,
            kind=self.kind,
            shape=tuple(weight.shape),
            dtype=str(weight.dtype).removeprefix("torch."),
            dim=getattr(norm, "dim", 0),
            eps=getattr(norm, "eps", None),
            n_power_iterations=getattr(norm, "n_power_iterations", None),
            sigma=_sigma(norm, weight),
        )

    def matrix(self) -> Tensor | None:
        """Return what the chain's first SN normalises, a vector as one row."""
        norm = self._norm()
        if not isinstance(norm, _SpectralNorm):
            return None  # a link of somebody's own need not take the norm of a matrix
        weight = self._input_of(norm)
        return weight[None] if weight.ndim == 1 else norm._reshape_weight_to_matrix(weight)

    def _norm(self) -> nn.Module:
        start = self.originals[0] if self.chain.is_tensor else None
        return next(m for m in self.chain.children() if is_spectral_norm(m, start))

    def _input_of(self, norm: nn.Module) -> Tensor:
        links = list(self.chain.children())
        before = links[: links.index(norm)]

        def run() -> Tensor:
            inputs: tuple[Tensor, ...] = self.originals
            for link in before:
                inputs = (link(*inputs),)
            return inputs[0].detach()

        if not before:
            return run()
        with torch.no_grad():
            return without_trace(run, self.chain.modules())


def find_parametrizations(path: str, module: nn.Module) -> Iterable[ParametrizationSite]:
    """Return the sites of `torch.nn.utils.parametrizations.spectral_norm` in ``module``."""
    lists = module._modules.get("parametrizations")
    return _sites(path, module, lists) if isinstance(lists, nn.ModuleDict) else ()


def _sites(path: str, module: nn.Module, lists: nn.ModuleDict) -> Iterator[ParametrizationSite]:
    for tensor, chain in lists._modules.items():
        if not isinstance(chain, ParametrizationList):
            continue
        start = chain._parameters.get("original", chain._buffers.get("original"))
        if any(is_spectral_norm(link, start) for link in chain._modules.values()):
            yield ParametrizationSite(path, module, tensor, chain)


def _is_plain(norm: nn.Module) -> bool:
    """Whether nothing but torch's own code runs when ``norm`` is called."""
    return not (norm._forward_hooks or norm._forward_pre_hooks or norm._modules)


def _without_property(cls: type, name: str) -> type:
    """Return ``cls`` without one parametrized property, for one instance alone."""
    namespace: dict[str, Any] = {
        key: entry
        for key, entry in vars(cls).items()
        if key not in (name, "__dict__", "__weakref__")
    }
    return type(cls)(cls.__name__, cls.__bases__, namespace)


def _sigma(norm: nn.Module, weight: Tensor) -> float:
    if not isinstance(norm, _SpectralNorm):
        return asked_sigma(norm, weight)
    if weight.ndim == 1:
        return float("nan") if weight.is_meta else float(torch.linalg.vector_norm(weight))
    matrix = norm._reshape_weight_to_matrix(weight)
    return stored_sigma(matrix, norm._u, norm._v)
