"""A report as Markdown, short enough for the summary of a CI job."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from . import numbers
from .reading import read_report
from .view import FrozenView, ModuleView, OutputView, ReportView

_ROWS = 20  # of each table; the HTML report holds all
_AROUND = 3  # modules before and after the first one outside tolerance
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#|~$&!])")
_LONGEST = 500  # characters of one text


def to_markdown(report: Any) -> str:
    """Return a report as GitHub-flavoured Markdown: the verdict, and tables of bounded length.

    Args:
        report: as for `to_html`.

    Raises:
        TypeError: for what is no report.
        ValueError: for JSON content in which something is missing.
    """
    view = read_report(report)
    parts = [
        f"### {'✅' if view.passed else '❌'} {_text(view.verdict)}",
        *(_text(sentence) for sentence in view.details),
        _outputs(view.outputs),
        _modules(view.modules),
        _frozen(view.frozen),
        _made(view),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _outputs(outputs: Sequence[OutputView]) -> str:
    ordered = sorted(outputs, key=lambda output: output.passed)  # failures are not cut off
    rows = [
        (
            _code(o.name),
            "passed" if o.passed else "**failed**",
            numbers.error(o.max_abs),
            numbers.error(o.max_rel),
            numbers.error(o.mean_abs),
            f"{numbers.error(o.atol)} + {numbers.error(o.rtol)} · ref",
        )
        for o in ordered[:_ROWS]
    ]
    head = ("output", "result", "max abs", "max rel", "mean abs", "tolerance")
    return _table(head, rows, len(ordered))


def _modules(modules: Sequence[ModuleView]) -> str:
    first = next((i for i, module in enumerate(modules) if module.is_first), None)
    if first is None:
        return ""
    around = modules[max(0, first - _AROUND) : first + _AROUND + 1]
    rows = [
        (
            _code(m.name),
            _code(m.type),
            numbers.error(m.max_abs),
            "within" if m.passed else "**first outside**" if m.is_first else "outside",
        )
        for m in around
    ]
    head = ("module", "type", "max abs", "tolerance")
    return "Modules around the first to differ, in network order:\n\n" + _table(head, rows)


def _frozen(frozen: Sequence[FrozenView]) -> str:
    if not frozen:
        return ""
    rows = [
        (
            _code(entry.name),
            entry.kind,
            entry.shape,
            numbers.sigma(entry.sigma),
            numbers.sigma(entry.sigma_exact),
        )
        for entry in frozen[:_ROWS]
    ]
    head = ("tensor", "kind", "shape", "sigma stored", "sigma true")
    count = f"{len(frozen)} frozen tensor{'' if len(frozen) == 1 else 's'}"
    return _details(count, _table(head, rows, len(frozen)))


def _made(view: ReportView) -> str:
    rows = [(_text(name), _code(text)) for name, text in (*view.facts, *view.versions)]
    rows += [(f"sha256 of {_code(name)}", _code(digest)) for name, _, digest in view.files]
    if view.command:
        rows.append(("command", _code(view.command)))
    return _details("How it was made", _table(("", ""), rows))


def _details(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], count: int = 0) -> str:
    lines = [_row(head), _row(["---"] * len(head)), *map(_row, rows)]
    left = count - (len(lines) - 2)
    text = "\n".join(lines)
    return f"{text}\n\nand {left} more" if left > 0 else text


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    """Return untrusted text as code, in which nothing is a link, a tag or an end of the cell."""
    text = _line(text)
    longest = max((len(list(run)) for char, run in groupby(text) if char == "`"), default=0)
    fence = "`" * (longest + 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{space}{text.replace('|', chr(92) + '|')}{space}{fence}"


def _text(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", _line(text))


def _line(text: str) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 2] + " …"
