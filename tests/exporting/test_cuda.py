"""A module on a CUDA device is frozen, exported and proved there, and comes back as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from export_models import EXPORTERS, KINDS, assert_as_before, images, small_net, trained
from fingerprint import fingerprint

from sn_export import export_onnx, frozen_spectral_norm

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
PROVIDERS = [
    provider
    for provider in ("CPUExecutionProvider", "CUDAExecutionProvider")
    if provider in onnxruntime.get_available_providers()
]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_block(kind: str, mode: bool) -> None:
    """The weights are on the device, equal to those of the module, and the module is as before."""
    model = trained(small_net(kind).cuda(), images().cuda()).train(mode)
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        assert {weight.device.type for weight in model.parameters()} == {"cuda"}
        frozen = model.eval()(images().cuda())
        model.train(mode)
    assert_as_before(before, model)
    assert torch.equal(frozen, model.eval()(images().cuda()))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_export(tmp_path: Path, kind: str, exporter: Any, provider: str) -> None:
    """The proof passes with the reference on the device, whatever runs the file."""
    model = trained(small_net(kind).cuda(), images().cuda())
    before = fingerprint(model)
    path = tmp_path / "net.onnx"
    report = export_onnx(model, images().cuda(), path, exporter=exporter, providers=[provider])
    assert report.parity.passed and path.is_file()
    assert_as_before(before, model)
