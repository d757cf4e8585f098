"""The verdict on each output: by tolerance, and by the truth where a tolerance cannot judge.

A fixed tolerance is wrong on both sides. A network that was just built divides its weights by a
sigma that is far from converged: they are huge, rounding is amplified a thousandfold, and a right
file differs from torch by 1e-3 and more. A well-conditioned network and its file differ by 1e-7,
and a file that is off by 5e-5 has lost something. What tells these apart is the distance of each
from the same network in float64, beside the distance that rounding accounts for: see `truth`.

Three statistics are held against each other, over all elements of all input sets: root mean square,
99th percentile and maximum. The mean alone lets a single wrong element pass; the maximum alone
hangs on one lucky element; the percentile sees what a few large errors hide.

The bounds were set by measuring how many times as far as rounding goes a file is; commands and
figures stand in ``tests/README.md``. No right file of a whole network or of torch's own modules was
more than 3.3, but where torch's exporters write an operator with others. A file within the default
tolerance has more room: other machines and providers may compute an operator less exactly.

The operators of a file are not those of the model. Onnxruntime's sigmoid of -9 is exact to 1e-7,
which is 5e-4 of it: its logarithm, as torch's exporters write `logsigmoid`, is off by that, and
``exp(x) - 1`` loses what `expm1` keeps. Such a file is the right function, and no better one can be
had from torch. So where a file is too far from the truth, its own values are moved by a unit of
rounding as well. Where that moves the outputs by more than `FACTOR` times what rounding moves the
model's, what it accounts for passes, with a warning, up to `_BEARABLE`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import EncodeError
from torch import Tensor, nn

from ..errors import ExportError, SnExportError
from ..freezing import UnconvergedSigma, find_unconverged
from ..results import Distance, OutputParity, ParityReport, Rounding
from ..running import Reference
from ..text import shorten_list
from .precision import find_narrow_operators, move_values
from .session import name_inputs, open_session, run_session
from .tolerances import DEFAULT_TOLERANCES, ProofSettings
from .truth import FACTOR, FEW, MANY, Freezing, NoTruthError, measure_operators, measure_rounding

_logger = logging.getLogger("sn_export")
WRONG = 10.0  # times what rounding accounts for: such a file is refused, though within tolerance
_DOUBTFUL = 30.0  # likewise: where rounding moves few elements much, few runs may not show it
_BEARABLE = 10.0  # times the default tolerance: what a file may lose by its own operators
_ASKED = 0.03  # of the tolerance: an output that differs by less is not asked about


def judge(
    report: ParityReport,
    model: nn.Module,
    freezing: Freezing,
    path: Path,
    references: Sequence[Reference],
    settings: ProofSettings,
    run_file: Callable[[Reference], Sequence[Tensor]],
) -> ParityReport:
    """Return the report with a verdict on each output, in one sentence.

    The truth is asked for outputs that are outside the default tolerance, or nearer to it than to
    what rounding does. A tolerance that the user gave is binding, and the truth not asked.

    Args:
        report: the comparison by tolerance.
        model: the unfrozen model.
        freezing: how it is frozen.
        path: the file.
        references: the input sets that were compared.
        settings: how the file was run, and with which tolerances.
        run_file: gives the outputs of the file for one of them.
    """
    asked = [
        position
        for position, output in enumerate(report.outputs)
        if settings.proof_dtype is None
        and settings.get_tolerances(position, output.name) == (None, None)
        and _is_in_question(output)
    ]
    found: dict[int, Rounding] = {}
    obstacle = narrow = ""
    if asked:
        coarsest = torch.float64
        if all(report.outputs[position].dtype == "float64" for position in asked):
            narrow = find_narrow_operators(path)
            coarsest = torch.float32 if narrow else coarsest
        try:
            for runs in (FEW, MANY):
                found = measure_rounding(
                    model, freezing, references, run_file, asked, coarsest, runs
                )
                if not any(FACTOR < one.ratio <= _DOUBTFUL for one in found.values()):
                    break
            found |= _ask_operators(report, found, path, references, settings)
        except NoTruthError as error:
            obstacle = str(error)
    outputs = tuple(
        _judge_output(output, found.get(position), obstacle if position in asked else "", narrow)
        for position, output in enumerate(report.outputs)
    )
    return replace(report, outputs=outputs)


def _is_in_question(output: OutputParity) -> bool:
    if output.dtype not in DEFAULT_TOLERANCES or not output.is_comparable:
        return False
    if not math.isfinite(output.max_abs) or output.histogram is None:  # nothing was compared
        return False
    return not output.passed or output.max_abs > _ASKED * output.atol


def _ask_operators(
    report: ParityReport,
    found: Mapping[int, Rounding],
    path: Path,
    references: Sequence[Reference],
    settings: ProofSettings,
) -> dict[int, Rounding]:
    """Return what rounding does to the file's own operators, for outputs that are too far."""
    asked = [
        position
        for position, rounding in found.items()
        if rounding.ratio > (WRONG if (output := report.outputs[position]).passed else FACTOR)
        and output.max_abs <= _BEARABLE * output.atol
    ]
    if not asked:
        return {}
    try:
        session = open_session(path, settings.providers, move_values(path))

        def run_moved(reference: Reference) -> list[Any]:
            feed = name_inputs(session, reference.inputs, settings.input_names)
            return run_session(session, feed, reference.inputs.label)

        moved = measure_operators(references, run_moved, asked)
    except (ExportError, EncodeError, MemoryError) as error:  # then the model's rounding decides
        _logger.info("the file's own rounding is not known: %s", error)
        return {}
    return {position: replace(found[position], operators=one) for position, one in moved.items()}


