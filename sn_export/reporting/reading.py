"""Reading the content of a report, once and in one place.

Files written by older versions lack some entries. What is missing is None or empty in the view,
and the pages leave it out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..text import qualified
from .content import as_content
from .view import FrozenView, HistogramView, ModuleView, OutputView, ReportView


def read_report(report: Any) -> ReportView:
    """Return the view of a report or of its JSON content.

    Raises:
        TypeError: for what is no report.
        ValueError: for the content of a report in which something is missing or of a wrong
            type.
    """
    content = as_content(report)
    try:
        return _view(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"this is not the content of a report: {found}") from error


def _view(content: Mapping[str, Any]) -> ReportView:
    parity = content["parity"]
    outputs = tuple(_output(entry) for entry in parity["outputs"])
    passed = bool(outputs) and all(output.passed for output in outputs)
    # Where the two part is told by the comparison, by a part of its own in it, or by both.
    divergence = {**parity, **(parity.get("divergence") or {})}
    first = divergence.get("first", divergence.get("first_divergent"))
    modules = tuple(_modules(divergence.get("modules") or (), first))
    path = str(content.get("path") or "")
    return ReportView(
        passed=passed,
        verdict=_verdict(outputs, passed),
        details=tuple(_details(outputs, divergence, first, content, passed)),
        path=path,
        facts=tuple(_facts(content, parity)),
        outputs=outputs,
        frozen=tuple(_frozen(entry) for entry in content.get("frozen") or ()),
        modules=modules,
        files=tuple(
            (str(name), int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in (content.get("files") or {}).items()
        ),
        versions=_pairs(content.get("versions")),
        metadata=_pairs(content.get("metadata")),
        command=str(content.get("command") or ""),
    )


def _output(entry: Mapping[str, Any]) -> OutputView:
    return OutputView(
        name=str(entry["name"]),
        dtype=str(entry["dtype"]),
        shape=_shape(entry["shape"]),
        passed=bool(entry["passed"]),
        reason=str(entry.get("reason") or ""),
        max_abs=_number(entry["max_abs"]),
        max_rel=_number(entry["max_rel"]),
        mean_abs=_number(entry["mean_abs"]),
        median_abs=_optional(entry, "median_abs"),
        p999_abs=_optional(entry, "p999_abs"),
        fraction_outside=_optional(entry, "fraction_outside"),
        worst_index=", ".join(str(i) for i in entry["worst_index"]),
        # None stands for NaN in JSON and for no value at all; an error of 0 has a value.
        worst_expected=_element(entry, "worst_expected"),
        worst_got=_element(entry, "worst_got"),
        worst_sample=str(entry["worst_sample"]),
        rtol=_number(entry["rtol"]),
        atol=_number(entry["atol"]),
        samples=int(entry["samples"]),
        histogram=_histogram(entry.get("histogram")),
    )


def _histogram(entry: Any) -> HistogramView | None:
    if not entry:
        return None
    found = entry if isinstance(entry, Mapping) else {"edges": entry[0], "counts": entry[1]}
    edges = tuple(_number(edge) for edge in found["edges"])
    counts = tuple(int(count) for count in found["counts"])
    if len(edges) != len(counts) + 1:
        raise ValueError(f"a histogram has {len(edges)} edges around {len(counts)} counts")
    return HistogramView(
        edges, counts, int(found.get("zeros") or 0), int(found.get("not_finite") or 0)
    )


def _frozen(entry: Mapping[str, Any]) -> FrozenView:
    return FrozenView(
        name=qualified(str(entry["module"]), str(entry["tensor"])),
        kind=str(entry["kind"]),
        shape=_shape(entry["shape"]),
        dtype=str(entry["dtype"]),
        sigma=_number(entry.get("sigma")),
        sigma_exact=_element(entry, "sigma_exact"),
        is_applied=bool(entry.get("is_applied", True)),
    )


def _modules(entries: Iterable[Mapping[str, Any]], first: Any) -> Iterable[ModuleView]:
    found = False
    for entry in entries:
        name, passed = str(entry["module"]), bool(entry["passed"])
        is_first = not found and not passed and name == first
        found = found or is_first
        call = int(entry.get("call") or 0)
        yield ModuleView(
            (name or "(the model)") + (f" (call {call + 1})" if call else ""),
            str(entry["type"]),
            _number(entry["max_abs"]),
            _number(entry["max_rel"]),
            passed,
            is_first,
        )


def _verdict(outputs: Sequence[OutputView], passed: bool) -> str:
    samples = max((output.samples for output in outputs), default=0)
    over = f"{samples} input set{'' if samples == 1 else 's'}"
    if passed:
        what = {1: "the output is", 2: "both outputs are"}.get(
            len(outputs), f"all {len(outputs)} outputs are"
        )
        return f"Proved: {what} within tolerance on {over}"
    if not outputs:
        return "Not proved: the file has no outputs"
    bad = sum(not output.passed for output in outputs)
    what = f"{bad} of {len(outputs)} outputs {'is' if bad == 1 else 'are'}"
    what = "the output is" if len(outputs) == 1 else what
    return f"Not proved: {what} outside tolerance on {over}"


def _details(
    outputs: Sequence[OutputView],
    divergence: Mapping[str, Any],
    first: Any,
    content: Mapping[str, Any],
    passed: bool,
) -> Iterable[str]:
    for output in outputs:
        if output.reason:
            yield f"{output.name}: {output.reason}."
    if divergence.get("reason") and not passed:
        yield _sentence(str(divergence["reason"]))
    elif first is not None and not passed:
        yield f"The first module to differ is {first or 'the model itself'}."
    if not passed and content.get("path", "") is None:
        yield "No file was published."
    notes = content.get("notes")
    yield from (str(note) for note in (notes if isinstance(notes, list) else ()))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _facts(content: Mapping[str, Any], parity: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if content.get("path"):
        yield "file", str(content["path"])
    for key in ("exporter", "opset", "dtype"):
        if content.get(key) is not None:
            yield key, str(content[key])
    if content.get("attempts"):
        when = "tried before" if content.get("path") else "also tried"
        yield when, as_text(content["attempts"])
    if content.get("folded"):
        yield "folded", as_text(content["folded"])
    yield "input sets", str(parity.get("samples", ""))
    if parity.get("providers"):
        yield "onnxruntime providers", ", ".join(str(name) for name in parity["providers"])


def as_text(value: Any) -> str:
    """Return nested content in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {as_text(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        simple = not any(isinstance(entry, (Mapping, list, tuple)) for entry in value)
        return (", " if simple else "; ").join(as_text(entry) for entry in value)
    return str(value)


def _pairs(entries: Any) -> tuple[tuple[str, str], ...]:
    return tuple((str(key), as_text(entry)) for key, entry in (entries or {}).items())


def _shape(sizes: Iterable[Any]) -> str:
    return " × ".join(str(size) for size in sizes) or "scalar"


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _optional(entry: Mapping[str, Any], key: str) -> float | None:
    return _number(entry[key]) if key in entry else None


def _element(entry: Mapping[str, Any], key: str) -> float | None:
    value = entry.get(key)
    return None if value is None else float(value)
