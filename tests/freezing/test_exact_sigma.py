"""True sigma: the largest singular value, within a budget, without touching the model.

`exact_sigma_cost` is called inside: the budget shows nowhere else but in time.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from export_models import images, rows, small_net, trained
from fingerprint import fingerprint
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import spectral_norm

from sn_export import export_onnx, find_spectral_norm
from sn_export.freezing import exact_sigma, find_unconverged, measure_exact_sigma
from sn_export.freezing.sigma import exact_sigma_cost


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 40), (40, 5), (33, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_it_is_the_largest_singular_value(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """It agrees with torch's own to float64."""
    matrix = torch.randn(shape, dtype=dtype if dtype != torch.bfloat16 else None).to(dtype)
    wide = matrix.to(torch.complex128 if dtype.is_complex else torch.float64)
    wanted = float(torch.linalg.matrix_norm(wide, 2))
    assert exact_sigma(matrix) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("matrix", "error"),
    [
        (torch.randn(900, 800, generator=torch.Generator().manual_seed(1)), 1e-9),
        (torch.randn(800, 900, generator=torch.Generator().manual_seed(1)).bfloat16(), 1e-9),
        (torch.randn(800, 800, dtype=torch.complex64), 1e-9),
        (torch.randn(800, 800).double() * 1e-300, 1e-9),
        (torch.randn(800, 3) @ torch.randn(3, 900), 1e-9),  # no more than three directions
        (torch.eye(800).double() + 1e-7 * torch.randn(800, 800).double(), 1e-5),  # all alike
    ],
    ids=["tall", "wide half", "complex", "tiny", "low rank", "alike"],
)
def test_large_matrices(matrix: torch.Tensor, error: float) -> None:
    """By another method the value is as good, and what it may be off by is stated."""
    assert exact_sigma_cost(tuple(matrix.shape)) < 800**3  # by fewer multiplications
    wide = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
    assert exact_sigma(matrix) == pytest.approx(float(torch.linalg.matrix_norm(wide, 2)), rel=error)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_squares_do_not_leave_float64(scale: float) -> None:
    """Elements whose squares overflow or vanish are no trouble."""
    assert exact_sigma(torch.eye(3).double() * scale) == pytest.approx(scale)


@pytest.mark.parametrize("element", [math.nan, math.inf])
def test_not_finite(element: float) -> None:
    """There is no singular value of what is not finite; that of zeros is 0."""
    assert math.isnan(exact_sigma(torch.tensor([[1.0, element]])))
    assert exact_sigma(torch.zeros(2, 3)) == 0


@pytest.mark.parametrize("kind", ["hook", "parametrization"])
def test_trained_network(kind: str) -> None:
    """The estimate is at most the true value, and nothing of the model is changed."""
    model = trained(small_net(kind), images())
    before = fingerprint(model)
    infos = find_spectral_norm(model)
    assert [info.sigma_exact for info in infos] == [None, None]
    found = measure_exact_sigma(model, infos)
    assert fingerprint(model) == before
    names = [
        f"{i}.weight_orig" if kind == "hook" else f"{i}.parametrizations.weight.original"
        for i in (0, 4)
    ]
    for info, name in zip(found, names, strict=True):
        raw = model.state_dict()[name].flatten(1).double()
        wanted = float(torch.linalg.matrix_norm(raw, 2))
        assert info.sigma_exact == pytest.approx(wanted, rel=1e-12)
        assert info.sigma <= wanted * (1 + 1e-6)


def test_transposed_convolution_and_vector() -> None:
    """The matrix is the one that sigma is about: other dim, one row for a vector."""
    model = nn.Sequential(
        spectral_norm(nn.ConvTranspose2d(2, 5, 3)),
        parametrizations.spectral_norm(nn.Linear(3, 4), "bias"),
    )
    first, second = measure_exact_sigma(model, find_spectral_norm(model))
    raw = model[0].weight_orig.detach().transpose(0, 1).flatten(1)  # type: ignore[union-attr,operator]
    assert first.sigma_exact == pytest.approx(float(torch.linalg.matrix_norm(raw, 2)), rel=1e-5)
    assert second.sigma_exact == pytest.approx(second.sigma, rel=1e-5)


def test_budget() -> None:
    """What does not fit keeps None, and the cheap ones come first wherever they are."""
    model = nn.Sequential(spectral_norm(nn.Linear(50, 50)), spectral_norm(nn.Linear(50, 2)))
    infos = find_spectral_norm(model)
    large, small = measure_exact_sigma(model, infos, budget=exact_sigma_cost((50, 50)))
    assert large.sigma_exact is None
    assert small.sigma_exact is not None
    assert all(i.sigma_exact is None for i in measure_exact_sigma(model, infos, budget=0))


def test_meta_device() -> None:
    """Without values there is nothing to compute."""
    model = nn.Sequential(spectral_norm(nn.Linear(3, 2))).to("meta")
    (info,) = measure_exact_sigma(model, find_spectral_norm(model))
    assert info.sigma_exact is None


@pytest.mark.parametrize("asked", [False, True])
def test_export_computes_it_only_when_asked(tmp_path: Path, asked: bool) -> None:
    """By default nothing is paid for it."""
    model = nn.Sequential(spectral_norm(nn.Linear(3, 2)))
    report = export_onnx(
        model, rows(), tmp_path / "net.onnx", exporter="torchscript", sigma_exact=asked
    )
    assert [info.sigma_exact is not None for info in report.frozen] == [asked]


def test_no_sigma_of_a_weight_of_zeros_is_too_small() -> None:
    """Where the true sigma is zero the stored one is that, and not far below it."""
    layer = spectral_norm(nn.Linear(3, 4))
    nn.init.zeros_(layer.weight_orig)
    assert find_unconverged(layer) == ()