def _judge_output(
    output: OutputParity, rounding: Rounding | None, obstacle: str, narrow: str
) -> OutputParity:
    """Return one output with its verdict."""
    if rounding is None:
        if not obstacle or output.passed:
            return output
        verdict = f"{output.reason}; the network in float64 does not tell, since {obstacle}"
        return replace(output, reason=verdict, verdict=verdict)
    distances = (
        f"from the network in float64 the file is {rounding.file.rms:.3g} away, the model itself "
        f"{rounding.model.rms:.3g} (root mean square), and rounding in {rounding.dtype} accounts "
        f"for {rounding.expected.rms:.3g}"
    )
    if narrow:
        distances += f" (the file computes {narrow} in float32)"
    is_right = rounding.ratio <= FACTOR
    if rounding.operators is not None and _is_excused(rounding, rounding.operators):
        verdict = (
            f"{output.verdict if output.passed else 'the function of the model'}; {distances}: "
            f"{rounding.ratio:.0f} times as far as that. Rounding in the file's own operators "
            f"accounts for {rounding.operators.rms:.3g}, so the file loses precision"
        )
        return replace(output, passed=True, reason="", verdict=verdict, rounding=rounding)
    if output.passed and rounding.ratio <= WRONG:
        return replace(output, verdict=f"{output.verdict}; {distances}", rounding=rounding)
    if is_right:
        bounds = f"atol {output.atol:.3g} + rtol {output.rtol:.3g}"
        verdict = f"as near as rounding allows, though outside {bounds}: {distances}"
        return replace(output, passed=True, reason="", verdict=verdict, rounding=rounding)
    reason = f"{distances}: the file is {rounding.ratio:.3g} times as far as that"
    if output.passed:
        advice = f"too far, though within the default tolerance (rtol={output.rtol:g} accepts it)"
        reason = f"{advice}: {reason}"
    else:
        reason = f"{output.reason}; {reason}"
    return replace(output, passed=False, reason=reason, verdict=reason, rounding=rounding)


def _is_excused(rounding: Rounding, own: Distance) -> bool:
    """Whether the file's own operators lose precision, and that accounts for its error."""
    if own.rms <= FACTOR * rounding.expected.rms:
        return False  # they round as the model's do, whose rounding decides
    return rounding.operators_ratio <= FACTOR


def explain_unconverged(model: nn.Module) -> str:
    """Return a sentence on the layers whose stored sigma is far below the true one, or nothing."""
    try:
        return describe_unconverged(find_unconverged(model))
    except SnExportError:  # spectral norm that cannot be read, as in a ScriptModule
        return ""


def describe_unconverged(found: Sequence[UnconvergedSigma]) -> str:
    """Return a sentence on what `find_unconverged` returned, or nothing."""
    if not found:
        return ""
    return (
        f"spectral norm is far from converged in {shorten_list(map(str, found), 4)}: run some "
        "forwards in train mode, or load a trained checkpoint"
    )


def is_imprecise(output: OutputParity) -> bool:
    """Whether an output passed though the file's own operators lose precision."""
    found = output.rounding
    return output.passed and found is not None and found.operators is not None
