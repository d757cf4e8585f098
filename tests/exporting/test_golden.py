"""Golden graphs: an upgrade of torch or onnx that changes what is exported does not go unseen."""

from __future__ import annotations

import difflib
from pathlib import Path

import export_models  # builds torch's table of operators once for all exports
import pytest
from golden_graphs import FOLDER, NETWORKS, as_text, golden_path, table_of


@pytest.mark.parametrize("exporter", export_models.EXPORTERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_graph_is_as_written_down(tmp_path: Path, network: str, exporter: str) -> None:
    """Operators, opsets, and the names of inputs, outputs and initializers are the known ones."""
    path = golden_path(network, exporter)
    wanted, found = path.read_text(), as_text(table_of(network, exporter, tmp_path))
    difference = "".join(
        difflib.unified_diff(
            wanted.splitlines(True), found.splitlines(True), path.name, "exported now"
        )
    )
    assert not difference, (
        f"the graph has changed:\n{difference}\n"
        "if that is meant: .venv/bin/python tests/support/golden_graphs.py --write"
    )


def test_no_table_is_left_over() -> None:
    """Every file belongs to a network and an exporter."""
    wanted = {golden_path(n, e).name for n in NETWORKS for e in export_models.EXPORTERS}
    assert {path.name for path in FOLDER.iterdir()} == wanted


@pytest.mark.parametrize("exporter", export_models.EXPORTERS)
def test_tables_hold_only_the_plain_network(exporter: str) -> None:
    """No written-down graph has a singular vector or a raw weight, should one ever be rewritten."""
    for network in NETWORKS:
        text = golden_path(network, exporter).read_text()
        assert not any(part in text for part in ("weight_u", "weight_orig", "parametrizations"))
