"""The four subcommands from end to end: exit codes, stdout, stderr and what is on disk.

It reaches inside to compare the fields of each command with the keywords of the API, and for an
exit that no command makes.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import pty
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch
import typer
from cli_networks import Critic, Tokens, exits, prefixed, trained, trained_critic
from cli_running import CRITIC, ONNX, Ran, Run, names, runner
from export_models import FRAMES
from onnx import numpy_helper

from sn_export import ExportError, check_case, check_parity, export_onnx
from sn_export.checkpoints import (
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    read_checkpoint,
)
from sn_export.cli import main
from sn_export.cli.check_command import CheckCommand
from sn_export.cli.console import errors_as_messages
from sn_export.cli.convert_command import ConvertCommand
from sn_export.cli.inspect_command import InspectCommand
from sn_export.cli.onnx_command import OnnxCommand


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in an otherwise empty folder with the checkpoint ``a.pt``."""
    return runner(tmp_path, monkeypatch, capsys)


def test_onnx_proves_and_writes(run: Run) -> None:
    """A proved export has exit code 0, two tables and a plain graph, and leaves one file."""
    ran = run(*ONNX)
    assert (ran.code, ran.err) == (0, "")
    assert "body.3.weight   hook   4x4x3x3   float32   0" in ran.out
    assert "parity with onnxruntime over 4 input sets" in ran.out
    assert ran.out.splitlines()[-1].startswith("proved and written: o.onnx (opset ")
    initializers = {one.name for one in onnx.load("o.onnx").graph.initializer}
    assert "head.weight" in initializers
    assert not [name for name in initializers if name.endswith(("_orig", "_u", "_v"))]
    assert names() == ["a.pt", "o.onnx"]


