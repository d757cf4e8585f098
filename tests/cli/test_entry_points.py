"""The options --network, --submodule and --method: which module is loaded and which is called."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from cli_networks import Critic, Scored
from cli_running import Run, runner


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in an otherwise empty folder with the checkpoint ``a.pt``."""
    return runner(tmp_path, monkeypatch, capsys)


_OF_CRITIC = ("a.pt", "--model", "cli_networks:Scored", "--network", "critic")


@pytest.mark.parametrize(
    ("options", "shape", "first"),
    [
        ((), "2x3x8x8", "critic.body.3.weight"),
        (("--method", "features"), "x=2x3x8x8", "critic.body.3.weight"),
        (("--submodule", "critic.body"), "2x3x8x8", "3.weight"),
        (("--submodule", "critic", "--method", "forward"), "2x3x8x8", "body.3.weight"),
    ],
)
def test_part(run: Run, options: tuple[str, ...], shape: str, first: str) -> None:
    """The checkpoint goes into --network; --submodule and --method are exported and checked."""
    options = (*_OF_CRITIC, *options, "--input", shape)
    ran = run("onnx", *options, "-o", "o.onnx", "--exporter", "torchscript")
    assert (ran.code, ran.err) == (0, "")
    graph = onnx.load("o.onnx").graph
    assert first in {entry.name for entry in graph.initializer}
    assert run("check", "o.onnx", *options).code == 0


def test_network_in_what_is_no_module(run: Run) -> None:
    """--network takes it out of an object of any class; without that the message names it."""
    options = ("a.pt", "--model", "cli_networks:Pipeline", "--input", "2x3x8x8", "-o", "o.onnx")
    ran = run("onnx", *options, "--network", "critic", "--exporter", "torchscript")
    assert (ran.code, ran.err) == (0, "")
    assert "body.3.weight" in {entry.name for entry in onnx.load("o.onnx").graph.initializer}
    made = "cli_networks:Pipeline made Pipeline, not a torch.nn.Module"
    for other, message in (
        ((), f"{made}; --network takes one of its modules: critic"),
        (
            ("--network", "rate"),
            "--network rate: there is no such module in Pipeline; it has ",
        ),
    ):
        ran = run("onnx", *options, *other)
        assert ran.code == 2
        assert message in ran.err


def test_part_that_is_not_there(run: Run) -> None:
    """A module or method that is absent has exit code 2, and the message lists those there."""
    for options, message in (
        (("--method", "nope"), "--method='nope' is not there in Scored; it has features, forward"),
        (("--submodule", "nope"), "--submodule nope: there is no such module in Scored; it has "),
        (("--device", "gpu"), "--device gpu: "),
        (("--device", "meta"), "--device meta: tensors there have no values"),
        (("--network", "critic.x"), "--network critic.x: there is no such module in Scored; it"),
    ):
        ran = run("onnx", *_OF_CRITIC, *options, "--input", "2x3x8x8", "-o", "o.onnx")
        assert ran.code == 2
        assert message in ran.err
    ran = run("check", "a.pt", "--case", "c.npz", "--method", "decode")
    assert ran.code == 2
    assert "--case needs no model: leave out --method" in ran.err


def test_networks_agree() -> None:
    """The wrapper of these tests gives another answer than its critic, so a mix-up would show."""
    model, x = Scored().eval(), torch.randn(2, 3, 8, 8)
    assert isinstance(model.critic, Critic)
    assert not torch.equal(model(x), model.critic(x))
