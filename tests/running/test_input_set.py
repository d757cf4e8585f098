"""Random inputs: within the range seen, from a private generator, the same every time."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from export_models import Head
from hypothesis import example, given, settings, strategies as st
from torch import Tensor, nn

from sn_export.running import (
    InputSet,
    as_input_sets,
    draw_random_like,
    draw_random_sets,
    list_tensors,
)

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _drawn(tensor: Tensor) -> Tensor:
    return draw_random_like(tensor, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [*_INTEGERS, *_FLOATS, torch.bool, torch.complex64])
def test_shape_and_dtype(dtype: torch.dtype) -> None:
    """Random values have the shape and dtype of the example, for every dtype."""
    example = torch.tensor([[3, 1, 100], [0, 7, 2]]).to(dtype)
    drawn = _drawn(example)
    assert (drawn.shape, drawn.dtype) == (example.shape, dtype)


@given(
    st.sampled_from(_INTEGERS),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5),
    st.integers(0, 100),
)
@example(torch.int64, [-(2**63), 2**63 - 1], 0)
@example(torch.int64, [2**53 + 1], 0)
@settings(deadline=None, max_examples=200)
def test_integers_within_the_range_seen(dtype: torch.dtype, values: list[int], seed: int) -> None:
    """Integers of every width, the full range of int64 included, stay within those seen."""
    info = torch.iinfo(dtype)
    shown = torch.tensor([min(max(v, info.min), info.max) for v in values], dtype=dtype)
    drawn = draw_random_like(shown, torch.Generator().manual_seed(seed))
    assert shown.min() <= drawn.min()
    assert drawn.max() <= shown.max()


def test_both_ends_are_drawn() -> None:
    """The smallest and the largest integer seen are drawn too."""
    example = torch.zeros(500, dtype=torch.int64)
    example[0], example[1] = -2, 2
    assert _drawn(example).unique().tolist() == [-2, -1, 0, 1, 2]


@given(
    st.sampled_from(_FLOATS),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=6),
)
@example(torch.float64, [1e308, -1e308])
@settings(deadline=None, max_examples=200)
def test_floats_within_the_range_seen(dtype: torch.dtype, values: list[float]) -> None:
    """Finite floats give finite floats, within the range seen where it is one."""
    shown = torch.tensor(values, dtype=torch.float64).to(dtype)
    drawn = _drawn(shown)
    assert torch.isfinite(drawn).all()
    if bool(torch.isfinite(shown).all()) and shown.min() < shown.max():
        assert shown.min() <= drawn.min()
        assert drawn.max() <= shown.max()


def test_constant_floats_become_normal_ones() -> None:
    """A constant example, which shows no range, gives standard normal values."""
    drawn = _drawn(torch.full((2000,), 3.0))
    assert abs(float(drawn.mean())) < 0.1
    assert abs(float(drawn.std()) - 1) < 0.1


def test_floats_fill_the_range() -> None:
    """Floats are uniform over the range seen."""
    example = torch.zeros(4000)
    example[0] = 10.0
    drawn = _drawn(example)
    assert abs(float(drawn.mean()) - 5) < 0.2
    assert abs(float((drawn < 1).float().mean()) - 0.1) < 0.02


@pytest.mark.parametrize("value", [torch.inf, torch.nan, -torch.inf])
def test_floats_that_are_not_finite(value: float) -> None:
    """An example that holds an infinity or NaN gives finite values."""
    assert torch.isfinite(_drawn(torch.tensor([1.0, value, 2.0]))).all()


def test_booleans_are_fair() -> None:
    """Booleans are drawn half and half, whatever the example holds."""
    assert 400 < int(_drawn(torch.zeros(1000, dtype=torch.bool)).sum()) < 600


def test_empty_and_scalar() -> None:
    """Tensors without elements or without dimensions keep their shape."""
    assert _drawn(torch.empty(0, 3)).shape == (0, 3)
    assert _drawn(torch.tensor(4)).item() == 4
    assert _drawn(torch.tensor(4.0)).shape == ()


def test_the_same_sets_every_time() -> None:
    """The sets are the same at every call, differ from one another, and touch no global RNG."""
    example = InputSet((torch.randn(3, 3),), {"more": [torch.arange(9)]})
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first, second = draw_random_sets(example, 3), draw_random_sets(example, 3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert repr(np.random.get_state()) == repr(states[1])
    assert random.getstate() == states[2]
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.args[0], two.args[0])
        assert torch.equal(one.kwargs["more"][0], two.kwargs["more"][0])
    assert not torch.equal(first[0].args[0], first[1].args[0])
    assert [one.label for one in first] == ["random input 0", "random input 1", "random input 2"]


def test_more_sets_begin_with_the_same() -> None:
    """Asking for more sets does not change the first ones."""
    example = InputSet((torch.randn(3),))
    few, many = draw_random_sets(example, 1), draw_random_sets(example, 5)
    assert torch.equal(few[0].args[0], many[0].args[0])


def test_nested_structure_is_kept() -> None:
    """Tuples, lists, dicts, numbers and None come back as they were, tensors replaced."""
    example = InputSet((({"a": torch.ones(2)}, [torch.zeros(1), 3, None]),), {"flag": True})
    (drawn,) = draw_random_sets(example, 1)
    (((mapping, items),), kwargs) = drawn.args, drawn.kwargs
    assert (list(mapping), items[1:], dict(kwargs)) == (["a"], [3, None], {"flag": True})
    assert (mapping["a"].shape, items[0].shape) == ((2,), (1,))


def test_clone_shares_nothing() -> None:
    """A clone can be written to, containers included, and the original stays."""
    tensor = torch.ones(2)
    original = InputSet(([tensor],), {"more": {"a": tensor}})
    copy = original.clone()
    copy.args[0][0].add_(1)
    copy.args[0].append("more")
    copy.kwargs["more"].clear()
    assert torch.equal(tensor, torch.ones(2))
    assert len(original.args[0]) == 1
    assert list(original.kwargs["more"]) == ["a"]


def test_names_are_those_of_the_parameters() -> None:
    """Tensors are named by the forward's parameters, in its order, and by their place within."""

    class Many(Head):
        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], **more: Tensor) -> Tensor:
            raise AssertionError

    t = torch.ones(1)
    inputs = InputSet((), {"extra": t, "pair": (t + 1, t + 2), "x": t + 3})
    named = [(name, float(tensor)) for name, tensor in inputs.bind(Many()).named_tensors()]
    assert named == [("x", 4.0), ("pair_0", 2.0), ("pair_1", 3.0), ("extra", 1.0)]


