"""Write reports to files: the suffix chooses the format, and no half-written file is ever seen."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import Drafts, as_path, name_side_file, publish, require_place
from ..text import format_json, to_json_values
from .content import Report, as_content
from .html import inspection_to_html, to_html
from .markdown import to_markdown

REPORT_SUFFIXES = (".json", ".html", ".md")
INSPECTION_SUFFIXES = (".json", ".html")


def save_report(report: Report, path: str | os.PathLike[str], *, command: str = "") -> Path:
    """Write a report to ``path``: JSON, HTML or Markdown by its suffix.

    Size and sha256 of the ONNX file and of its external data are added if the file is there.

    Args:
        report: an `sn_export.ExportReport`, an `sn_export.ParityReport`, or the content of the
            JSON of one.
        path: the file to write; its folder must exist. One that is there is replaced.
        command: the command line that made the file, if there was one.

    Returns:
        The path.

    Raises:
        TypeError: for what is no report, or no path.
        ValueError: for another suffix, or JSON content in which a key is missing or a value has a
            wrong type.
        FileNotFoundError: if the folder does not exist.
        IsADirectoryError: if ``path`` is a folder.
    """
    target = require_report_path(path)
    content = as_content(report)
    if content.get("path") and "files" not in content:
        content["files"] = collect_file_facts(Path(content["path"]))
    if command:
        content["command"] = command
    if target.suffix == ".json":
        text = f"{format_json(content)}\n"
    else:
        text = (to_html if target.suffix == ".html" else to_markdown)(content)
    return _write(text, target)


def save_inspection(
    inspection: Mapping[str, Any], path: str | os.PathLike[str], *, command: str = ""
) -> Path:
    """Write the answer of ``sn-export inspect --json`` as a page, or as JSON.

    Args:
        inspection: the content of that JSON; paths, tuples and NaN are converted.
        path: the file to write, ``.html`` or ``.json``; its folder must exist.
        command: the command line.

    Returns:
        The path.

    Raises:
        ValueError: for another suffix, or content in which a key is missing or a value has a
            wrong type.
        FileNotFoundError: if the folder does not exist.
        IsADirectoryError: if ``path`` is a folder.
    """
    target = require_report_path(path, INSPECTION_SUFFIXES)
    content = to_json_values(dict(inspection)) | ({"command": command} if command else {})
    if target.suffix == ".json":
        return _write(f"{format_json(content)}\n", target)
    return _write(inspection_to_html(content), target)


def _write(text: str, target: Path) -> Path:
    with Drafts() as drafts:
        draft = drafts.open(target)
        # Written as bytes: line ends are the same on every system.
        draft.write_bytes(text.encode("utf-8", "replace"))
        publish([(draft, target)])
    return target


def require_report_path(
    path: str | os.PathLike[str], suffixes: Sequence[str] = REPORT_SUFFIXES
) -> Path:
    """Return ``path`` if a report can be written there; raises as `save_report` does."""
    target = as_path(path, "path")
    if target.suffix not in suffixes:
        wanted = ", ".join(suffixes)
        raise ValueError(f"the name of this report must end in one of {wanted}, got '{target}'")
    require_place(target)
    return target


def collect_file_facts(path: Path) -> dict[str, dict[str, Any]]:
    """Return ``bytes`` and ``sha256`` of an ONNX file, and of its external data if it has any.

    Example: ``{"net.onnx": {"bytes": 812, "sha256": "9f86..."}}``; empty if the file is absent.
    """
    if not path.is_file():
        return {}
    data = name_side_file(path)
    # A data file whose name does not occur in the model is left over from an earlier export.
    facts, has_data = _collect_facts(path, data.name.encode())
    found = {path.name: facts}
    if has_data and data.is_file():
        found[data.name], _ = _collect_facts(data)
    return found


def _collect_facts(path: Path, name: bytes = b"") -> tuple[dict[str, Any], bool]:
    """Return size and hash of a file, and whether ``name`` occurs in it, in bounded memory."""
    digest, count, has_name, tail = hashlib.sha256(), 0, False, b""
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            count += len(block)
            has_name = has_name or (bool(name) and name in tail + block)
            tail = block[-len(name) :]
    return {"bytes": count, "sha256": digest.hexdigest()}, has_name
