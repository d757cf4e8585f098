"""Small models of published packages, each built by the package's own code."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, ...]]


def _without_init(*names: str) -> None:
    """Let submodules be imported without their package's ``__init__``, which wants torchvision."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if name in sys.modules:
            continue
        if parent:
            folder = Path(sys.modules[parent].__path__[0]) / leaf
        else:
            spec = find_spec(name)
            if spec is None or not spec.submodule_search_locations:
                raise ModuleNotFoundError(f"no package '{name}'")
            folder = Path(next(iter(spec.submodule_search_locations)))
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module
        if parent:
            setattr(sys.modules[parent], leaf, module)


def _load(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def _mimicry(module: str, name: str, *shape: int) -> Built:
    _without_init("torch_mimicry", "torch_mimicry.nets", "torch_mimicry.training")
    model = _load(f"torch_mimicry.nets.{module}", name)(**_MIMICRY[name])
    labels = [torch.randint(0, 10, shape[:1])] if "num_classes" in _MIMICRY[name] else []
    return _First(model), (torch.randn(shape), *labels)


_MIMICRY: dict[str, dict[str, int]] = {
    "SNGANDiscriminator32": {"ndf": 16},
    "SAGANDiscriminator32": {"ndf": 32, "num_classes": 10},
}


def _torchgan() -> Built:
    _without_init("torchgan", "torchgan.layers")
    wrap = _load("torchgan.layers.spectralnorm", "SpectralNorm2d")
    layers = [wrap(nn.Conv2d(3, 8, 3)), nn.LeakyReLU(0.2), wrap(nn.Conv2d(8, 4, 3))]
    return nn.Sequential(*layers), (torch.randn(1, 3, 12, 12),)


def _attn_gan() -> Built:
    wrap = _load("attn_gan_pytorch.CustomLayers", "SpectralNorm")
    layers = [wrap(nn.Conv2d(3, 64, 3)), nn.LeakyReLU(0.2), wrap(nn.Conv2d(64, 128, 3))]
    return nn.Sequential(*layers), (torch.randn(1, 3, 12, 12),)


def _lip() -> Built:
    lip = import_module("deel.torchlip")
    layers = [lip.SpectralConv2d(3, 8, 3, padding=1), lip.GroupSort2(), nn.Flatten()]
    return nn.Sequential(*layers, lip.SpectralLinear(8 * 64, 4)), (torch.randn(1, 3, 8, 8),)


def _lip_frobenius() -> Built:
    lip = import_module("deel.torchlip")
    return nn.Sequential(nn.Flatten(), lip.FrobeniusLinear(64, 4)), (torch.randn(2, 64),)


def _encodec(norm: str) -> Built:
    _without_init("encodec")
    encoder = _load("encodec.modules.seanet", "SEANetEncoder")
    model = encoder(n_filters=4, dimension=16, ratios=[4, 2], lstm=0, norm=norm)
    return model, (torch.randn(1, 1, 256),)


def _hifi_gan() -> Built:
    return _load("hifi_gan.models", "DiscriminatorS")(True), (torch.randn(1, 1, 4096),)


def _nowcasting() -> Built:
    _without_init("skillful_nowcasting")
    cell = _load("skillful_nowcasting.layers.ConvGRU", "ConvGRUCell")
    return cell(8, 4), (torch.randn(1, 4, 6, 6), torch.randn(1, 4, 6, 6))


def _sngp() -> Built:
    model = _load("sngp", "SNGP")(3, nn.Linear(8, 16), 16, num_inducing=32)
    return _First(model), (torch.randn(2, 8),)


def _normflows(name: str, *sizes: Any, x: Tensor) -> Built:
    _without_init("normflows", "normflows.nets")
    network = _load("normflows.nets.lipschitz", name)
    options = {"lipschitz_const": 0.9, "max_lipschitz_iter": 5, "lipschitz_tolerance": None}
    return network(*sizes, **options), (x,)


class _First(nn.Module):
    """Hands out the first of several outputs, some of which are None."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Tensor:
        y = self.inner(*args)
        return y if isinstance(y, Tensor) else y[0]


def _fastai() -> Built:
    layers = import_module("fastai.layers")
    spectral = layers.NormType.Spectral
    model = nn.Sequential(
        layers.ConvLayer(3, 8, norm_type=spectral),
        layers.SimpleSelfAttention(8, ks=1),
        layers.ConvLayer(8, 4, norm_type=spectral),
    )
    return model, (torch.randn(1, 3, 8, 8),)


MODELS: dict[str, tuple[str, Callable[[], Built]]] = {
    "SNGANDiscriminator32": (
        "torch-mimicry",
        lambda: _mimicry("sngan.sngan_32", "SNGANDiscriminator32", 2, 3, 32, 32),
    ),
    "SAGANDiscriminator32": (
        "torch-mimicry",
        lambda: _mimicry("sagan.sagan_32", "SAGANDiscriminator32", 2, 3, 32, 32),
    ),
    "SpectralNorm2d around Conv2d": ("torchgan", _torchgan),
    "SpectralNorm around Conv2d": ("attn-gan-pytorch", _attn_gan),
    "SpectralConv2d, SpectralLinear": ("deel-torchlip", _lip),
    "FrobeniusLinear": ("deel-torchlip", _lip_frobenius),
    "SEANetEncoder, spectral norm": ("encodec", lambda: _encodec("spectral_norm")),
    "SEANetEncoder, weight norm": ("encodec", lambda: _encodec("weight_norm")),
    "DiscriminatorS": ("hifi-gan", _hifi_gan),
    "ConvGRUCell": ("skillful-nowcasting", _nowcasting),
    "SNGP": ("sngp", _sngp),
    "LipschitzMLP": (
        "normflows",
        lambda: _normflows("LipschitzMLP", [4, 16, 4], x=torch.randn(3, 4)),
    ),
    "LipschitzCNN": (
        "normflows",
        lambda: _normflows("LipschitzCNN", [3, 8, 3], [3, 3], x=torch.randn(2, 3, 8, 8)),
    ),
    "ConvLayer, SimpleSelfAttention": ("fastai", _fastai),
}