def test_onnx_json(run: Run) -> None:
    """--json prints JSON alone on stdout, the same as in the report, with notes of the loading."""
    torch.save({"state_dict": prefixed(trained_critic().state_dict(), "module.")}, "a.pt")
    ran = run(*ONNX, "--json", "--report", "r.json", "--samples", "1", "--dynamic", "x:0=n")
    content = json.loads(ran.out)
    assert ran.code == 0
    assert content["path"] == "o.onnx"
    assert content["parity"]["passed"] is True
    assert content["parity"]["outputs"][0]["shape"] == [2, 5]
    assert [one["tensor"] for one in content["frozen"]] == ["weight"] * 4
    assert content["notes"][1] == "took the wrappers' 'module.' out of the names"
    saved = json.loads(Path("r.json").read_text())
    assert saved.pop("command").startswith("sn-export onnx a.pt --model cli_networks:critic ")
    assert list(saved.pop("files")) == ["o.onnx"]
    assert saved == content
    assert onnx.load("o.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"


def test_onnx_options(run: Run) -> None:
    """Exporter, opset, external data and arguments of the factory reach the export."""
    ran = run(
        *ONNX,
        *("--exporter", "torchscript", "--opset", "17", "--external-data", "always"),
        *("--model-kwargs", '{"kind": "parametrization"}'),
    )
    assert ran.code == 0
    assert "respelled 4 spectral norms from hook to parametrization" in ran.out
    assert onnx.load("o.onnx").opset_import[0].version == 17
    assert names() == ["a.pt", "o.onnx", "o.onnx.data"]


def test_what_is_no_onnx_file_is_not_replaced(run: Run) -> None:
    """A file of another kind is replaced with --force alone, an ONNX file always."""
    Path("o.onnx").write_text("somebody's notes")
    ran = run(*ONNX)
    assert (ran.code, ran.out, ran.err) == (
        2,
        "",
        "sn-export: cannot write 'o.onnx': the file that is there is no ONNX file; --force writes "
        "it all the same\n",
    )
    assert Path("o.onnx").read_text() == "somebody's notes"
    assert run(*ONNX, "--force").code == 0
    assert run(*ONNX).code == 0


def test_names_and_providers(run: Run) -> None:
    """The file has the names asked for, and the providers asked for ran it."""
    ran = run(*ONNX, "--input-names", "image", "--output-names", "score",
              "--providers", "CPUExecutionProvider", "--json", "--dynamic", "x:0=n")  # fmt: skip
    assert ran.code == 0, ran.err
    graph = onnx.load("o.onnx").graph
    assert [one.name for one in (*graph.input, *graph.output)] == ["image", "score"]
    assert json.loads(ran.out)["parity"]["providers"] == ["CPUExecutionProvider"]
    ran = run("check", "o.onnx", "a.pt", *CRITIC, "--providers", "NoSuchProvider")
    assert ran.code == 2 and "NoSuchProvider" in ran.err
    ran = run(*ONNX, "--input-names", "a,b,c")
    assert ran.code == 2 and "input_names" in ran.err


def test_onnx_with_real_inputs(run: Run) -> None:
    """Inputs from a file are the example, with the names of the arguments."""
    model = trained(Tokens(), torch.randint(0, 7, (4, 5))).eval()
    torch.save(model.state_dict(), "t.pt")
    np.savez("in.npz", ids=np.arange(6).reshape(2, 3), scale=np.ones((2, 1), np.float32))
    ran = run("onnx", "t.pt", "--model", "cli_networks:tokens", "--input-file", "in.npz",
              "-o", "t.onnx", "--json")  # fmt: skip
    assert ran.code == 0, ran.err
    assert [one.name for one in onnx.load("t.onnx").graph.input] == ["ids", "scale"]
    assert json.loads(ran.out)["parity"]["samples"] == 4


def test_onnx_parity_failure(run: Run) -> None:
    """A failed proof has exit code 1, the table and one message, and the old file stays."""
    assert run(*ONNX).code == 0
    old = Path("o.onnx").read_bytes()
    ran = run(*ONNX, "--rtol", "0", "--atol", "0")
    assert ran.code == 1
    assert "NOT EQUAL" in ran.out
    assert "elements are outside" in ran.out
    assert ran.err.startswith("sn-export: note: the torchscript exporter was tried too: the file ")
    assert ran.err.splitlines()[-1] == (
        "sn-export: the file does not reproduce the model, and 'o.onnx' was not written "
        "(exporter: dynamo)"
    )
    assert Path("o.onnx").read_bytes() == old
    ran = run(*ONNX, "--rtol", "0", "--atol", "0", "--json")
    assert ran.code == 1
    failed = json.loads(ran.out)
    schema = json.loads((resources.files("sn_export.reporting") / "report.schema.json").read_text())
    jsonschema.validate(failed, schema)
    assert (failed["path"], failed["parity"]["passed"]) == (None, False)
    assert [attempt["exporter"] for attempt in failed["attempts"]] == ["torchscript"]
    assert len(failed["frozen"]) == 4
    assert names() == ["a.pt", "o.onnx"]


def test_tolerance_of_one_output(run: Run) -> None:
    """A tolerance by the name of an output decides in an export and in the replay of a case."""
    assert run(*ONNX, "--atol", "output=0", "--rtol", "0=0").code == 1
    assert run(*ONNX, "--atol", "output=1", "--save-case", "o.npz").code == 0
    replay = ("check", "o.onnx", "--case", "o.npz")
    assert run(*replay).code == 0
    ran = run(*replay, "--atol", "output=0", "--rtol", "output=0")
    assert ran.code == 1 and "NOT EQUAL" in ran.out


def test_proof_dtype_of_a_case(run: Run) -> None:
    """A case, alone or in a folder, is replayed in the dtype asked for."""
    assert run(*ONNX, "--save-case", "o.npz").code == 0
    for what in (("o.onnx", "--case", "o.npz"), (".",)):
        ran = run("check", *what, "--proof-dtype", "float32", "--json")
        answered = json.loads(ran.out)
        (one,) = answered.get("cases", [answered])
        assert (ran.code, one["parity"]["proof_dtype"]) == (0, "float32")
    assert run("check", ".").out.splitlines()[-1] == "1 case: 1 equal, 0 not, 0 not compared"


def test_draws_of_a_network_with_noise(run: Run) -> None:
    """With --draws zeros noise is proved, checked and replayed; without, the message names it."""
    noisy = ["--model", "cli_networks:NoisyCritic", "--input", "2x3x8x8"]
    export = ["onnx", "a.pt", *noisy, "-o", "o.onnx", "--save-case", "o.npz"]
    zeros = "note: draws='zeros': every random number of the forward is 0"
    assert run(*export, "--draws", "zeros").code == 0
    ran = run("check", "o.onnx", "a.pt", *noisy, "--draws", "zeros")
    assert ran.code == 0 and zeros in ran.err
    ran = run("check", "o.onnx", "--case", "o.npz")
    assert ran.code == 0 and zeros in ran.err
    ran = run("check", "o.onnx", "--case", "o.npz", "--draws", "zeros")
    assert ran.code == 2 and "--case needs no model: leave out --draws" in ran.err
    for command in (["check", "o.onnx", "a.pt", *noisy], [*export, "--force"]):
        ran = run(*command)
        assert ran.code == 1 and "draws='zeros' makes and proves a file without" in ran.out


BAD: dict[str, tuple[list[str], str]] = {
    "absent": (["onnx", "no.pt", *CRITIC], "there is no checkpoint at 'no.pt'"),
    "shape": (
        ["onnx", "a.pt", "--model", "cli_networks:critic", "--input", "2y3"],
        "--input must be [NAME=]SHAPE[:DTYPE] such as 2x3x8x8 or x=1x77:int64, got '2y3'",
    ),
    "factory": (
        ["onnx", "a.pt", "--model", "cli_networks:broken", "--input", "2"],
        "cli_networks:broken() raised ValueError: no configuration given",
    ),
    "other model": (
        ["onnx", "a.pt", "--model", "cli_networks:tokens", "--input", "2"],
        "'a.pt' does not fit Tokens: it lacks 'embed.weight_orig', 'embed.weight_u', "
        "'embed.weight_v', 'head.bias'; it has the unknown 'body.0.bias', "
        "'body.0.weight_orig', 'body.0.weight_u', 'body.0.weight_v', 'body.1.weight' and 12 "
        "more; 'head.weight_orig' is [5, 2] and should be [2, 4]; 'head.weight_u' is [5] and "
        "should be [2]; 'head.weight_v' is [2] and should be [4]",
    ),
    "no folder": (
        ["onnx", "a.pt", *CRITIC, "-o", "no/o.onnx"],
        "cannot write 'no/o.onnx': no folder 'no'",
    ),
    "no name": (["onnx", "a.pt", *CRITIC, "-o", "."], "cannot write '.': it is a folder"),
    "report": (
        ["onnx", "a.pt", *CRITIC, "--report", "no/r.json"],
        "cannot write 'no/r.json': no folder 'no'",
    ),
    "suffix of another format": (
        ["onnx", "a.pt", *CRITIC, "-o", "o.pth"],
        "cannot write 'o.pth': an ONNX file should end in .onnx, and .pth is the suffix of another "
        "format; --force writes it all the same",
    ),
    "tolerance": (["onnx", "a.pt", *CRITIC, "--rtol", "-1"], "rtol must be 0 or more, got -1.0"),
    "tolerance of no output": (
        ["onnx", "a.pt", *CRITIC, "--atol", "score=1e-3"],
        "atol names the output 'score', the file has ['output']",
    ),
    "tolerance that is no number": (
        ["check", "a.onnx", "--rtol", "much"],
        "--rtol must be a number, or OUTPUT=NUMBER such as score=1e-3, got 'much'",
    ),
    "dim that is none": (
        ["onnx", "a.pt", *CRITIC, "--dim", "body.0.weight=9"],
        "'body.0.weight' [4, 3, 3, 3] with u of 4 elements has dim 0, got --dim body.0.weight=9",
    ),
    "dim of another length": (
        ["convert", "a.pt", "--to", "hook", "-o", "o.pt", "--dim", "head.weight=1"],
        "'head.weight' [5, 2] with u of 5 elements has dim 0, got --dim head.weight=1",
    ),
    "inspect": (["inspect", "no.pt"], "there is no checkpoint at 'no.pt'"),
    "convert": (
        ["convert", "a.pt", "--to", "plain", "-o", "o.txt"],
        "cannot write 'o.txt': it must end in .pt, .pth, .ckpt, .bin or .safetensors",
    ),
    "check without a checkpoint": (
        ["check", "a.pt"],
        "check needs CHECKPOINT, or a saved case with --case",
    ),
    "check without a model": (
        ["check", "a.pt", "a.pt"],
        "check needs --model, or a saved case with --case",
    ),
    "check": (["check", "no.onnx", "a.pt", *CRITIC], "there is no file or folder 'no.onnx'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, run: Run) -> None:
    """Bad input has exit code 2 and one message on stderr, without a traceback or a file."""
    arguments, message = BAD[name]
    if arguments[0] == "onnx" and "-o" not in arguments:
        arguments = [*arguments, "-o", "o.onnx"]
    ran = run(*arguments)
    assert (ran.code, ran.out, ran.err) == (2, "", f"sn-export: {message}\n")
    assert names() == ["a.pt"]


def test_inputs_that_the_model_rejects(run: Run) -> None:
    """If the model rejects the inputs, its own error is shown."""
    ran = run("onnx", "a.pt", "--model", "cli_networks:critic", "--input", "2x4", "-o", "o.onnx")
    assert ran.code == 2
    start = "sn-export: the model fails on the example input: RuntimeError: "
    assert ran.err.startswith(start)
    assert "Traceback" not in ran.err
    assert names() == ["a.pt"]


_TOO_LONG = """
import torch
class Layer(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.ones(10**30)
"""


def test_frames_of_torch_are_not_shown(run: Run) -> None:
    """The C++ frames of an error are shown with --debug alone."""
    Path("long_of_a_test.py").write_text(_TOO_LONG)
    torch.save(torch.nn.Linear(3, 2).state_dict(), "l.pt")
    arguments = ("onnx", "l.pt", "--model", "long_of_a_test:Layer", "--input", "2x3",
                 "--model-kwargs", '{"in_features": 3, "out_features": 2}',
                 "-o", "l.onnx")  # fmt: skip
    ran = run(*arguments)
    assert ran.code == 2
    (line,) = ran.err.splitlines()
    assert line.startswith("sn-export: the model fails on the example input: TypeError: ones(): ")
    assert "Traceback" in run(*arguments, "--debug").err


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, ExportError])
def test_errors_of_any_kind_are_told_without_frames(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    """The C++ frames of an unexpected error are not shown either."""
    with pytest.raises(typer.Exit), errors_as_messages(debug=False):
        raise kind(f"no such size\n{FRAMES}")
    told = capsys.readouterr().err
    assert "no such size" in told
    assert len(told.splitlines()) == 1


def test_a_network_that_exits(run: Run) -> None:
    """If the network's code calls sys.exit(0), the exit code is not 0: nothing was proved."""
    torch.save(exits().state_dict(), "e.pt")
    ran = run("onnx", "e.pt", "--model", "cli_networks:exits", "--input", "2x3", "-o", "o.onnx")
    assert ran.code == 2
    assert "sn-export: the model fails on the example input: SystemExit: 0\n" in ran.err
    assert not Path("o.onnx").exists()


def test_debug_shows_the_traceback(run: Run) -> None:
    """--debug shows the traceback, with the same exit code."""
    ran = run("inspect", "no.pt", "--debug")
    assert ran.code == 2
    assert ran.err.startswith("Traceback (most recent call last):")
    assert "CheckpointError: there is no checkpoint at 'no.pt'" in ran.err


def test_inspect(run: Run) -> None:
    """inspect prints a table, and with --json the promised names."""
    ran = run("inspect", "a.pt")
    assert ran.code == 0
    assert ran.out.startswith("a.pt (torch): 20 entries, 4 tensors under spectral norm\n")
    ran = run("inspect", "a.pt", "--json")
    layers = json.loads(ran.out)["layers"]
    assert {"module", "tensor", "kind", "shape", "dim", "sigma", "sigma_exact"} <= set(layers[0])
    assert [layer["module"] for layer in layers] == ["body.0", "body.3", "body.4", "head"]
    assert layers[2]["dim"] == 1


def test_inspect_of_an_onnx_file(run: Run) -> None:
    """Of an ONNX file inspect shows inputs, outputs, producer, and frozen layers with sigma."""
    options = ("--dynamic", "x:0=n", "--external-data", "always", "--metadata", "run=42")
    made = json.loads(run(*ONNX, *options, "--json").out)
    found = json.loads(run("inspect", "o.onnx", "--json").out)
    assert found["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["n", 3, 8, 8]}]
    assert found["outputs"] == [{"name": "output", "dtype": "float32", "shape": ["n", 5]}]
    assert found["opsets"]["ai.onnx"] == made["opset"]
    assert found["producer"].startswith("pytorch ")
    assert found["bytes"] == Path("o.onnx").stat().st_size
    assert found["external_data"] == {"o.onnx.data": Path("o.onnx.data").stat().st_size}
    assert found["metadata"]["run"] == "42"
    sigmas = {f"{one['module']}.{one['tensor']}": one["sigma"] for one in made["frozen"]}
    assert found["frozen"] == {name: pytest.approx(s, rel=1e-5) for name, s in sigmas.items()}
    shown = run("inspect", "o.onnx")
    assert shown.code == 0
    for text in ("nx3x8x8", "body.3.weight", "opset ai.onnx ", "external data: o.onnx.data, "):
        assert text in shown.out
    Path("o.onnx.data").unlink()
    assert "external data: o.onnx.data, missing" in run("inspect", "o.onnx").out


@pytest.mark.parametrize("json", [[], ["--json"]])
@pytest.mark.parametrize("kind", ["input", "key", "value", "number"])
def test_inspect_of_what_cannot_be_shown(kind: str, json: list[str], run: Run) -> None:
    """A name in no encoding, or a number of thousands of digits, ends in one message."""
    model = onnx.ModelProto(ir_version=9)
    graph = model.graph
    graph.input.add(name="XXXX")
    model.metadata_props.add(key="KKKK", value="VVVV")
    graph.initializer.add(name="w", dims=[2**62] * (300 if kind == "number" else 1))
    old = {"input": b"XXXX", "key": b"KKKK", "value": b"VVVV", "number": b"none"}[kind]
    Path("o.onnx").write_bytes(model.SerializeToString().replace(old, b"\xff\xfe\xff\xfe"))
    ran = run("inspect", "o.onnx", *json)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "sn-export: 'o.onnx' holds a name that is no text, or a number of thousands of digits\n"
    )


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x08\xff", b"PK\x03\x04"])
def test_inspect_of_a_broken_onnx_file(content: bytes, run: Run) -> None:
    """A broken ONNX file, or an option for state dicts, ends in one message."""
    Path("o.onnx").write_bytes(content)
    ran = run("inspect", "o.onnx")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("sn-export: 'o.onnx' is no ONNX file: ")
    assert len(ran.err.splitlines()) == 1
    ran = run("inspect", "o.onnx", "--key", "model")
    assert ran.err == "sn-export: an ONNX file has no state dict: leave out --key\n"


def test_inspect_shows_metadata_escaped(run: Run) -> None:
    """Metadata of a foreign file is shown escaped, also under the keys of sn_export."""
    long = f'{{"a": {"9" * 400}}}'
    for text in ("[1]", '{"a": "b"}', '{"a": [1]}', long, "[" * 100_000, "\x1b[31m"):
        model = onnx.ModelProto(ir_version=8, graph=onnx.GraphProto(name="g"))
        model.metadata_props.add(key="sn_export.frozen", value=text)
        model.metadata_props.add(key="\x1b[2J", value="\u202e")
        for location in ("a\0b", "x" * 5000, "../\x1b[2J"):
            tensor = model.graph.initializer.add(name=location[:9], dims=[3], data_type=1)
            tensor.external_data.add(key="location", value=location)
        Path("o.onnx").write_bytes(model.SerializeToString())
        ran = run("inspect", "o.onnx")
        assert ran.code == 0
        assert all(line.isprintable() for line in ran.out.split("\n"))
        assert json.loads(run("inspect", "o.onnx", "--json").out)["frozen"] is None


def test_inspect_without_numbers(run: Run) -> None:
    """NaN and infinities do not make the JSON invalid."""
    state = dict(trained_critic().state_dict())
    state["head.weight_u"] = state["head.weight_u"] * torch.nan
    torch.save(state, "n.pt")
    layer = json.loads(run("inspect", "n.pt", "--json").out)["layers"][3]
    assert layer["sigma"] is None
    assert layer["note"] == "'head.weight_u' holds NaN or infinite values"


def test_convert(run: Run) -> None:
    """convert says what it changed, and a plain network loads the file."""
    ran = run("convert", "a.pt", "--to", "plain", "-o", "b.pt")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == "respelled 4 spectral norms as plain\nwrote b.pt\n"
    Critic("plain").load_state_dict(torch.load("b.pt"))
    ran = run("convert", "a.pt", "--to", "hook", "-o", "c.safetensors", "--max-shard-size", "1kb",
              "--json")  # fmt: skip
    content = json.loads(ran.out)
    assert content["changed"] == []
    assert content["files"][-1] == "c.safetensors.index.json"


def test_what_does_not_fit_is_listed_without_strict(run: Run) -> None:
    """With --no-strict the keys that do not fit are listed, in the metadata of the file too."""
    state = dict(trained_critic().state_dict())
    del state["head.weight_u"]
    torch.save(state | {"extra": torch.ones(2)}, "part.pt")
    command = ["onnx", "part.pt", *ONNX[2:]]
    ran = run(*command)
    assert ran.code == 2
    assert "it lacks 'head.weight_u'; it has the unknown 'extra'" in ran.err
    ran = run(*command, "--no-strict")
    assert ran.code == 0
    assert "checkpoint: not in the model, and so left out: 'extra'\n" in ran.out
    said = {entry.key: entry.value for entry in onnx.load("o.onnx").metadata_props}
    assert said["checkpoint.missing_keys"] == '["head.weight_u"]'
    assert said["checkpoint.unexpected_keys"] == '["extra"]'


def _check(run: Run, *more: str) -> Ran:
    return run("check", "o.onnx", "a.pt", *CRITIC, *more)


def test_check(run: Run) -> None:
    """check gives 0 for the checkpoint that the file was made from, and 1 for another one."""
    assert run(*ONNX).code == 0
    ran = _check(run)
    assert (ran.code, ran.err) == (0, "")
    torch.save(trained_critic(seed=9).state_dict(), "a.pt")
    ran = _check(run)
    assert (ran.code, ran.err) == (1, "sn-export: 'o.onnx' does not reproduce the model\n")
    ran = _check(run, "--json")
    assert (ran.code, json.loads(ran.out)["parity"]["passed"]) == (1, False)


def _edited(change: Callable[[Any], Any]) -> None:
    model = onnx.load("o.onnx")
    change(model)
    onnx.save(model, "o.onnx")


def test_check_names_the_first_module(run: Run) -> None:
    """If a weight in the file was changed, table and JSON name its module."""
    assert run(*ONNX).code == 0

    def alter(model: Any) -> None:
        (weight,) = (i for i in model.graph.initializer if i.name == "body.3.weight")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))

    _edited(alter)
    ran = _check(run)
    assert ran.code == 1
    (line,) = (line for line in ran.out.splitlines() if "NOT EQUAL, first" in line)
    assert line.split()[:2] == ["body.3", "Conv2d"]
    assert "the first module to differ is 'body.3' (Conv2d), max_abs" in ran.out
    parity = json.loads(_check(run, "--json").out)["parity"]
    assert parity["first_divergent"] == "body.3"
    bad = [entry["module"] for entry in parity["modules"] if not entry["passed"]]
    assert bad[0] == "body.3"


