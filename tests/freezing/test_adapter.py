"""register_spectral_norm: teaching the block a spectral norm of one's own.

The first part is what another package can copy: its layer, its adapter, its test.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import pytest
import torch
from fingerprint import assert_unchanged, fingerprint, same_bits
from networks import net
from torch import Tensor, nn

from sn_export import (
    FreezeError,
    Registration,
    SpectralNormAdapter,
    find_spectral_norm,
    frozen_spectral_norm,
    register_spectral_norm,
)


class PackedLinear(nn.Module):
    """A layer of your own: weight and singular vectors lie in one parameter and one tuple."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(outputs * inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("estimate", torch.randn(inputs))
        self.size = (outputs, inputs)

    def effective(self) -> Tensor:
        weight = self.packed.view(self.size)
        with torch.no_grad():
            estimate = cast(Tensor, self.estimate)
            estimate.copy_(nn.functional.normalize(weight.t() @ (weight @ estimate), dim=0))
        return weight / torch.linalg.vector_norm(weight @ estimate)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.effective().t() + self.bias


class PlainLinear(PackedLinear):
    """The same layer without spectral norm."""

    weight: nn.Parameter

    def effective(self) -> Tensor:
        return self.weight


class PackedAdapter:
    """Tells sn_export about `PackedLinear`."""

    def find(self, module: nn.Module) -> Iterable[str]:
        return ["weight"] if type(module) is PackedLinear else []

    def value(self, module: nn.Module, name: str) -> Tensor:
        return cast(PackedLinear, module).effective()

    def freeze(self, module: nn.Module, name: str, weight: nn.Parameter) -> None:
        del module.packed, module.estimate
        module.register_parameter(name, weight)
        module.__class__ = PlainLinear

    def restore(self, module: nn.Module, name: str) -> None:
        pass


def test_own_spectral_norm_is_frozen_and_restored() -> None:
    """With its adapter registered, the layer is plain inside the block and unchanged after."""
    model = nn.Sequential(PackedLinear(3, 4), nn.ReLU()).eval()
    x = torch.randn(2, 3)
    before = model.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    with register_spectral_norm(PackedAdapter()):
        with frozen_spectral_norm(model), torch.no_grad():
            assert list(model.state_dict()) == ["0.bias", "0.weight"]
            frozen = model(x)
        after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    with torch.no_grad():
        assert torch.equal(model(x), frozen)


# ---------------------------------------------------------------- what the library promises


@pytest.fixture(autouse=True)
def _nothing_stays_registered() -> Iterator[None]:
    """Ask the registry inside: an adapter that finds nothing shows nowhere else."""
    from sn_export.freezing.kinds.adapters import list_registrations

    yield
    assert not list_registrations()


def model() -> nn.Module:
    """A network with one layer for the adapter, and torch's own spectral norm beside it."""
    inner = net("hook")
    return nn.ModuleDict({"own": PackedLinear(3, 4), "torch": inner})


def test_nothing_is_found_without_the_adapter() -> None:
    """An adapter counts from its registration to its removal, whichever way that is spelt."""
    layer = PackedLinear(3, 4)

    def count() -> int:
        return len(find_spectral_norm(layer))

    assert count() == 0
    registration = register_spectral_norm(PackedAdapter())
    assert isinstance(registration, Registration)
    assert isinstance(registration.adapter, SpectralNormAdapter)
    assert count() == 1
    registration.remove()
    registration.remove()
    assert count() == 0
    registration = register_spectral_norm(PackedAdapter())
    registration()
    assert count() == 0
    with pytest.raises(KeyError), register_spectral_norm(PackedAdapter()):
        assert count() == 1
        raise KeyError
    assert count() == 0


def test_decorator_registers_a_class() -> None:
    """As a decorator it returns the class; without a handle, the registry inside is emptied."""
    from sn_export.freezing.kinds.adapters import list_registrations

    decorated = register_spectral_norm(PackedAdapter)
    try:
        assert decorated is PackedAdapter
        (info,) = find_spectral_norm(PackedLinear(3, 4))
        assert info.kind == "PackedAdapter"
    finally:
        cast(list[Any], list_registrations()).clear()


def test_block_with_an_adapter_is_exact() -> None:
    """Inside, the adapter's layer is plain among the others; after, every bit is as it was."""
    whole = model()
    sibling = PackedLinear(2, 2)
    whole["own"].note = sibling  # type: ignore[index,assignment]
    before = fingerprint(whole)
    with register_spectral_norm(PackedAdapter()):
        found = find_spectral_norm(whole)
        assert_unchanged(before, whole)
        assert [info.name for info in found][:2] == ["own.weight", "own.note.weight"]
        assert (found[0].shape, found[0].dtype) == ((4, 3), "float32")
        with frozen_spectral_norm(whole):
            own = cast(Any, whole)["own"]
            assert type(own) is type(sibling) is PlainLinear
            assert isinstance(own.weight, nn.Parameter)
            assert not own.weight.requires_grad
            assert find_spectral_norm(whole) == []
            with frozen_spectral_norm(whole):
                pass
            assert type(own) is PlainLinear
        assert_unchanged(before, whole)


