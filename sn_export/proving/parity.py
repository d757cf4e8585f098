"""Parity: run a file in onnxruntime and compare its outputs with the model's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ExportError
from ..files import as_path
from ..freezing import freeze_into
from ..results import Divergence, Draws, OutputParity, ParityReport, ProofDtype, Tolerance
from ..running import (
    Preserved,
    Reference,
    as_input_sets,
    describe_draws,
    find_entry,
    initialise_lazy,
    preserved,
    require_draws,
    run_reference,
)
from ..text import describe_error, format_count
from .divergence import locate
from .external_data import require_data_inside
from .module_errors import Strictness
from .output_errors import RunningErrors
from .pictures import find_shown
from .precision import convert_inputs, make_comparable, write_float32
from .session import DEFAULT_PROVIDERS, name_inputs, open_session, run_session
from .tolerances import ProofSettings, find_coarsest_dtype, find_largest
from .truth import FACTOR, Freezing
from .verdicts import explain_unconverged, judge


def check_parity(
    model: nn.Module | Callable[..., Any],
    onnx_path: str | os.PathLike[str],
    inputs: Any,
    *,
    method: str | None = None,
    rtol: Tolerance = None,
    atol: Tolerance = None,
    providers: Sequence[str] = DEFAULT_PROVIDERS,
    per_module: bool = False,
    proof_dtype: ProofDtype | None = None,
    draws: Draws | None = None,
    images: Sequence[str] | None = None,
) -> ParityReport:
    """Compare an ONNX file with a model in eval mode, on the given inputs.

    Where an output does not pass, the comparison is repeated for every module on the worst input
    set, and the report's ``divergence`` says where the two part.

    Args:
        model: the reference, with or without spectral norm, or a bound method of a module, such as
            ``net.decode``. It and the inputs are left as they were, but for lazy modules that never
            ran, as by `export_onnx`.
        onnx_path: the file.
        inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or a list of
            these for several calls.
        method: the name of a method of ``model`` that is called in place of it.
        rtol: relative tolerance; by default by dtype, see `sn_export.proving.tolerances`. A
            mapping gives it by name or position of outputs; the others have the default.
        atol: absolute tolerance in units of the output; by default by dtype and relative to
            the largest reference value of each output. A mapping as for ``rtol``.
        providers: onnxruntime execution providers, in order of preference.
        per_module: compare every module (on the first input set) also where all outputs pass.
        proof_dtype: ``"float32"`` runs a copy of the file in that dtype, for a file in half
            precision or float64 whose operators the providers do not all have. Outputs are
            compared in the narrower dtype, modules not at all.
        draws: as for `sn_export.export_onnx`, of a file that it made with the same.
        images: names of the outputs of which samples are shown in a HTML report; by default
            those that look like pictures (N x 1, 3 or 4 x H x W) or sound (N x 1 x T).

    Returns:
        The report, passed or not.

    Raises:
        TypeError: if ``model`` is no module and no method of one, ``inputs`` are of no known form,
            or another argument is of a wrong type.
        ValueError: for a method that is not there, no inputs, a negative tolerance, a tolerance for
            an output that the file does not have, or an unknown provider.
        FileNotFoundError: if there is no such file.
        SnExportError: if the model rejects an input.
        ExportError: if onnxruntime cannot load or run the file, or its inputs or outputs
            are not those of the model.
    """
    network, entry = find_entry(model, method)
    settings = ProofSettings(rtol, atol, providers, proof_dtype, images=images).check()
    path = as_path(onnx_path, "onnx_path")
    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file at '{path}'")
    require_data_inside(path)
    session = open_proof_session(path, settings)
    sets = as_input_sets(network, inputs, arity=len(session.get_inputs()), method=entry)
    if not sets:
        raise ValueError("inputs must hold at least one input, got none")
    sets = [replace(one, draws=require_draws(draws)) for one in sets]
    initialise_lazy(network, sets[0])
    note = explain_unconverged(network)
    with preserved(network) as state:
        references = [run_reference(network, state, one) for one in sets]
        freezing = Freezing(partial(freeze_into, network, "spectral_norm", list))
        report = compare(network, freezing, session, path, references, settings)
        report = replace(report, notes=tuple(filter(None, (describe_draws(draws), note))))
        if per_module or not report.passed:
            report = locate_divergence(report, network, state, path, references, settings)
    return report


def open_proof_session(path: Path, settings: ProofSettings) -> Any:
    """Return a session with the file, or with a copy of it in the dtype of the proof.

    Raises:
        ExportError: if onnxruntime cannot load it.
    """
    if settings.proof_dtype is None:
        return open_session(path, settings.providers)
    with tempfile.TemporaryDirectory(prefix="sn_export_") as folder:
        copied = Path(folder) / path.name
        write_float32(path, copied)
        # The copy is gone when the session runs, so it is not run in pieces.
        return open_session(copied, settings.providers, at_once=True)


def compare(
    model: nn.Module,
    freezing: Freezing,
    session: Any,
    path: Path,
    references: Sequence[Reference],
    settings: ProofSettings,
) -> ParityReport:
    """Run every reference's inputs through ``session``, compare the outputs and judge.

    Args:
        model: the unfrozen model.
        freezing: how it is frozen.
        session: that of `open_proof_session` with the same settings. The file's inputs are
            matched as by `name_inputs`.
        path: the file.
        references: the input sets, with what the model returned.
        settings: how the file is run, and with which tolerances.

    Raises:
        ValueError: for a tolerance for an output that the file does not have.
        ExportError: if onnxruntime cannot run the inputs, or the number of inputs or
            outputs differs.
    """
    names = [output.name for output in session.get_outputs()]
    running = make_running_errors(names, settings, find_coarsest(model, references))
    proof_dtype = settings.proof_dtype
    mark_shown(running, references[0].outputs, settings.images)

    def feed_of(reference: Reference) -> dict[str, Tensor]:
        inputs = convert_inputs(reference.inputs) if proof_dtype else reference.inputs
        return name_inputs(session, inputs, settings.input_names)

    for reference in references:
        label = reference.inputs.label
        add_results(running, session, feed_of(reference), label, reference.outputs, proof_dtype)
    providers = tuple(session.get_providers())
    report = ParityReport(
        make_results(running), len(references), providers, proof_dtype=proof_dtype
    )

    def run_file(reference: Reference) -> list[Any]:
        return run_session(session, feed_of(reference), reference.inputs.label)

    return judge(report, model, freezing, path, references, settings, run_file)


def find_coarsest(model: nn.Module, references: Sequence[Reference]) -> str | None:
    """Return the coarsest floating dtype of a model's parameters, buffers and inputs."""
    inputs = [t for r in references[:1] for _, t in r.inputs.named_tensors()]
    return find_coarsest_dtype([*model.parameters(), *model.buffers(), *inputs])