def test_check_what_cannot_be_compared(run: Run) -> None:
    """A broken file, an unknown opset, and other inputs or shapes have exit code 2."""
    assert run(*ONNX).code == 0
    ran = run("check", "o.onnx", "a.pt", "--model", "cli_networks:critic", "--input", "2x3x9x9")
    assert ran.code == 2
    assert ran.err.startswith("sn-export: onnxruntime fails on ")
    whole = Path("o.onnx").read_bytes()
    _edited(lambda model: setattr(model.opset_import[0], "version", 999))
    assert "opset" in _check(run).err
    Path("o.onnx").write_text("garbage")
    ran = _check(run)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "sn-export: cannot load 'o.onnx': it is no ONNX file, or damaged\n"
    Path("o.onnx").write_bytes(whole)
    torch.save(Tokens().state_dict(), "t.pt")
    ran = run("check", "o.onnx", "t.pt", "--model", "cli_networks:tokens", "--input", "2x3:int64",
              "--input", "2x1")  # fmt: skip
    assert ran.code == 2
    assert ran.err.startswith("sn-export: the file takes the inputs ['x']")


def test_check_an_output_of_another_shape(run: Run) -> None:
    """An output of another shape has exit code 2, since no elements can be compared."""
    torch.save(torch.nn.Linear(3, 4).state_dict(), "l.pt")
    torch.save(torch.nn.Linear(3, 5).state_dict(), "m.pt")
    four = ["--model", "torch.nn:Linear", "--input", "2x3", "--model-kwargs"]
    assert (
        run("onnx", "l.pt", *four, '{"in_features":3,"out_features":4}', "-o", "o.onnx").code == 0
    )
    ran = run("check", "o.onnx", "m.pt", *four, '{"in_features":3,"out_features":5}')
    assert ran.code == 2
    assert "cannot be compared: the file gives float32[2, 4], the model float32[2, 5]" in ran.err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["onnx", "--help"]])