class Twice(nn.Module):
    """Two weights in one module, each with a vector."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("a", "b"):
            self.register_parameter(f"{name}_raw", nn.Parameter(torch.randn(3, 3)))
            self.register_buffer(f"{name}_help", torch.randn(3))
        self.order: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        for name in ("a", "b"):
            if name in self._parameters:
                x = x @ cast(Tensor, self._parameters[name])
            else:
                raw = cast(Tensor, getattr(self, f"{name}_raw"))
                x = x @ (raw / (raw @ cast(Tensor, getattr(self, f"{name}_help"))).norm())
        return x


class TwiceAdapter:
    """Leaves debris, and a restore that does the wrong thing or fails, if told to."""

    def __init__(self, sloppy: bool = False, fail: str = "") -> None:
        self.sloppy, self.fail = sloppy, fail
        self.outside: list[str] = []

    def _may_fail(self, method: str) -> None:
        if self.fail == method:
            raise ZeroDivisionError("on purpose")

    def find(self, module: nn.Module) -> Iterable[str]:
        self._may_fail("find")
        return [n for n in ("a", "b") if f"{n}_raw" in module._parameters]

    def value(self, module: nn.Module, name: str) -> Tensor:
        self._may_fail("value")
        raw = cast(nn.Parameter, getattr(module, f"{name}_raw"))
        raw.data.mul_(2)  # a side effect that must not reach the model
        value = raw / (raw @ cast(Tensor, getattr(module, f"{name}_help"))).norm()
        raw.data.div_(2)
        cast(list[str], module.order).append(name)
        torch.rand(1)
        return value

    def freeze(self, module: nn.Module, name: str, weight: nn.Parameter) -> None:
        self.outside.append(name)
        if self.sloppy:
            module.debris = torch.ones(3)  # type: ignore[assignment]
            module.register_forward_hook(lambda m, x, y: None)
            module.train(False)
        delattr(module, f"{name}_raw")
        delattr(module, f"{name}_help")
        setattr(module, name, weight)
        if name == "b":
            self._may_fail("freeze")

    def restore(self, module: nn.Module, name: str) -> None:
        self.outside.remove(name)
        if self.sloppy:
            module.register_parameter("wrong", nn.Parameter(torch.ones(1)))
            module._parameters.pop(name)
            module.left = []  # type: ignore[assignment]
            cast(nn.Parameter, module._parameters.get("b_raw", torch.ones(1))).data.zero_()
        self._may_fail("restore")


@pytest.mark.parametrize("sloppy", [False, True])
def test_restoring_is_the_librarys_own(sloppy: bool) -> None:
    """Two tensors of one module come back bit for bit, whatever freeze and restore leave behind."""
    layer = Twice()
    adapter = TwiceAdapter(sloppy)
    with torch.no_grad():
        expected = layer(torch.eye(3))
    before = fingerprint(layer)
    with register_spectral_norm(adapter):
        with frozen_spectral_norm(layer):
            assert list(layer.state_dict()) == ["a", "b"]
            assert adapter.outside == ["a", "b"]
            with torch.no_grad():
                assert same_bits(layer(torch.eye(3)), expected)
        assert adapter.outside == []
        with pytest.raises(KeyboardInterrupt), frozen_spectral_norm(layer):
            raise KeyboardInterrupt
    if sloppy:
        assert layer._forward_hooks == {}
    after = fingerprint(layer)
    after.facts["next hook id"] = before.facts["next hook id"]  # sloppiness registers hooks
    assert before.differences(after) == []


MESSAGES = {
    "find": "cannot freeze 'the model': adapter TwiceAdapter: find raised",
    "value": "cannot freeze 'part.a': adapter TwiceAdapter: value raised",
    "freeze": "cannot freeze 'part.b': adapter TwiceAdapter: freeze raised",
    "restore": "cannot freeze 'part.b': adapter TwiceAdapter: restore raised",
}


@pytest.mark.parametrize("method", MESSAGES)
def test_errors_of_an_adapter_name_the_module_and_the_adapter(method: str) -> None:
    """Whatever method fails, one FreezeError says where, and the model is as it was."""
    layer = nn.ModuleDict({"part": Twice()})
    adapter = TwiceAdapter(fail=method)
    before = fingerprint(layer)
    text = (
        f"{MESSAGES[method]} ZeroDivisionError: on purpose. Correct the adapter, or unregister it"
    )
    with (
        register_spectral_norm(adapter),
        pytest.raises(FreezeError) as caught,
        frozen_spectral_norm(layer),
    ):
        pass
    assert str(caught.value) == text
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert_unchanged(before, layer)
    adapter.fail = ""
    adapter.outside.clear()
    with register_spectral_norm(adapter), frozen_spectral_norm(layer):
        assert list(layer.state_dict()) == ["part.a", "part.b"]
    assert_unchanged(before, layer)


class Wrong(PackedAdapter):
    """An adapter whose answers are wrong in one way."""

    def __init__(self, way: str) -> None:
        self.way = way

    def find(self, module: nn.Module) -> Iterable[str]:
        return cast(Any, [3]) if self.way == "find" else super().find(module)

    def value(self, module: nn.Module, name: str) -> Tensor:
        wrong = {"value": cast(Any, None), "dtype": torch.ones(4, 3, dtype=torch.long)}
        return wrong.get(self.way, super().value(module, name))

    def freeze(self, module: nn.Module, name: str, weight: nn.Parameter) -> None:
        if self.way == "nowhere":
            return
        if self.way == "write":
            cast(nn.Parameter, module.packed).data.zero_()
        if self.way == "list":
            cast(Any, module).names.append("x")
        super().freeze(module, name, weight)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("find", "find returned 3, not the name of a tensor"),
        ("value", "value returned NoneType, not a tensor"),
        ("dtype", "value returned a tensor of torch.int64, which is no weight"),
        ("nowhere", "freeze left the weight it was given in no module: register it as a parameter"),
        ("write", "freeze wrote into a tensor; it may only register and delete"),
        ("list", "freeze changed a list in place; set a new one instead"),
    ],
)
def test_wrong_answers_are_refused(way: str, reason: str) -> None:
    """An answer that cannot be used is one error that says what is wanted, and changes nothing."""
    layer = PackedLinear(3, 4)
    layer.names = []  # type: ignore[assignment]
    before = fingerprint(layer)
    with (
        register_spectral_norm(Wrong(way)),
        pytest.raises(FreezeError, match=reason),
        frozen_spectral_norm(layer),
    ):
        pass
    assert_unchanged(before, layer)


def test_incomplete_adapters_are_refused_at_once() -> None:
    """Registering says which method is missing, or what arguments it must take."""

    class Short(PackedAdapter):
        value = None  # type: ignore[assignment]

    class Other(PackedAdapter):
        def find(self):  # type: ignore[no-untyped-def,override]
            return []

    with pytest.raises(TypeError) as missing:
        register_spectral_norm(cast(Any, Short()))
    assert str(missing.value) == "adapter Short must have a method value(module, name), found none"
    with pytest.raises(TypeError) as other:
        register_spectral_norm(cast(Any, Other))
    assert str(other.value) == "method find of adapter Other must take (module), it takes ()"


def test_weight_in_a_child_is_watched_where_it_stands() -> None:
    """An adapter of a wrapper may put the weight into the child; an edit of it is noticed there."""
    from handwritten_networks import Wrapper

    class ForWrapper:
        def find(self, module: nn.Module) -> Iterable[str]:
            inside = "weight_bar" in getattr(module, "module", nn.Module())._parameters
            return ["weight"] if isinstance(module, Wrapper) and inside else []

        def value(self, module: nn.Module, name: str) -> Tensor:
            cast(Wrapper, module)._update_u_v()
            return cast(Tensor, cast(nn.Module, module.module).weight)

        def freeze(self, module: nn.Module, name: str, weight: nn.Parameter) -> None:
            inner = cast(nn.Module, module.module)
            inner.__dict__.pop("weight", None)
            for key in ("weight_bar", "weight_u", "weight_v"):
                delattr(inner, key)
            inner.weight = weight
            cast(Any, module)._update_u_v = lambda: None

        def restore(self, module: nn.Module, name: str) -> None:
            pass

    layer = nn.Sequential(Wrapper(nn.Conv2d(1, 2, 2))).eval()
    layer(torch.ones(1, 1, 2, 2))
    before = fingerprint(layer)
    with register_spectral_norm(ForWrapper()):
        (info,) = find_spectral_norm(layer)
        assert info.kind == "ForWrapper"  # before what is built in
        with frozen_spectral_norm(layer):
            assert list(layer.state_dict()) == ["0.module.bias", "0.module.weight"]
    assert_unchanged(before, layer)


def test_the_second_weight_of_a_module_is_frozen_on_top_of_the_first() -> None:
    """The adapter finds the module as it left it for the first weight: its tensors and class."""
    classes: list[str] = []

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw_a, self.raw_b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))

    class PairAdapter(PackedAdapter):
        def find(self, module: nn.Module) -> Iterable[str]:
            return ["a", "b"] if isinstance(module, Pair) else []

        def value(self, module: nn.Module, name: str) -> Tensor:
            return cast(Tensor, getattr(module, f"raw_{name}")) / 2

        def freeze(self, module: nn.Module, name: str, weight: nn.Parameter) -> None:
            classes.append(f"{type(module).__name__} with {list(module._parameters)}")
            delattr(module, f"raw_{name}")
            module.register_parameter(name, weight)
            module.__class__ = type(f"{name}_{type(module).__name__}", (type(module),), {})

    pair = Pair()
    before = fingerprint(pair)
    with register_spectral_norm(PairAdapter()), frozen_spectral_norm(pair):
        assert classes == ["Pair with ['raw_a', 'raw_b']", "a_Pair with ['raw_b', 'a']"]
        assert type(pair).__name__ == "b_a_Pair"
        assert list(pair.state_dict()) == ["a", "b"]
    assert_unchanged(before, pair)
