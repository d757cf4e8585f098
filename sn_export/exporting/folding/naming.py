"""Names of folded initializers: the module that uses them, and the tensor they come from."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence

from ...freezing import plain_name
from ...text import qualified

_PARAMETRIZED = re.compile(r"(?:(.*)\.)?parametrizations\.([^.]+)\.original\d*$")


def plain_path(raw: str) -> str:
    """Return the qualified name of a weight behind that of its raw tensor.

    ::

        plain_path("a.weight_orig")  # "a.weight"
        plain_path("a.weight_v")  # "a.weight", the direction of weight norm
        plain_path("a.parametrizations.weight.original0")  # "a.weight"
    """
    parametrized = _PARAMETRIZED.match(raw)
    if parametrized:
        return qualified(parametrized[1] or "", parametrized[2])
    module, _, tensor = raw.rpartition(".")
    return qualified(module, plain_name(tensor.removesuffix("_v") or tensor))


def folded_name(raw: str | None, users: Sequence[str], taken: Container[str]) -> str:
    """Return a free name for a folded value.

    Args:
        raw: name of the tensor that it is made from, if that has one.
        users: paths of the modules that read it.
        taken: names that are in use.
    """
    user = users[0] if len(users) == 1 else None
    if raw is None:
        wanted = qualified(user or "", "weight")
    else:
        wanted = plain_path(raw)
        module, _, tensor = wanted.rpartition(".")
        # A module above merely computes in the place of the one that holds the weight.
        if user is not None and not _is_within(module, user):
            wanted = qualified(user, tensor)
    candidates = [wanted, qualified(wanted.rpartition(".")[0], "weight"), wanted + "_folded"]
    return next(name for name in (*candidates, *_numbered(wanted, taken)) if name not in taken)


def _numbered(name: str, taken: Container[str]) -> Iterable[str]:
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return [f"{name}_{number}"]


def _is_within(module: str, parent: str) -> bool:
    return parent == "" or module == parent or module.startswith(parent + ".")
