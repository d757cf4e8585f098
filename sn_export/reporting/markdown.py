"""A report as Markdown, short enough for the summary of a CI job."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from ..text import escape_unprintable, format_count
from .content import (
    Number,
    Report,
    ReportView,
    errors_of_content,
    format_error,
    format_shape,
    format_sigma,
    name_module,
    name_tensor,
    read_report,
)

_ROWS = 20  # of each table; the HTML report holds all
_AROUND = 3  # modules before and after the first one outside tolerance
# Letters of markup, the ends of "http:" and "www." that make a link, and the start of a list.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#|~$&!]|:(?=//)|(?<=www)\.|^[-+=])", re.IGNORECASE)
_NUMBERED = re.compile(r"^(\d+)\.")
_LONGEST = 500  # characters of one text


def to_markdown(report: Report) -> str:
    """Return a report as GitHub-flavoured Markdown: the verdict, and tables of bounded length.

    Args:
        report: as for `to_html`.

    Raises:
        TypeError: for what is no report.
        ValueError: for JSON content in which a key is missing or a value has a wrong type.
    """
    view = read_report(report)
    with errors_of_content():
        parts = [
            f"### {'✅' if view.parity['passed'] else '❌'} {_escape_text(view.verdict)}",
            *(_escape_text(sentence) for sentence in view.details),
            _write_outputs(view.parity["outputs"]),
            _write_inputs(view.content.get("inputs", ())),
            _write_modules(view.parity["modules"], view.first),
            _write_frozen(view.content.get("frozen", ())),
            _write_origin(view),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _write_outputs(outputs: Sequence[Mapping[str, Any]]) -> str:
    ordered = sorted(outputs, key=lambda output: bool(output["passed"]))  # failures come first
    rows = [
        (
            _quote_code(output["name"]),
            "passed" if output["passed"] else "**failed**",
            *(format_error(output[key]) for key in ("max_abs", "max_rel", "mean_abs")),
            f"{format_error(output['atol'])} + {format_error(output['rtol'])} · ref",
        )
        for output in ordered[:_ROWS]
    ]
    head = ("output", "result", "max abs", "max rel", "mean abs", "tolerance")
    return _write_table(head, rows, len(ordered))


def _write_inputs(inputs: Sequence[Mapping[str, Any]]) -> str:
    if not inputs:
        return ""
    rows = [
        (
            _quote_code(one["name"]),
            _quote_code(one["dtype"]),
            _quote_code(format_shape(one["shape"])),
        )
        for one in inputs[:_ROWS]
    ]
    return _write_table(("input", "dtype", "shape"), rows, len(inputs))


def _write_modules(modules: Sequence[Mapping[str, Any]], first: int | None) -> str:
    if first is None:
        return ""
    start = max(0, first - _AROUND)
    rows = [
        (
            _quote_code(name_module(entry)),
            _quote_code(entry["type"]),
            format_error(entry["max_abs"]),
            "within" if entry["passed"] else "**first outside**" if i == first else "outside",
        )
        for i, entry in enumerate(modules[start : first + _AROUND + 1], start)
    ]
    head = ("module", "type", "max abs", "tolerance")
    return "Modules around the first to differ, in network order:\n\n" + _write_table(head, rows)


def _write_frozen(frozen: Sequence[Mapping[str, Any]]) -> str:
    if not frozen:
        return ""
    rows = [
        (
            _quote_code(name_tensor(entry)),
            _quote_code(entry["kind"]),
            _escape_text(format_shape(entry["shape"])),
            *(_format_sigma(entry.get(key)) for key in ("sigma", "sigma_exact")),
        )
        for entry in frozen[:_ROWS]
    ]
    head = ("tensor", "kind", "shape", "sigma stored", "sigma true")
    return _write_details(
        format_count(len(frozen), "frozen tensor"), _write_table(head, rows, len(frozen))
    )


def _format_sigma(value: Number) -> str:
    return "–" if value is None else format_sigma(value)


def _write_origin(view: ReportView) -> str:
    content = view.content
    facts = [*view.facts, *content.get("versions", {}).items()]
    rows = [(_escape_text(name), _quote_code(text)) for name, text in facts]
    for name, facts_of_file in content.get("files", {}).items():
        rows.append((f"sha256 of {_quote_code(name)}", _quote_code(facts_of_file["sha256"])))
    if content.get("command"):
        rows.append(("command", _quote_code(content["command"])))
    return _write_details("How it was made", _write_table(("", ""), rows))


def _write_details(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def _write_table(head: Sequence[str], rows: Iterable[Sequence[str]], count: int = 0) -> str:
    lines = [_write_row(head), _write_row(["---"] * len(head)), *map(_write_row, rows)]
    left = count - (len(lines) - 2)
    text = "\n".join(lines)
    return f"{text}\n\nand {left} more" if left > 0 else text


def _write_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _quote_code(text: str) -> str:
    """Return untrusted text as code, in which nothing becomes a link, a tag or another cell."""
    text = _shorten_line(text)
    longest = max((len(list(run)) for char, run in groupby(text) if char == "`"), default=0)
    fence = "`" * (longest + 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{space}{text.replace('|', chr(92) + '|')}{space}{fence}"


def _escape_text(text: str) -> str:
    """Return untrusted text as a sentence, in which no letter is markup."""
    return _NUMBERED.sub(r"\1\\.", _SPECIAL.sub(r"\\\1", _shorten_line(text)))


def _shorten_line(text: str) -> str:
    text = escape_unprintable(" ".join(text.split()))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 2] + " …"
