"""What the unfrozen model says, which every file is held against, and the plan of that proof."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ..freezing import freeze_into
from ..proving import (
    Freezing,
    Proof,
    Resizer,
    coarsest_of,
    find_shown,
    references_beyond,
    resized_references,
)
from ..running import (
    InputSet,
    Preserved,
    Reference,
    draws_note,
    left_out_note,
    random_references,
    run_usable,
)
from .arguments import Request
from .graph import name_outputs
from .spill import Spill
from .torch_exporters import ExportOptions, default_opset

_logger = logging.getLogger("sn_export")


Run = Callable[[InputSet], Reference]


def run_references(request: Request, state: Preserved, run: Run) -> tuple[list[Reference], str]:
    """Run the model on the example, at random, on the user's inputs, and at other sizes.

    Args:
        request: what was asked for; names and tolerances are held against the outputs as soon as
            the example has run.
        run: runs the model.
        state: the model's; which parameters the forward writes is known after the example.

    Returns:
        What the model said, the example first; and a sentence on random inputs that were left
        out, since the model does not take them.

    Raises:
        SnExportError: if it rejects an input.
        ExportError: if it takes no other size in a dimension that the user names.
        ValueError: for names, tolerances or images that do not fit the outputs.
    """
    call = request.call
    first = run(call.example)
    state.settle()
    names = _name_outputs(request, first)
    find_shown(names, first.outputs, request.settings.checked(names).images)
    _logger.info("running the reference")
    drawn = random_references(first, request.samples, run)
    references = [first, *drawn.references, *map(run, call.own)]
    usable = partial(run_usable, first, run=run)
    references += resized_references(call.example, request.dims, usable, call.own)
    return references, left_out_note(drawn)


def plan_proof(
    request: Request, state: Preserved, run: Run, references: list[Reference], left_out: str
) -> tuple[Proof, ExportOptions]:
    """Return what files are held against, and what torch's exporters are asked for.

    Args:
        request: what was asked for.
        state: puts the model back after a forward pass.
        run: runs the model for the reference.
        references: what `run_references` returned.
        left_out: the sentence that it returned.
    """
    first = references[0]
    outputs = _name_outputs(request, first)
    spill = Spill(request.model, request.target.parent)
    proof = Proof(
        model=request.model,
        state=state,
        run=run,
        references=references,
        freezing=Freezing(
            partial(freeze_into, request.model, request.frozen_kinds, spill.keep), spill.release
        ),
        dims=request.dims,
        settings=replace(request.settings.checked(outputs), input_names=request.input_names),
        per_module=request.per_module,
        keeps_case=request.case is not None,
        notes=tuple(filter(None, (draws_note(first.inputs.draws), request.note, left_out))),
    )
    options = ExportOptions(
        opset_version=request.opset_version or default_opset(coarsest_of(request.model, [first])),
        input_names=request.input_names,
        output_names=outputs,
        dims=request.dims,
        external_data=request.external_data,
        verbose=request.verbose,
        release=spill.release,
    )
    return proof, options


def extend_references(proof: Proof, request: Request, program: Any) -> None:
    """Add what the model says at the first sizes that torch's program leaves out.

    They count for the proof of this file and of the next one.
    """
    example = request.call.example
    proof.references.extend(
        references_beyond(
            program,
            example.named_tensors(),
            request.dims,
            Resizer(example).of,
            partial(run_usable, proof.references[0], run=proof.run),
        )
    )


def _name_outputs(request: Request, first: Reference) -> list[str]:
    inputs = list(request.input_names.values())
    return name_outputs(request.model, first.paths, request.output_names, inputs)
