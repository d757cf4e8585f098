"""A report as one HTML page: no script, nothing from the network, all text escaped."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import markupsafe

from ..text import escape_unprintable
from . import content, drawings

_FOLD = 12  # a table beside its chart with at least so many rows is closed at first
_MANY = 20  # a chart with more rows is closed too, and has an overview above it


def to_html(report: content.Report) -> str:
    """Return a report as one self-contained HTML page.

    Args:
        report: an `sn_export.ExportReport`, an `sn_export.ParityReport`, or the content of the
            JSON of one. Its keys ``command`` (the command line) and ``files`` (see
            `collect_file_facts`) are shown too.

    Raises:
        TypeError: for what is no report.
        ValueError: for JSON content in which a key is missing or a value has a wrong type.
    """
    view = content.read_report(report)
    with content.errors_of_content():
        page = _load_template("report.html").render(
            view=view,
            report=view.content,
            parity=view.parity,
            fold=_FOLD,
            many=_MANY,
            pictures=[
                (output, [(one, drawings.draw_sample(one)) for one in output["pictures"]])
                for output in view.parity["outputs"]
                if output.get("pictures")
            ],
            sigma_chart=drawings.chart_sigma(view.content.get("frozen", ())),
            module_chart=drawings.chart_modules(view.parity["modules"], view.first),
            histograms=[
                (output, chart)
                for output in view.parity["outputs"]
                if (chart := drawings.chart_histogram(output)) is not None
            ],
        )
    return page.strip() + "\n"


def inspection_to_html(inspection: Mapping[str, Any]) -> str:
    """Return the answer of ``sn-export inspect`` as one self-contained HTML page.

    Args:
        inspection: the JSON of ``sn-export inspect --json``; the key ``command`` is shown too.

    Raises:
        ValueError: for content in which a key is missing or a value has a wrong type.
    """
    with content.errors_of_content():
        layers = inspection["layers"]
        normed = [layer for layer in layers if layer["sigma"] is not None]
        page = _load_template("checkpoint.html").render(
            found=inspection,
            normed=normed,
            measured=normed or any(layer["sigma_exact"] is not None for layer in layers),
            many=_MANY,
            fold=_FOLD,
            sigma_chart=drawings.chart_sigma(normed),
        )
    return page.strip() + "\n"


@functools.cache
def _load_template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sn_export.reporting"),
        autoescape=True,
        finalize=_escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        with_breaks=_add_breaks,
        error=content.format_error,
        sigma=content.format_sigma,
        element=content.format_element,
        share=content.format_share,
        deviation=content.format_deviation,
        bytes=content.format_size,
        shape=content.format_shape,
        dynamic_dims=content.format_dynamic_dims,
        make_strip=drawings.make_strip,
        describe_worst_sigma=drawings.describe_worst_sigma,
        describe_worst_module=drawings.describe_worst_module,
        own_metadata=content.select_own_metadata,
        module_name=content.name_module,
        tensor_name=content.name_tensor,
    )
    return environment.get_template(name)


def _add_breaks(text: str) -> markupsafe.Markup:
    """Return a key as markup that a browser may break behind ``.``, ``_``, ``-`` and ``/``.

    Example: ``body.0.weight`` is ``body.<wbr>0.<wbr>weight``.
    """
    escaped = str(markupsafe.escape(escape_unprintable(text)))
    return markupsafe.Markup(re.sub(r"(?<=[._/-])(?=.)", "<wbr>", escaped))


def _escape(value: Any) -> Any:
    """Return a value for a template, with control and bidirectional characters escaped.

    Jinja escapes ``<``, ``&`` and quotes afterwards.
    """
    is_text = isinstance(value, str) and not isinstance(value, markupsafe.Markup)
    return escape_unprintable(value) if is_text else value
