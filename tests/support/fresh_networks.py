"""Networks that are judged as they are built, before any training: `norm` is put on each weight."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Norm = Callable[..., nn.Module]


def generator(norm: Norm) -> nn.Module:
    """Return the generator of an SNGAN, small."""
    return nn.Sequential(
        norm(nn.ConvTranspose2d(16, 32, 4)),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        norm(nn.ConvTranspose2d(32, 16, 4, 2, 1)),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        norm(nn.ConvTranspose2d(16, 3, 4, 2, 1)),
        nn.Tanh(),
    )


class Recurrent(nn.Module):
    """Two recurrent layers, all of them under the norm, and a head."""

    def __init__(self, kind: type[nn.RNNBase], norm: Norm) -> None:
        super().__init__()
        self.layers = kind(16, 32, 2, batch_first=True)
        for name in [n for n, _ in self.layers.named_parameters() if n.startswith("weight")]:
            norm(self.layers, name)
        self.head = norm(nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the last step."""
        return self.head(self.layers(x)[0][:, -1])  # type: ignore[no-any-return]
