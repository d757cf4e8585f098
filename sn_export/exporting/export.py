"""The one job: freeze, export, prove, publish; and leave the model as it was."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ExportError, SnExportError
from ..files import disk_errors_as, drafts, publish, side_file
from ..freezing import describe_sites, freeze_into, require_module, with_exact_sigma
from ..proving import (
    Proof,
    ProofSettings,
    Proved,
    Resizer,
    coarsest_of,
    find_stale_data,
    references_beyond,
    resized_references,
    type_name,
    unconverged_note,
    write_case,
)
from ..results import (
    EXPORTERS,
    Attempt,
    Exporter,
    ExporterChoice,
    ExportReport,
    Freeze,
    ParityError,
    ProofDtype,
    Tolerance,
)
from ..running import (
    InputSet,
    Preserved,
    Reference,
    as_input_sets,
    as_kwargs,
    dynamic_dims,
    preserved,
    random_sets,
    require_seen,
    run_reference,
    unwrapped,
)
from .arguments import (
    as_args,
    require_case,
    require_initialized,
    require_options,
    require_samples,
    require_target,
)
from .attempts import (
    is_hopeless,
    raise_all,
    warn_of_decisions,
    warn_of_folded,
    warn_of_proof,
    warn_of_unseen,
    with_cause,
)
from .metadata import file_metadata, require_metadata, require_source, versions
from .names import names_of_inputs, names_of_outputs
from .opset import default_opset, require_opset
from .spill import Spill
from .torch_exporters import ExportOptions, ExternalData, Written, write_onnx

_logger = logging.getLogger("sn_export")
# torch's exporters, random states, descriptors and warnings belong to the whole process.
_one_at_a_time = threading.RLock()


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    exporter: ExporterChoice = "auto",
    freeze: Freeze = "spectral_norm",
    opset_version: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    external_data: ExternalData = "auto",
    rtol: Tolerance = None,
    atol: Tolerance = None,
    samples: int = 3,
    inputs: Any = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    per_module: bool = False,
    proof_dtype: ProofDtype | None = None,
    save_case: str | os.PathLike[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    source: str | os.PathLike[str] | None = None,
    sigma_exact: bool = False,
    keep_programs: bool = True,
    overwrite: bool = False,
    verbose: bool = False,
) -> ExportReport:
    """Export ``model`` without its spectral norm, and publish the file once it is proved.

    ::

        report = export_onnx(critic, (images,), "critic.onnx")
        report.parity.passed  # True, or ParityError was raised and no file written

    The unfrozen model is run in eval mode on the example, on random inputs of the same
    shapes, on ``inputs``, and with dynamic shapes on other sizes. Then `torch.onnx.export`
    runs inside `frozen_spectral_norm`, into a folder beside ``path``; arithmetic that depends
    on initializers alone is folded, and onnxruntime must give the same outputs. The model, its
    modes, the inputs and the global random states are as before afterwards, whatever happens.

    Args:
        model: the model, in train or eval mode, with or without spectral norm. Of
            `torch.compile`, DataParallel and DistributedDataParallel the network inside is taken.
        args: positional arguments of an example call, as for `torch.onnx.export`.
        path: the ONNX file to write; its folder must exist. External data goes to
            ``<path>.data``.
        kwargs: keyword arguments of the example call.
        exporter: ``"dynamo"`` (torch.export), ``"torchscript"`` (tracing), or ``"auto"``: the
            first, and the second where the first cannot export or its file does not prove.
        freeze: ``"spectral_norm"``, or ``"all"`` for every reparametrization, as
            `frozen_parametrizations` finds them.
        opset_version: version of the ONNX opset, from 17 to the newest that both exporters and
            onnxruntime take; torch's default where None, but 22 for bfloat16.
        input_names: names of the first inputs in the file, or all; by default those of the
            forward's parameters, nested ones joined (``pair_0``).
        output_names: names of the first outputs, or all; by default from the structure of the
            output: ``output``, ``output_0`` and on, or its keys and fields. What is no tensor
            in the output is left out.
        dynamic_shapes: as for `torch.export.export`, for both exporters; what is left out is
            fixed. The proof runs at the smallest, an odd and a larger size.
        external_data: whether weights go to a side file; ``"auto"`` does it past 2 GB.
        rtol: relative tolerance; by default by dtype, see `sn_export.proving.tolerances`. A mapping
            gives it by name or position of outputs; the others have the default.
        atol: absolute tolerance in units of the output; by default by dtype and relative
            to the largest reference value of each output. A mapping as for ``rtol``.
        samples: number of random inputs, drawn from a private generator: floats and
            integers within the range that the example shows.
        inputs: inputs of your own for the proof: a tensor, a tuple of arguments, a dict of
            keyword arguments, or a list of these.
        providers: onnxruntime execution providers for the proof.
        per_module: compare the output of every module too, not only where the proof fails.
        proof_dtype: ``"float32"`` proves a copy of the file in that dtype, for a file in bfloat16
            or float64 whose operators onnxruntime does not all have.
        save_case: a file to write too, with the inputs and the model's outputs of the proof,
            which `check_case` replays without the model; its folder must exist.
        metadata: keys and values of your own for the file's ``metadata_props``, beside what
            sn_export writes: see `sn_export.exporting.metadata`.
        source: the checkpoint that the weights came from; its SHA-256 is written to the file.
        sigma_exact: compute the largest singular value of each weight under spectral norm for
            the report, as far as that takes seconds.
        keep_programs: keep torch's ExportedProgram and ONNXProgram in the report, with the frozen
            weights that they hold: in memory, or past 512 MB of parameters in files without a
            name beside ``path``, whose room on the disk is free again with the report.
        overwrite: write ``path`` also where something is that is no ONNX file, or where its suffix
            is that of another format, such as ``.pt``. An ONNX file is replaced in any case.
        verbose: let the exporters print, log and warn.

    Returns:
        The report.

    Raises:
        TypeError: for a model that is no module, or arguments of a wrong type, such as objects
            whose tensors no exporter sees.
        ValueError: for an option outside its range, dynamic shapes or names that do not fit the
            inputs or outputs, a tolerance for an output that the file does not have, or a tensor
            in ``inputs`` that the example does not have.
        FileNotFoundError: if the folder of ``path`` or ``save_case``, or the file ``source``,
            does not exist.
        FileExistsError: if ``path`` is something else than an ONNX file.
        FreezeError: if a tensor cannot be frozen.
        SnExportError: if the model rejects an input, or a lazy module of it never ran.
        ExportError: if torch cannot export the model, or onnxruntime not run the file; if a
            dimension that is declared dynamic by name takes one size only, or is made one with
            another that has its own size in the model.
        ParityError: if outputs differ, or are NaN. No file is written then.

    Warns:
        ReparametrizationNotRecognisedWarning: if a module computes its weight in a way that the
            block does not know, so that the value had to be folded in the file.
        TracedDecisionWarning: if ``"auto"`` took the TorchScript exporter because the forward
            decides by the values of a tensor.
        OutputNotExportedWarning: if the model returns objects with tensors that no exporter sees.
        SpectralNormNotConvergedWarning: if a stored sigma is far below the true one, as in a
            network that was never trained.
        PrecisionLostWarning: if the file is within the default tolerance, and much farther from
            the network in float64 than rounding accounts for.
    """
    model = unwrapped(require_module(model))
    require_initialized(model)
    target = require_target(path, overwrite)
    exporters = require_options(exporter, external_data, freeze)
    samples = require_samples(samples)
    opset_version = require_opset(opset_version)
    settings = ProofSettings(rtol, atol, providers, proof_dtype).checked()
    require_metadata(metadata)
    case = require_case(save_case, target) if save_case is not None else None
    checkpoint = require_source(source)
    keywords = {} if kwargs is None else as_kwargs(kwargs, "kwargs")
    given = InputSet(as_args(args), keywords, "the example input").bind(model)
    require_seen(given)
    example = given.clone()  # a copy, in which no tensor stands twice
    own = as_input_sets(model, inputs, len(example.args), "inputs", example)
    for one in own:
        require_seen(one, example)
    dims = dynamic_dims(example, dynamic_shapes)
    names = names_of_inputs(model, example, input_names)
    only = "spectral_norm" if freeze == "spectral_norm" else None
    frozen = tuple(describe_sites(model, only))  # the block itself warns
    note = unconverged_note(model)
    if sigma_exact:
        frozen = with_exact_sigma(model, frozen)
    with _one_at_a_time, preserved(model) as state, contextlib.ExitStack() as stack:
        first = run_reference(model, state, example)
        state.settle()
        outputs = names_of_outputs(model, first.paths, output_names, list(names.values()))
        settings = replace(settings.checked(outputs), input_names=names)
        opset_version = opset_version or default_opset(coarsest_of(model, [first]))
        _logger.info("running the reference")
        references = [first]
        for one in (*random_sets(example, samples), *own):
            references.append(_run_further(model, state, one))
        references += resized_references(
            example, dims, lambda one: run_reference(model, state, one), own
        )
        spill = Spill(model, target.parent)
        freezing = partial(freeze_into, model, only, spill.keep)
        proof = Proof(
            model=model,
            state=state,
            references=references,
            freezing=freezing,
            dims=dims,
            settings=settings,
            per_module=per_module,
            keeps_case=case is not None,
            notes=(note,) if note else (),
        )
        other = next((e for e in EXPORTERS if e not in exporters), None)
        made, attempts = None, list[tuple[Exporter, ExportError | ParityError]]()
        for chosen in exporters:
            draft = stack.enter_context(drafts(target))
            props = file_metadata(chosen, versions(), frozen, checkpoint, metadata)
            options = ExportOptions(
                opset_version, names, outputs, dims, external_data, verbose, props, spill.release
            )
            _logger.info("exporting with %s, %d tensors frozen", chosen, len(frozen))
            try:
                written = _write(proof, freezing, first, chosen, options, draft, target, other)
                if written.program is not None and dims:
                    references += references_beyond(  # for this proof and the next one
                        written.program,
                        example.named_tensors(),
                        dims,
                        Resizer(example).of,
                        lambda one: run_reference(model, state, one),
                    )
                if not keep_programs:
                    written = written.without_program()
                proved = proof.of(draft, f"the {chosen} exporter")
            except (ExportError, ParityError) as error:
                if isinstance(error, ParityError):
                    error = with_cause(error, proof, freezing, first)
                    error.export = ExportReport(
                        target,
                        chosen,
                        written.opset,
                        error.report,
                        frozen,
                        versions(),
                        props,
                        written.folded,
                        inputs=written.inputs,
                        model=type_name(model),
                    )
                attempts.append((chosen, error))
                if is_hopeless(error):
                    break
                _logger.info("not with %s: %s", chosen, error)
            else:
                made = chosen
                break
        if made is None:
            raise_all(attempts)
        warn_of_folded(written.folded)
        warn_of_decisions(attempts, model, proved.parity)
        warn_of_unseen(first.unseen)
        warn_of_proof(note, proved.parity)
        _publish(draft, target, case, proved)
    _logger.info("wrote %s", target)
    return ExportReport(
        target,
        made,
        written.opset,
        proved.parity,
        frozen,
        dict(versions()),
        props,
        written.folded,
        tuple(Attempt(tried, str(error)) for tried, error in attempts),
        written.inputs,
        type_name(model),
        written.program,
    )


def _write(
    proof: Proof,
    freezing: Callable[[], AbstractContextManager[nn.Module]],
    reference: Reference,
    exporter: Exporter,
    options: ExportOptions,
    draft: Path,
    target: Path,
    other: Exporter | None,
) -> Written:
    try:
        # No name holds the block: whatever strikes as it is left, it ends before the state around.
        with disk_errors_as(ExportError, target), freezing():
            options.release()  # the block looks at its weights, on entering and on leaving
            return write_onnx(proof.model, reference, exporter, options, draft, other)
    finally:
        options.release()
        proof.state.reset()


def _publish(draft: Path, target: Path, case: Path | None, proved: Proved) -> None:
    """Move a file to its place, with its external data and the case that was asked for."""
    with contextlib.ExitStack() as stack:
        moves = [(draft, target)]
        data = side_file(draft)
        if data.exists():
            moves.insert(0, (data, side_file(target)))
        if case is not None and proved.case is not None:
            with disk_errors_as(ExportError, case):
                made = stack.enter_context(drafts(case))
                write_case(made, proved.case)
            moves.insert(0, (made, case))
        with disk_errors_as(ExportError, target):
            publish(moves, find_stale_data(draft, target))


def _run_further(model: nn.Module, state: Preserved, inputs: InputSet) -> Reference:
    try:
        return run_reference(model, state, inputs)
    except SnExportError as error:
        if not inputs.label.startswith("random"):
            raise
        raise SnExportError(
            f"{error}. If it takes only certain values, pass samples=0 and real inputs=[...]"
        ) from error.__cause__
