"""Make typer commands of the four subcommands, each a dataclass in a file of its own."""

from __future__ import annotations

import dataclasses
import inspect
import operator
import sys
from typing import Annotated, Any, get_type_hints

import typer

from .check_command import CheckCommand
from .console import errors_as_messages, run
from .convert_command import ConvertCommand
from .inspect_command import InspectCommand
from .onnx_command import OnnxCommand
from .options import Command, Parsed, import_from_current_folder

app = typer.Typer(
    name="sn-export",
    help="From a checkpoint with spectral normalisation to a proved ONNX file.",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    sys.exit(run(app, "sn-export"))


def add_command(name: str, command: type[Command]) -> None:
    """Add a subcommand whose options are the fields of the dataclass ``command``.

    Typer reads the signature of a function, so it gets a function with one parameter for each
    field. The fields of the class itself come before those of its bases, in ``--help`` too.
    """
    hints = get_type_hints(command, include_extras=True)
    fields = {entry.name: entry for entry in dataclasses.fields(command)}
    own_first = (name for kind in command.__mro__ for name in inspect.get_annotations(kind))
    parameters, parsers = [], {}
    for field in (fields[name] for name in dict.fromkeys(own_first)):
        annotation, default = hints[field.name], field.default
        parsed, *options = getattr(annotation, "__metadata__", (None,))
        if isinstance(parsed, Parsed):
            annotation = operator.getitem(Annotated, (parsed.written, *options))
            parsers[field.name], default = parsed.parse, parsed.default
        if default in (..., dataclasses.MISSING):
            default = inspect.Parameter.empty
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )
        )

    def call(**written: Any) -> None:
        with errors_as_messages(written["debug"]):
            values = {
                key: parsers[key](value) if key in parsers else value
                for key, value in written.items()
            }
            if written.get("trust_pickle"):  # pickled classes may lie in the current folder
                import_from_current_folder()
            command(**values).run()

    call.__doc__ = command.__doc__
    call.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app.command(name)(call)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"sn-export {version('sn-export')}")
        except PackageNotFoundError:
            print("sn-export, not installed")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


add_command("onnx", OnnxCommand)
add_command("inspect", InspectCommand)
add_command("convert", ConvertCommand)
add_command("check", CheckCommand)
