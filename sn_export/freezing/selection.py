"""Which reparametrizations a block takes: by kind, or by the name of a tensor or module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ..text import shorten_list
from .info import GROUPS, Group
from .kinds import ALL, SPECTRAL_NORM
from .plan import Walk, walk
from .site import Found, Kind, Site

Only = str | Iterable[str] | None


class Selection:
    """What ``only=`` says.

    Args:
        only: a kind (`GROUPS`), the qualified name of a tensor or of a module, which takes in
            everything below it, or several of these; None for everything.

    Raises:
        TypeError: if ``only`` is something else.
    """

    def __init__(self, only: Only) -> None:
        self._values: tuple[str, ...] | None = None if only is None else _values(only)
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
            walk: `plan.walk`, or what does more at each module.

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

        found = list(walk(model, self._kinds(), takes if self._is_partial() else None))
        for site in frozen if names else ():
            takes(site)
        missing = [name for name in self._names if name not in used]
        if missing:
            raise ValueError(_describe_unmatched(missing[0], model))
        return found

    def _is_partial(self) -> bool:
        return bool(self._names) or self.groups not in ({"spectral_norm"}, set(GROUPS))

    def _kinds(self) -> Sequence[Kind]:
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


def _values(only: str | Iterable[str]) -> tuple[str, ...]:
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
