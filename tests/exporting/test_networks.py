"""Real architectures with spectral norm on their less usual tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_models import (
    APPLY,
    EXPORTERS,
    KINDS,
    assert_as_before,
    bare_export,
    plain_twin,
    plain_values,
    trained,
)
from fingerprint import contents, fingerprint
from onnx import numpy_helper
from torch import Tensor, nn

from sn_export import export_onnx

_SEQUENCE = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))


def _encoder(kind: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    APPLY[kind](layer.linear1)
    APPLY[kind](layer.linear2)
    APPLY[kind](layer.self_attn, "in_proj_weight")
    return layer


def _attention(kind: str) -> nn.Module:
    attention: nn.Module = APPLY[kind](
        nn.MultiheadAttention(8, 2, batch_first=True), "in_proj_weight"
    )
    return attention


def _recurrent(cls: type[nn.RNNBase]) -> Callable[[str], nn.Module]:
    def build(kind: str) -> nn.Module:
        module: nn.Module = APPLY[kind](cls(8, 4, batch_first=True), "weight_hh_l0")
        return module

    return build


_PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
_NETWORKS: dict[str, tuple[Callable[[str], nn.Module], tuple[Tensor, ...], dict[str, Any]]] = {
    # Without a mask, torch's TorchScript exporter cannot trace attention.
    "encoder": (_encoder, (_SEQUENCE,), {"src_key_padding_mask": _PADDING}),
    "attention": (_attention, (_SEQUENCE, _SEQUENCE.roll(1, 0), _SEQUENCE.roll(1, 1)), {}),
    "LSTM": (_recurrent(nn.LSTM), (_SEQUENCE,), {}),
    "GRU": (_recurrent(nn.GRU), (_SEQUENCE,), {}),
}


@pytest.mark.parametrize("name", _NETWORKS)
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_network(tmp_path: Path, kind: str, exporter: str, name: str) -> None:
    """The file is proved, the model as before, and no spectral norm is left in the graph."""
    build, args, kwargs = _NETWORKS[name]
    model = trained(build(kind), *args)
    model.train()
    before = fingerprint(model)
    samples = 0 if kwargs else 2  # a random mask may hide a whole sequence
    report = export_onnx(
        model,
        args,
        tmp_path / "net.onnx",
        exporter=exporter,
        kwargs=kwargs,
        samples=samples,
        inputs=[{**dict(zip(("src",), args, strict=True)), **kwargs}] if kwargs else None,
    )
    assert_as_before(before, model)
    assert report.parity.passed
    content = (tmp_path / "net.onnx").read_bytes()
    for word in (b"weight_u", b"_l0_u", b"_orig", b"parametriz", b"_weight_v"):
        assert word not in content


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_encoder_graph_is_the_plain_one(tmp_path: Path, kind: str, exporter: str) -> None:
    """Several encoder layers give the operators and weights of the plain encoder's export."""

    def build(kind: str) -> nn.Module:
        return nn.Sequential(_encoder(kind))

    class Masked(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Tensor) -> Any:
            return self.encoder[0](x, src_key_padding_mask=_PADDING)  # type: ignore[operator]

    model = trained(build(kind), _SEQUENCE)
    twin = plain_twin(model, build)
    report = export_onnx(Masked(model), _SEQUENCE, tmp_path / "net.onnx", exporter=exporter)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        bare_export(Masked(twin).eval(), (_SEQUENCE,), tmp_path / "bare.onnx", exporter)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    ours, bare = (onnx.load(tmp_path / name).graph for name in ("net.onnx", "bare.onnx"))
    assert [n.op_type for n in ours.node] == [n.op_type for n in bare.node]
    weights = {i.name: numpy_helper.to_array(i).tobytes() for i in ours.initializer}
    assert weights == {i.name: numpy_helper.to_array(i).tobytes() for i in bare.initializer}
    assert len(report.frozen) == 3
    assert torch.backends.mha.get_fastpath_enabled() == enabled


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_encoder_without_a_mask(tmp_path: Path, mode: str) -> None:
    """torch's fused attention, which has no ONNX form, keeps out of the way in eval mode too."""
    model = trained(_encoder("parametrization"), _SEQUENCE).train(mode == "train")
    assert export_onnx(model, _SEQUENCE, tmp_path / "net.onnx").parity.passed


def test_recurrent_weight_in_the_file(tmp_path: Path) -> None:
    """The recurrent weight that onnxruntime runs is the one frozen: other weights fail parity."""
    model = trained(_recurrent(nn.LSTM)("hook"), _SEQUENCE)
    export_onnx(model, _SEQUENCE, tmp_path / "net.onnx", exporter="torchscript")
    graph = onnx.load(tmp_path / "net.onnx").graph
    hidden = plain_values(model)["weight_hh_l0"]  # ONNX orders the gates i, o, f, c
    i, f, c, o = hidden.chunk(4)
    stored = {numpy_helper.to_array(entry).tobytes() for entry in graph.initializer}
    assert contents(torch.cat([i, o, f, c])) in stored
