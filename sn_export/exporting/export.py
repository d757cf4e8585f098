"""The one job: freeze, export, prove, publish; and leave the model as it was."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import ExportError
from ..files import DraftFolders, Drafts, disk_errors_as, name_side_file, publish
from ..proving import (
    ProofSettings,
    describe_unconverged,
    find_stale_data,
    require_same_network,
    write_case,
)
from ..results import Draws, ExporterChoice, ExportReport, Freeze, ProofDtype, Tolerance
from ..running import (
    find_entry,
    initialise_lazy,
    preserved,
    require_draws,
    run_reference,
    undo_on_exit,
    undoing,
)
from ..text import require_choice
from .arguments import (
    ExternalData,
    Request,
    Source,
    export_from,
    require_call,
    require_case,
    require_dims,
    require_exporter,
    require_freeze,
    require_samples,
    require_target,
    require_whole,
)
from .attempts import Made, make_proved_file, warn_of_made
from .graph import name_inputs, require_opset
from .onnx_file import require_metadata, require_source
from .references import plan_proof, run_references

_logger = logging.getLogger("sn_export")
# torch's exporters, random states, descriptors and warnings belong to the whole process.
_turns: dict[str, tuple[int, object]] = {}  # the thread whose export runs, and a token of it


def export_onnx(
    model: nn.Module | Callable[..., Any],
    args: tuple[Any, ...] | Tensor,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    method: str | None = None,
    exporter: ExporterChoice = "auto",
    freeze: Freeze = "all",
    opset_version: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    dynamic_axes: Any = None,
    external_data: ExternalData = "auto",
    rtol: Tolerance = None,
    atol: Tolerance = None,
    samples: int = 3,
    inputs: Any = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    per_module: bool = False,
    proof_dtype: ProofDtype | None = None,
    draws: Draws | None = None,
    images: Sequence[str] | None = None,
    save_case: str | os.PathLike[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    source: str | os.PathLike[str] | None = None,
    sigma_exact: bool = False,
    model_factory: Callable[[], nn.Module] | None = None,
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
    modes, the inputs and the global random states are as before afterwards, whatever happens, but
    for lazy modules that never ran: the example is run once, in eval mode, and they are initialised
    then as after any forward, also where the export fails later.

    Args:
        model: the model, in train or eval mode, with or without spectral norm. The network within
            `torch.compile`, DataParallel and DistributedDataParallel is taken.
            A bound method of a module, such as ``net.decode``, is exported in place of its forward:
            called directly, without the hooks of ``net`` itself. Names in the file and in the
            report are those in ``net``.
        args: positional arguments of an example call, as for `torch.onnx.export`.
        path: the ONNX file to write; its folder must exist. External data goes to
            ``<path>.data``.
        kwargs: keyword arguments of the example call.
        method: the name of a method of ``model`` to export in place of its forward.
        exporter: ``"dynamo"`` (torch.export), ``"torchscript"`` (tracing), or ``"auto"``: the
            first, and the second where the first cannot export or its file does not prove.
        freeze: ``"all"`` for every reparametrization, as `frozen_parametrizations` finds them, or
            ``"spectral_norm"`` alone; what is left is computed, or folded, in the file.
        opset_version: version of the ONNX opset: from 11 by the TorchScript exporter, from 17 by
            the dynamo one, to the newest that torch, onnx and onnxruntime take; ``"auto"`` takes
            the exporters that make it. torch's default where None, but 22 for bfloat16.
        input_names: names of the first inputs in the file, or all; by default those of the
            forward's parameters, nested ones joined (``pair_0``).
        output_names: names of the first outputs, or all; by default from the structure of the
            output: ``output``, ``output_0`` and on, or its keys and fields. What is no tensor
            in the output is left out.
        dynamic_shapes: as for `torch.export.export`, for both exporters; what is left out is
            fixed. The proof runs at the smallest, an odd and a larger size.
        dynamic_axes: `torch.onnx.export`'s older notation, which is refused: the error has it as
            ``dynamic_shapes``.
        external_data: whether weights go to a side file; ``"auto"`` does it past 2 GB.
        rtol: relative tolerance; by default by dtype, see `sn_export.proving.tolerances`. A mapping
            gives it by name or position of outputs; the others have the default.
        atol: absolute tolerance in units of the output; by default by dtype and relative
            to the largest reference value of each output. A mapping as for ``rtol``.
        samples: number of random inputs, drawn from a private generator: floats and
            integers within the range that the example shows, or near the example where the model
            does not take that.
        inputs: inputs of your own for the proof: a tensor, a tuple of arguments, a dict of
            keyword arguments, or a list of these.
        providers: onnxruntime execution providers for the proof.
        per_module: compare the output of every module too, not only where the proof fails.
        proof_dtype: ``"float32"`` proves a copy of the file in that dtype, for a file in bfloat16
            or float64 whose operators onnxruntime does not all have.
        draws: ``"zeros"`` exports and proves the network without the noise of its forward (VITS, a
            VAE): every random number that it draws is 0, in the model as in the file; a normal one
            is its mean, and dropout hands on its input. See `sn_export.running.draws`.
        images: names of the outputs of which samples are shown in a HTML report, the model's beside
            the file's; by default those that look like pictures (N x 1, 3 or 4 x H x W) or sound
            (N x 1 x T).
        save_case: a file to write too, with the inputs and the model's outputs of the proof,
            which `check_case` replays without the model; its folder must exist.
        metadata: keys and values of your own for the file's ``metadata_props``, beside what
            sn_export writes: see `sn_export.exporting.onnx_file`.
        source: the checkpoint that the weights came from; its SHA-256 is written to the file.
        sigma_exact: compute the largest singular value of each weight under spectral norm for
            the report, as far as that takes seconds.
        model_factory: for a model under `torch.distributed.fsdp.fully_shard`, which is exported by
            this call on every rank: builds the network in one process, without `fully_shard`. The
            first rank calls it, loads the gathered weights, exports and proves the file against
            the sharded model, with its own arguments; all ranks return its report. Other models
            need none.
        keep_programs: keep torch's ExportedProgram and ONNXProgram in the report, with the frozen
            weights that they hold: in memory, or past 512 MB of parameters in files without a
            name beside ``path``, whose room on the disk is free again with the report.
        overwrite: write ``path`` also where something is that is no ONNX file, or where its suffix
            is that of another format, such as ``.pt``. An ONNX file is replaced in any case. Under
            suffixes such as ``.json`` onnx writes text, and they are refused.
        verbose: let the exporters print, log and warn.

    Returns:
        The report.

    Raises:
        TypeError: for a model that is no module and no method of one, or arguments of a wrong type,
            such as objects whose tensors no exporter sees.
        ValueError: for an option outside its range, a method that is not there, dynamic shapes or
            names that do not fit the inputs or outputs, a tolerance for an output that the file
            does not have, or a tensor in ``inputs`` that the example does not have.
        FileNotFoundError: if the folder of ``path`` or ``save_case``, or the file ``source``,
            does not exist.
        FileExistsError: if ``path`` is something else than an ONNX file.
        FreezeError: if a tensor cannot be frozen.
        SnExportError: if the model rejects an input, or the example does not call a lazy module
            that never ran.
        ExportError: if torch cannot export the model, or onnxruntime not run the file; for a
            sharded model without ``model_factory``, or one whose weights do not fit that; if a
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
        RandomInputsLeftOutWarning: if the model rejects random inputs, or turns them into NaN or
            infinities, near the example as well; the proof stands on the others.
        PrecisionLostWarning: if the file is farther from the network in float64 than rounding
            accounts for, since torch wrote an operator with others that lose precision.
    """
    network, entry = find_entry(model, method)
    frozen_kinds = require_freeze(freeze)

    def export(origin: Source) -> ExportReport:
        opset, exporters = require_opset(opset_version, require_exporter(exporter))
        placing = require_choice("external_data", external_data, ("auto", True, False))
        target = require_target(path, network, placing, overwrite)
        settings = ProofSettings(rtol, atol, providers, proof_dtype, images=images).check()
        whole = require_whole(origin.network)
        call = require_call(whole, entry, args, kwargs, inputs, require_draws(draws))
        if origin.run is not None:
            call = call.move_to_cpu()
        request = Request(
            model=whole,
            target=target,
            exporters=exporters,
            external_data=placing,
            samples=require_samples(samples),
            opset_version=opset,
            settings=settings,
            metadata=require_metadata(metadata),
            case=require_case(save_case, target),
            source=require_source(source),
            call=call,
            dims=require_dims(call.example, dynamic_shapes, dynamic_axes, input_names),
            input_names=name_inputs(whole, call.example, input_names),
            output_names=() if output_names is None else output_names,
            frozen_kinds=frozen_kinds,
            run=origin.run,
            per_module=per_module,
            keep_programs=keep_programs,
            verbose=verbose,
        )
        return _export(request, origin, sigma_exact)

    return export_from(network, entry, model_factory, frozen_kinds, export)


