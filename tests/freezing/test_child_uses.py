"""What a forward calls, reads and hands on, by each form in which code can say so.

It reaches inside: a table of forms is clearer than a network, and what is warned of it, for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sn_export.freezing.introspection.child_uses import ChildUses

Forward = Callable[[Any, Tensor], Any]


def starred(self: Any, x: Tensor) -> Tensor:
    _, *rest = self.items
    return F.linear(x, rest[0].weight)


def unpacked(self: Any, x: Tensor) -> Tensor:
    _, second = self.items
    return F.linear(x, second.weight)


def pairs(self: Any, x: Tensor) -> Tensor:
    for _, item in enumerate([self.items]):
        x = F.linear(x, item[1].weight)
    return x


def comprehension(self: Any, x: Tensor) -> list[Tensor]:
    return [F.linear(x, item.weight) for item in self.items]


def generator(self: Any, x: Tensor) -> Any:
    return sum(item(x) for item in self.items if item.bias is not None)


def mapping(self: Any, x: Tensor) -> dict[int, Tensor]:
    return {i: item.weight @ x for i, item in enumerate(self.items)}


def shape_alone(self: Any, x: Tensor) -> Tensor:
    return x + torch.zeros(self.out.weight.shape, dtype=self.out.weight.dtype)


def named_entry(self: Any, x: Tensor) -> Tensor:
    layer = self.out
    out: Tensor = layer(x, extra=self.items[0])
    return out


def by_name(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, getattr(self, "out").weight)  # noqa: B009


def walrus(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight) if (layer := self.out) else x


def inner_function(self: Any, x: Tensor) -> Tensor:
    def apply(layer: Any, *, last: Any) -> Any:
        return last(layer.weight @ x)

    out: Tensor = apply(self.items[0], last=self.out)
    return out


def inner_lambda(self: Any, x: Tensor) -> Tensor:
    pick = lambda: self.out  # noqa: E731
    return F.linear(x, pick().weight)


def annotated(self: Any, x: Tensor) -> Tensor:
    layer: nn.Linear = self.items[1]
    return layer(x)


def compiled_code(self: Any, x: Tensor) -> Any:
    return torch.utils.checkpoint.checkpoint(self.out, x)


FORMS: dict[Forward, tuple[str, str, str]] = {  # called, read, handed on
    starred: ("", "items.0.weight items.1.weight", ""),
    unpacked: ("", "items.0.weight items.1.weight", ""),
    pairs: ("", "items.0.weight items.1.weight", ""),
    comprehension: ("", "items.0.weight items.1.weight", ""),
    generator: ("items.0 items.1", "items.0.bias items.1.bias", ""),
    mapping: ("", "items.0.weight items.1.weight", ""),
    shape_alone: ("", "", ""),
    named_entry: ("out", "", "items.0"),
    by_name: ("", "out.weight", ""),
    walrus: ("", "out.weight", ""),
    inner_function: ("out", "items.0.weight", ""),
    inner_lambda: ("", "out.weight", ""),
    annotated: ("items.1", "", ""),
    compiled_code: ("", "", "out"),
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_form(form: Forward) -> None:
    """Each module is found to be called, read or handed on as the code does it, and no other."""

    class Net(nn.Module):
        forward = form

        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(2, 2)
            self.items = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    net = Net()
    uses = ChildUses([net])
    names = {module: name for name, module in net.named_modules()}
    called, read, handed = FORMS[form]
    assert sorted(names[module] for module in uses.calls) == called.split()
    reads = {f"{names[module]}.{name}" for module, name in uses.reads if hasattr(module, name)}
    assert sorted(reads) == read.split()
    assert sorted(names[module] for module in uses.handed) == handed.split()
