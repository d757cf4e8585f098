"""Remove spectral norm, put it back, and compare: the question that started this package.

The sequence of https://discuss.pytorch.org/t/removing-spectral-norm-changes-the-output-values/153428
on the installed torch: c1 is a plain convolution, c2 the same under spectral norm, c3 after
removing it, c4 after applying it again, each followed by one forward pass in the mode a new
module is in, train. Then the same with the block: before it, inside it, after it.

    python scripts/reproduce.py [--markdown] [--seed N]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrizations, remove_spectral_norm, spectral_norm
from torch.nn.utils.parametrize import remove_parametrizations

from sn_export import frozen_spectral_norm

KINDS = ("hook", "parametrization")
CHANNELS = (1, 16)  # 1 is the layer of the question; with one row, sigma is found at once
SEED = 0


@dataclass(frozen=True)
class Row:
    """One pair of states of one layer, compared element by element."""

    kind: str
    layer: str  # its channels
    sequence: str  # "remove" or "block"
    pair: str
    outputs_equal: float  # fraction of elements that are exactly equal
    outputs_max: float  # largest absolute difference
    weights_equal: float
    weights_max: float


@dataclass(frozen=True)
class Sigma:
    """What is taken for the spectral norm of W / sigma, a matrix whose norm should be 1."""

    kind: str
    layer: str
    exact: float  # largest singular value
    stored: float  # by the u, v that belong to the model: 1, up to rounding
    fresh: float  # by the u, v drawn anew, after the first forward pass


@dataclass(frozen=True)
class _State:
    output: Tensor
    weight: Tensor


def reproduce(kind: str, seed: int = SEED) -> list[Row]:
    """Run both sequences on fresh layers.

    Args:
        kind: ``"hook"`` or ``"parametrization"``.
        seed: seeds the layer, its input and the singular vectors.

    Returns:
        For each layer the pairs of the removal sequence, then those of the block.
    """
    rows = []
    for channels in CHANNELS:
        rows += _compare(kind, channels, "remove", _remove_and_apply_again(kind, channels, seed))
        rows += _compare(kind, channels, "block", _enter_block(kind, channels, seed))
    return rows


def explain_sigma(kind: str, seed: int = SEED) -> list[Sigma]:
    """Return, for each layer, the sigma that the second application divides by."""
    found = []
    for channels in CHANNELS:
        conv, image = _make_layer(channels, seed)
        _apply(kind, conv)
        _observe(conv, image)
        own = _find_singular_vectors(kind, conv)
        _remove(kind, conv)
        matrix = conv.weight.detach().flatten(1).clone()
        _apply(kind, conv)
        _observe(conv, image)
        fresh = _find_singular_vectors(kind, conv)
        exact = float(torch.linalg.matrix_norm(matrix.double(), 2))
        stored_sigma, fresh_sigma = _compute_sigma(matrix, *own), _compute_sigma(matrix, *fresh)
        found.append(Sigma(kind, _name_layer(channels), exact, stored_sigma, fresh_sigma))
    return found


def _remove_and_apply_again(kind: str, channels: int, seed: int) -> dict[str, _State]:
    conv, image = _make_layer(channels, seed)
    states = {"c1": _observe(conv, image)}
    _apply(kind, conv)
    states["c2"] = _observe(conv, image)
    _remove(kind, conv)
    states["c3"] = _observe(conv, image)
    _apply(kind, conv)
    states["c4"] = _observe(conv, image)
    return states


def _enter_block(kind: str, channels: int, seed: int) -> dict[str, _State]:
    conv, image = _make_layer(channels, seed)
    _apply(kind, conv)
    states = {"before": _observe(conv, image)}
    conv.eval()  # a forward pass in train mode would step the power iteration
    with frozen_spectral_norm(conv) as plain:
        states["inside"] = _observe(plain, image)
    states["after"] = _observe(conv, image)
    return states


def _compare(kind: str, channels: int, sequence: str, states: dict[str, _State]) -> list[Row]:
    names = list(states)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    rows = []
    for a, b in pairs:
        outputs = _measure_difference(states[a].output, states[b].output)
        weights = _measure_difference(states[a].weight, states[b].weight)
        rows.append(Row(kind, _name_layer(channels), sequence, f"{a}, {b}", *outputs, *weights))
    return rows


def _measure_difference(a: Tensor, b: Tensor) -> tuple[float, float]:
    return float((a == b).double().mean()), float((a - b).abs().max())


def _make_layer(channels: int, seed: int) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(seed)
    image = torch.randn(2000, 3, 4, 4)
    return nn.Conv2d(3, channels, 3), image


def _name_layer(channels: int) -> str:
    return f"3 to {channels}"


def _observe(conv: nn.Conv2d, image: Tensor) -> _State:
    """Run one forward pass and keep the weight it used."""
    with torch.no_grad():
        output = conv(image)
    return _State(output, _find_weight(conv))


def _find_weight(conv: nn.Conv2d) -> Tensor:
    """Return the weight of the last forward pass; in train mode, reading one steps it."""
    training = conv.training
    conv.eval()
    weight = conv.weight.detach().clone()
    conv.train(training)
    return weight


def _apply(kind: str, conv: nn.Module) -> None:
    if kind == "hook":
        spectral_norm(conv)
    else:
        parametrizations.spectral_norm(conv)


def _remove(kind: str, conv: nn.Module) -> None:
    if kind == "hook":
        remove_spectral_norm(conv)
    else:
        remove_parametrizations(conv, "weight")


def _find_singular_vectors(kind: str, conv: nn.Module) -> tuple[Tensor, Tensor]:
    prefix = "weight" if kind == "hook" else "parametrizations.weight.0."
    return conv.get_buffer(prefix + "_u"), conv.get_buffer(prefix + "_v")


def _compute_sigma(matrix: Tensor, u: Tensor, v: Tensor) -> float:
    return float(torch.dot(u, torch.mv(matrix, v)))


Cells = Sequence[str]


def _make_pair_cells(row: Row) -> Cells:
    return (
        row.kind,
        row.layer,
        row.pair,
        f"{row.outputs_equal:.4f}",
        f"{row.outputs_max:.1e}",
        f"{row.weights_equal:.4f}",
        f"{row.weights_max:.1e}",
    )


def _make_sigma_cells(row: Sigma) -> Cells:
    return (row.kind, row.layer, f"{row.exact:.7f}", f"{row.stored:.7f}", f"{row.fresh:.7f}")


PAIR_HEADER = ("kind", "layer", "pair", "outputs equal", "max diff", "weights equal", "max diff")
SIGMA_HEADER = ("kind", "layer", "exact", "by its own u, v", "by fresh u, v")


def main(argv: Sequence[str] | None = None) -> int:
    """Print three tables: removal, block, mechanism."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print markdown tables")
    parser.add_argument("--seed", type=int, default=SEED, help="default: %(default)s")
    options = parser.parse_args(argv)
    show = _print_markdown if options.markdown else _print_rich

    rows = [row for kind in KINDS for row in reproduce(kind, options.seed)]
    removed = [_make_pair_cells(row) for row in rows if row.sequence == "remove"]
    blocked = [_make_pair_cells(row) for row in rows if row.sequence == "block"]
    sigmas = [_make_sigma_cells(row) for kind in KINDS for row in explain_sigma(kind, options.seed)]
    show(
        f"Conv2d, spectral norm removed and applied again, torch {torch.__version__}",
        PAIR_HEADER,
        removed,
    )
    show("The same layers, frozen_spectral_norm", PAIR_HEADER, blocked)
    show(
        "Spectral norm of W / sigma: the second application divides by the last column",
        SIGMA_HEADER,
        sigmas,
    )
    return 0


def _print_rich(title: str, header: Cells, rows: Sequence[Cells]) -> None:
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _print_markdown(title: str, header: Cells, rows: Sequence[Cells]) -> None:
    lines = [header, ["---"] * len(header), *rows]
    print(f"{title}\n")
    print("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
