"""The reference: what the model itself says, in eval mode, leaving no trace.

Random inputs that it rejects are drawn again near the example.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..errors import SnExportError
from ..text import without_frames
from .input_set import InputSet, random_sets
from .nested import is_plain, paths_of_tensors, tensor_leaves, unseen_tensors
from .preservation import Preserved, set_by_hooks
from .tensor_memory import are_large, as_real_pairs
from .torch_private import SAFE_SOFTMAX, TorchDispatchMode
from .undo import undo_on_exit, undoing

_logger = logging.getLogger("sn_export")
_SEED = 2
_ALONE = 8  # tensors at most that are shuffled each alone
_NOISE = 0.01  # of each number: its sign and its size stay


@dataclass(frozen=True)
class Reference:
    """An input set and the model's outputs for it.

    Attributes:
        inputs: what the model was given.
        outputs: the tensors that it returned, complex ones as pairs of reals.
        paths: where each stood in the result.
        is_plain: whether the result had nothing but tensors in containers that torch knows.
        unseen: what else held tensors in the result, which are not among the outputs.
    """

    inputs: InputSet
    outputs: tuple[Tensor, ...]
    paths: tuple[tuple[str, ...], ...] = ()
    is_plain: bool = True
    unseen: tuple[str, ...] = ()


def run_reference(
    model: nn.Module, state: Preserved, inputs: InputSet, drops_weights: bool | None = None
) -> Reference:
    """Run ``model`` without grad on a copy of ``inputs``, from the state it started in.

    Args:
        model: the model.
        state: its state, which is reset afterwards.
        inputs: the inputs.
        drops_weights: whether to free each weight that a hook sets once its module has run, which a
            forward that reads it later fails without. By default that is tried with large models,
            which are run again if they fail.

    Raises:
        SnExportError: if the model rejects the inputs or returns no tensor.
    """
    with _describe_failures(model, inputs):
        result = _run(model, state, inputs, drops_weights)
    found = paths_of_tensors(result)
    outputs = tuple(as_real_pairs(leaf.detach()).clone() for _, leaf in found)
    state.reset()
    if not outputs:
        raise SnExportError(
            f"the model returns no tensor for {inputs.label}: got {type(result).__name__}"
        )
    paths = tuple(path for path, _ in found)
    unseen = tuple(
        f"{kind} at {'_'.join(('output', *path))!r}" for path, kind in unseen_tensors(result)
    )
    return Reference(inputs.clone(), outputs, paths, is_plain(result), unseen)


@contextmanager
def _describe_failures(model: nn.Module, inputs: InputSet) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:  # a network that exits has not run
        raise SnExportError(
            f"the model fails on {inputs.label}: {type(error).__name__}: "
            f"{without_frames(str(error))}{_place_of(error, model)}"
        ) from error


def initialise_lazy(model: nn.Module, inputs: InputSet) -> None:
    """Run ``model`` once in eval mode where lazy modules of it never ran, so that they have shapes.

    They, and the random numbers that they draw, are as after any forward; all else in the model is
    put back.

    Raises:
        SnExportError: if the model rejects the inputs, or does not call one of them.
    """
    lazy = [m for m in model.modules() if isinstance(m, LazyModuleMixin) and _never_ran(m)]
    if lazy:
        known = set(map(id, lazy))
        state = Preserved([m for m in model.modules() if id(m) not in known], True, left=lazy)
        modes = [(module.__dict__, module.training) for module in lazy]

        def restore() -> None:
            state.restore()
            for attributes, training in modes:
                attributes["training"] = training

        with undo_on_exit(restore), _describe_failures(model, inputs):
            state.guard_parameters()
            state.begin()
            for attributes, _ in modes:
                attributes["training"] = False
            _call(model, inputs)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise SnExportError(
                f"'{name}' has no shape yet, since {inputs.label} does not call its lazy module: "
                "run the model once in a way that does"
            )


def _never_ran(module: Any) -> bool:
    return "_initialize_hook" in vars(module)  # which its first call removes


def _place_of(error: BaseException, model: nn.Module) -> str:
    """Return where below ``model`` an error was raised: ``; in 'body.0' (Conv2d)``."""
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    place = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and paths.get(id(module)):
            kind = parametrize.type_before_parametrizations(module).__name__
            place = f"; in '{paths[id(module)]}' ({kind})"
    return place


def _run(model: nn.Module, state: Preserved, inputs: InputSet, drops: bool | None) -> Any:
    if drops is not None:
        with _drop_weights(model) if drops else nullcontext():
            return _call(model, inputs)
    if are_large(model.parameters()):
        try:
            with _drop_weights(model):
                return _call(model, inputs)
        except Exception:  # it may need one of them later
            state.reset()
    return _call(model, inputs)


def _call(model: nn.Module, inputs: InputSet) -> Any:
    with torch.no_grad():
        return inputs.clone().call(model)


@undoing
def _drop_weights(model: nn.Module) -> Iterator[None]:
    """Free each weight that a hook of torch's has set once its module has run.

    It is deleted, not replaced: a forward that reads it later fails, and gets no other value.
    """
    with ExitStack() as stack:
        for module, name in list(set_by_hooks(model.modules())):
            stack.callback(module.register_forward_hook(partial(_drop, name)).remove)
        yield


def _drop(name: str, module: nn.Module, *_: object) -> None:
    module.__dict__.pop(name, None)


class RandomReferences(NamedTuple):
    """What came of the random inputs.

    Attributes:
        references: of the inputs that the model takes, with what it said.
        left_out: how many were left out.
        reason: why, for the last of them; empty if there are none.
    """

    references: list[Reference]
    left_out: int
    reason: str


def random_references(
    first: Reference, count: int, run: Callable[[InputSet], Reference]
) -> RandomReferences:
    """Run the model on ``count`` random inputs like the example.

    Within the range of the example a model may still reject what is drawn: lengths of sequences,
    offsets, indices, bounds. Or it gives NaN: for a mask that hides a whole row, for the power of a
    negative number. Such an input is drawn again near the example; what still does not go is left
    out.

    Args:
        first: the example, with what the model said.
        count: how many.
        run: runs the model, and raises a `SnExportError` where it rejects an input.
    """
    generator = torch.Generator().manual_seed(_SEED)
    references: list[Reference] = []
    reason = ""
    for drawn in random_sets(first.inputs, count):
        for attempt in chain((drawn,), near_sets(first.inputs, drawn.label, generator)):
            try:
                references.append(run_usable(first, attempt, run))
                break
            except SnExportError as error:
                _logger.info("drawn again: %s", error)
                reason = " ".join(str(error).split())
    left_out = count - len(references)
    return RandomReferences(references, left_out, reason if left_out else "")


def left_out_note(drawn: RandomReferences) -> str:
    """Return a sentence on random inputs that the model does not take, or nothing."""
    if not drawn.left_out:
        return ""
    tried = drawn.left_out + len(drawn.references)
    return (
        f"{drawn.left_out} of {tried} random inputs were left out of the proof, also near the "
        f"example: {drawn.reason}. Pass inputs=[...] that the model takes, or samples=0"
    )


def run_usable(
    first: Reference, inputs: InputSet, run: Callable[[InputSet], Reference]
) -> Reference:
    """Return what the model says for drawn inputs.

    Raises:
        SnExportError: if it rejects them; if it gives NaN or infinities where it gives none for
            the example: nothing can be compared then; or if a mask hides a whole row of an
            attention, where the formula, and so the file, has NaN.
    """
    reference = run(inputs)
    if not _is_finite_as(first, reference):
        raise SnExportError(f"the model gives NaN or infinities for {inputs.label}")
    has_mask = any(map(_may_be_mask, tensor_leaves((inputs.args, dict(inputs.kwargs)))))
    if has_mask and _hides_rows(inputs, run) and not _hides_rows(first.inputs, run):
        raise SnExportError(
            f"a mask hides all that a query may attend to for {inputs.label}, where attention is "
            "not defined: torch's gives zeros, and its formula NaN"
        )
    return reference


def _is_finite_as(first: Reference, reference: Reference) -> bool:
    """Whether an output is finite wherever that of the example is."""
    return all(
        bool(now.isfinite().all()) or not bool(before.isfinite().all())
        for before, now in zip(first.outputs, reference.outputs, strict=False)
    )


def _may_be_mask(tensor: Tensor) -> bool:
    is_integer = not (tensor.is_floating_point() or tensor.is_complex())
    return is_integer and bool(((tensor == 0) | (tensor == 1)).all())


def _hides_rows(inputs: InputSet, run: Callable[[InputSet], Reference]) -> bool:
    seen = _HiddenRows()
    with no_fused_attention(), seen:
        run(inputs)
    return seen.found


class _HiddenRows(TorchDispatchMode):
    """Sees whether a mask of torch's attention leaves a query nothing to attend to.

    Attributes:
        found: whether one did.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator, and look at its mask."""
        kwargs = dict(kwargs or {})
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        # Each kernel has an operator of its own; without one it is this softmax, of what is masked.
        key = "self" if func is SAFE_SOFTMAX else "attn_mask"
        mask = given.get(key, given.get("attn_bias"))
        if isinstance(mask, Tensor):
            visible = mask if mask.dtype == torch.bool else ~mask.isneginf()
            self.found |= not bool(visible.any(-1).all())
        return func(*args, **kwargs)


@undoing
def no_fused_attention() -> Iterator[None]:
    """Keep `torch.nn.TransformerEncoderLayer` off its fused operator, which has no ONNX form."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    with undo_on_exit(lambda: torch.backends.mha.set_fastpath_enabled(enabled)):
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def near_sets(example: InputSet, label: str, generator: torch.Generator) -> Iterator[InputSet]:
    """Yield input sets near the example, from a farther to a nearer one.

    Floats get a little noise; integers and booleans are in another order within each row, so that
    no row is hidden by a mask that the example does not hide: all of them, then those of one tensor
    alone, then none::

        ids [4, 4, 9], starts [0, 2]  ->  [9, 4, 4], [2, 0], then [4, 9, 4], [0, 2], ...
    """
    leaves = tensor_leaves((example.args, dict(example.kwargs)))
    rows = [id(t) for t in leaves if t.ndim and not (t.is_floating_point() or t.is_complex())]
    alone = [[row] for row in rows[:_ALONE]] if len(rows) > 1 else []
    for chosen in (rows, *alone, []):

        def change(tensor: Tensor, chosen: Sequence[int] = chosen) -> Tensor:
            return near_like(tensor, generator, shuffled=id(tensor) in chosen)

        near = example.map(change, f"{label}, near the example")
        if not _is_same(near, example):
            yield near


def near_like(tensor: Tensor, generator: torch.Generator, shuffled: bool) -> Tensor:
    """Return a tensor with noise of 1 % of each number, or with its integers in another order."""
    values = tensor.detach().clone()
    if tensor.is_floating_point() or tensor.is_complex():
        drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64, device="cpu")
        noise = 1 + _NOISE * (2 * drawn - 1)
        return (values * noise.to(values.device)).to(values.dtype)
    if not shuffled or not values.ndim:
        return values
    order = torch.randperm(values.shape[-1], generator=generator, device="cpu")
    return values[..., order.to(values.device)]


def _is_same(one: InputSet, other: InputSet) -> bool:
    left, right = (tensor_leaves((entry.args, dict(entry.kwargs))) for entry in (one, other))
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(left, right, strict=True))
