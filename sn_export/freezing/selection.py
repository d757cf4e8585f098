"""The walk over a network: which of its tensors are computed, and which of those are taken."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import FreezeError
from ..text import qualify, shorten_list
from .info import GROUPS, Group
from .introspection.child_uses import ChildUses
from .introspection.source_code import collect_method_names
from .kinds import ALL, SPECTRAL_NORM
from .site import Found, Kind, Site, get_attributes

Only = str | Iterable[str] | None
Walk = Callable[
    [nn.Module, Iterable[Kind], Callable[[Site], bool] | None], Iterable[Found]
]  # `walk`

_SCRIPTED_SN = re.compile(r"(?P<name>.*)(_orig|\.original)$")


def walk(
    model: nn.Module, kinds: Iterable[Kind], takes: Callable[[Site], bool] | None = None
) -> Iterator[Found]:
    """Yield every module once, parents first, with its sites.

    Args:
        model: any module.
        kinds: what to look for; the first to claim a tensor has it.
        takes: whether a site is wanted. What an unwanted one computes from is walked like
            any module, since something else may sit there.

    Raises:
        FreezeError: for a ScriptModule that holds spectral norm.
    """
    kinds = tuple(kinds)
    callers = Callers(model)
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    scripted = torch.jit.ScriptModule
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if issubclass(type(module), scripted):  # `isinstance` asks the module for its class, too
            _refuse_scripted(path, module)
            continue
        sites: list[Site] = []
        for kind in kinds:
            if more := kind(path, module):
                known = {site.tensor for site in sites} if sites else ()
                sites += [site for site in more if site.tensor not in known]
        if sites:
            sites = [
                site
                for site in sites
                if (takes is None or takes(site)) and not callers.is_read_raw(site)
            ]
            for site in sites:
                seen.update(map(id, site.hidden))
                callers.mark(site)
        yield module, sites
        if children := get_attributes(module)["_modules"]:
            prefix = path + "." if path else ""
            for name, child in reversed(children.items()):
                if child is not None:
                    stack.append((prefix + name, child))


def _refuse_scripted(path: str, module: nn.Module) -> None:
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
                qualify(path, name),
                "it belongs to a ScriptModule, whose spectral norm is compiled code",
                "Freeze the Python module first, then script or trace it inside the block",
            )


class Callers:
    """What the code of a network calls; the code is read only where a site has a hook.

    Args:
        model: the network that is frozen; code outside of it is not read.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._reads: dict[str, dict[tuple[nn.Module, str], nn.Module]] = {}

    def mark(self, site: Site) -> None:
        """Set ``site.unapplied`` to a reason, if the hook of ``site`` never runs."""
        caller = site.caller
        if caller is None:
            return
        if not _is_called(caller):
            site.unapplied = "nothing calls a " + _name_class(caller)
            return
        reader = None
        if reads := self._reads_of(site.tensor):
            reader = reads.get((site.module, site.tensor)) or reads.get((site.module, "*"))
        runner = None if reader is not None else self._find_runner_around(site)
        if reader is None and runner is None:
            return
        if caller in (self._uses if reader is not None else self._uses_in_any_mode).calls:
            return
        child = site.path.rpartition(".")[2]
        if reader is not None and caller not in self._uses.handed:
            what = f"reads the {site.tensor} of {child} without calling it"
            site.unapplied = f"{_name_class(reader)} {what}"
        elif runner is not None or (runner := self._find_runner_around(site)) is not None:
            site.unapplied = f"{_name_class(runner)} has run without calling {child}"

    def _find_runner_around(self, site: Site) -> nn.Module | None:
        """Return the module around a layer that has run, though the layer has not.

        Before its first call a hook of torch's has left the raw parameter as the weight.
        """
        if not self._have_run or not _has_raw_weight(site.module, site.tensor):
            return None
        around = self._parents.get(site.module, [])
        while around and not _is_called(around[-1]):
            around = self._parents.get(around[-1], [])
        return around[-1] if around and around[-1] in self._have_run else None

    def is_read_raw(self, site: Site) -> bool:
        """Whether a forward reads the raw parameter that the module of ``site`` normalises itself.

        No one plain weight serves both, so that layer is left as it is.
        """
        if not site.keeps_raw_name or (site.module, site.tensor) not in self._reads_of(site.tensor):
            return False
        return (site.module, site.tensor) in ChildUses(self._owners, from_forward=True).reads

    def _reads_of(self, tensor: str) -> dict[tuple[nn.Module, str], nn.Module]:
        if tensor not in self._reads:
            readers = [m for m in self._owners if tensor in collect_method_names(type(m))]
            self._reads[tensor] = ChildUses(readers).reads  # of most networks no class does
        return self._reads[tensor]

    @cached_property
    def _all(self) -> list[nn.Module]:
        found: dict[nn.Module, None] = {}
        stack = [self._model]
        while stack:  # in the order of `modules`, which takes three times as long
            module = stack.pop()
            if module not in found:
                found[module] = None
                if children := module._modules:
                    stack += [child for child in reversed(children.values()) if child is not None]
        return list(found)

    @cached_property
    def _owners(self) -> list[nn.Module]:
        return [module for module in self._all if module._modules]

    @cached_property
    def _uses(self) -> ChildUses:
        return ChildUses(self._owners)

    @cached_property
    def _uses_in_any_mode(self) -> ChildUses:
        return ChildUses(self._owners, in_any_mode=True)

    @cached_property
    def _parents(self) -> dict[nn.Module, list[nn.Module]]:
        parents: dict[nn.Module, list[nn.Module]] = {}
        for module in self._owners:
            for child in module._modules.values():
                if child is not None:
                    parents.setdefault(child, []).append(module)
        return parents

    @cached_property
    def _have_run(self) -> set[nn.Module]:
        """The layers whose hook has set the weight, and all modules around them."""
        queue = [
            module
            for module in self._all
            if module._forward_pre_hooks
            for name in module._parameters
            if name.endswith("_orig")
            and _has_raw_weight(module, name.removesuffix("_orig")) is False
        ]
        found = set(queue)
        for module in queue:  # grows on the way
            more = [parent for parent in self._parents.get(module, []) if parent not in found]
            queue += more
            found.update(more)
        return found