def _export(request: Request, origin: Source, sigma_exact: bool) -> ExportReport:
    """Export the network, prove the file and publish it."""
    network = request.model
    with _one_at_a_time():
        initialise_lazy(network, request.call.example)
        described = origin.describe(sigma_exact)
        note = describe_unconverged(described.unconverged)
        request = replace(request, frozen=described.frozen, note=note)
        with preserved(network) as state, Drafts() as drafts:
            run = request.run or partial(run_reference, network, state)
            request, references, left_out = run_references(request, state, run)
            proof = plan_proof(request, state, run, references, left_out)
            if request.run is not None:
                require_same_network(proof, request.output_names)
            made = make_proved_file(request, proof, drafts)
            warn_of_made(request, made, references[0], left_out)
            _publish(request, made, drafts)
    return made.report


@undoing
def _one_at_a_time() -> Iterator[None]:
    """Let the exports of other threads wait.

    This is no lock: an interrupt could keep a lock from its release, and the exports of all other
    threads would wait for ever. Taking a turn is one atomic operation; ending it can be repeated.
    """
    turn = (threading.get_ident(), object())

    def end() -> None:
        if _turns.get("export") is turn:
            del _turns["export"]

    with undo_on_exit(end):
        while (holder := _turns.setdefault("export", turn)) is not turn and holder[0] != turn[0]:
            time.sleep(0.01)
        yield


def _publish(request: Request, made: Made, drafts: DraftFolders) -> None:
    """Move a file to its place, with its external data and the case that was asked for."""
    draft, target, case = made.draft, request.target, request.case
    moves = [(draft, target)]
    data = name_side_file(draft)
    if data.exists():
        moves.insert(0, (data, name_side_file(target)))
    if case is not None and made.case is not None:
        with disk_errors_as(ExportError, case):
            draft_of_case = drafts.open(case)
            write_case(draft_of_case, made.case)
        moves.insert(0, (draft_of_case, case))
    with disk_errors_as(ExportError, target):
        publish(moves, find_stale_data(draft, target))
    _logger.info("wrote %s", target)
