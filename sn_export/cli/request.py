"""What the user asks about a checkpoint and a model, resolved into both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..checkpoints import load_checkpoint, read_checkpoint
from ..results import Tolerance
from .console import print_line, print_note
from .inputs import Inputs, gather
from .model_factory import build_model
from .options import parse_dims, parse_kwargs


@dataclass(frozen=True)
class Request:
    """What both subcommands are given, as it was written."""

    checkpoint: Path
    model: str
    model_kwargs: str | None
    inputs: list[str]
    input_files: list[Path]
    rtol: Tolerance
    atol: Tolerance
    samples: int
    key: str | None = None
    prefix: str | None = None
    dim: tuple[str, ...] = ()
    trust_pickle: bool = False

    def choosing(
        self, key: str | None, prefix: str | None, dim: list[str], trust_pickle: bool
    ) -> Request:
        """Return the request with what it says about the checkpoint."""
        return dataclasses.replace(
            self, key=key, prefix=prefix, dim=tuple(dim), trust_pickle=trust_pickle
        )

    def prepare(self, show: Callable[[str], None]) -> tuple[nn.Module, Inputs, tuple[str, ...]]:
        """Return the network with the checkpoint in it, the inputs, and what had to be done."""
        kwargs, dims = parse_kwargs(self.model_kwargs), parse_dims(list(self.dim))
        inputs = gather(self.inputs, self.input_files)
        show(f"reading {self.checkpoint}")
        content = read_checkpoint(self.checkpoint, trust_pickle=self.trust_pickle)
        show(f"building {self.model}")
        model = build_model(self.model, kwargs)
        show("loading the checkpoint into the model")
        loaded = load_checkpoint(model, content, key=self.key, prefix=self.prefix, dims=dims)
        return model, inputs, loaded.notes

    def source(self) -> Path | None:
        """Return the file that says what the weights are; an index or a folder does not."""
        is_index = self.checkpoint.name.endswith(".index.json")
        return self.checkpoint if self.checkpoint.is_file() and not is_index else None


def _show_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print_line(f"checkpoint: {note}")


def _say_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print_note(f"note: {note}")
