"""Texts from files are shown escaped: the tests look at the bytes that reach the terminal.

`print_note` and `table` are called inside, with texts that no file system takes for a name.
"""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from cli_running import CRITIC, Run, runner
from hostile_texts import HOSTILE

from sn_export import ExportError, FreezeError
from sn_export.checkpoints import convert_checkpoint
from sn_export.cli.console import print_json, print_note, print_table
from sn_export.errors import CheckpointError, SnExportWarning
from sn_export.text import escape_unprintable, join_lines, quote_name, quote_names

READABLE = ["body.0.weight", "größe", "重み", "[red]x[/red]", ":smile:", "a\\b", "😀", ""]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in a new folder."""
    return runner(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_unprintable_is_left(kind: str) -> None:
    """An escaped text is printable, encodable and one line; escaping it again changes nothing."""
    escaped = escape_unprintable(HOSTILE[kind])
    assert escaped.isprintable()
    assert escaped.encode().decode() == escaped
    assert "\\" in escaped
    assert escape_unprintable(escaped) == escaped


@pytest.mark.parametrize("text", READABLE)
def test_readable_text_stays(text: str) -> None:
    """Letters of any script, markup and backslashes are shown unchanged."""
    assert escape_unprintable(text) == text


def test_quotes_and_lines() -> None:
    """Names in quotes are escaped and shortened, and several lines become one."""
    assert quote_name("a\nb") == r"'a\nb'"
    assert quote_names(["a\x1b", Path("b")]) == r"'a\x1b', 'b'"
    assert quote_name("x" * 5000) == f"'{'x' * 500}...{'x' * 500}'"
    assert join_lines("one\n  two\r\n\n three ") == "one two three"


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("command", ["inspect", "convert", "onnx"])
def test_keys_of_a_checkpoint(command: str, kind: str, run: Run) -> None:
    """A hostile key is escaped in tables, notes and errors."""
    weights = {"weight_orig": torch.eye(3, 2), "weight_u": torch.ones(3), "weight_v": torch.ones(2)}
    state = {f"{HOSTILE[kind]}.{key}": value for key, value in weights.items()}
    state[f"{HOSTILE[kind]}.weight_bar"] = state[f"{HOSTILE[kind]}.weight_u"]
    torch.save({HOSTILE[kind]: state}, "b.pt")
    more = {
        "inspect": [],
        "convert": ["--to", "plain", "--only", "spectral_norm", "-o", "c.pt"],
        "onnx": ["--model", "cli_networks:critic", "--input", "2x3x8x8", "-o", "o.onnx"],
    }
    ran = run(command, "b.pt", *more[command])
    assert ran.code == (2 if command == "onnx" else 0)
    _require_clean(ran.out + ran.err)


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind not in ("nul", "surrogate")])
def test_names_of_files(kind: str, run: Run) -> None:
    """A hostile file name is escaped too."""
    ran = run("inspect", HOSTILE[kind].replace("/", "_") + ".pt")
    assert ran.code == 2
    _require_clean(ran.out + ran.err)


@pytest.mark.parametrize("kind", HOSTILE)
def test_messages_of_the_api(kind: str, tmp_path: Path) -> None:
    """Python prints an error on the terminal too: it holds nothing unprintable, pickled or not."""
    weights = {"weight_orig": torch.eye(3, 2) / 0, "weight_u": torch.ones(3)}
    torch.save({f"{HOSTILE[kind]}.{key}": value for key, value in weights.items()}, tmp_path / "a")
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(tmp_path / "a", tmp_path / "b.pt", "plain")
    assert str(caught.value).isprintable()
    text = HOSTILE[kind].replace("\n", "")
    for error in (ExportError(f"one\n{text}"), FreezeError("a", text, text)):
        for one in (error, pickle.loads(pickle.dumps(error))):
            assert all(line.isprintable() for line in str(one).split("\n"))
            assert str(one) == str(error)
    assert len(str(ExportError("one\ntwo")).splitlines()) == 2


@pytest.mark.parametrize("kind", HOSTILE)
def test_warnings_of_the_api(kind: str) -> None:
    """A warning is one printable line, in whatever way it is shown."""
    with pytest.warns(SnExportWarning) as caught:
        warnings.warn(HOSTILE[kind], SnExportWarning, stacklevel=1)
    assert str(caught[0].message) == escape_unprintable(HOSTILE[kind])


def test_traceback_is_escaped_too(run: Run) -> None:
    """With --debug the errors that led to the message are shown, and escaped line by line."""
    Path("\x1b[2J.npz").write_bytes(b"PK")
    torch.save({}, "a.pt")
    ran = run("onnx", "a.pt", *CRITIC, "--input-file", "\x1b[2J.npz", "-o", "o.onnx", "--debug")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Traceback (most recent call last):\n")
    _require_clean(ran.err)


@pytest.mark.parametrize("kind", HOSTILE)
def test_json_is_printable(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON on the terminal is printable too, and says the same."""
    print_json({"name": HOSTILE[kind]})
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.split("\n"))
    assert json.loads(shown) == {"name": HOSTILE[kind]}


def test_markup_and_emoji_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """Markup and emoji codes in cells and titles are shown as text."""
    print_table("[red]title[/red] :smile:", ["a"], [["[bold]b[/bold] :smile: [/]"], ["\x1b[1m"]])
    assert capsys.readouterr().out.splitlines() == [
        "[red]title[/red] :smile:",
        " a",
        " ──────────────────────────",
        " [bold]b[/bold] :smile: [/]",
        r" \x1b[1m",
        "",
    ]


def test_a_note_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A note is one line, so no text of a file can imitate a line of the tool."""
    print_note("a\nsn-export: b")
    assert capsys.readouterr().err == "sn-export: a\\nsn-export: b\n"


def test_names_that_safetensors_cannot_hold(run: Run) -> None:
    """A name that UTF-8 cannot hold ends in a message, and no file is written."""
    weights = {"weight_orig": torch.eye(3, 2), "weight_u": torch.ones(3), "weight_v": torch.ones(2)}
    torch.save({f"a\udc80.{key}": value for key, value in weights.items()}, "b.pt")
    ran = run("convert", "b.pt", "--to", "plain", "-o", "c.safetensors")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "sn-export: safetensors has names in UTF-8 alone, and 'a\\udc80.weight' is not; "
        "write a .pt\n"
    )
    assert not Path("c.safetensors").exists()


def _require_clean(shown: str) -> None:
    lines = shown.split("\n")
    assert all(line.isprintable() for line in lines)
    own = ("sn-export: '", "sn-export: note: '", "sn-export: there is no checkpoint at '")
    assert all(line.startswith(own) for line in lines if line.startswith("sn-export:"))
    shown.encode()
