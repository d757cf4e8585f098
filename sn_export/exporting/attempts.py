"""What is said of an export: why attempts failed, and what to know of the file that was made."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

from torch import nn

from ..errors import (
    ExportError,
    OutputNotExportedWarning,
    PrecisionLostWarning,
    ReparametrizationNotRecognisedWarning,
    SpectralNormNotConvergedWarning,
    TracedDecisionWarning,
)
from ..proving import Proof, differs, is_imprecise
from ..results import Attempt, Exporter, FoldedInitializer, ParityError, ParityReport
from ..running import Reference
from ..text import quote_names
from .failures import traced_decision
from .quiet import no_fused_attention

Attempts = Sequence[tuple[Exporter, ExportError | ParityError]]


def with_cause(
    error: ParityError,
    proof: Proof,
    freezing: Callable[[], AbstractContextManager[nn.Module]],
    first: Reference,
) -> ParityError:
    """Say so where no exporter is to blame: the model itself differs under the same conditions."""
    found = error.divergence
    if found is None or not found.is_deterministic:
        return error
    if differs(proof, no_fused_attention, first):
        cause = (
            "the model's own outputs differ as well without torch's fused attention, which no "
            "exporter takes and which gives zeros at padding: call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )
    elif differs(proof, freezing, first):
        cause = (
            "inside frozen_spectral_norm the model's own outputs differ as well: its forward uses "
            "something else than one plain weight for each layer, such as the raw weight, by "
            "parameters() or as 'weight_orig' (read the module's 'weight' instead), the weight of "
            "a layer that it never calls, or vectors that move on at every call in eval mode"
        )
    else:
        return error
    found = dataclasses.replace(found, reason=f"{found.reason}; {cause}")
    report = dataclasses.replace(error.report, divergence=found)
    return ParityError(f"{error}; {cause}", report)


def is_hopeless(error: ExportError | ParityError) -> bool:
    """Whether no other exporter can do better."""
    if isinstance(error, ParityError):
        return error.divergence is not None and not error.divergence.is_deterministic
    return isinstance(error.__cause__, OSError)


def raise_all(attempts: Attempts) -> NoReturn:
    """Raise one error with what each attempt ended with; a `ParityError` if one of them is."""
    errors = [error for _, error in attempts]
    if len(errors) == 1:
        raise errors[0]
    text = "\n".join(dict.fromkeys(str(error) for error in errors))
    differing = next((error for error in errors if isinstance(error, ParityError)), None)
    if differing is not None:
        others = tuple(Attempt(tried, str(e)) for tried, e in attempts if e is not differing)
        export = differing.export and dataclasses.replace(differing.export, attempts=others)
        raise ParityError(text, differing.report, export) from errors[0]
    raise ExportError(text) from errors[0]


def warn_of_folded(folded: Sequence[FoldedInitializer]) -> None:
    """Warn of weights that the block does not know."""
    weights = [entry for entry in folded if entry.is_weight]
    if not weights:
        return
    warnings.warn(
        f"the model computes {quote_names(entry.name for entry in weights)} by itself, in a way "
        "that frozen_spectral_norm does not know. The file holds the computed values and is "
        "proved, but a with-block of your own leaves these modules as they are. If it is spectral "
        "norm, register_spectral_norm teaches the block; what was folded is in the report's "
        "'folded'",
        ReparametrizationNotRecognisedWarning,
        stacklevel=3,
    )


def warn_of_decisions(attempts: Attempts, model: nn.Module, parity: ParityReport) -> None:
    """Warn if an exporter that takes no decision by values was tried first."""
    for _, error in attempts:
        where = traced_decision(error, model)
        if where is not None:
            warnings.warn(
                f"the forward decides by the values of a tensor ({where}), which the dynamo "
                "exporter does not take. The TorchScript exporter's file always does what was "
                f"decided for the example, and is proved for {parity.samples} input sets alone. "
                "Pass inputs=[...] that are decided otherwise, or use torch.where or torch.cond",
                TracedDecisionWarning,
                stacklevel=3,
            )


def warn_of_proof(note: str, parity: ParityReport) -> None:
    """Warn of layers that are far from converged, and of precision that a file has lost."""
    if note:
        warnings.warn(note, SpectralNormNotConvergedWarning, stacklevel=3)
    for output in parity.outputs:
        if is_imprecise(output.rounding):
            warnings.warn(
                f"output '{output.name}': {output.verdict}. rtol={output.rtol:g} as an argument "
                "accepts that",
                PrecisionLostWarning,
                stacklevel=3,
            )


def warn_of_unseen(unseen: Sequence[str]) -> None:
    """Warn of outputs that the file lacks."""
    if unseen:
        warnings.warn(
            f"the file lacks the tensors within {quote_names(unseen)}, which the model returns: "
            "return them as tensors, in tuples, lists, dicts or dataclasses",
            OutputNotExportedWarning,
            stacklevel=3,
        )
