"""Tensors under `torch.nn.utils.parametrize`: the whole chain runs, whatever is in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrize import ParametrizationList

from ...errors import FreezeError
from ...running import (
    OrthogonalLink,
    SpectralNormLink,
    WeightNormLink,
    get_parametrize_cache,
    restore_container,
    run_without_trace,
    undo_on_exit,
    undoing,
)
from ..edits import Edits
from ..info import Group
from ..introspection.source_code import read_code
from ..site import Site, get_attributes

# Their forward in eval mode writes nothing and returns memory of its own.
_PURE = (SpectralNormLink, WeightNormLink)


class ChainSite(Site):
    """A tensor computed by ``module.parametrizations[<name>]``; the whole chain counts."""

    __slots__ = ("chain", "lists")
    kind = "parametrization"

    @property
    def group(self) -> Group:  # type: ignore[override]
        """The kind that `find_parametrizations` lists."""
        links = self.chain._modules.values()
        if any(isinstance(link, OrthogonalLink) for link in links):
            return "orthogonal"
        if any(isinstance(link, WeightNormLink) for link in links):
            return "weight_norm"
        return "parametrization"

    def __init__(
        self, path: str, module: nn.Module, tensor: str, chain: ParametrizationList
    ) -> None:
        super().__init__(path, module, tensor)
        self.chain = chain
        self.lists = cast(nn.ModuleDict, self.attributes["_modules"]["parametrizations"])

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """Every parameter and buffer of the chain."""
        chain = self.chain
        first, *others = chain._modules.values()
        if not others and type(first) is SpectralNormLink:
            tensors = (*chain._parameters.values(), *chain._buffers.values())
            return tuple(t for t in (*tensors, *first._buffers.values()) if t is not None)
        return (*chain.parameters(), *chain.buffers())

    @property
    def hidden(self) -> tuple[nn.Module, ...]:
        """The chain, and the dictionary around it if there is no other in it."""
        lists = self.lists
        return (self.chain, lists) if len(lists._modules) == 1 else (self.chain,)

    @property
    def is_buffer(self) -> bool:
        """A parametrized buffer is a buffer again in the plain network."""
        return not self.chain._parameters

    def value(self) -> Tensor:
        """Run the whole chain in eval mode, or take what `parametrize.cached` holds."""
        if find_class_with_property(type(self.module), self.tensor) is None:
            raise FreezeError(
                self.name,
                f"class {type(self.module).__name__} has no property of its own for it",
                "remove_parametrizations on a deep copy deletes the property that all copies "
                "share; build the model anew and load its state dict",
            )
        cached = get_parametrize_cache().get((id(self.module), self.tensor))
        if cached is not None:
            return cached.detach().clone()
        if _is_pure(self.chain):
            return self._compute_pure_chain()
        # A chain that ends in a view or a cached tensor must not lend us its memory.
        with _bypass_cache(), self._make_cache():
            value = run_without_trace(self._run, self.chain.modules())
        return value.clone() if isinstance(value, Tensor) else value

    def _make_cache(self) -> AbstractContextManager[None]:
        """Return torch's cache if the module reads the tensor within it.

        Vectors that are under parametrizations, as in orthogonium, are then read as they were.
        """
        nested = any(list_chains(module) for module in self.chain.modules())
        is_cached = nested and "cached" in read_code(type(self.module)).names
        return parametrize.cached() if is_cached else nullcontext()

    def _run(self) -> Tensor:
        value: Tensor = self.chain()
        return value

    def _compute_pure_chain(self) -> Tensor:
        modes = [(m, m.training) for m in self.chain._modules.values() if m.training]
        if not modes:  # the common case, and the fast one
            return self._run()

        def restore_modes() -> None:
            for link, mode in modes:
                link.__dict__["training"] = mode

        with undo_on_exit(restore_modes):
            for link, _ in modes:
                link.__dict__["training"] = False
            return self._run()

    def plan(self, edits: Edits, frozen: Tensor) -> None:
        """Take the tensor out of ``parametrizations`` and its property off this instance."""
        module, name, lists = self.module, self.tensor, self.lists
        edits.remove(lists._modules, (name,))
        current = edits.get_planned_class(module)
        owner = find_class_with_property(current, name)
        assert owner is not None  # `value` has seen it
        if edits.get_planned(lists._modules):
            plain = change_class(owner, (name,), {}, owner.__bases__)
        else:
            edits.remove(self.attributes["_modules"], ("parametrizations",))
            plain = owner.__bases__[0]
        edits.set_class(module, replace_base(current, owner, plain))
        if hooks := self.attributes["_load_state_dict_pre_hooks"]:
            keys = [key for key, entry in hooks.items() if is_weight_norm_state_hook(entry, name)]
            edits.remove(hooks, keys)
        self.register(edits, frozen)

    def follow_mode(self, training: bool) -> None:
        """Give the chain the mode that ``module.train()`` would have given it."""
        self.attributes["_modules"]["parametrizations"].__dict__["training"] = training
        for module in self.chain.modules():
            module.__dict__["training"] = training


def list_chains(module: nn.Module) -> list[tuple[str, ParametrizationList]]:
    """Return the chains of ``module`` with the names of their tensors."""
    lists = get_attributes(module)["_modules"].get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        return []
    entries = lists._modules.items()
    return [(tensor, chain) for tensor, chain in entries if isinstance(chain, ParametrizationList)]


def list_originals(chain: ParametrizationList) -> tuple[Tensor, ...]:
    """Return the tensors that the first parametrization of ``chain`` starts from."""
    if chain.is_tensor:
        return (chain.original,)
    return tuple(getattr(chain, f"original{i}") for i in range(chain.ntensors))


def find_chains(path: str, module: nn.Module) -> list[ChainSite]:
    """Return the sites of every parametrization in ``module``, of whatever kind."""
    return [ChainSite(path, module, tensor, chain) for tensor, chain in list_chains(module)]


@undoing
def _bypass_cache() -> Iterator[None]:
    """Let nothing of a chain stay in torch's cache: it is computed from copies here."""
    cache = get_parametrize_cache()
    content = cache.copy()
    with undo_on_exit(lambda: restore_container(cache, content)):
        yield


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_pure(chain: ParametrizationList) -> bool:
    """Whether nothing runs in ``chain`` but torch's own code, which leaves no trace."""
    if _has_hooks(chain):
        return False
    for link in chain._modules.values():
        if type(link) not in _PURE or link._modules or _has_hooks(link):
            return False
    return True


