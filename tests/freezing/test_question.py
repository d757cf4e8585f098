"""The original question: removing spectral norm and putting it back changes the network."""

from __future__ import annotations

import pytest
from reproduce import KINDS, Row, explain_sigma, reproduce

each_kind = pytest.mark.parametrize("kind", KINDS)
PAIRS_OF_REMOVAL = ["c1, c2", "c1, c3", "c1, c4", "c2, c3", "c2, c4", "c3, c4"]
PAIRS_OF_BLOCK = ["before, inside", "before, after", "inside, after"]


def rows_of(kind: str, sequence: str, seed: int = 0) -> list[Row]:
    """Run the sequences and return the rows of one of them."""
    return [row for row in reproduce(kind, seed) if row.sequence == sequence]


@each_kind
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_block_keeps_outputs_and_weights(kind: str, seed: int) -> None:
    """Before, inside and after the block, every element of outputs and weights is the same."""
    rows = rows_of(kind, "block", seed)
    assert [row.pair for row in rows] == PAIRS_OF_BLOCK * 2
    for row in rows:
        assert (row.outputs_equal, row.outputs_max) == (1.0, 0.0)
        assert (row.weights_equal, row.weights_max) == (1.0, 0.0)


@each_kind
def test_removing_and_applying_again_changes_the_outputs(kind: str) -> None:
    """In torch, few elements are the same after removing and applying spectral norm again."""
    rows = rows_of(kind, "remove")
    assert [row.pair for row in rows] == PAIRS_OF_REMOVAL * 2
    last = [row for row in rows if row.pair == "c3, c4"]
    assert all(row.outputs_equal < 0.9 for row in last)
    assert all(row.outputs_max > 0 for row in last)


@each_kind
def test_spectral_norm_itself_changes_the_convolution(kind: str) -> None:
    """Applying spectral norm the first time changes nearly every output, as it should."""
    (first, *_) = [row for row in rows_of(kind, "remove") if row.pair == "c1, c2"]
    assert first.outputs_equal < 0.01


@each_kind
def test_fresh_vectors_are_the_reason(kind: str) -> None:
    """By its own vectors the removed weight has norm 1; by fresh ones, not yet converged, less."""
    wide = explain_sigma(kind)[-1]
    assert wide.stored == pytest.approx(1.0, abs=1e-6)
    assert abs(wide.fresh - wide.exact) > 1e-6
    assert wide.fresh < wide.exact
