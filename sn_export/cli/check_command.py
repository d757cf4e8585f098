"""``sn-export check``: compare a file with a checkpoint, a saved case or a folder of cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ExportError, SnExportError, UsageError
from ..results import ParityReport
from ..text import format_count
from .console import (
    BAD_INPUT,
    FAILED,
    collect_warnings,
    format_number,
    print_json,
    print_line,
    print_note,
    print_notes_of_checkpoint,
    print_warnings,
    show_parity,
    show_progress,
)
from .options import ModelOptions, Parsed, ProofOptions, parse_factory, refuse_options


@dataclass(frozen=True, kw_only=True)
class CheckCommand(ModelOptions, ProofOptions):
    """Compare an ONNX file with a checkpoint, or with a saved case.

    A folder is searched for NAME.onnx with NAME.npz beside it, and every case is replayed.

    Exit codes: 0 equal, 1 not equal, 2 they cannot be compared.
    """

    file: Annotated[
        Path, typer.Argument(metavar="MODEL.onnx", help="The ONNX file, or a folder of cases.")
    ]
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[CHECKPOINT]", help="A file, or a folder of shards.")
    ] = None
    model: Annotated[
        str | None,
        Parsed(str | None, parse_factory, None),
        typer.Option("--model", help="MODULE:FACTORY, as for 'onnx'."),
    ]
    case: Annotated[
        Path | None, typer.Option(help="Replay what 'onnx --save-case' wrote; no model needed.")
    ] = None

    def run(self) -> None:
        """Compare; raise `typer.Exit` with code 1 if the outputs differ."""
        if self.case is not None and self.file.is_dir():
            raise UsageError(f"--case goes with one ONNX file, and '{self.file}' is a folder")
        if not self.file.exists():
            raise UsageError(f"there is no file or folder '{self.file}'")
        if self.case is not None:
            self._require_no_model("--case")
            self._replay_case(self.case)
        elif self.file.is_dir():
            self._require_no_model("a folder of cases")
            self._replay_folder()
        elif self.checkpoint is None or self.model is None:
            missing = "CHECKPOINT" if self.checkpoint is None else "--model"
            raise UsageError(f"check needs {missing}, or a saved case with --case")
        else:
            self._compare(self.checkpoint, self.model)

    def _require_no_model(self, instead: str) -> None:
        given = {
            "CHECKPOINT": self.checkpoint,
            "--model": self.model,
            "--input": self.shapes,
            "--input-file": self.input_files,
            "--model-kwargs": self.model_kwargs,
            "--network": self.network,
            "--submodule": self.submodule,
            "--method": self.method,
            "--device": self.device != "cpu",
            "--key": self.key,
            "--prefix": self.prefix,
            "--no-strict": not self.strict,
            "--dim": self.dims,
            "--trust-pickle": self.trust_pickle,
            "--draws": self.draws,
        }
        refuse_options(given, f"{instead} needs no model")

    def _replay_case(self, case: Path) -> None:
        if not case.is_file():
            raise UsageError(f"there is no case '{case}'")
        with show_progress() as show:
            show(f"replaying {case}")
            parity = self._replay(self.file, case)
        if self.as_json:
            print_json({"path": self.file, "case": case, "parity": parity.content(), "notes": []})
        else:
            show_parity(parity)
        if not parity.passed:
            print_note(f"'{self.file}' does not reproduce '{case}'")
            raise typer.Exit(FAILED)

    def _replay(self, file: Path, case: Path) -> ParityReport:
        from ..proving import check_case

        parity = check_case(file, case, **self.select_keywords(check_case))
        require_comparable(parity)
        return parity

    def _compare(self, checkpoint: Path, factory: str) -> None:
        self.require_files(checkpoint)
        with show_progress() as show, collect_warnings() as warned:
            from ..proving import check_parity
            from ..running import describe_left_out, draw_references, preserved, run_reference
            from .model_factory import prepare_model

            model, inputs, loaded = prepare_model(self, checkpoint, factory, show)
            with preserved(model) as state:
                run = partial(run_reference, model, state)
                drawn = draw_references(run(inputs.example), self.samples, run)
            if drawn.left_out:
                warned.append(describe_left_out(drawn))
            sets = [inputs.example, *(one.inputs for one in drawn.references), *inputs.own]
            show(f"comparing {len(sets)} input sets with onnxruntime")
            parity = check_parity(model, self.file, sets, **self.select_keywords(check_parity))
        require_comparable(parity)
        print_warnings(warned)
        if self.as_json:
            content = {
                "path": self.file,
                "parity": parity.content(),
                "notes": [*loaded.notes, *warned],
            }
            print_json(content)
        else:
            print_notes_of_checkpoint(loaded.notes)
            show_parity(parity, told=warned)
        if not parity.passed:
            print_note(f"'{self.file}' does not reproduce the model")
            raise typer.Exit(FAILED)

    def _replay_folder(self) -> None:
        files = _find_files(self.file)
        if not files:
            raise UsageError(
                f"folder '{self.file}' holds no case: no NAME.onnx with NAME.npz beside it"
            )
        done = []
        with show_progress() as show:
            for count, file in enumerate(files):
                show(f"replaying {file}, {count + 1} of {len(files)}")
                done.append(self._replay_one(file))
        unequal = [str(one.file) for one in done if one.parity and not one.parity.passed]
        unknown = [str(one.file) for one in done if one.parity is None]
        if self.as_json:
            passed = not unequal and not unknown
            cases = [one.content() for one in done]
            print_json({"path": self.file, "passed": passed, "cases": cases})
        else:
            _show_replayed(done, len(unequal), len(unknown))
        if unknown:
            print_note(f"cannot be compared: {', '.join(unknown)}")
        if unequal:
            print_note(f"not equal: {', '.join(unequal)}")
        if unknown or unequal:
            raise typer.Exit(BAD_INPUT if unknown else FAILED)

    def _replay_one(self, file: Path) -> Replayed:
        case = file.with_suffix(".npz")
        if not case.is_file():
            return Replayed(file, None, f"no case '{case.name}' beside '{file}'")
        try:
            return Replayed(file, self._replay(file, case))
        except (SnExportError, OSError, ValueError) as error:
            return Replayed(file, None, f"{file}, {error}")


@dataclass(frozen=True)
class Replayed:
    """One case of a folder: its comparison, or the error that prevented it."""

    file: Path
    parity: ParityReport | None
    error: str = ""

    @property
    def result(self) -> str:
        """The result in words."""
        if self.parity is None:
            return "cannot be compared"
        return "equal" if self.parity.passed else "NOT EQUAL"

    def format_line(self) -> str:
        """Return the line that is printed."""
        if self.parity is None:
            return f"{self.result}: {self.error}"
        worst = max((output.max_abs for output in self.parity.outputs), default=0.0)
        text = f"max abs {format_number(worst)} over {self.parity.samples} input sets"
        return f"{self.result}: {self.file}, {text}"

    def content(self) -> dict[str, Any]:
        """Return the entry of the JSON."""
        return {
            "path": self.file,
            "case": self.file.with_suffix(".npz"),
            "result": self.result.lower(),
            "error": self.error or None,
            "parity": self.parity.content() if self.parity else None,
        }


def _show_replayed(done: Sequence[Replayed], unequal: int, unknown: int) -> None:
    for one in done:
        print_line(one.format_line())
    equal = len(done) - unequal - unknown
    count = format_count(len(done), "case")
    print(f"{count}: {equal} equal, {unequal} not, {unknown} not compared")


def _find_files(folder: Path) -> list[Path]:
    """Return the ONNX files of a folder, and for a case without one the path that it should have.

    Example: for ``a.onnx``, ``b.npz`` (a case) and ``c.npz`` (none) it is ``a.onnx, b.onnx``.
    """
    files = {path for path in folder.rglob("*.onnx") if path.is_file()}
    for path in folder.rglob("*.npz"):
        file = path.with_suffix(".onnx")
        if file not in files and _is_case(path):  # other .npz files may lie there too
            files.add(file)
    return sorted(files)


def _is_case(path: Path) -> bool:
    from ..proving import open_case

    try:
        with open_case(path):
            return True
    except SnExportError:
        return False


def require_comparable(parity: ParityReport) -> None:
    """Raise an ExportError if an output has nothing that could be compared."""
    for output in parity.outputs:
        if not output.is_comparable:
            raise ExportError(f"output '{output.name}' cannot be compared: {output.reason}")
