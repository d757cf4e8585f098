"""The content of a report, as its JSON holds it, and the sentences and numbers of its pages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jinja2

from ..text import format_count, qualify, to_json_values

Number = float | str | None  # in JSON NaN is null, and infinities are the texts "inf" and "-inf"


@runtime_checkable
class HasContent(Protocol):
    """A report with a JSON content: `sn_export.ExportReport` or `sn_export.ParityReport`."""

    def content(self) -> dict[str, Any]:
        """Return the content of the report's JSON."""


Report = HasContent | Mapping[str, Any]


def as_content(report: Report) -> dict[str, Any]:
    """Return the content of a report's JSON.

    Args:
        report: an `sn_export.ExportReport`, an `sn_export.ParityReport`, or the content that
            was read from the JSON of one.

    Returns:
        A new mapping with the key ``parity``, which is the only one for an
        `sn_export.ParityReport`; NaN is None and infinities are texts.

    Raises:
        TypeError: for anything else.
    """
    if not isinstance(report, (Mapping, HasContent)):
        raise TypeError(f"report must be a report or its JSON content, got {type(report).__name__}")
    given = report if isinstance(report, Mapping) else report.content()
    content: dict[str, Any] = to_json_values(given)
    if isinstance(content.get("parity"), dict):
        return content
    if isinstance(content.get("outputs"), list):
        return {"parity": content}
    raise TypeError(
        "report must be the JSON content of a report with the key 'parity' or 'outputs', "
        f"got the keys {sorted(content)}"
    )


@dataclass(frozen=True)
class ReportView:
    """The content of a report, with the sentences that every page shows.

    Attributes:
        content: the content of the JSON, as `as_content` returns it.
        verdict: whether the file is proved, in one line.
        details: further sentences: why an output failed, which module differs first, notes.
        facts: names and texts about the export, such as ``("opset", "18")``.
        first: position of the first module outside tolerance in ``parity["modules"]``.
    """

    content: dict[str, Any]
    verdict: str
    details: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    first: int | None

    @property
    def parity(self) -> dict[str, Any]:
        """The comparison."""
        return dict(self.content["parity"])


def read_report(report: Report) -> ReportView:
    """Return the view of a report or of its JSON content.

    Raises:
        TypeError: for what is no report.
        ValueError: for content in which a key is missing or a value has a wrong type.
    """
    content = as_content(report)
    with errors_of_content():
        parity = content["parity"]
        return ReportView(
            content,
            _format_verdict(parity),
            tuple(_iter_details(content, parity)),
            tuple(_iter_facts(content, parity)),
            _find_first_outside(parity),
        )


@contextlib.contextmanager
def errors_of_content() -> Iterator[None]:
    """Raise a ValueError for every error that content with missing or wrong values can cause."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"this is not the content of a report: no key {error}") from error
    except (TypeError, ValueError, AttributeError, jinja2.UndefinedError) as error:
        raise ValueError(f"this is not the content of a report: {error}") from error


def name_module(entry: Mapping[str, Any]) -> str:
    """Return the path of a module: ``"body.0"``, or ``"body.0 (call 2)"`` for its second call."""
    call = f" (call {entry['call'] + 1})" if entry["call"] else ""
    return f"{entry['module'] or '(the model)'}{call}"


def name_tensor(entry: Mapping[str, Any]) -> str:
    """Return the qualified name of a frozen tensor."""
    return qualify(entry["module"], entry["tensor"])


def select_own_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file without the keys that have tables of their own on the page."""
    shown = ("sn_export.frozen", "sn_export.versions")
    return {key: text for key, text in metadata.items() if key not in shown}


def format_dynamic_dims(entry: Mapping[str, Any]) -> str:
    """Return which dimensions of an input vary: ``0: batch``, or ``none``."""
    named = (f"{i}: {size}" for i, size in enumerate(entry["shape"]) if isinstance(size, str))
    return ", ".join(named) or "none"


