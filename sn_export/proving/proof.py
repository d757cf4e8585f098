"""The proof of one file: against the unfrozen model, on every input set that fits the file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..results import OutputParity, ParityError, ParityReport
from ..running import DynamicDim, InputSet, Preserved, Reference, as_real_pairs, find_tensors
from ..text import name_dtype
from .cases import Case
from .declared_sizes import correct_declared_sizes, find_tied_dims, require_apart, require_dynamic
from .dynamic_sizes import list_sizes
from .parity import (
    compare,
    find_coarsest,
    locate_divergence,
    make_results,
    make_running_errors,
    open_proof_session,
)
from .session import name_inputs
from .tolerances import ProofSettings, resolve_tolerance
from .truth import FACTOR, Freezing

_logger = logging.getLogger("sn_export")
_SAME = 1e-3  # of the largest output: far above what other kernels make, far below sigma


class Proved(NamedTuple):
    """What a proof returns: the comparison, and its case where that is kept."""

    parity: ParityReport
    case: Case | None


@dataclass(frozen=True)
class Proof:
    """All that a file is held against.

    Attributes:
        model: the unfrozen model.
        state: puts the model back after a forward pass.
        run: runs the model that the references come from: this one, or the one that it was
            gathered from.
        references: the input sets with the model's outputs; more may be added between two proofs.
        freezing: how the model is frozen, as for the export.
        dims: the dimensions that may vary.
        settings: how files are run and held against the model.
        per_module: whether modules are compared though all outputs pass.
        keeps_case: whether inputs and outputs are kept.
        notes: sentences for the report of every proof.
    """

    model: nn.Module
    state: Preserved
    run: Callable[[InputSet], Reference]
    references: list[Reference]
    freezing: Freezing
    dims: Sequence[DynamicDim]
    settings: ProofSettings
    per_module: bool
    keeps_case: bool
    notes: tuple[str, ...] = ()

    def prove(
        self,
        draft: Path,
        maker: str,
        declared: Sequence[Sequence[object]] | None,
        is_last: bool,
    ) -> Proved:
        """Return the proof of a file.

        Args:
            draft: the file.
            maker: who made it, for the message.
            declared: the shapes that it declares of its outputs, where that is known.
            is_last: whether no other exporter is tried after this one.

        Raises:
            ExportError: if onnxruntime cannot run the file; if it fixes a dimension that the user
                named, or one of an output that varies while another exporter is left to try; or if
                it has made one dimension of two.
            ParityError: if it does not reproduce the model.
        """
        _logger.info("comparing %d input sets with onnxruntime", len(self.references))
        session = open_proof_session(draft, self.settings)
        shapes = self._read_shapes(session)
        require_dynamic(shapes, self.dims)
        runnable = self._select_runnable(shapes)
        parity = compare(self.model, self.freezing, session, draft, runnable, self.settings)
        self.state.reset()  # outside of the block: the state knows nothing of its weights
        parity = replace(parity, notes=(*parity.notes, *self.notes))
        keeps = self.keeps_case and parity.passed
        case = _make_case(self.model, session, runnable, self.settings, parity) if keeps else None
        del session
        if parity.passed:
            corrected = correct_declared_sizes(draft, runnable, declared, is_last)
            parity = replace(parity, notes=(*parity.notes, *corrected))
        if self.per_module or not parity.passed:
            _logger.info("comparing module by module")
            parity = locate_divergence(
                parity, self.model, self.state, draft, runnable, self.settings
            )
        parity.require_passed(f"the file made by {maker}")
        return Proved(parity, case)

    def _select_runnable(self, shapes: Mapping[str, Sequence[Any]]) -> list[Reference]:
        """Leave out sizes that the file has fixed, as ``Dim.AUTO`` allows the exporter to."""
        kept = []
        for reference in self.references:
            label = reference.inputs.label
            if label.startswith("size ") and not self._fits_file(shapes, reference.inputs):
                _logger.info("the file has fixed shapes; not run at %s", label)
            else:
                kept.append(reference)
        return kept

    def _fits_file(self, shapes: Mapping[str, Sequence[Any]], inputs: InputSet) -> bool:
        sizes = list_sizes(inputs)
        one_for_two = find_tied_dims(shapes, self.dims, sizes)
        if one_for_two is not None:
            require_apart(one_for_two, inputs.label)
            return False
        return not any(
            isinstance(wanted, int) and sizes.get((name, position), wanted) != wanted
            for name, shape in shapes.items()
            for position, wanted in enumerate(shape)
        )

    def _read_shapes(self, session: Any) -> dict[str, Sequence[Any]]:
        shapes = {entry.name: entry.shape for entry in session.get_inputs()}
        names = self.settings.input_names or {}
        return {name: shapes[file] for name, file in names.items() if file in shapes}


def differs(proof: Proof, within: Callable[[], AbstractContextManager[Any]]) -> bool:
    """Whether the model gives other outputs for the example within a context than without."""
    outputs = _compute_outputs(proof, within)
    pairs = zip(outputs, proof.references[0].outputs, strict=False)
    return any(one.shape != other.shape or not _are_close(one, other) for one, other in pairs)


def require_same_network(proof: Proof, names: Sequence[str]) -> None:
    """Raise if the model is another network than the one that the references come from.

    Args:
        proof: its model was gathered from that one.
        names: those of the outputs.

    Raises:
        ParityError: if outputs for the example are far apart.
    """
    if not differs(proof, nullcontext):
        return
    reference = proof.references[0]
    running = make_running_errors(names, proof.settings, find_coarsest(proof.model, [reference]))
    outputs = _compute_outputs(proof, nullcontext)
    for errors, wanted, got in zip(running, reference.outputs, outputs, strict=False):
        errors.add(reference.inputs.label, wanted, got)
    report = ParityReport(make_results(running), 1, ())
    farthest = max(report.outputs, key=lambda output: output.max_abs)
    raise ParityError(
        "the network that model_factory builds gives other outputs than the sharded model for "
        f"{reference.inputs.label}, with the same parameters and buffers: '{farthest.name}' "
        f"differs by up to {farthest.max_abs:.3g}",
        report,
    )


def _compute_outputs(
    proof: Proof, within: Callable[[], AbstractContextManager[Any]]
) -> list[Tensor]:
    """Return what the model gives within a context; nothing if it fails there."""
    given = proof.references[0].inputs.clone()
    try:
        with within(), torch.no_grad():
            found = find_tensors(given.call(proof.model))
        return [as_real_pairs(leaf.detach()).clone() for _, leaf in found]
    except Exception:  # an exporter has failed on it as well, and its error says so
        return []
    finally:
        proof.state.reset()  # outside of the block: the state knows nothing of its weights


def _are_close(one: Tensor, other: Tensor) -> bool:
    one, other = one.double(), other.double()
    scale = float(other[other.isfinite()].abs().max()) if other.isfinite().any() else 0.0
    return torch.allclose(one, other, rtol=_SAME, atol=_SAME * scale, equal_nan=True)


def _make_case(
    model: nn.Module,
    session: Any,
    references: Sequence[Reference],
    settings: ProofSettings,
    parity: ParityReport,
) -> Case:
    """Return the case of a proof: its inputs by the names in the file, and the model's outputs."""
    coarsest = find_coarsest(model, references)
    tolerances = [
        _choose_saved_tolerances(
            settings.get_tolerances(position, output.name),
            output,
            [reference.outputs[position] for reference in references],
            coarsest,
        )
        for position, output in enumerate(parity.outputs)
    ]
    sets = []
    for reference in references:
        feed = name_inputs(session, reference.inputs, settings.input_names)
        sets.append((reference.inputs.label, list(feed.values()), reference.outputs))
    return Case(
        tuple(entry.name for entry in session.get_inputs()),
        tuple(entry.name for entry in session.get_outputs()),
        tuple(rtol for rtol, _ in tolerances),
        tuple(atol for _, atol in tolerances),
        sets,
        settings.proof_dtype,
        references[0].inputs.draws,
    )


def _choose_saved_tolerances(
    given: tuple[float | None, float | None],
    output: OutputParity,
    references: Sequence[Tensor],
    coarsest: str | None,
) -> tuple[float | None, float | None]:
    """Return rtol and atol of an output as its case has them; None for the default by dtype.

    Args:
        given: those that the user asked for.
        output: how it compared.
        references: the output of the model for each input set.
        coarsest: the coarsest dtype that the network computes in.
    """
    rtol, atol = given
    if coarsest not in (None, name_dtype(references[0])):
        # The dtype of the output does not tell in what precision the network computes.
        defaults = [resolve_tolerance(one, None, None, coarsest) for one in references]
        rtol = max(default for default, _ in defaults) if rtol is None else rtol
        atol = max(default for _, default in defaults) if atol is None else atol
    if output.fraction_outside and output.rounding is not None:
        # Without the model nobody can ask again how far rounding goes: what was allowed is kept.
        moved = [output.rounding.expected, output.rounding.operators]
        atol = output.atol + (1 + FACTOR) * max(one.max for one in moved if one is not None)
    return rtol, atol
