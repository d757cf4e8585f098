"""Messages, progress and tables: the answer goes to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import typer

from ..errors import SnExportWarning, UsageError
from ..freezing import ParametrizationInfo, SpectralNormInfo
from ..results import Divergence, ParityReport
from ..text import (
    escape_lines,
    escape_unprintable,
    format_json,
    join_lines,
    strip_frames,
    to_json_values,
)

# click's UsageError: some versions of typer depend on click, and others hold a copy of it.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]

FAILED, BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141
_WIDE = 160  # columns of a table where stdout is no terminal


@contextlib.contextmanager
def errors_as_messages(debug: bool) -> Iterator[None]:
    """Turn every error into one message on stderr and exit code 2."""
    try:
        yield
    except typer.Exit:
        raise
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(PIPE_CLOSED) from None
    except KeyboardInterrupt:
        print_note("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except (Exception, SystemExit) as error:  # a network's own code may call sys.exit
        if debug:
            print(escape_lines(traceback.format_exc().expandtabs()), end="", file=sys.stderr)
        else:
            print_note(_describe_error(error))
        raise typer.Exit(BAD_INPUT) from error


def print_note(message: str) -> None:
    """Print one message on stderr, as one line."""
    print(f"sn-export: {escape_unprintable(message)}", file=sys.stderr)


def print_line(text: str) -> None:
    """Print one line of the answer on stdout."""
    print(escape_unprintable(text))


def print_json(content: Mapping[str, Any]) -> None:
    """Print JSON on stdout; NaN becomes null and an infinity a string, as in a report."""
    print(format_json(to_json_values(content)))


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the current step; without a terminal it shows nothing.

    Output of the model meanwhile goes to stderr, since stdout is for the answer alone.
    """
    with contextlib.redirect_stdout(sys.stderr):
        if not sys.stderr.isatty():
            yield lambda text: None
            return
        from rich.console import Console
        from rich.text import Text

        # The stderr of now: exporters run with a replaced one.
        with Console(file=sys.stderr).status("") as status:

            def show(text: str) -> None:
                status.update(Text(escape_unprintable(text)))  # rich reads a str as markup

            with _follow_log(show):
                yield show


def print_notes_of_checkpoint(notes: Iterable[str]) -> None:
    """Print on stdout the notes of how a checkpoint was loaded."""
    for note in notes:
        print_line(f"checkpoint: {note}")


def print_warnings(notes: Iterable[str]) -> None:
    """Print sn_export's own warnings on stderr."""
    for note in notes:
        print_note(f"note: {note}")


@contextlib.contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Yield a list that collects the texts of sn_export's warnings; others are shown as usual."""
    notes: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def keep(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, SnExportWarning):
                show(message, category, *where, **more)
            elif str(message) not in notes:
                notes.append(str(message))

        warnings.showwarning = keep
        warnings.simplefilter("always", SnExportWarning)
        yield notes


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on stdout; markup in cells and title is shown, not interpreted."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def cell(text: str) -> Text:  # rich reads a str as markup and emoji codes
        return Text(escape_unprintable(text))

    shown = Table(title=cell(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold", justify="left")
    for row in rows:
        shown.add_row(*map(cell, row))
    if sys.stdout.isatty():
        Console().print(shown)
        return
    console = Console(width=_WIDE)
    with console.capture() as text:
        console.print(shown)
    lines = [line.rstrip() for line in text.get().splitlines()]
    print("\n".join(line for line in lines if line) + "\n")


def format_number(value: float) -> str:
    """Return a number with six digits, or ``-`` for NaN."""
    return "-" if math.isnan(value) else f"{value:.6g}"


@contextlib.contextmanager
def _follow_log(show: Callable[[str], None]) -> Iterator[None]:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show(record.getMessage())

    logger = logging.getLogger("sn_export")
    handler, level, propagates = Handler(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


def _describe_error(error: BaseException) -> str:
    from ..errors import SnExportError

    text = join_lines(strip_frames(str(error)))
    if isinstance(error, (SnExportError, UsageError, ValueError, TypeError)):
        return text
    if isinstance(error, OSError):
        named = f"'{error.filename}': " if error.filename else ""
        return f"{named}{error.strerror or error}"
    return f"unexpected {type(error).__name__}: {text}; --debug shows where"


def run(app: typer.Typer, name: str) -> int:
    """Run the command line and return its exit code; without arguments it shows its help."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A letter that the terminal's encoding lacks is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] or ["--help"]
    try:
        return app(arguments, prog_name=name, standalone_mode=False) or 0
    except typer.Abort:
        return INTERRUPTED
    except _USAGE_ERROR as error:
        print_note(_describe_usage_error(error, name))
        return BAD_INPUT


def _describe_usage_error(error: Any, name: str) -> str:
    command = error.ctx.command_path if error.ctx is not None else name
    text = " ".join(error.format_message().split()).replace("Value error, ", "")
    return f"{text.rstrip('.')}; see '{command} --help'"


_BEFORE, _AFTER = 5, 3  # modules shown around the first one to differ


def show_frozen(frozen: Sequence[SpectralNormInfo | ParametrizationInfo]) -> None:
    """Print the tensors that were frozen."""
    if not frozen:
        print("nothing to freeze in the model")
        return
    print_table(
        "frozen",
        ["tensor", "kind", "shape", "dtype", "dim", "sigma"],
        [
            [
                info.name,
                info.kind,
                "x".join(map(str, info.shape)),
                info.dtype,
                *_describe_norm(info),
            ]
            for info in frozen
        ],
    )


def _describe_norm(info: SpectralNormInfo | ParametrizationInfo) -> tuple[str, str]:
    if not isinstance(info, SpectralNormInfo):
        return "", ""  # another reparametrization, which has no sigma
    return str(info.dim), format_number(info.sigma)


def show_parity(
    parity: ParityReport, with_modules: bool = False, told: Collection[str] = ()
) -> None:
    """Print the comparison of each output, and that of the modules if it failed or on request.

    Args:
        parity: the comparison.
        with_modules: print all modules, also where the comparison passed.
        told: notes that were printed before, and are left out.
    """
    print_table(
        f"parity with onnxruntime over {parity.samples} input sets",
        ["output", "shape", "dtype", "max abs", "max rel", "mean abs", "result"],
        [
            [
                output.name,
                "x".join(map(str, output.shape)),
                output.dtype,
                format_number(output.max_abs),
                format_number(output.max_rel),
                format_number(output.mean_abs),
                "equal" if output.passed else "NOT EQUAL",
            ]
            for output in parity.outputs
        ],
    )
    for output in parity.outputs:
        if output.reason:
            print_line(join_lines(f"{output.name}: {output.reason}"))
    if parity.divergence is not None and (with_modules or not parity.passed):
        _show_modules(parity.divergence, with_modules)
    for note in parity.notes:
        if note not in told:
            print_note(f"note: {note}")


def _show_modules(divergence: Divergence, is_all: bool) -> None:
    """Print all modules, or those around the first one to differ."""
    modules = divergence.modules
    bad = next((i for i, entry in enumerate(modules) if not entry.passed), len(modules))
    if divergence.first or is_all:
        print_table(
            "modules in network order",
            ["module", "type", "max abs", "result"],
            [
                [
                    entry.module or "(the model itself)",
                    entry.type,
                    format_number(entry.max_abs),
                    "equal" if entry.passed else "NOT EQUAL" + (", first" if i == bad else ""),
                ]
                for i, entry in enumerate(modules)
                if is_all or bad - _BEFORE <= i <= bad + _AFTER
            ],
        )
    print_line(join_lines(divergence.reason))
