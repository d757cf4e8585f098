"""A small convolutional SN-GAN for 8x8 digits, and its deterministic training run.

The critic uses the hook form of spectral norm, the generator the parametrization form, so that
one run shows both. Both nets know which digit is wanted: the critic by projection (Miyato and
Koyama, 2018), the generator by an embedding beside its noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, spectral_norm

DIGITS = 10
NOISE = 32
BATCH = 32


class Critic(nn.Module):
    """Scores how real an image of a digit is, under hook-based spectral norm."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.features = nn.Sequential(
            spectral_norm(nn.Conv2d(1, width, 3, padding=1)),
            nn.LeakyReLU(0.1),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.1),
            spectral_norm(nn.Conv2d(2 * width, 2 * width, 3, padding=1)),
            nn.LeakyReLU(0.1),
        )
        self.score = spectral_norm(nn.Linear(2 * width, 1))
        self.digit = spectral_norm(nn.Embedding(DIGITS, 2 * width))

    def forward(self, image: Tensor, digit: Tensor) -> Tensor:
        """Return one score for each image."""
        features = self.features(image).sum(dim=(2, 3))
        projection = (self.digit(digit) * features).sum(dim=1)
        return cast(Tensor, self.score(features).squeeze(1) + projection)


class Generator(nn.Module):
    """Draws digits from noise, under parametrization-based spectral norm."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        normed = parametrizations.spectral_norm
        self.digit = nn.Embedding(DIGITS, NOISE)
        self.stem = normed(nn.Linear(2 * NOISE, 2 * width * 4 * 4))
        self.layers = nn.Sequential(
            nn.Unflatten(1, (2 * width, 4, 4)),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            normed(nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor, digit: Tensor) -> Tensor:
        """Return one 8x8 image in -1 to 1 for each row of ``noise``."""
        return cast(Tensor, self.layers(self.stem(torch.cat([noise, self.digit(digit)], dim=1))))


def load_real_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's scanned digits as images in -1 to 1, and which digit each shows."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().div(8).sub(1).unsqueeze(1)
    return images, torch.from_numpy(data.target).long()


class Training:
    """One training run: the same seed gives the same run, bit for bit.

    Noise comes from torch's global generator on purpose, so that an export that draws from it
    would be noticed; the order of the data comes from a generator of its own.
    """

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.order = torch.Generator().manual_seed(seed)
        self.images, self.labels = load_real_digits()
        self.critic = Critic()
        self.generator = Generator()
        self.critic_optimizer = torch.optim.Adam(
            self.critic.parameters(), lr=1e-3, betas=(0.0, 0.9), fused=True
        )
        self.generator_optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=5e-4, betas=(0.0, 0.9), fused=True
        )
        self._batches = self._iter_batches()

    def step(self) -> None:
        """Train critic and generator on the next batch."""
        real, labels = next(self._batches)
        fake = self.generator(torch.randn(BATCH, NOISE), labels)
        # Hinge loss: the critic is satisfied with real scores above 1 and fake ones below -1.
        critic_loss = (
            functional.relu(1 - self.critic(real, labels)).mean()
            + functional.relu(1 + self.critic(fake.detach(), labels)).mean()
        )
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        generator_loss = -self.critic(fake, labels).mean()
        self.generator_optimizer.zero_grad()
        generator_loss.backward()
        self.generator_optimizer.step()

    def save(self, folder: Path) -> None:
        """Write checkpoints: one state dict for each net and each optimizer."""
        for name, state_dict in self._collect_state_dicts().items():
            torch.save(state_dict, folder / f"{name}.pt")

    def state(self) -> dict[str, Any]:
        """Return a copy of all that decides how the run goes on, by name."""
        entries = dict(iter_leaves(self._collect_state_dicts()))
        entries["rng.global"] = torch.get_rng_state()
        entries["rng.order"] = self.order.get_state()
        return {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in entries.items()
        }

    def _collect_state_dicts(self) -> dict[str, Any]:
        return {
            "critic": self.critic.state_dict(),
            "generator": self.generator.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
        }

    def _iter_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            shuffled = torch.randperm(len(self.images), generator=self.order)
            for rows in shuffled[: len(shuffled) // BATCH * BATCH].view(-1, BATCH):
                yield self.images[rows], self.labels[rows]


def iter_leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of nested mappings and sequences with its dotted path."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        yield path, tree
        return
    for key, value in items:
        yield from iter_leaves(value, f"{path}.{key}" if path else key)


def list_differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Return the names whose values are not the same to the last bit, or that one side lacks."""
    return [
        name
        for name in sorted(left.keys() | right.keys())
        if name not in left or name not in right or not _have_same_bits(left[name], right[name])
    ]


def _have_same_bits(left: Any, right: Any) -> bool:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return type(left) is type(right) and bool(left == right)
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.numpy().tobytes() == right.numpy().tobytes()
    )