def make_running_errors(
    names: Sequence[str], settings: ProofSettings, coarsest: str | None = None
) -> list[RunningErrors]:
    """Return an empty record of errors for each output of the file.

    Raises:
        ValueError: for a tolerance for an output that the file does not have.
    """
    settings = settings.check(names)
    return [
        RunningErrors(name, *settings.get_tolerances(i, name), coarsest)
        for i, name in enumerate(names)
    ]


def mark_shown(
    running: Sequence[RunningErrors], outputs: Sequence[Tensor], images: Sequence[str] | None
) -> None:
    """Have samples kept of the outputs that are shown: see `find_shown`."""
    shown = find_shown([state.name for state in running], outputs, images)
    for state in running:
        state.is_shown = state.name in shown


def make_results(running: Sequence[RunningErrors]) -> tuple[OutputParity, ...]:
    """Return the errors of each output; none passes if no output has a single element."""
    found = tuple(state.make_result() for state in running)
    if any(state.elements for state in running):
        return found
    reason = "no element was compared: the outputs are empty for every input set"
    return tuple(
        replace(one, passed=False, reason=one.reason or reason, verdict=one.reason or reason)
        for one in found
    )


def add_results(
    running: Sequence[RunningErrors],
    session: Any,
    feed: Any,
    label: str,
    expected: Sequence[Any],
    proof_dtype: ProofDtype | None,
) -> None:
    """Run one input set and take its errors in.

    Raises:
        ExportError: if onnxruntime cannot run it, or the number of outputs differs.
    """
    found = run_session(session, feed, label)
    if len(found) != len(expected):
        raise ExportError(
            f"the file has {format_count(len(found), 'output')}, the model {len(expected)}"
        )
    for state, wanted, got in zip(running, expected, found, strict=True):
        if got is None:
            raise ExportError(f"the file's output '{state.name}' is no tensor of numbers")
        state.add(label, *(make_comparable(wanted, got) if proof_dtype else (wanted, got)))


def locate_divergence(
    report: ParityReport,
    model: nn.Module,
    state: Preserved,
    path: Path,
    references: Sequence[Reference],
    settings: ProofSettings,
) -> ParityReport:
    """Return the report with the comparison module by module.

    It is made on the worst input set of the first output that did not pass, or on the first set,
    with that output's tolerances.
    """
    if report.proof_dtype or not any(output.histogram for output in report.outputs):
        return report  # modules would have to be cast, or nothing was compared
    failed = [i for i, output in enumerate(report.outputs) if not output.passed]
    position = failed[0] if failed else 0
    output = report.outputs[position]
    chosen = next(
        (r for r in references if failed and r.inputs.label == output.worst_sample), references[0]
    )
    strictness = Strictness.of(
        chosen.outputs[position],
        *settings.get_tolerances(position, output.name),
        find_coarsest(model, references),
    )
    if output.rounding is not None:  # what rounding moves in the output, it moves in the modules
        size = find_largest(chosen.outputs[position]) or 1.0
        moved = FACTOR * output.rounding.expected.max / size
        if output.passed or output.fraction_outside:
            strictness = strictness.relax(moved, output.dtype)
        else:  # it was within tolerance, and too far from the truth
            strictness = Strictness(0.0, moved)
    try:
        divergence = locate(model, state, path, chosen.inputs, strictness, settings, bool(failed))
    except Exception as error:  # a search that fails must not hide what is known already
        reason = f"cannot tell where: {describe_error(error)}"
        divergence = Divergence((), None, reason, sample=chosen.inputs.label)
    return replace(report, divergence=divergence)
