"""Try torch's exporters one after the other until a file is proved, and say what went wrong."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NoReturn

from ..errors import (
    ExportError,
    OutputNotExportedWarning,
    PrecisionLostWarning,
    RandomInputsLeftOutWarning,
    ReparametrizationNotRecognisedWarning,
    SpectralNormNotConvergedWarning,
    TracedDecisionWarning,
)
from ..files import DraftFolders, disk_errors_as
from ..freezing import describe_sites
from ..proving import Case, Proof, differs, is_imprecise, name_called
from ..results import (
    Attempt,
    Exporter,
    ExportReport,
    FoldedInitializer,
    ParityError,
    ParityReport,
)
from ..running import Reference, no_fused_attention
from ..text import quote_names, quote_subject
from .arguments import Request
from .failures import Failure, describe_failures, find_traced_decision
from .onnx_file import Written, list_versions, make_metadata, write_onnx
from .references import extend_references

_logger = logging.getLogger("sn_export")
_CALLER = 6  # stack level of whoever calls export_onnx, from `warn_of_made`

Finding = tuple[type[Warning], str]  # the category of a warning, and its text


@dataclass(frozen=True)
class Made:
    """A file that was proved, not published yet.

    Attributes:
        draft: the file, beside its place.
        report: its report.
        case: the inputs and outputs of its proof, where the user wants them saved.
        failures: the exporters that were tried before, with their errors.
    """

    draft: Path
    report: ExportReport
    case: Case | None
    failures: Sequence[Failure]


def make_proved_file(request: Request, proof: Proof, drafts: DraftFolders) -> Made:
    """Return the first file that an exporter makes and that is proved.

    Args:
        request: which exporters are tried, and what is asked of them.
        proof: proves each file.
        drafts: keeps the files until they are published.

    Raises:
        ExportError: if no exporter can make a file that onnxruntime runs.
        ParityError: if one made a file, and none reproduces the model.
    """
    failures: list[Failure] = []
    for exporter in request.exporters:
        draft = drafts.open(request.target)
        frozen, source = request.frozen, request.source
        metadata = make_metadata(
            exporter, list_versions(), frozen, source, request.metadata, request.call.example.draws
        )
        _logger.info("exporting with %s, %d tensors frozen", exporter, len(frozen))
        try:
            return _make(request, proof, exporter, metadata, draft, failures)
        except (ExportError, ParityError) as error:
            failures.append((exporter, error))
            if _rules_out_others(error):
                break
            _logger.info("not with %s: %s", exporter, error)
    _raise_failures(failures)


def _make(
    request: Request,
    proof: Proof,
    exporter: Exporter,
    metadata: Mapping[str, str],
    draft: Path,
    failures: Sequence[Failure],
) -> Made:
    written = _write(request, proof, exporter, metadata, draft)
    if written.program is not None and request.dims:
        extend_references(proof, request, written.program)
    if not request.keep_programs:
        written = written.drop_program()
    try:
        proved = proof.prove(
            draft,
            f"the {exporter} exporter",
            written.declared,
            is_last=exporter == request.exporters[-1],
        )
    except ParityError as error:
        found = _add_cause(error, proof)
        found.export = _describe_export(request, exporter, metadata, written, found.report)
        raise found from None
    parity = replace(proved.parity, notes=(*proved.parity.notes, *written.notes))
    report = replace(
        _describe_export(request, exporter, metadata, written, parity),
        attempts=tuple(Attempt(tried, str(error)) for tried, error in failures),
        onnx_program=written.program,
    )
    return Made(draft, report, proved.case, failures)


def _write(
    request: Request, proof: Proof, exporter: Exporter, metadata: Mapping[str, str], draft: Path
) -> Written:
    """Export the frozen model to ``draft``, and leave it as it was."""
    release = proof.freezing.release
    try:
        # No variable holds the block, so that it ends before the state around it is put back,
        # even if an interrupt strikes as it is left.
        with disk_errors_as(ExportError, request.target), proof.freezing.block():
            release()  # the block looks at its weights, on entering and on leaving
            return write_onnx(request, proof.references[0], exporter, metadata, draft, release)
    finally:
        release()
        proof.state.reset()


def _describe_export(
    request: Request,
    exporter: Exporter,
    metadata: Mapping[str, str],
    written: Written,
    parity: ParityReport,
) -> ExportReport:
    return ExportReport(
        path=request.target,
        exporter=exporter,
        opset=written.opset,
        parity=parity,
        frozen=request.frozen,
        versions=dict(list_versions()),
        metadata=dict(metadata),
        folded=written.folded,
        inputs=written.inputs,
        model=name_called(request.model, request.call.example),
    )


def _add_cause(error: ParityError, proof: Proof) -> ParityError:
    """Add the cause where the model itself, not an exporter, gives other outputs when frozen."""
    found = error.divergence
    if found is None or not found.is_deterministic:
        return error
    if differs(proof, no_fused_attention):
        cause = (
            "the model's own outputs differ as well without torch's fused attention, which no "
            "exporter takes and which gives zeros at padding: call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )
    elif differs(proof, proof.freezing.block):
        cause = (
            "inside frozen_spectral_norm the model's own outputs differ as well: its forward uses "
            "something else than one plain weight for each layer, such as the raw weight, by "
            "parameters() or as 'weight_orig' (read the module's 'weight' instead), the weight of "
            "a layer that it never calls, a computed weight that it writes (what it writes is lost "
            "at the next computation), or vectors that move on at every call in eval mode"
        )
    else:
        return error
    found = replace(found, reason=f"{found.reason}; {cause}")
    report = replace(error.report, divergence=found)
    return ParityError(f"{error}; {cause}", report)


def _rules_out_others(error: ExportError | ParityError) -> bool:
    """Whether no other exporter can do better: the model is random, or the disk takes no file."""
    if isinstance(error, ParityError):
        return error.divergence is not None and not error.divergence.is_deterministic
    return isinstance(error.__cause__, OSError)


def _raise_failures(failures: Sequence[Failure]) -> NoReturn:
    """Raise one error that has those of all exporters; a `ParityError` if one of them is."""
    errors = [error for _, error in failures]
    if len(errors) == 1:
        raise errors[0]
    text = describe_failures(failures)
    differing = next((error for error in errors if isinstance(error, ParityError)), None)
    if differing is not None:
        others = tuple(Attempt(tried, str(e)) for tried, e in failures if e is not differing)
        export = differing.export and replace(differing.export, attempts=others)
        raise ParityError(text, differing.report, export) from errors[0]
    raise ExportError(text) from errors[0]


def warn_of_made(request: Request, made: Made, example: Reference, left_out: str) -> None:
    """Warn of what a user should know about a file, though it is proved.

    Args:
        request: what was asked for.
        made: the file.
        example: the model's outputs for the example.
        left_out: a sentence on random inputs that were left out; empty if none was.
    """
    report = made.report
    found: Iterator[Finding] = chain(
        _find_folded_weights(request, report.folded),
        _find_traced_decisions(request, made),
        _find_unseen_outputs(example.unseen),
        [(RandomInputsLeftOutWarning, left_out)] if left_out else (),
        [(SpectralNormNotConvergedWarning, request.note)] if request.note else (),
        _find_lost_precision(report.parity),
    )
    for category, message in found:
        warnings.warn(message, category, stacklevel=_CALLER)


def _find_folded_weights(
    request: Request, folded: Sequence[FoldedInitializer]
) -> Iterator[Finding]:
    """Yield warnings of weights that the block left, so that the file holds folded values."""
    weights = [entry.name for entry in folded if entry.is_weight]
    known = {info.name for info in describe_sites(request.model, None)} if weights else set()
    frozen = {info.name for info in request.frozen}
    if made := [name for name in weights if name in frozen]:
        yield (
            ReparametrizationNotRecognisedWarning,
            f"the model computes a weight from the frozen {quote_names(made)}. The file holds what "
            "it computes, under that name, and is proved",
        )
    known -= frozen
    if left := [name for name in weights if name in known]:
        yield (
            ReparametrizationNotRecognisedWarning,
            f"{quote_subject(left, 'is')} under a reparametrization that freeze='spectral_norm' "
            "leaves. The file holds the computed values and is proved; freeze='all' freezes them "
            "all, as frozen_parametrizations does",
        )
    if unknown := [name for name in weights if name not in known | frozen]:
        yield (
            ReparametrizationNotRecognisedWarning,
            f"the model computes {quote_names(unknown)} by itself, in a way that "
            "frozen_spectral_norm does not know. The file holds the computed values and is "
            "proved, but a with-block of your own leaves these modules as they are. If it is "
            "spectral norm, register_spectral_norm teaches the block; what was folded is in the "
            "report's 'folded'",
        )


def _find_traced_decisions(request: Request, made: Made) -> Iterator[Finding]:
    """Yield a warning if dynamo failed because the forward decides by the values of a tensor."""
    samples = made.report.parity.samples
    for _, error in made.failures:
        where = find_traced_decision(error, request.model, request.call.example.method)
        if where is not None:
            yield (
                TracedDecisionWarning,
                f"the forward decides by the values of a tensor ({where}), which the dynamo "
                "exporter does not take. The TorchScript exporter's file always does what was "
                f"decided for the example, and is proved for {samples} input sets alone. "
                "Pass inputs=[...] that are decided otherwise, or use torch.where or torch.cond",
            )


def _find_lost_precision(parity: ParityReport) -> Iterator[Finding]:
    for output in parity.outputs:
        if is_imprecise(output):
            yield (
                PrecisionLostWarning,
                f"output '{output.name}': {output.verdict}. rtol={output.rtol:g} as an argument "
                "accepts that",
            )


def _find_unseen_outputs(unseen: Sequence[str]) -> Iterator[Finding]:
    if unseen:
        yield (
            OutputNotExportedWarning,
            f"the file lacks the tensors within {quote_names(unseen)}, which the model returns: "
            "return them as tensors, in tuples, lists, dicts or dataclasses",
        )
