"""The Markdown report: it is short, and names in it are text."""

from __future__ import annotations

import re

import pytest
from markdown_it import MarkdownIt
from report_contents import LONG, NASTY, content, frozen, module, output

from sn_export.reporting import to_markdown


def _html(text: str) -> str:
    # As on GitHub: tables, and markup of one's own (this report has but <details>).
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return reader.render(text)


def test_passed() -> None:
    """The report of a success has verdict, outputs, frozen layers, versions and hash."""
    text = to_markdown(content())
    assert text.startswith(
        "### ✅ Proved: both outputs are within tolerance on 6 input sets\n\n| output |"
    )
    assert "| `logits` | passed | 5.96e-07 | 2.28e-06 | 4.1e-08 | 0.00031 + 0.0001 · ref |" in text
    assert f"| `{LONG}.weight` | `parametrization` | 64 × 32 × 3 × 3 | 1.25 | 1.2625 |" in text
    assert "| `head.weight` | `parametrization` | 64 × 32 × 3 × 3 | 1.25 | – |" in text
    assert "| torch | `2.13.0+cpu` |" in text
    assert f"| sha256 of `critic.onnx` | `{'9f86d081' * 8}` |" in text
    assert "Modules" not in text


def test_failed() -> None:
    """In the report of a failure the reason and the first module to differ precede the tables."""
    text = to_markdown(content(False))
    assert text.startswith("### ❌ Not proved: 1 of 2 outputs is outside tolerance")
    assert text.index("49 of 3136 elements") < text.index("| output |")
    assert f"| `{LONG}` | `Conv2d` | 0.02 | **first outside** |" in text
    assert r"'critic.onnx' was not written." in text
    assert "| model | `Critic` |" in text
    assert "| `noise` | `int64` | `scalar` |" in text


def test_it_is_short() -> None:
    """Whatever the size of the network, the report is far below the 1 MiB of a job summary."""
    given = content(False)
    names = [f"m{i}" for i in range(3000)]
    given["frozen"] = [frozen(name) for name in names]
    given["parity"]["modules"] = [module(name, i < 2000) for i, name in enumerate(names)]
    given["parity"]["first_divergent"] = "m2000"
    given["parity"]["outputs"] = [output(f"o{i}", i != 999, reason="") for i in range(1000)]
    text = to_markdown(given)
    assert len(text) < 20_000
    assert "and 2980 more" in text and "and 980 more" in text
    assert "| `o999` | **failed** |" in text  # failures are not among those left out
    found = re.findall(r"\| `(m\d+)` \| `Conv2d`", text)
    assert found == [f"m{i}" for i in range(1997, 2004)]


NAMES = {
    "markup": NASTY,
    "pipes": "a|b\\|c",
    "fences": "``` `x``",
    "fence": "`",
    "space": " ",
    "links": "[x](javascript:alert(1)) **b** _c_ ~~d~~ $e$ ![f](g)",
    "lines": "\x1b[31m\r\n\u2028# heading",
    "long": "x" * 100_000,
    "item": "- item",
    "number": "1. item",
    "plus": "+ item",
    "rule": "===",
    "address": "https://example.com www.example.com",
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("passed", [True, False])
def test_names_are_only_text(kind: str, passed: bool) -> None:
    """A name adds no element, no cell and no line, wherever it is shown."""

    def tags(text: str) -> list[str]:
        return re.findall(r"</?[a-z][a-z0-9]*", _html(text))

    wild, tame = (to_markdown(content(passed, one)) for one in (NAMES[kind], "tame"))
    assert tags(wild) == tags(tame)
    assert wild.count("\n") == tame.count("\n")
    assert len(wild) < 10_000


@pytest.mark.parametrize("kind", NAMES)
def test_sizes_are_only_text(kind: str) -> None:
    """Content that was read from a JSON may hold a text for a size, too, which is no markup."""
    wild, tame = (
        content(True, "a") | {"frozen": [frozen("a", shape=[s])]} for s in (NAMES[kind], "1")
    )
    shown = to_markdown(wild)
    assert shown.count("\n") == to_markdown(tame).count("\n")
    assert set(re.findall(r"</?[a-z]\w*", _html(shown))) <= set(
        re.findall(r"</?[a-z]\w*", _html(to_markdown(tame)))
    )


def test_addresses_are_no_links() -> None:
    """An address in a file's text becomes no link on GitHub."""
    text = to_markdown(content(False, notes=["see https://evil.example and www.evil.example"]))
    assert r"see https\://evil.example and www\.evil.example" in text


def test_everything_is_one_line_of_a_table() -> None:
    """Every row of a table has as many cells as its head."""
    html = _html(to_markdown(content(False, NASTY)))
    for table in re.findall(r"<table>.*?</table>", html, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        assert len({len(re.findall(r"<t[hd]", row)) for row in rows}) == 1
        assert len(rows) > 1


def test_verdicts_by_rounding_and_notes_are_shown() -> None:
    """Verdicts that were decided in float64, and the notes of the proof, are shown."""
    distance = {"rms": 1e-4, "p99": 2e-4, "max": 3e-4}
    rounding = {
        **dict.fromkeys(("model", "file", "expected"), distance),
        "scale": 1.0,
        "dtype": "float32",
    }
    made = content()
    made["parity"]["outputs"][0] |= {"rounding": rounding, "verdict": "as near as it can be"}
    made["parity"]["notes"] = ["spectral norm is far from converged in 'fc.weight'"]
    page = to_markdown(made)
    assert "as near as it can be." in page
    assert "Spectral norm is far from converged in 'fc.weight'." in page