def test_help_and_version_do_not_import_torch(arguments: list[str]) -> None:
    """--help and --version import neither torch nor onnx nor numpy."""
    code = (
        "import sys\n"
        "from sn_export.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules), file=sys.stderr)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert ran.stderr == "set()\n"
    assert "sn-export" in ran.stdout


_ANSWERED_WITHOUT_TORCH = {
    "absent checkpoint": ["onnx", "no.pt", *CRITIC, "-o", "o.onnx"],
    "shape": ["onnx", "a.pt", *CRITIC[:2], "--input", "2y3", "-o", "o.onnx"],
    "no input": ["onnx", "a.pt", *CRITIC[:2], "-o", "o.onnx"],
    "absent input": ["onnx", "a.pt", *CRITIC[:2], "--input-file", "no.npz", "-o", "o.onnx"],
    "factory": ["onnx", "a.pt", "--model", "nets", "--input", "2", "-o", "o.onnx"],
    "arguments": ["onnx", "a.pt", *CRITIC, "--model-kwargs", "{", "-o", "o.onnx"],
    "folder": ["onnx", "a.pt", *CRITIC, "-o", "no/o.onnx"],
    "report": ["onnx", "a.pt", *CRITIC, "-o", "o.onnx", "--report", "r.pdf"],
    "same file": ["onnx", "a.pt", *CRITIC, "-o", "a.pt"],
    "tolerance": ["check", "o.onnx", "a.pt", "--rtol", "much"],
    "dynamic": ["onnx", "a.pt", *CRITIC, "-o", "o.onnx", "--dynamic", "x"],
    "metadata": ["onnx", "a.pt", *CRITIC, "-o", "o.onnx", "--metadata", "run"],
    "choice": ["onnx", "a.pt", *CRITIC, "-o", "o.onnx", "--exporter", "jax"],
    "absent file": ["check", "no.onnx", "a.pt", *CRITIC],
    "absent case": ["check", "a.pt", "--case", "no.npz"],
    "nothing to check against": ["check", "a.pt"],
    "inspect": ["inspect", "no.pt"],
    "dim": ["inspect", "a.pt", "--dim", "w"],
    "convert": ["convert", "no.pt", "--to", "plain", "-o", "o.pt"],
    "size": ["convert", "a.pt", "--to", "plain", "-o", "o.pt", "--max-shard-size", "much"],
}


@pytest.mark.parametrize("name", _ANSWERED_WITHOUT_TORCH)
def test_what_needs_no_torch_is_answered_without(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths, shapes and options are checked before torch, onnx and numpy are imported."""
    monkeypatch.chdir(tmp_path)
    Path("a.pt").touch()
    code = (
        "import sys\n"
        "from sn_export.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "print({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *_ANSWERED_WITHOUT_TORCH[name]],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "set()\n"
    assert ran.stderr.startswith("sn-export: ") and len(ran.stderr.splitlines()) == 1


_HANDLED = {
    OnnxCommand: {"checkpoint", "model", "output", "shapes", "input_files", "model_kwargs"}
    | {"dynamic", "report", "network", "submodule", "device"},
    InspectCommand: {"checkpoint", "report"},
    ConvertCommand: {"checkpoint", "to", "output"},
    CheckCommand: {"file", "checkpoint", "model", "case", "shapes", "input_files", "model_kwargs"}
    | {"samples", "network", "submodule", "device"},
}


@pytest.mark.parametrize("command", _HANDLED)
def test_every_option_arrives(command: type[Any]) -> None:
    """Each option is used by its command, or is a keyword of what the command calls.

    It reaches inside, since an option with a misspelt name would be read and then dropped.
    """
    called = {
        OnnxCommand: [export_onnx, load_checkpoint, read_checkpoint],
        InspectCommand: [inspect_checkpoint],
        ConvertCommand: [convert_checkpoint],
        CheckCommand: [check_parity, check_case, load_checkpoint, read_checkpoint],
    }[command]
    keywords = {name for one in called for name in inspect.signature(one).parameters}
    fields = {field.name for field in dataclasses.fields(command)} - {"as_json", "debug"}
    assert fields - keywords == _HANDLED[command] - keywords


def test_defaults_are_those_of_export_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that is not given has the default of export_onnx.

    It reaches inside: both state their defaults for their readers.
    """
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        OnnxCommand, "run", lambda self: seen.update(self.select_keywords(export_onnx))
    )
    monkeypatch.setattr(sys, "argv", ["sn-export", "onnx", "a.pt", "--model", "a:b", "-o", "c"])
    with pytest.raises(SystemExit):
        main()
    parameters = inspect.signature(export_onnx).parameters
    as_given = {name: list(value) if isinstance(value, tuple) else value
                for name, value in ((name, parameters[name].default) for name in seen)}  # fmt: skip
    assert seen == as_given | {"metadata": {}}


def test_progress_is_for_terminals_alone(tmp_path: Path) -> None:
    """On a terminal the steps are shown on stderr, and stdout holds JSON alone."""
    torch.save(trained_critic().state_dict(), tmp_path / "a.pt")
    reader, terminal = pty.openpty()
    ran = subprocess.run(
        [sys.executable, "-m", "sn_export", "inspect", tmp_path / "a.pt", "--json"],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
        check=True,
    )
    os.close(terminal)
    shown = os.read(reader, 10_000).decode()
    os.close(reader)
    assert json.loads(ran.stdout)["format"] == "torch"
    assert "looked at" in shown or "\x1b[" in shown


def test_pipes_in_a_folder_of_cases(run: Run) -> None:
    """Pipes in a folder are no cases, and are not waited for."""
    os.mkfifo("pipe.npz")
    ran = run("check", ".")
    assert (ran.code, ran.err) == (
        2,
        "sn-export: folder '.' holds no case: no NAME.onnx with NAME.npz beside it\n",
    )


def test_inputs_that_unpack_to_more(run: Run) -> None:
    """A small archive that would unpack to gigabytes of inputs is refused."""
    with zipfile.ZipFile("x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(2**28 + 1))
    ran = run("onnx", "a.pt", "--model", "cli_networks:critic", "--input-file", "x.npz", "-o", "o")
    size = Path("x.npz").stat().st_size
    assert (ran.code, ran.err) == (
        2,
        f"sn-export: 'x.npz' unpacks from {size} to {2**28 + 1} bytes; save it with np.savez\n",
    )


def test_a_whole_module_of_the_current_folder(run: Run, tmp_path: Path) -> None:
    """With --trust-pickle the class of a pickled module is found in the current folder."""
    Path("own_nets.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    code = "import torch, own_nets; torch.save(own_nets.Net(2, 2), 'whole.pt')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    ran = run("inspect", "whole.pt")
    assert (ran.code, "wants to call 'own_nets.Net'" in ran.err) == (2, True)
    Path("own_nets.py").rename("elsewhere.py")
    ran = run("inspect", "whole.pt", "--trust-pickle")
    assert (ran.code, ran.err) == (
        2,
        "sn-export: 'whole.pt' needs the package 'own_nets', which cannot be imported here\n",
    )
    Path("elsewhere.py").rename("own_nets.py")
    ran = run("inspect", "whole.pt", "--trust-pickle")
    assert (ran.code, ran.err) == (0, "")
