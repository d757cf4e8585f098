"""Networks as they are published, for the benchmarks, with spectral norm of each kind or without.

Layers, strides and paddings are those of the papers; widths are a half or a quarter where the
whole would take minutes. Every builder takes what is put on a layer, and returns the network with
one example input.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from bench_common import apply_spectral_norm
from torch import Tensor, nn

Norm = Callable[[nn.Module], nn.Module]
Built = tuple[nn.Module, tuple[Tensor, ...]]


def dcgan_critic(norm: Norm) -> Built:
    """Return the critic of SN-GAN (Miyato et al., arXiv:1802.05957) for 64 x 64 images."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 64), (64, 128), (128, 256), (256, 512)):
        layers += [norm(nn.Conv2d(inputs, outputs, 4, 2, 1)), nn.LeakyReLU(0.1)]
    layers += [nn.Flatten(), norm(nn.Linear(512 * 16, 1))]
    return nn.Sequential(*layers), (torch.randn(1, 3, 64, 64),)


def dcgan_generator(norm: Norm) -> Built:
    """Return the generator of DCGAN (Radford et al., arXiv:1511.06434) for 64 x 64 images."""
    layers: list[nn.Module] = [norm(nn.ConvTranspose2d(100, 512, 4)), nn.BatchNorm2d(512)]
    for inputs, outputs in ((512, 256), (256, 128), (128, 64)):
        up = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)
        layers += [nn.ReLU(), norm(up), nn.BatchNorm2d(outputs)]
    layers += [nn.ReLU(), norm(nn.ConvTranspose2d(64, 3, 4, 2, 1)), nn.Tanh()]
    return nn.Sequential(*layers), (torch.randn(2, 100, 1, 1),)


class ResidualBlock(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, norm: Norm, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = norm(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False))
        self.conv2 = norm(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False))
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            shortcut = norm(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.down = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.down(x))


def resnet18(norm: Norm) -> Built:
    """Return ResNet-18 (He et al., arXiv:1512.03385), all 21 layers under the norm."""
    layers: list[nn.Module] = [norm(nn.Conv2d(3, 64, 7, 2, 3, bias=False)), nn.BatchNorm2d(64)]
    layers += [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers.append(ResidualBlock(norm, inputs, outputs, stride))
        layers.append(ResidualBlock(norm, outputs, outputs, 1))
        inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm(nn.Linear(512, 1000))]
    return nn.Sequential(*layers), (torch.randn(1, 3, 64, 64),)


class Period(nn.Module):
    """A discriminator of HiFi-GAN that sees every ``period``-th sample."""

    def __init__(self, norm: Norm, period: int) -> None:
        super().__init__()
        self.period = period
        widths = (1, 16, 64, 128, 256)
        self.convs = nn.ModuleList(
            norm(nn.Conv2d(inputs, outputs, (5, 1), (3, 1), (2, 0)))
            for inputs, outputs in itertools.pairwise(widths)
        )
        self.convs.append(norm(nn.Conv2d(256, 256, (5, 1), 1, (2, 0))))
        self.post = norm(nn.Conv2d(256, 1, (3, 1), 1, (1, 0)))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = F.pad(x, (0, -x.shape[-1] % self.period), "reflect")
        x = x.view(x.shape[0], 1, -1, self.period)
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return torch.flatten(self.post(x), 1), features


class Scale(nn.Module):
    """A discriminator of HiFi-GAN that sees all samples."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        sizes = ((1, 32, 15, 1, 1), (32, 32, 41, 2, 4), (32, 64, 41, 2, 16), (64, 128, 41, 4, 16))
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, groups=groups))
            for inputs, outputs, kernel, stride, groups in sizes
        )
        self.post = norm(nn.Conv1d(128, 1, 3, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return torch.flatten(self.post(x), 1), features


class Discriminators(nn.Module):
    """Five periods and one scale."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.each = nn.ModuleList(Period(norm, period) for period in (2, 3, 5, 7, 11))
        self.each.append(Scale(norm))

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        scores, features = zip(*(one(x) for one in self.each), strict=True)
        return list(scores), list(features)


def hifigan(norm: Norm) -> Built:
    """Return the discriminators of HiFi-GAN (Kong et al., arXiv:2010.05646), a quarter as wide."""
    return Discriminators(norm), (torch.randn(1, 1, 4096),)