_COMPATIBILITY = "weight_norm.<locals>._weight_norm_compat_hook"


def is_weight_norm_state_hook(entry: Any, tensor: str) -> bool:
    """Whether ``entry`` translates old checkpoints of ``tensor`` for the weight_norm of chains."""
    function = getattr(entry, "hook", entry)
    if getattr(function, "__qualname__", "") != _COMPATIBILITY:
        return False
    if function.__module__ != parametrizations.__name__:
        return False
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return "name" in cells and cells["name"].cell_contents == tensor


def find_class_with_property(cls: type, name: str) -> type | None:
    """Return the class among ``cls`` and its bases that `parametrize` gave the property ``name``.

    It is ``cls`` itself, unless something else has made a class on top of it: an FSDP module is of
    a class ``FSDPParametrizedLinear`` with the bases ``FSDPModule`` and ``ParametrizedLinear``.
    """
    for base in cls.__mro__:
        if name in vars(base):
            return base if isinstance(vars(base)[name], property) else None
    return None


def replace_base(cls: type, old: type, new: type) -> type:
    """Return ``cls`` with ``new`` in the place of ``old`` among its bases, however far down.

    Example: of ``FSDPParametrizedLinear(FSDPModule, ParametrizedLinear)`` with ``nn.Linear`` in the
    place of ``ParametrizedLinear``, a class with the bases ``FSDPModule`` and ``nn.Linear``.
    """
    if cls is old:
        return new
    bases = tuple(replace_base(b, old, new) if old in b.__mro__ else b for b in cls.__bases__)
    return change_class(cls, (), {}, bases)


def change_class(
    cls: type, without: Iterable[str], added: dict[str, Any], bases: tuple[type, ...]
) -> type:
    """Return ``cls`` for one instance alone: without some properties, with others, on ``bases``.

    It is made from `nn.Module` and given its bases afterwards: making a subclass of the user's
    class would run its ``__init_subclass__``, which may keep a registry.
    """
    left_out = {*without, "__dict__", "__weakref__", "_abc_impl"}
    namespace = {key: entry for key, entry in vars(cls).items() if key not in left_out}
    new: type = type.__new__(type(cls), cls.__name__, (nn.Module,), {**namespace, **added})
    new.__bases__ = bases
    return new
