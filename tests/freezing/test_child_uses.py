"""What a forward calls, reads and hands on, by each form in which code can say so.

It reaches inside: a table of forms is clearer than a network, and what is warned of it, for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sn_export.freezing.introspection.child_uses import ChildUses

Forward = Callable[[Any, Tensor], Any]
TABLE = {"a": lambda layer, x: layer(x)}


def read_weight(layer: Any, scale: float = 1.0) -> Any:
    return layer.weight * scale


def read_first(layer: Any, *others: Any) -> Any:
    return layer.weight


@torch.no_grad()
def read_decorated(layer: Any) -> Any:
    return layer.weight


class Inner(nn.Module):
    """A module of the user's with a layer, and what may stand for that layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.activation = torch.tanh

    @property
    def only(self) -> nn.Linear:
        return self.layer

    def pick(self) -> nn.Linear:
        return self.layer

    @staticmethod
    def read_weight(layer: Any) -> Any:
        return layer.weight

    def apply_first(self, first: Any, x: Tensor, *rest: Any, **named: Any) -> Any:
        return first(x)


class Base(nn.Module):
    """The layers that each form of a forward stands among."""

    is_fused = False

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2, 2)
        self.items = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.table = nn.ModuleDict({"a": nn.Linear(2, 2)})
        self.inner = Inner()
        self.plain = {"deep": [self.items[0]]}
        self.bound = self.out.forward
        self.kind = "split"
        self.register_parameter("deep", None)

    @staticmethod
    def read_weight(layer: Any) -> Any:
        return layer.weight

    def each(self) -> Iterator[nn.Module]:
        yield self.out
        yield from self.items

    def init_weights(self) -> None:
        nn.init.zeros_(cast(Tensor, self.items[0].weight))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.out.weight)

    def extra_repr(self) -> str:
        return f"{self.out.weight}"

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.init.zeros_(self.out.weight)

    def __len__(self) -> int:
        return int(self.out.weight.sum())


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


def inner_function(self: Any, x: Any) -> Any:
    def apply(layer: Any, *, last: Any) -> Any:
        return last(layer.weight @ x)

    return apply(self.items[0], last=self.out)


def inner_lambda(self: Any, x: Tensor) -> Tensor:
    pick: Callable[[], Any] = lambda: self.out  # noqa: E731
    return F.linear(x, pick().weight)


def annotated(self: Any, x: Any) -> Any:
    layer: nn.Linear = self.items[1]
    return layer(x)


def compiled_code(self: Any, x: Tensor) -> Any:
    return torch.utils.checkpoint.checkpoint(self.out, x)


def both_of_a_choice(self: Any, x: Any) -> Any:
    layer = self.out if x.ndim else (self.table["a"] or self.items[1])
    out: Tensor = layer(x)
    return out


def last(self: Any, x: Any) -> Any:
    return self.items[-1](x)


def some_index(self: Any, x: Any) -> Any:
    return self.items[x.ndim](x)


def key(self: Any, x: Any) -> Any:
    return self.table["a"](x) + {"k": self.out}["k"](x)


def part(self: Any, x: Any) -> Any:
    for item in self.items[1:]:
        x = item(x)
    return x


def part_of_a_part(self: Any, x: Any) -> Any:
    return self.items[:1][0](x)


