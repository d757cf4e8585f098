"""Handwritten spectral norm is told by names: each name that people use does, and no other.

The networks are made from text, so that one template stands for every spelling.
"""

from __future__ import annotations

import textwrap
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sn_export import (
    SpectralNormNotRecognisedWarning,
    find_spectral_norm,
    find_suspects,
    frozen_spectral_norm,
)

EXACT = """
class {cls}(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def computed(self):
        return self.weight / {word}(self.weight)

    def forward(self, x):
        return x @ self.computed().t()
"""
ITERATING = """
class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn({rows}, 3))
        self.register_buffer("{vector}", torch.ones({rows}))
        self.{iterations} = 2

    def computed(self):
        other = {word}(self.weight.t() @ self.{vector})
        return self.weight / {word}(self.weight @ other).sum()

    def forward(self, x):
        return x @ self.computed().t()
"""
WRAPPER = """
class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.layer.register_parameter("{raw}", self.layer._parameters.pop("weight"))
        self.layer.register_buffer("weight_u", torch.ones(4))

    def forward(self, x):
        v = F.normalize(self.layer.{raw}.t() @ self.layer.weight_u, dim=0)
        self.layer.weight = self.layer.{raw} / (self.layer.{raw} @ v).norm()
        return self.layer(x)
"""
PROPERTY = """
class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.{raw} = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("u", torch.ones(4))

    @property
    def {name}(self):
        v = F.normalize(self.{raw}.t() @ self.u, dim=0)
        return self.{raw} / (self.{raw} @ v).norm()

    def forward(self, x):
        return x @ self.{name}.t()
"""
BY_HAND = """
class {cls}(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return x @ self.kernel.t() / {word}(self.kernel)
"""


def largest(tensor: Tensor) -> Tensor:
    return tensor.abs().max()


def unit(tensor: Tensor) -> Tensor:
    return tensor / tensor.abs().max()


def build(template: str, **words: Any) -> nn.Module:
    """Make a network of a template, in which the function ``word`` has a name of its own."""
    function = unit if template is ITERATING else largest
    namespace = {"nn": nn, "torch": torch, "F": F, "__name__": "written_by_hand"}
    namespace[words.get("word", "unit")] = function
    exec(textwrap.dedent(template).format(**words), namespace)
    made = next(v for k, v in namespace.items() if isinstance(v, type) and k != "nn")
    model: nn.Module = made()
    return model


VECTORS = (
    *("u", "v", "us", "vs", "u0", "v_1", "u_hat", "vhat", "u_vec", "vvec", "weight_u", "_v"),
    *("left", "right_2", "singular", "weight_singular_vector"),
)
NO_VECTORS = ("shift", "menu", "uv", "vector", "lefts", "u_scale", "value", "hat", "conv")


@pytest.mark.parametrize("vector", [*VECTORS, *NO_VECTORS])
def test_a_vector_is_told_by_its_name(vector: str) -> None:
    """Where no function says that it normalises, the weight is found if a vector is named so."""
    model = build(ITERATING, vector=vector, word="halve", rows=4, iterations="steps")
    assert [info.name for info in find_spectral_norm(model)] == ["weight"] * (vector in VECTORS)


TELLING = (
    "u",
    "v0",
    "us",
    "sn_w",
    "sv",
    "svs1",
    "left",
    "right",
    "singular",
    "spectral_w",
    "sigma",
)


@pytest.mark.parametrize("vector", [*TELLING, "scale", "usage", "snapshot", "unit", "weights"])
def test_a_vector_of_one_element_needs_a_telling_name(vector: str) -> None:
    """One number fits the last layer of any critic, so there the name has to say what it is."""
    model = build(ITERATING, vector=vector, word="normalize", rows=1, iterations="steps")
    assert [info.name for info in find_spectral_norm(model)] == ["weight"] * (vector in TELLING)


NORMS = ("normalize", "normalise", "norm", "vector_norm", "rsqrt")
SIGMAS = (
    *(
        "svd",
        "svdvals",
        "singular_value",
        "largest_singular",
        "spectral_radius",
        "sigma",
        "_sigmas",
    ),
    *("lipschitz", "lipschitz_bound", "power_iteration", "lobpcg", "eigvals", "matrix_norm"),
    *("gram", "gram_iteration", "l2_normalize", "l2normalise", "my_svd"),
)
NO_SIGMAS = ("scale", "spectral_norm", "variance", "telegram", "sigmoid", "maximum", "grammar")


