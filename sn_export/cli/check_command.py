"""``sn-export check``: a file against a checkpoint, a saved case or a folder of cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ..errors import ExportError, SnExportError, UsageError
from ..proving import check_parity, opened_case
from ..results import ParityReport
from ..running import random_sets
from .console import (
    BAD_INPUT,
    FAILED,
    collect_warnings,
    number,
    print_json,
    print_line,
    print_note,
    progress,
)
from .request import Request, _say_notes, _show_notes
from .tables import show_parity

Check = Callable[[Path, Path], ParityReport]  # `check_case` with its options


def run_case(file: Path, case: Path, check: Check, as_json: bool) -> None:
    """Replay one case; raise `typer.Exit` with code 1 if the outputs differ."""
    with progress() as show:
        show(f"replaying {case}")
        parity = check(file, case)
    require_comparable(parity)
    if as_json:
        print_json({"path": str(file), "case": str(case), "parity": parity.content(), "notes": []})
    else:
        show_parity(parity)
    if not parity.passed:
        print_note(f"'{file}' does not reproduce '{case}'")
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class Replayed:
    """One case of a folder: compared, or why not."""

    file: Path
    parity: ParityReport | None
    error: str = ""

    @property
    def result(self) -> str:
        """What came of it, in words."""
        if self.parity is None:
            return "cannot be compared"
        return "equal" if self.parity.passed else "NOT EQUAL"

    def line(self) -> str:
        """Return what is printed of it."""
        if self.parity is None:
            return f"{self.result}: {self.error}"
        worst = max((output.max_abs for output in self.parity.outputs), default=0.0)
        text = f"max abs {number(worst)} over {self.parity.samples} input sets"
        return f"{self.result}: {self.file}, {text}"

    def content(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "path": str(self.file),
            "case": str(self.file.with_suffix(".npz")),
            "result": self.result.lower(),
            "error": self.error or None,
            "parity": self.parity.content() if self.parity else None,
        }


def run_folder(folder: Path, check: Check, as_json: bool) -> None:
    """Replay each ``NAME.npz`` beside ``NAME.onnx``; raise `typer.Exit` if one is not equal."""
    files = _files(folder)
    if not files:
        raise UsageError(f"folder '{folder}' holds no case: no NAME.onnx with NAME.npz beside it")
    done = []
    with progress() as show:
        for count, file in enumerate(files):
            show(f"replaying {file}, {count + 1} of {len(files)}")
            done.append(_replay(file, check))
    unequal = [str(one.file) for one in done if one.parity and not one.parity.passed]
    unknown = [str(one.file) for one in done if one.parity is None]
    if as_json:
        passed = not unequal and not unknown
        cases = [one.content() for one in done]
        print_json({"path": str(folder), "passed": passed, "cases": cases})
    else:
        for one in done:
            print_line(one.line())
        equal = len(done) - len(unequal) - len(unknown)
        count_of_all = f"{len(done)} case{'' if len(done) == 1 else 's'}"
        print(f"{count_of_all}: {equal} equal, {len(unequal)} not, {len(unknown)} not compared")
    if unknown:
        print_note(f"cannot be compared: {', '.join(unknown)}")
    if unequal:
        print_note(f"not equal: {', '.join(unequal)}")
    if unknown or unequal:
        raise typer.Exit(BAD_INPUT if unknown else FAILED)


def _files(folder: Path) -> list[Path]:
    """Return the ONNX files of a folder, and where cases say that one should be."""
    files = {path for path in folder.rglob("*.onnx") if path.is_file()}
    for path in folder.rglob("*.npz"):
        file = path.with_suffix(".onnx")
        if file not in files and _is_case(path):  # other arrays may lie there too
            files.add(file)
    return sorted(files)


def _is_case(path: Path) -> bool:
    try:
        with opened_case(path):
            return True
    except SnExportError:
        return False


def _replay(file: Path, check: Check) -> Replayed:
    case = file.with_suffix(".npz")
    if not case.is_file():
        return Replayed(file, None, f"no case '{case.name}' beside '{file}'")
    try:
        parity = check(file, case)
        require_comparable(parity)
    except (SnExportError, OSError, ValueError) as error:
        return Replayed(file, None, f"{file}, {error}")
    return Replayed(file, parity)


def run_check(request: Request, file: Path, as_json: bool, proof_dtype: Any = None) -> None:
    """Compare; raise `typer.Exit` with code 1 if the outputs differ."""
    with progress() as show, collect_warnings() as warned:
        model, inputs, notes = request.prepare(show)
        sets = [inputs.example, *random_sets(inputs.example, request.samples), *inputs.own]
        show(f"comparing {len(sets)} input sets with onnxruntime")
        parity = check_parity(
            model, file, sets, rtol=request.rtol, atol=request.atol, proof_dtype=proof_dtype
        )
    require_comparable(parity)
    _say_notes(warned)
    if as_json:
        print_json({"path": str(file), "parity": parity.content(), "notes": [*notes, *warned]})
    else:
        _show_notes(notes)
        show_parity(parity)
    if not parity.passed:
        print_note(f"'{file}' does not reproduce the model")
        raise typer.Exit(FAILED)


def require_comparable(parity: ParityReport) -> None:
    """Raise an ExportError if an output has nothing that could be compared."""
    for output in parity.outputs:
        if not output.is_comparable:
            raise ExportError(f"output '{output.name}' cannot be compared: {output.reason}")
