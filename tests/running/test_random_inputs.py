"""Random inputs that a model does not take are drawn again near the example, or left out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from sn_export.running import (
    InputSet,
    describe_left_out,
    draw_near_like,
    draw_references,
    preserved,
    run_reference,
)


class Packed(nn.Module):
    """Takes lengths that fall."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return the packed states."""
        packed, _ = self.lstm(pack_padded_sequence(x, lengths, batch_first=True))
        return packed.data  # type: ignore[no-any-return]


class Bags(nn.Module):
    """Takes offsets that rise from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(10, 4)

    def forward(self, scale: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        """Return the sums of the bags."""
        return self.bag(indices, offsets) * scale  # type: ignore[no-any-return]


class Power(nn.Module):
    """Gives NaN for the power of a negative number."""

    def forward(self, x: Tensor) -> Tensor:
        """Return powers."""
        return (x - 1.5) ** 0.5


class Picky(nn.Module):
    """Takes ones alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        if not bool((x == 1).all()):
            raise ValueError("want ones")
        return x


class Masked(nn.Module):
    """Gives numbers by torch's fused attention where a mask hides a whole row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Return the tokens."""
        return self.layer(x, src_key_padding_mask=hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "args", "left_out"),
    [
        (Packed(), (torch.randn(3, 7, 4), torch.tensor([7, 5, 2])), 0),
        (Bags(), (torch.rand(3, 4), torch.arange(8), torch.tensor([0, 2, 5])), 0),
        (nn.EmbeddingBag(9, 4), (torch.arange(9), torch.tensor([0, 2, 5])), 0),
        (Power(), (torch.tensor([[2.0, 3.0, 9.0, 1.6] * 4]),), 0),
        (Masked().eval(), (torch.randn(5, 2, 4), torch.tensor([[False, True]] * 5)), 0),
        (Picky(), (torch.ones(3),), 3),
    ],
    ids=["lengths", "offsets", "integers", "powers", "masks", "ones"],
)
def test_every_random_input_is_usable_or_left_out(
    model: nn.Module, args: tuple[Tensor, ...], left_out: int
) -> None:
    """Each that is used is another input than the example, and gives finite outputs."""
    example = InputSet(args, label="the example input")
    with preserved(model) as state:
        run = partial(run_reference, model, state)
        drawn = draw_references(run(example), 3, run)
    assert drawn.left_out == left_out and len(drawn.references) == 3 - left_out
    for reference in drawn.references:
        assert reference.inputs.label.startswith("random input ")
        assert all(bool(output.isfinite().all()) for output in reference.outputs)
        if isinstance(model, Masked):
            assert not reference.inputs.args[1].all(-1).any()  # no row is hidden altogether
        pairs = zip(reference.inputs.args, args, strict=True)
        assert not all(torch.equal(one, other) for one, other in pairs)
    assert bool(describe_left_out(drawn)) == bool(left_out)


def test_nothing_that_goes_is_drawn_near_the_example() -> None:
    """A model that takes every input is proved on the whole range of the example."""
    model, example = nn.Linear(4, 4), InputSet((torch.randn(2, 4),), label="the example input")
    with preserved(model) as state:
        run = partial(run_reference, model, state)
        drawn = draw_references(run(example), 3, run)
    assert [one.inputs.label for one in drawn.references] == [f"random input {i}" for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_near_integers_are_those_of_the_example(dtype: torch.dtype) -> None:
    """They come in another order, or as they are."""
    given = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0]).to(dtype)
    draws = torch.Generator().manual_seed(0)
    assert torch.equal(draw_near_like(given, draws, shuffled=False), given)
    found = draw_near_like(given, draws, shuffled=True)
    assert found.dtype == dtype and not torch.equal(found, given)
    assert torch.equal(found.sort().values, given.sort().values)