@pytest.mark.parametrize("word", [*NORMS, *SIGMAS, *NO_SIGMAS])
def test_a_function_tells_that_it_normalises(word: str) -> None:
    """State that fits is taken for vectors beside code that normalises, by any of its names."""
    model = build(ITERATING, vector="state", word=word, rows=4, iterations="steps")
    found = [info.name for info in find_spectral_norm(model)]
    assert found == ["weight"] * (word not in NO_SIGMAS)


@pytest.mark.parametrize("vector", ["bias", "running_bias", "bias_u"])
def test_a_bias_is_no_vector(vector: str) -> None:
    """Its shape fits every weight, so beside code that normalises it tells nothing."""
    model = build(ITERATING, vector=vector, word="normalize", rows=4, iterations="steps")
    assert [info.name for info in find_spectral_norm(model)] == ["weight"] * (vector == "bias_u")


@pytest.mark.parametrize("word", [*SIGMAS, *NORMS, *NO_SIGMAS])
def test_a_largest_singular_value_needs_no_vectors(word: str) -> None:
    """Without vectors the weight is found if a function says that it is its largest value."""
    model = build(EXACT, cls="Dense", word=word)
    is_sigma = word not in (*NO_SIGMAS, *NORMS)
    assert [info.name for info in find_spectral_norm(model)] == ["weight"] * is_sigma


@pytest.mark.parametrize(
    "name",
    ["power_iterations", "n_power_iterations", "num_iters", "num_itrs", "n_iter", "Ip", "steps"],
)
def test_the_number_of_iterations_is_told(name: str) -> None:
    """It is listed under each name that is known, and None under others."""
    model = build(ITERATING, vector="u", word="normalize", rows=4, iterations=name)
    (info,) = find_spectral_norm(model)
    assert info.n_power_iterations == (None if name == "steps" else 2)


@pytest.mark.parametrize(
    "raw", ["bar", "orig", "raw", "org", "original", "parameter", "param", "g", "mask"]
)
def test_a_wrapper_may_call_the_raw_weight(raw: str) -> None:
    """A layer lacks ``weight`` if its raw weight has one of the endings that say so."""
    model, is_known = build(WRAPPER, raw=f"weight_{raw}"), raw not in ("g", "mask")
    assert [suspect.module for suspect in find_suspects(model)] == [""] * (not is_known)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpectralNormNotRecognisedWarning)
        assert [info.name for info in find_spectral_norm(model)] == ["layer.weight"] * is_known


@pytest.mark.parametrize(
    ("raw", "name", "plain"),
    [
        *[(raw, "weight", "weight") for raw in ("weight_bar", "weight_orig", "_weight")],
        ("raw_weight", "weight", "weight"),
        ("weight_bar", "normed", "weight"),
        ("_kernel", "normed", "_kernel"),
        ("kernel", "normed", "kernel"),
    ],
)
def test_a_property_gives_its_name_to_the_weight(raw: str, name: str, plain: str) -> None:
    """Inside, the weight has the name that it is read by where the raw one is made of that."""
    with frozen_spectral_norm(build(PROPERTY, raw=raw, name=name)) as model:
        assert list(model.state_dict()) == [plain]


NAMED = ("SNDense", "Dense_SN", "SN_Dense", "DenseSN", "MySpectralNorm", "spectral_norm_layer")
BOUNDED = ("LipschitzDense", "lipschitz_layer", "SLLBlock", "AOL", "My_CPL", "BCOP2")
NO_NORMS = ("SNNDense", "Dense", "SpectralConv", "Snow", "FALL", "AOLder", "DISNEY")


@pytest.mark.parametrize("cls", [*NAMED, *BOUNDED, *NO_NORMS])
@pytest.mark.parametrize("word", ["svdvals", "total"])
def test_a_class_is_suspected_by_its_name(cls: str, word: str) -> None:
    """One named a spectral norm that says sigma, and one named a bound, are; others are not."""
    suspects = [suspect.reason for suspect in find_suspects(build(BY_HAND, cls=cls, word=word))]
    is_one = cls in BOUNDED or (cls in NAMED and word == "svdvals")
    assert suspects == ["its name, and it computes with 'kernel'"] * is_one
