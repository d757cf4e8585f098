"""The outputs of the unfrozen model, and the proof that holds every file against them."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..freezing import freeze_into
from ..proving import (
    Freezing,
    Proof,
    find_coarsest,
    find_shown,
    run_beyond_program,
    run_resized,
)
from ..running import (
    InputSet,
    Preserved,
    Reference,
    are_large,
    describe_draws,
    describe_left_out,
    draw_references,
    is_dense,
    run_usable,
)
from .arguments import Request
from .graph import choose_opset, find_exporters, name_outputs

_logger = logging.getLogger("sn_export")
_SMALLEST = 2**20  # bytes of a weight
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
        The request with the names of all outputs, and the opset for the network's dtype where the
        user leaves it open; the references, that of the example first; a sentence on random inputs
        that were left out because the model does not take them, or an empty one.

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
    settings = request.settings.check(names)
    find_shown(names, first.outputs, settings.images)
    _logger.info("running the reference")
    drawn = draw_references(first, request.samples, run)
    references = [first, *drawn.references, *map(run, call.own)]
    usable = partial(run_usable, first, run=run)
    references += run_resized(call.example, request.dims, usable, call.own)
    dtype = find_coarsest(request.model, [first])
    opset = request.opset_version or choose_opset(dtype, request.exporters)
    request = replace(
        request,
        opset_version=opset,
        exporters=tuple(name for name in request.exporters if name in find_exporters(opset)),
        output_names=names,
        settings=replace(settings, input_names=request.input_names),
    )
    return request, references, describe_left_out(drawn)


def plan_proof(
    request: Request, state: Preserved, run: Run, references: list[Reference], left_out: str
) -> Proof:
    """Return the proof that every file has to pass.

    Args:
        request: what `run_references` returned.
        state: puts the model back after a forward pass.
        run: runs the model for the reference.
        references: what `run_references` returned.
        left_out: the sentence that it returned.
    """
    spill = Spill(request.model, request.target.parent)
    notes = describe_draws(references[0].inputs.draws), request.note, left_out
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
    """Add references at the first sizes that torch's program leaves out.

    They count for the proof of this file and of the next one.
    """
    run = partial(run_usable, proof.references[0], run=proof.run)
    example = request.call.example
    proof.references.extend(run_beyond_program(program, example, request.dims, run))


class Spill:
    """Keeps large weights in files that are mapped: only what is read of them takes memory.

    Such a file has no name: its room on the disk is free again when the weight is freed.

    Args:
        model: whose weights they are. There are files only past 512 MB of parameters, and only on
            systems that let an open file be deleted.
        folder: on a disk with room for the ONNX file.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        is_worth_it = os.name == "posix" and are_large(model.parameters())
        self._folder = folder if is_worth_it else None
        self._kept: list[Tensor] = []

    def keep(self, values: Iterable[Tensor]) -> list[Tensor]:
        """Return tensors of the same bits, in files; no more than one value at a time is in memory.

        Small weights stay in memory, and what is not on the CPU or not contiguous; so does what
        the folder has no room for.
        """
        self._kept = []  # of this block alone: the files of an earlier one go with its weights
        return list(map(self._keep, values))

    def _keep(self, value: Tensor) -> Tensor:
        if self._folder is None or not _can_be_kept(value):
            return value
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder) as file:
                value.detach().flatten().view(torch.uint8).numpy().tofile(file)
                size, name = value.nbytes, file.name
                content = torch.from_file(name, shared=False, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError):  # a full disk; a file system that maps nothing
            return value
        self._kept.append(content)
        return content.view(value.dtype).view(value.shape)

    def release(self) -> None:
        """Free the memory that reading the weights took; what was written to them is lost."""
        for content in self._kept:
            start, size = ctypes.c_void_p(content.data_ptr()), ctypes.c_size_t(content.nbytes)
            ctypes.CDLL(None).madvise(start, size, mmap.MADV_DONTNEED)


def _can_be_kept(value: Tensor) -> bool:
    is_plain = type(value) in (Tensor, nn.Parameter) and is_dense(value) and value.is_contiguous()
    # The bytes of a lazy conjugate are not its values.
    has_own_bits = not (value.is_conj() or value.is_neg())
    return is_plain and value.is_cpu and has_own_bits and value.nbytes >= _SMALLEST
