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
from .torch_exporters import default_opset

_logger = logging.getLogger("sn_export")


Run = Callable[[InputSet], Reference]


def run_references(
    request: Request, state: Preserved, run: Run
) -> tuple[Request, list[Reference], str]:
    """Run the model on the example, at random, on the user's inputs, and at other sizes.

    Args:
        request: what was asked for; names and tolerances are held against the outputs as soon as
            the example has run.
        run: runs the model.
        state: the model's; which parameters the forward writes is known after the example.

    Returns:
        The request with the names of all outputs, and the opset of the network's dtype where the
        user leaves it open. What the model said, the example first. A sentence on random inputs
        that were left out, since the model does not take them.

    Raises:
        SnExportError: if it rejects an input.
        ExportError: if it takes no other size in a dimension that the user names.
        ValueError: for names, tolerances or images that do not fit the outputs.
    """
    call = request.call
    first = run(call.example)
    state.settle()
    names = name_outputs(
        request.model, first.paths, request.output_names, list(request.input_names.values())
    )
    settings = request.settings.checked(names)
    find_shown(names, first.outputs, settings.images)
    _logger.info("running the reference")
    drawn = random_references(first, request.samples, run)
    references = [first, *drawn.references, *map(run, call.own)]
    usable = partial(run_usable, first, run=run)
    references += resized_references(call.example, request.dims, usable, call.own)
    request = replace(
        request,
        opset_version=request.opset_version or default_opset(coarsest_of(request.model, [first])),
        output_names=names,
        settings=replace(settings, input_names=request.input_names),
    )
    return request, references, left_out_note(drawn)


def plan_proof(
    request: Request, state: Preserved, run: Run, references: list[Reference], left_out: str
) -> Proof:
    """Return what files are held against.

    Args:
        request: what `run_references` returned.
        state: puts the model back after a forward pass.
        run: runs the model for the reference.
        references: what `run_references` returned.
        left_out: the sentence that it returned.
    """
    spill = Spill(request.model, request.target.parent)
    notes = draws_note(references[0].inputs.draws), request.note, left_out
    return Proof(
        model=request.model,
        state=state,
        run=run,
        references=references,
        freezing=Freezing(
            partial(freeze_into, request.model, request.frozen_kinds, spill.keep), spill.release
        ),
        dims=request.dims,
        settings=request.settings,
        per_module=request.per_module,
        keeps_case=request.case is not None,
        notes=tuple(filter(None, notes)),
    )


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
