"""The parsers of options, and the messages for options without a meaning.

It calls the parsers inside `cli`: they run before a model is built, and a command line cannot
show what they return.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_networks import Critic, critic

from sn_export.cli.convert_command import parse_size
from sn_export.cli.model_factory import Inputs, build_model, draw_example, gather
from sn_export.cli.onnx_command import parse_dynamic
from sn_export.cli.options import (
    parse_dims,
    parse_factory,
    parse_inputs,
    parse_kwargs,
    parse_names,
    parse_tolerance,
)
from sn_export.errors import UsageError


def _message(function: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(UsageError) as caught:
        function(*args)
    return str(caught.value)


def test_shapes_become_inputs() -> None:
    """Positional and named shapes give inputs of the dtype asked for, the same ones each time."""
    inputs = draw_example(parse_inputs(["2x3x8x8", "1x4:int64", "x=5:bfloat16", "t=scalar"]))
    first, second = inputs.args
    assert (first.shape, first.dtype) == ((2, 3, 8, 8), torch.float32)
    assert (second.shape, second.dtype) == ((1, 4), torch.int64)
    assert set(second.flatten().tolist()) <= {0, 1}
    assert inputs.kwargs["x"].dtype == torch.bfloat16
    assert inputs.kwargs["t"].shape == ()
    assert torch.equal(draw_example(parse_inputs(["2x3x8x8"])).args[0], first)


def test_bad_shapes() -> None:
    """A text that is no shape, an unknown dtype and a wrong order are each refused."""
    for text in ("2x3x", "2,3", "x=", "-1x3", "a b=3", "2x3:float32:x"):
        assert _message(parse_inputs, [text]) == (
            f"--input must be [NAME=]SHAPE[:DTYPE] such as 2x3x8x8 or x=1x77:int64, got '{text}'"
        )
    assert _message(parse_inputs, ["2:float99"]) == (
        "--input 2:float99: dtype must be one of float64, float32, float16, bfloat16, "
        "complex64, complex128, int64, int32, int16, int8, uint8, bool"
    )
    assert _message(parse_inputs, ["x=2", "3"]) == (
        "--input 3 has no name and follows one that has"
    )
    assert _message(parse_inputs, ["x=2", "y=2", "x=3"]) == (
        "--input gives 'x' twice, again with x=3"
    )


def test_shapes_that_are_too_large() -> None:
    """More than 2**31 elements are refused, also where a size beside a 0 fits no integer."""
    for text, count in (
        ("99999999x3x8x8", 99999999 * 192),
        ("x=999999999999999999999x3:int8", 999999999999999999999 * 3),
        ("0x99999999999999999999", 99999999999999999999),
    ):
        assert _message(parse_inputs, [text]) == (
            f"--input {text}: an input must have at most 2147483648 elements, not {count}"
        )
    assert draw_example(parse_inputs(["0x2147483648"])).args[0].shape == (0, 2**31)


def test_a_shape_that_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """If torch finds no memory for an input, the message names the option."""

    def randn(*args: object, **options: object) -> None:
        raise RuntimeError("you tried to allocate 9 bytes")

    monkeypatch.setattr(torch, "randn", randn)
    assert _message(draw_example, parse_inputs(["2x3"])) == (
        "--input 2x3: torch cannot draw it: you tried to allocate 9 bytes"
    )


def test_sizes() -> None:
    """A size may have a decimal or a binary unit."""
    texts = ["700", "500MB", "2GiB", "1.5 kb", "1TB"]
    sizes = [700, 500_000_000, 2 * 2**30, 1500, 10**12]
    assert [parse_size(text) for text in texts] == sizes
    for text in ("0", "many", "5XB", "-1"):
        assert _message(parse_size, text) == (
            f"--max-shard-size must be a size such as 500MB or 2GiB, got '{text}'"
        )


def test_dims() -> None:
    """--dim is the name of a tensor, which may hold dots, and a number."""
    assert parse_dims(["body.0.weight=1", "w=-1"]) == {"body.0.weight": 1, "w": -1}
    for text in ("w", "w=", "=1", "w=x"):
        assert _message(parse_dims, [text]) == (
            f"--dim must be NAME=D such as body.0.weight=1, got '{text}'"
        )
    assert _message(parse_dims, ["w=0", "w=-1"]) == "--dim gives 'w' twice: 0 and -1"


def test_tolerances() -> None:
    """A tolerance is one number for all outputs, or a number for each name or position."""
    assert parse_tolerance("--rtol", []) is None
    assert parse_tolerance("--rtol", ["1e-3"]) == 1e-3
    named = parse_tolerance("--atol", ["score=1e-3", "1=0", "a=b=2"])
    assert named == {"score": 1e-3, 1: 0.0, "a=b": 2.0}
    for text in ("much", "score=", "score=much"):
        assert _message(parse_tolerance, "--rtol", [text]) == (
            f"--rtol must be a number, or OUTPUT=NUMBER such as score=1e-3, got '{text}'"
        )
    for texts in (["1", "2"], ["1", "score=2"], ["score=1", "score=2"], ["=1"]):
        assert _message(parse_tolerance, "--atol", texts) == (
            "--atol must be one number for all outputs, or one OUTPUT=NUMBER for each, "
            f"got {' and '.join(texts)}"
        )


def test_dynamic_dimensions() -> None:
    """Dimensions are named for each input; an input that does not exist is refused."""
    dims = parse_dynamic(["x:0=batch", "x:2=width"])
    assert dims == {"x": {0: "batch", 2: "width"}}
    for text in ("x=0", "x:0=", "x:0=a b", "x:0=1", "x:-1=a"):
        assert _message(parse_dynamic, [text]) == (
            f"--dynamic must be INPUT:DIM=NAME such as x:0=batch, got '{text}'"
        )
    assert _message(parse_dynamic, ["x:0=a", "x:1=a", "x:0=b"]) == (
        "--dynamic gives dimension 0 of 'x' twice: 'a' and 'b'"
    )
    given = Inputs(draw_example(parse_inputs(["4x2", "y=1"])), ())
    assert given.make_dynamic_shapes(_Two(), dims) == {"x": {0: "batch", 2: "width"}, "y": None}
    assert given.make_dynamic_shapes(_Two(), {}) is None
    assert _message(given.make_dynamic_shapes, _Two(), {"z": {0: "b"}}) == (
        "--dynamic names the input 'z'; the inputs are x, y"
    )


class _Two(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def test_names_of_inputs_and_outputs() -> None:
    """Names are separated by commas or given one by one; an empty name is refused."""
    assert parse_names("--input-names", []) is None
    assert parse_names("--input-names", ["x, y", "z"]) == ["x", "y", "z"]
    for text in ("", "x,", ",x", " "):
        assert _message(parse_names, "--input-names", [text]) == (
            f"--input-names must be names with commas between them, got '{text}'"
        )


def test_model_kwargs() -> None:
    """--model-kwargs is a JSON object; any other text is refused."""
    assert parse_kwargs('{"ch": 64}') == {"ch": 64}
    assert _message(parse_kwargs, "[1]") == "--model-kwargs must be a JSON object, got '[1]'"
    assert _message(parse_kwargs, "{ch: 1}").startswith(
        "--model-kwargs must be a JSON object, got '{ch: 1}': "
    )


def test_inputs_from_files(tmp_path: Path) -> None:
    """Unnamed arrays of an .npz are positional arguments, named ones keyword arguments."""
    np.savez(tmp_path / "a.npz", np.ones((2, 3), np.float32))
    np.savez(tmp_path / "b.npz", x=np.zeros(3))
    inputs = gather((), [tmp_path / "a.npz", tmp_path / "b.npz"])
    assert torch.equal(inputs.example.args[0], torch.ones(2, 3))
    assert torch.equal(inputs.own[0].kwargs["x"], torch.zeros(3, dtype=torch.float64))
    inputs = gather(parse_inputs(["2x3"]), [tmp_path / "a.npz"])
    assert [one.label for one in inputs.own] == ["'a.npz'"]


def test_bad_input_files(tmp_path: Path) -> None:
    """A file that numpy did not write, or that would run code, is refused."""
    path = tmp_path / "a.npz"
    path.write_text("garbage")
    assert _message(gather, (), [path]).startswith(f"'{path}' is no .npz of numeric arrays: ")
    np.savez(path, x=np.array([{}], dtype=object))
    assert _message(gather, (), [path]).startswith(f"'{path}' is no .npz of numeric arrays: ")


def test_factories() -> None:
    """A factory is a function or a class, and may take arguments."""
    assert isinstance(build_model("cli_networks:Critic", {})[0], Critic)
    assert build_model("cli_networks:critic", {"ch": 6})[0].body[0].out_channels == 6
    assert type(critic()) is type(build_model("cli_networks:critic", {"kind": "hook"})[0])


def test_factories_that_cannot_be_named() -> None:
    """A text that is not MODULE:FACTORY, or a path instead of a module, is refused."""
    assert parse_factory("pkg.nets:Critic.build") == "pkg.nets:Critic.build"
    for text in ("nets", "nets:", ":critic"):
        assert _message(parse_factory, text) == (
            f"--model must be MODULE:FACTORY such as pkg.nets:critic, got '{text}'"
        )
    for text in ("../a/train:D", "a/train:D", "..:D", "a b:D", ".nets:D"):
        assert _message(parse_factory, text) == (
            "--model must be MODULE:FACTORY with the module as in an import, such as "
            f"pkg.nets:critic, got '{text}'"
        )


def test_factories_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message for a wrong factory says which names exist, or what was raised."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_a_test.py").write_text("import no_such_package\n")
    (tmp_path / "exits_of_a_test.py").write_text("raise SystemExit(3)\n")
    cases = {
        "nots:critic": (
            "there is no module 'nots'; modules in the current folder: exits_of_a_test, "
            "nets_of_a_test"
        ),
        "nets_of_a_test:f": ("importing 'nets_of_a_test' raised No module named 'no_such_package'"),
        "exits_of_a_test:f": "importing 'exits_of_a_test' raised SystemExit: 3",
        "cli_networks:critc": (
            "module 'cli_networks' has no 'critc'; it has Critic, Exits, Lstm, NoisyCritic, "
            "Pipeline, Scored, Tokens, Unknown, Untraceable, a_number, before_v, broken, chatty, "
            "critic, exits, parametrized_critic, plain_critic, prefixed, save_folder, tokens, "
            "trained, trained_critic, untraceable, wide_critic"
        ),
        "cli_networks:broken": ("cli_networks:broken() raised ValueError: no configuration given"),
        "cli_networks:a_number": "cli_networks:a_number made int, not a torch.nn.Module",
    }
    for text, message in cases.items():
        assert _message(build_model, text, {}) == message
    start = "cli_networks:critic(width=3) raised TypeError: "
    assert _message(build_model, "cli_networks:critic", {"width": 3}).startswith(start)