def _is_called(module: nn.Module) -> bool:
    """Whether a module has a forward; a `torch.nn.ModuleList` has none."""
    return getattr(type(module), "forward", None) is not nn.Module.forward


def _has_raw_weight(module: nn.Module, tensor: str) -> bool | None:
    """Whether the weight of a layer is still its raw parameter; None where it lacks either."""
    raw, weight = module._parameters.get(f"{tensor}_orig"), module.__dict__.get(tensor)
    if raw is None or is_lazy(raw) or not isinstance(weight, Tensor):
        return None
    return weight.data_ptr() == raw.data_ptr()


def _name_class(module: nn.Module) -> str:
    cls = type(module)
    return f"torch.nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else cls.__name__


class Selection:
    """What ``only=`` says.

    Args:
        only: a kind (`GROUPS`), the qualified name of a tensor or of a module, which takes in
            everything below it, or several of these; None for everything.

    Raises:
        TypeError: if ``only`` is something else.
    """

    def __init__(self, only: Only) -> None:
        self._values: tuple[str, ...] | None = None if only is None else _list_values(only)
        self.groups = set(GROUPS if self._values is None else self._values) & set(GROUPS)
        self._names = [v for v in self._values or () if v not in GROUPS]

    @property
    def includes_spectral_norm(self) -> bool:
        """Whether all of spectral norm is taken, so that one that is not known is missed."""
        return "spectral_norm" in self.groups

    def find(self, model: nn.Module, frozen: Iterable[Site] = (), walk: Walk = walk) -> list[Found]:
        """Walk ``model`` for the sites that are taken.

        Args:
            model: any module.
            frozen: sites that blocks around hold already; their names are no mistakes.
            walk: `walk`, or what does more at each module.

        Raises:
            ValueError: if a name fits nothing.
            FreezeError: as `walk` raises it.
        """
        names = self._resolve(model)
        used: set[str] = set()

        def takes(site: Site) -> bool:
            fitting = [name for name, places in names.items() if _is_at(site, places)]
            used.update(fitting)
            return bool(fitting) or site.group in self.groups

        found = list(walk(model, self._choose_kinds(), takes if self._is_partial() else None))
        for site in frozen if names else ():
            takes(site)
        missing = [name for name in self._names if name not in used]
        if missing:
            raise ValueError(_describe_unmatched(missing[0], model))
        return found

    def _is_partial(self) -> bool:
        return bool(self._names) or self.groups not in ({"spectral_norm"}, set(GROUPS))

    def _choose_kinds(self) -> Sequence[Kind]:
        return SPECTRAL_NORM if self.groups <= {"spectral_norm"} and not self._names else ALL

    def _resolve(self, model: nn.Module) -> dict[str, set[tuple[int, str | None]]]:
        """Return for each name the modules, or the tensor of a module, that it means."""
        if not self._names:
            return {}
        modules = dict(model.named_modules(remove_duplicate=False))
        places: dict[str, set[tuple[int, str | None]]] = {}
        for name in self._names:
            path, _, tensor = name.rpartition(".")
            places[name] = set()
            if name in modules:
                places[name] = {(id(m), None) for m in modules[name].modules()}
            if path in modules:
                places[name].add((id(modules[path]), tensor))
        return places


def _is_at(site: Site, places: set[tuple[int, str | None]]) -> bool:
    return (id(site.module), None) in places or (id(site.module), site.tensor) in places


def _list_values(only: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(only, str):
        return (only,)
    values = tuple(only) if isinstance(only, Iterable) else (only,)
    for value in values:
        if not isinstance(value, str):
            raise TypeError(
                "only must be a kind, the name of a tensor or module, or several of these, "
                f"got {type(value).__name__}"
            )
    return values


def _describe_unmatched(name: str, model: nn.Module) -> str:
    there: dict[str, Group] = {
        site.name: site.group for _, sites in walk(model, ALL) for site in sites
    }
    shown = shorten_list((f"'{tensor}' ({group})" for tensor, group in there.items()), most=20)
    return (
        f"only={name!r} is no kind ({', '.join(GROUPS)}), and no name of a reparametrized tensor "
        f"or of a module that holds one. The model has {shown or 'none'}"
    )
