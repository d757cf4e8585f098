"""Layers of torch that compute their weight inline are frozen if nothing else of them is changed.

The classes are made from text, so that one template stands for every way to call torch's function.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fingerprint import assert_unchanged, fingerprint, same_bits
from torch import Tensor, nn

from sn_export import find_spectral_norm, find_suspects, frozen_spectral_norm

INLINE = """
class Inline(nn.{layer}):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("u", torch.randn(self.weight.shape[0]))

    def forward(self, x):
        matrix = self.weight.flatten(1)
        v = F.normalize(matrix.t() @ self.u, dim=0)
        w = self.weight / torch.linalg.vector_norm(matrix @ v)
        return {call}
"""
ROW, IDS = torch.ones(2, 3), torch.arange(3)
# Of each layer: its function, its sizes, the arguments after the weight, an input.
LAYERS: dict[str, tuple[str, tuple[Any, ...], str, Tensor]] = {
    "Linear": ("linear", (3, 4), "bias", ROW),
    "Embedding": (
        *("embedding", (5, 3)),
        *("padding_idx max_norm norm_type scale_grad_by_freq sparse", IDS),
    ),
}
for n in (1, 2, 3):
    image = torch.ones(2, 2, *[7] * n)
    plain = ("bias stride padding dilation groups", image)
    LAYERS[f"Conv{n}d"] = (f"conv{n}d", (2, 4, 3), *plain)
    turned = ("bias stride padding output_padding groups dilation", image)
    LAYERS[f"ConvTranspose{n}d"] = (f"conv_transpose{n}d", (2, 4, 3), *turned)
OTHER = {
    **{"bias": None, "stride": 3, "padding": 2, "dilation": 2, "output_padding": 1, "groups": 2},
    **{"padding_idx": 1, "max_norm": 1.0, "norm_type": 1.0},
    **{"scale_grad_by_freq": True, "sparse": True},
}


def build(layer: str, call: str, **options: Any) -> nn.Module:
    namespace: dict[str, Any] = {"nn": nn, "torch": torch, "F": F, "__name__": "written_by_hand"}
    exec(INLINE.format(layer=layer, call=call), namespace)
    model: nn.Module = namespace["Inline"](*LAYERS[layer][1], **options)
    return model.eval()


def same_calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the ways to say what the layer itself would."""
    for layer, (function, _, names, _) in LAYERS.items():
        own = [f"self.{name}" for name in names.split()]
        named = [f"{name}=self.{name}" for name in names.split()]
        yield layer, f"F.{function}(x, w, {', '.join(own)})", {}
        yield layer, f"F.{function}(weight=w, input=x, {', '.join(reversed(named))})", {}
        yield layer, f"F.{function}(x, w, {own[0]})", {}
        if "stride" in names:
            options = {"stride": 2, "dilation": 2, "groups": 2, "padding": 1}
            yield layer, f"F.{function}(x, w, {', '.join(own)})", options
            numbers = "stride=2, dilation=2, groups=2, padding=1"
            yield layer, f"F.{function}(x, w, self.bias, {numbers})", options


def other_calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield calls that differ from that of the layer in one thing."""
    for layer, (function, _, names, _) in LAYERS.items():
        own = [f"self.{name}" for name in names.split()]
        first = f"F.{function}(x, w, {own[0]})"
        yield layer, f"{first} * 2", {}
        yield layer, f"{first} + {first}", {}
        yield layer, f"F.{function}(x + 0, w, {own[0]})", {}
        options = {"stride": 2} if "stride" in names else {}
        for name in names.split():
            if name == "groups":
                continue  # with another number of groups the weight does not fit
            named = [f"{n}={OTHER[n] if n == name else 'self.' + n}" for n in names.split()]
            yield layer, f"F.{function}(x, w, {', '.join(named)})", options
        if options:
            yield layer, first, options


@pytest.mark.parametrize(("layer", "call", "options"), list(same_calls()))
def test_inline_layers_are_frozen(layer: str, call: str, options: dict[str, Any]) -> None:
    """However the forward calls torch's function for the layer, inside is the plain layer."""
    model, x = build(layer, call, **options), LAYERS[layer][3]
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    before = fingerprint(model)
    assert [(info.name, info.kind) for info in find_spectral_norm(model)] == [("weight", "mixin")]
    with frozen_spectral_norm(model), torch.no_grad():
        assert "u" not in model.state_dict()
        assert same_bits(model(x), expected)
    assert_unchanged(before, model)


@pytest.mark.parametrize(("layer", "call", "options"), list(other_calls()))
def test_what_does_more_is_a_suspect(layer: str, call: str, options: dict[str, Any]) -> None:
    """A forward that hands torch other arguments, or changes the result, is left as it is."""
    (suspect,) = find_suspects(build(layer, call, **options))
    assert suspect.reason == "'u' fits the singular vectors of 'weight'"
