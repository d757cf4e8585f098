"""Saved cases: inputs and the model's outputs, replayed without the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import ExportError
from ..files import as_path
from ..results import OutputParity, ParityReport, ProofDtype, Tolerance
from ..running import Reference, draws_note
from ..text import dtype_name, format_count
from .case_file import Case, opened_case
from .external_data import require_data_inside
from .parity import add_results, coarsest_of, mark_shown, proof_session, results, running_errors
from .precision import as_float32
from .session import DEFAULT_PROVIDERS, named_inputs
from .tolerances import ProofSettings, resolve_tolerance
from .verdicts import FACTOR


def check_case(
    onnx_path: str | os.PathLike[str],
    case_path: str | os.PathLike[str],
    *,
    rtol: Tolerance = None,
    atol: Tolerance = None,
    providers: Sequence[str] = DEFAULT_PROVIDERS,
    proof_dtype: ProofDtype | None = None,
) -> ParityReport:
    """Compare an ONNX file with the outputs in a saved case; no model is needed.

    ::

        export_onnx(critic, (images,), "critic.onnx", save_case="critic.npz")
        check_case("critic.onnx", "critic.npz").passed  # True

    Args:
        onnx_path: the file. Its inputs are matched by name, or by position where it has others.
        case_path: the case, as `sn_export.export_onnx` writes it with ``save_case``.
        rtol: relative tolerance in the place of the saved one, as for `sn_export.check_parity`.
        atol: absolute tolerance in the place of the saved one, likewise.
        providers: onnxruntime execution providers, in order of preference.
        proof_dtype: as for `sn_export.check_parity`; by default that of the proof that was saved.

    Returns:
        The report, passed or not, without modules.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for a negative tolerance, a tolerance for an output that the file does not
            have, or an unknown provider.
        FileNotFoundError: if there is no such file.
        SnExportError: if the case cannot be read.
        ExportError: if onnxruntime cannot load or run the file, or its inputs or outputs
            are not those of the case.
    """
    settings = ProofSettings(rtol, atol, providers, proof_dtype).checked()
    path, saved = as_path(onnx_path, "onnx_path"), as_path(case_path, "case_path")
    for kind, file in (("ONNX file", path), ("case", saved)):
        if not file.is_file():
            raise FileNotFoundError(f"no {kind} at '{file}'")
    require_data_inside(path)
    with opened_case(saved) as (case, sets):
        settings = replace(
            settings,
            rtol=_by_position(case.rtol) if settings.rtol is None else settings.rtol,
            atol=_by_position(case.atol) if settings.atol is None else settings.atol,
            proof_dtype=proof_dtype or case.proof_dtype,
        )
        session = proof_session(path, settings)
        names = [output.name for output in session.get_outputs()]
        if len(names) != len(case.outputs):
            raise ExportError(
                f"the file has {format_count(len(names), 'output')}, the case '{saved.name}' "
                f"{len(case.outputs)}"
            )
        running = running_errors(names, settings)
        wanted = [entry.name for entry in session.get_inputs()]
        if len(wanted) != len(case.inputs):
            raise ExportError(
                f"the file takes the inputs {wanted}, the case has {list(case.inputs)}"
            )
        known = case.inputs if set(wanted) == set(case.inputs) else wanted
        for label, inputs, outputs in sets:
            if running and not running[0].samples:
                mark_shown(running, outputs, None)
            given = map(as_float32, inputs) if settings.proof_dtype else inputs
            feed = dict(zip(known, given, strict=True))
            add_results(running, session, feed, label, outputs, settings.proof_dtype)
    return ParityReport(
        results(running),
        len(case.sets),
        tuple(session.get_providers()),
        proof_dtype=settings.proof_dtype,
        notes=tuple(filter(None, [draws_note(case.draws)])),
    )


def case_of(
    model: nn.Module,
    session: Any,
    references: Sequence[Reference],
    settings: ProofSettings,
    parity: ParityReport,
) -> Case:
    """Return the case of a proof: its inputs by the names in the file, and the model's outputs."""
    coarsest = coarsest_of(model, references)

    def saved(which: int) -> tuple[float | None, ...]:
        return tuple(
            _saved(settings, which, i, entry, references, coarsest)
            for i, entry in enumerate(parity.outputs)
        )

    inputs = tuple(entry.name for entry in session.get_inputs())
    outputs = tuple(entry.name for entry in session.get_outputs())
    sets = []
    for reference in references:
        feed = named_inputs(session, reference.inputs, settings.input_names)
        sets.append((reference.inputs.label, list(feed.values()), reference.outputs))
    return Case(
        inputs,
        outputs,
        saved(0),
        saved(1),
        sets,
        settings.proof_dtype,
        references[0].inputs.draws,
    )


def _saved(
    settings: ProofSettings,
    which: int,
    position: int,
    output: OutputParity,
    references: Sequence[Reference],
    coarsest: str | None,
) -> float | None:
    """Return rtol (0) or atol (1) of an output as the case has it; None for its dtype's default."""
    given = settings.tolerances_of(position, output.name)[which]
    outputs = [reference.outputs[position] for reference in references]
    if which and output.fraction_outside and output.rounding is not None:
        # Without the model nobody can ask again how far rounding goes: what was allowed is kept.
        moved = [output.rounding.expected, output.rounding.operators]
        return output.atol + (1 + FACTOR) * max(one.max for one in moved if one is not None)
    if given is not None or coarsest in (None, dtype_name(outputs[0])):
        return given
    # The dtype of the output does not tell in what precision the network computes.
    return max(resolve_tolerance(output, None, None, coarsest)[which] for output in outputs)


def _by_position(tolerances: Sequence[float | None]) -> dict[int, float]:
    return {i: value for i, value in enumerate(tolerances) if value is not None}