def as_text(value: Any) -> str:
    """Return nested content in one line: ``[{"a": 1}, {"a": 2}]`` is ``a: 1; a: 2``."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {as_text(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        is_simple = not any(isinstance(entry, (Mapping, list)) for entry in value)
        return (", " if is_simple else "; ").join(as_text(entry) for entry in value)
    return str(value)


def as_number(value: Number) -> float:
    """Return a number of the JSON as a float."""
    return math.nan if value is None else float(value)


def format_error(value: Number, digits: int = 3) -> str:
    """Return an error with three digits: ``5.96e-07``, ``0``, ``NaN``, ``∞``."""
    number = as_number(value)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    return f"{number:.{digits}g}"


def format_sigma(value: Number) -> str:
    """Return sigma with six digits, as many as float32 holds."""
    return format_error(value, 6)


def format_element(value: Number) -> str:
    """Return the value of an element with the digits that tell float32 values apart."""
    return format_error(value, 9)


def format_share(value: float) -> str:
    """Return a fraction in percent; a small one does not become 0."""
    return f"{100 * value:.3g} %"


def format_deviation(value: Number, exact: Number) -> str:
    """Return how far ``value`` is from ``exact`` in percent of it, with its sign.

    ::

        format_deviation(1.25, 1.2625)  # "−0.99 %"
    """
    number, true = as_number(value), as_number(exact)
    if not (math.isfinite(number) and math.isfinite(true) and true):
        return "–"
    relative = number / true - 1
    return f"{100 * relative:+.2g} %".replace("-", "−") if relative else "0 %"


def format_size(count: int) -> str:
    """Return a number of bytes with its unit."""
    amount, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{amount:.3g} {unit}"


def format_shape(sizes: Sequence[int | str]) -> str:
    """Return a shape as ``batch × 32 × 3 × 3``."""
    return " × ".join(map(str, sizes)) or "scalar"


def _format_verdict(parity: Mapping[str, Any]) -> str:
    outputs: Sequence[Any] = parity["outputs"]
    sets = parity["samples"]
    over = format_count(sets, "input set")
    if parity["passed"]:
        all_of_them = f"all {len(outputs)} outputs are"
        what = {1: "the output is", 2: "both outputs are"}.get(len(outputs), all_of_them)
        return f"Proved: {what} within tolerance on {over}"
    if not outputs:
        return "Not proved: the file has no outputs"
    bad = sum(not output["passed"] for output in outputs)
    what = f"{bad} of {len(outputs)} outputs {'is' if bad == 1 else 'are'}"
    what = "the output is" if len(outputs) == 1 else what
    return f"Not proved: {what} outside tolerance on {over}"


def _iter_details(content: Mapping[str, Any], parity: Mapping[str, Any]) -> Iterator[str]:
    for output in parity["outputs"]:
        if output["reason"]:
            yield f"{output['name']}: {output['reason']}."
        elif output.get("rounding"):
            yield f"{output['name']}: {output['verdict']}."
    if not parity["passed"]:
        if parity["divergence"]:
            yield _make_sentence(parity["divergence"]["reason"])
        if "target" in content:
            yield f"'{content['target']}' was not written."
    said = content.get("notes", ())  # the command line has the warnings among its notes
    yield from (_make_sentence(note) for note in parity.get("notes", ()) if note not in said)
    yield from said


def _make_sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _iter_facts(content: Mapping[str, Any], parity: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if content.get("model"):
        yield "model", content["model"]
    if "target" in content:
        written = "" if content["path"] else ", which was not written"
        yield "file", f"{content['target']}{written}"
    for key in ("exporter", "opset"):
        if key in content:
            yield key, str(content[key])
    if content.get("attempts"):
        yield "tried before" if content.get("path") else "also tried", as_text(content["attempts"])
    if content.get("folded"):
        yield "folded", as_text(content["folded"])
    yield "input sets", str(parity["samples"])
    yield "onnxruntime providers", ", ".join(parity["providers"])
    if parity["proof_dtype"]:
        yield "proved as a copy in", parity["proof_dtype"]


def _find_first_outside(parity: Mapping[str, Any]) -> int | None:
    for i, entry in enumerate(parity["modules"]):
        if not entry["passed"] and entry["module"] == parity["first_divergent"]:
            return i
    return None