def test_names_of_every_kind_of_parameter() -> None:
    """``*args`` are numbered, and a keyword that is called like a parameter has a name of its own.

    A copy has the names of its original.
    """

    class Every(Head):
        def forward(
            self, x: Tensor, /, y: int = 0, *rest: Tensor, z: Tensor, left: int = 0, **more: Tensor
        ) -> Tensor:
            raise AssertionError

    t = torch.ones(1)
    given = InputSet((t, 1, t + 1, t + 2), {"x": t + 5, "b": t + 4, "z": t + 3}).bind(Every())
    assert list(given.kwargs) == ["z", "x", "b"]
    for inputs in (given, given.clone()):
        named = [(name, float(tensor)) for name, tensor in inputs.named_tensors()]
        assert named == [
            ("x", 1.0),
            ("rest_0", 2.0),
            ("rest_1", 3.0),
            ("z", 4.0),
            ("more_x", 6.0),
            ("b", 5.0),
        ]


_T = torch.ones(1)


@pytest.mark.parametrize(
    ("given_inputs", "arity", "sizes"),
    [
        (None, None, []),
        (_T, None, [1]),
        ((_T, _T), 2, [2]),
        ((_T, _T), 1, [1, 1]),
        ({"x": _T}, 1, [0]),
        ([], 1, []),
        ([_T, _T, _T], 1, [1, 1, 1]),
        ([(_T, _T)], 2, [2]),
        (((_T, _T), (_T, _T)), 2, [2, 2]),
        (({"x": _T}, {"x": _T}), 1, [0, 0]),
    ],
)
def test_forms_of_inputs(given_inputs: object, arity: int | None, sizes: list[int]) -> None:
    """Each accepted form gives its calls, with as many positional arguments as meant."""
    assert [len(one.args) for one in as_input_sets(nn.Identity(), given_inputs, arity)] == sizes


def test_tensor_leaves() -> None:
    """The tensors of a nested output come in order, other leaves are left out."""
    a, b, c = (torch.tensor(float(i)) for i in range(3))
    assert [float(t) for t in list_tensors({"p": (a, [b, None, 3]), "q": {"r": c}})] == [0, 1, 2]
