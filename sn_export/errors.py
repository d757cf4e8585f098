"""The errors and warnings that sn_export raises."""

from __future__ import annotations

import importlib
from typing import Any

from .text import escape_lines, escape_unprintable


class SnExportError(Exception):
    """Base of every error that sn_export raises on purpose.

    A message may hold names from files, and Python prints it on the terminal: it is escaped here,
    but for line breaks, which some messages have.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*map(escape_lines, args))


class FreezeError(SnExportError):
    """A tensor cannot be frozen; the model was left as it was.

    Attributes:
        tensor: qualified name of the tensor in the model, such as ``"body.0.weight"``.
        reason: why it cannot be frozen.
        remedy: what to do about it.
        rank: the rank on which it failed, of a model that is spread over several; else None.
    """

    def __init__(self, tensor: str, reason: str, remedy: str, rank: int | None = None) -> None:
        where = "" if rank is None else f"rank {rank}: "
        super().__init__(f"{where}cannot freeze '{tensor}': {reason}. {remedy}")
        self.tensor = tensor
        self.reason = reason
        self.remedy = remedy
        self.rank = rank

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error as its arguments, since processes hand errors to each other."""
        return type(self), (self.tensor, self.reason, self.remedy, self.rank)


class SnExportWarning(UserWarning):
    """Base of every warning that sn_export gives, one line; it is escaped as an error is."""

    def __init__(self, *args: object) -> None:
        super().__init__(*map(escape_unprintable, map(str, args)))


class FrozenWeightChangedWarning(SnExportWarning):
    """A frozen weight was edited or moved inside the block; the change was discarded."""


class ReparametrizationNotAppliedWarning(SnExportWarning):
    """The network carries a reparametrization where it never uses the computed weight."""


class SpectralNormNotAppliedWarning(ReparametrizationNotAppliedWarning):
    """The network carries spectral norm where it never uses the normalised weight."""


class SpectralNormNotRecognisedWarning(SnExportWarning):
    """A module looks like a handwritten spectral norm that nothing here can freeze."""


class ReparametrizationNotRecognisedWarning(SnExportWarning):
    """A module computes its weight itself; the file holds the result, the block changes nothing."""


class TracedDecisionWarning(SnExportWarning):
    """The forward decides by values; the file always does what was decided for the example."""


class OutputNotExportedWarning(SnExportWarning):
    """The model returns tensors inside an object into which no exporter looks."""


class SpectralNormNotConvergedWarning(SnExportWarning):
    """Stored singular vectors are far from the true ones: the weights in use are far too large."""


class RandomInputsLeftOutWarning(SnExportWarning):
    """The model rejects random inputs, so the proof uses the other inputs alone."""


class PrecisionLostWarning(SnExportWarning):
    """The file computes what the model computes, but with operators that lose precision."""


class ExportError(SnExportError):
    """The model could not be exported, or the file could not be run; nothing was published."""


class MissingRuntimeError(ExportError, ImportError):
    """onnxruntime is not installed, so no file can be proved; the message says what to install."""


class CheckpointError(SnExportError):
    """A checkpoint cannot be read, be understood, fit a model, or be written; one line says why."""

    def __init__(self, message: str) -> None:
        super().__init__(escape_unprintable(message))


class UsageError(SnExportError):
    """An argument, a model or an input on the command line cannot be used."""


def __getattr__(name: str) -> Any:
    """Return `ParityError`, which is defined in `results` beside the records that it carries."""
    if name == "ParityError":
        return importlib.import_module(".results", __package__).ParityError
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