class UNet(nn.Module):
    """The discriminator of Real-ESRGAN."""

    def __init__(self, norm: Norm, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, 1, 1)
        sizes = ((1, 2), (2, 4), (4, 8))
        self.down = nn.ModuleList(
            norm(nn.Conv2d(width * a, width * b, 4, 2, 1, bias=False)) for a, b in sizes
        )
        self.up = nn.ModuleList(
            norm(nn.Conv2d(width * b, width * a, 3, 1, 1, bias=False)) for a, b in reversed(sizes)
        )
        self.last = nn.ModuleList(
            norm(nn.Conv2d(width, width, 3, 1, 1, bias=False)) for _ in range(2)
        )
        self.score = nn.Conv2d(width, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [F.leaky_relu(self.first(x), 0.2)]
        for down in self.down:
            seen.append(F.leaky_relu(down(seen[-1]), 0.2))
        x = seen.pop()
        for up in self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = F.leaky_relu(up(x), 0.2) + seen.pop()
        for last in self.last:
            x = F.leaky_relu(last(x), 0.2)
        score: Tensor = self.score(x)
        return score


def unet(norm: Norm) -> Built:
    """Return the U-Net discriminator of Real-ESRGAN (Wang et al., arXiv:2107.10833)."""
    return UNet(norm), (torch.randn(1, 3, 64, 64),)


class ConditionalNorm(nn.Module):
    """Batch norm whose gain and bias are computed from the class, as BigGAN has it."""

    def __init__(self, norm: Norm, channels: int, condition: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, affine=False)
        self.gain = norm(nn.Linear(condition, channels, bias=False))
        self.bias = norm(nn.Linear(condition, channels, bias=False))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gain, bias = 1 + self.gain(y)[:, :, None, None], self.bias(y)[:, :, None, None]
        normed: Tensor = self.bn(x) * gain + bias
        return normed


class BigGANBlock(nn.Module):
    """A block of BigGAN's generator, with the self-attention that follows one of them."""

    def __init__(self, norm: Norm, inputs: int = 128, outputs: int = 64) -> None:
        super().__init__()
        self.bn1 = ConditionalNorm(norm, inputs, 148)
        self.bn2 = ConditionalNorm(norm, outputs, 148)
        self.conv1 = norm(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.conv2 = norm(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = norm(nn.Conv2d(inputs, outputs, 1))
        self.theta = norm(nn.Conv2d(outputs, outputs // 8, 1, bias=False))
        self.phi = norm(nn.Conv2d(outputs, outputs // 8, 1, bias=False))
        self.g = norm(nn.Conv2d(outputs, outputs // 2, 1, bias=False))
        self.o = norm(nn.Conv2d(outputs // 2, outputs, 1, bias=False))
        self.gamma = nn.Parameter(torch.full((), 0.5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.bn1(x, y)), scale_factor=2.0)
        h = self.conv2(F.relu(self.bn2(self.conv1(h), y)))
        h = h + self.shortcut(F.interpolate(x, scale_factor=2.0))
        theta = self.theta(h).flatten(2)
        phi, g = (F.max_pool2d(m(h), 2).flatten(2) for m in (self.phi, self.g))
        weights = torch.softmax(theta.transpose(1, 2) @ phi, -1)
        found = (g @ weights.transpose(1, 2)).view(h.shape[0], -1, *h.shape[2:])
        attended: Tensor = self.gamma * self.o(found) + h
        return attended


def biggan_block(norm: Norm) -> Built:
    """Return a block of BigGAN's generator (Brock et al., arXiv:1809.11096), with attention."""
    return BigGANBlock(norm), (torch.randn(2, 128, 8, 8), torch.randn(2, 148))


class EncoderLayer(nn.Module):
    """A layer of BERT with every linear layer under the norm."""

    def __init__(self, norm: Norm, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            norm(nn.Linear(width, width)) for _ in range(4)
        )
        self.up, self.down = norm(nn.Linear(width, 4 * width)), norm(nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = torch.softmax(query @ key.transpose(-2, -1) / (width / self.heads) ** 0.5, -1)
        found = (scores @ value).transpose(1, 2).reshape(batch, length, width)
        x = self.norm1(x + self.out(found))
        normed: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return normed


class Encoder(nn.Module):
    """Embeddings and encoder layers of BERT."""

    def __init__(self, norm: Norm, layers: int = 4, width: int = 256) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(2000, width), nn.Embedding(128, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(*(EncoderLayer(norm, width, 4) for _ in range(layers)))
        self.pooler = norm(nn.Linear(width, width))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.layers(self.norm(self.words(tokens) + self.positions(places)))
        return x, torch.tanh(self.pooler(x[:, 0]))


def bert(norm: Norm) -> Built:
    """Return an encoder like BERT-mini (Turc et al., arXiv:1908.08962): 4 layers of width 256."""
    return Encoder(norm), (torch.randint(0, 2000, (2, 32)),)


BUILDERS: dict[str, Callable[[Norm], Built]] = {
    "DCGAN critic": dcgan_critic,
    "DCGAN generator": dcgan_generator,
    "ResNet-18": resnet18,
    "HiFi-GAN discriminators": hifigan,
    "U-Net discriminator": unet,
    "BigGAN block": biggan_block,
    "BERT encoder": bert,
}
_FORWARDS = 20  # in train mode: u and v come to belong to the weights


def build(name: str, kind: str) -> Built:
    """Return a network of `BUILDERS` in eval mode, and its example; the same for a seed of 0."""
    torch.manual_seed(0)
    model, args = BUILDERS[name](partial(apply_spectral_norm, kind))
    if kind != "plain":
        with torch.no_grad():
            for _ in range(_FORWARDS):
                model(*args)
    return model.eval(), args