def part_handed_on(self: Any, x: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(self.items[1:], x)


def values(self: Any, x: Any) -> Any:
    for layer in self.table.values():
        x = layer(x)
    return x


def pairs_of_a_dict(self: Any, x: Any) -> Any:
    for _, layer in self.table.items():
        x = layer(x)
    return x


def entry_by_get(self: Any, x: Any) -> Any:
    return self.table.get("a")(x)


def keys(self: Any, x: Any) -> Any:
    for name in self.table.keys():  # noqa: SIM118
        x = self.table[name](x)
    return x


def children(self: Any, x: Any) -> Any:
    for child in self.inner.children():
        x = child(x)
    return x


def named_children(self: Any, x: Any) -> Any:
    for _, child in self.inner.named_children():
        x = child.weight @ x
    return x


def dictionary_of_children(self: Any, x: Any) -> Any:
    return [child(x) for child in self.inner._modules.values()]


def modules(self: Any, x: Any) -> Any:
    for module in self.inner.modules():
        x = module(x)
    return x


def named_modules(self: Any, x: Any) -> Any:
    for _, module in self.items.named_modules():
        x = module(x)
    return x


def by_path(self: Any, x: Any) -> Any:
    return self.inner.get_submodule("layer")(x)


def by_a_name_that_varies(self: Any, x: Any) -> Any:
    for name in "ab":
        x = getattr(self.table, name)(x)
    return x


def its_forward(self: Any, x: Any) -> Any:
    return self.out.forward(self.items[0].__call__(x, self.items[1]))


def forward_by_another_name(self: Any, x: Any) -> Any:
    run = self.out.forward
    return run(x)


def passed_through(self: Any, x: Any) -> Any:
    first, second = list(self.items), next(iter(tuple(reversed(self.items))))
    return [layer(x) for layer in sorted(first)] + [second.weight]


def zipped(self: Any, x: Any) -> Any:
    return [a(x) @ b.weight for a, b in zip(self.items, self.table.values(), strict=False)]


def copied_dict(self: Any, x: Any) -> Any:
    return [layer(x) for layer in dict(self.table).values()]


def stated_type(self: Any, x: Any) -> Any:
    return cast("nn.Linear", self.out)(x)


def looked_at(self: Any, x: Any) -> Any:
    assert isinstance(self.out, nn.Linear) and hasattr(self.out, "bias"), str(self.items)
    print(self.out, len(self.items), type(self.out), id(self.out), bool(self.table))
    return x


def metadata(self: Any, x: Any) -> Any:
    of = self.out
    sizes = of.weight.size(0), of.weight.dim(), of.weight.numel(), self.items[0].weight.ndim
    return sizes, self.out.weight.device, self.out.weight.requires_grad


def metadata_of_what_a_call_gives(self: Any, x: Any) -> Any:
    return self.inner.pick().weight.shape, self.out(x).weight.shape


def gradient(self: Any, x: Any) -> Any:
    return self.out.weight.grad


def held_in_a_dict(self: Any, x: Any) -> Any:
    return self.plain["deep"][0](x)


def held_bound_method(self: Any, x: Any) -> Any:
    return self.bound(x)


def stored(self: Any, x: Any) -> Any:
    self.current = self.out
    x.layers["a"] = self.items
    return x


def set_comprehension(self: Any, x: Any) -> Any:
    return {item(x) for item in {*self.items}}


def entries_of_a_dict_comprehension(self: Any, x: Any) -> Any:
    layers = {i: item for i, item in enumerate(self.items)}
    return layers[1](x)


def condition_of_a_comprehension(self: Any, x: Any) -> Any:
    return [i for i in range(3) if self.out(x)]


def set_late_in_a_loop(self: Any, x: Any) -> Any:
    layer = None
    while x.ndim:
        if layer is not None:
            x = layer(x)
        layer = self.out
    else:
        x = self.items[0](x)
    return x


def after_a_loop(self: Any, x: Any) -> Any:
    for item in self.items:
        x = item.weight @ x
    else:
        x = self.out(x)
    return x


def in_every_block(self: Any, x: Any) -> Any:
    with torch.no_grad():
        x = self.out(x)
    try:
        return self.items[0](x)
    except ValueError:
        x += self.items[1].weight
    match x.ndim:
        case 1:
            return self.table["a"](x)
    return x


def declared(self: Any, x: Any) -> Any:
    layer: nn.Module
    layer = self.out
    return layer(x)


def inner_function_given_more(self: Any, x: Any) -> Any:
    def apply(layer: Any, *others: Any, **named: Any) -> Any:
        return layer(x)

    return apply(self.out, self.items[0], b=self.items[1], **{"a": self.table["a"]})


def inner_function_that_gives_a_layer(self: Any, x: Any) -> Any:
    def pick() -> Any:
        return self.items[0]

    return pick()(x)


def inner_function_that_calls_itself(self: Any, x: Any) -> Any:
    def apply(layer: Any, depth: int, last: Any = None) -> Any:
        return apply(self.items[0], depth - 1, last=self.items[1]) if depth else layer(x)

    return apply(self.out, 2)


def inner_function_with_a_default(self: Any, x: Any) -> Any:
    def apply(y: Any, layer: Any = self.out, *, last: Any = self.items[1]) -> Any:
        return last.weight @ layer(y)

    return apply(x)


def inner_lambda_with_a_default(self: Any, x: Any) -> Any:
    for item in self.items:
        x = torch.utils.checkpoint.checkpoint(lambda y, layer=item: layer(y), x)
    return x


def inner_function_never_called(self: Any, x: Any) -> Any:
    def hook() -> Any:
        return self.out(x)

    x.register_hook(hook)
    return x


async def awaited(self: Any, x: Any) -> Any:
    async def apply(layer: Any) -> Any:
        return layer.weight @ x

    return await apply(self.out)


def method_that_gives_a_layer(self: Any, x: Any) -> Any:
    return self.inner.pick()(x)


def generator_method(self: Any, x: Any) -> Any:
    for layer in self.each():
        x = layer(x)
    return x


def method_given_more(self: Any, x: Any) -> Any:
    return self.inner.apply_first(self.out, x, self.items[0], key=self.table["a"])


def static_method(self: Any, x: Any) -> Any:
    return self.read_weight(self.out) @ self.inner.read_weight(self.items[0])


def method_of_the_class(self: Any, x: Any) -> Any:
    return Inner.read_weight(self.out)


def method_of_torch_by_its_class(self: Any, x: Any) -> Any:
    return nn.Module.float(self)


def property_with_a_layer(self: Any, x: Any) -> Any:
    return self.inner.only(x)


def attribute_that_is_called(self: Any, x: Any) -> Any:
    return self.inner.activation(self.out)


def helper(self: Any, x: Any) -> Any:
    return read_weight(self.out) + read_weight(layer=self.items[0])


def decorated_helper(self: Any, x: Any) -> Any:
    return read_decorated(self.out)


def helper_given_more(self: Any, x: Any) -> Any:
    return read_first(self.out, self.table["a"], *self.items)


def helper_by_name_of_the_argument(self: Any, x: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(function=self.out, x=x)


def kind_of_call_that_cannot_be_read(self: Any, x: Any) -> Any:
    return TABLE["a"](self.out, x)


def compiled_children(self: Any, x: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(self.items, x), [*map(self.inner, x)]


def closure() -> Forward:
    names, later = ["weight"], read_weight

    def over_functions(self: Any, x: Any) -> Any:
        return later(self.out) if names else unset(self.items[0])

    if not names:
        unset = read_weight
    return over_functions


def from_text(name: str, line: str) -> Forward:
    namespace: dict[str, Any] = {}
    exec(f"def {name}(self, x):\n    return {line}", namespace)
    made: Forward = namespace[name]
    return made


def by_settings(self: Any, x: Any) -> Any:
    if self.deep is None and self.kind != "fused" and not self.is_fused and self.inner is not None:
        return self.out(x) if self.plain is not None else self.items[0](x)
    return self.out.weight


def by_what_may_change(self: Any, x: Any) -> Any:
    if self.kind is x or self.kind == x or self.kind < 2 or self.plain or x.kind or self.absent:
        return self.out(x)
    self.is_fused = True
    return self.out.weight if self.deep is None else self.items[1](x)


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
    both_of_a_choice: ("items.1 out table.a", "", ""),
    last: ("items.0 items.1", "", ""),
    some_index: ("items.0 items.1", "", ""),
    key: ("out table.a", "", ""),
    part: ("items.0 items.1", "", ""),
    part_of_a_part: ("items.0 items.1", "", ""),
    part_handed_on: ("", "", "items items.0 items.1"),
    values: ("table.a", "", ""),
    pairs_of_a_dict: ("table.a", "", ""),
    entry_by_get: ("table.a", "", ""),
    keys: ("table.a", "", ""),
    children: ("inner inner.layer", "", ""),
    named_children: ("", "inner.layer.weight", ""),
    dictionary_of_children: ("inner.layer", "", ""),
    modules: ("inner inner.layer", "", ""),
    named_modules: ("items.0 items.1", "", ""),
    by_path: ("inner inner.layer", "", ""),
    by_a_name_that_varies: ("table.a", "table.*", ""),
    its_forward: ("items.0 out", "", "items.1"),
    forward_by_another_name: ("out", "", ""),
    passed_through: ("items.0 items.1", "items.0.weight items.1.weight", ""),
    zipped: ("items.0 items.1 table.a", "items.0.weight items.1.weight table.a.weight", ""),
    copied_dict: ("table.a", "", ""),
    stated_type: ("out", "", ""),
    looked_at: ("", "", ""),
    metadata: ("", "", ""),
    metadata_of_what_a_call_gives: ("out", "", ""),
    gradient: ("", "out.weight", ""),
    held_in_a_dict: ("items.0", "", ""),
    held_bound_method: ("out", "", ""),
    stored: ("", "", "items items.0 items.1 out"),
    set_comprehension: ("items.0 items.1", "", ""),
    entries_of_a_dict_comprehension: ("items.0 items.1", "", ""),
    condition_of_a_comprehension: ("out", "", ""),
    set_late_in_a_loop: ("items.0 out", "", ""),
    after_a_loop: ("out", "items.0.weight items.1.weight", ""),
    in_every_block: ("items.0 out table.a", "items.1.weight", ""),
    declared: ("out", "", ""),
    inner_function_given_more: ("out", "", "items.0 items.1 table.a"),
    inner_function_that_gives_a_layer: ("items.0", "", ""),
    inner_function_that_calls_itself: ("out", "", "items.0 items.1"),
    inner_function_with_a_default: ("out", "items.1.weight", ""),
    inner_lambda_with_a_default: ("items.0 items.1", "", ""),
    inner_function_never_called: ("out", "", ""),
    awaited: ("", "out.weight", ""),
    method_that_gives_a_layer: ("inner.layer", "", ""),
    generator_method: ("items.0 items.1 out", "", ""),
    method_given_more: ("out", "", "items.0 table.a"),
    static_method: ("", "items.0.weight out.weight", ""),
    method_of_the_class: ("", "out.weight", ""),
    method_of_torch_by_its_class: ("", "", ""),
    property_with_a_layer: ("inner.layer", "", ""),
    attribute_that_is_called: ("", "inner.activation", "out"),
    helper: ("", "items.0.weight out.weight", ""),
    decorated_helper: ("", "out.weight", ""),
    helper_given_more: ("", "out.weight", "items items.0 items.1 table.a"),
    helper_by_name_of_the_argument: ("", "", "out"),
    kind_of_call_that_cannot_be_read: ("", "", "out"),
    compiled_children: ("", "", "inner items items.0 items.1"),
    closure(): ("", "out.weight", "items.0"),
    by_settings: ("out", "", ""),
    by_what_may_change: ("out", "out.weight", ""),
    from_text("compiled_read", "self.out.weight"): ("", "out.weight", ""),
    from_text("compiled_call", "self.out(x) + self.items[0](x)"): (
        "",
        "",
        "items items.0 items.1 out",
    ),
    from_text("compiled_name", "getattr(self, 'out')(x)"): ("", "", "out"),
    from_text("compiled_path", "self.inner.layer"): ("", "inner.layer", ""),
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_form(form: Forward) -> None:
    """Each module is found to be called, read or handed on as the code does it, and no other."""

    class Net(Base):
        forward = form

    net = Net()
    uses = ChildUses([net])
    names = {module: name for name, module in net.named_modules()}
    called, read, handed = FORMS[form]
    assert sorted(names[module] for module in uses.calls) == called.split()
    reads = {f"{names[m]}.{name}" for m, name in uses.reads if name == "*" or hasattr(m, name)}
    assert sorted(reads) == read.split()
    assert sorted(names[module] for module in uses.handed) == handed.split()
