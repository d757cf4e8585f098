"""The truth about an output: the frozen network in float64, and how far rounding goes from it.

It is asked where a fixed tolerance cannot judge: see `verdicts`. Measured is, for each output and
over all elements of all input sets, how far model and file are from it, and how far the model's own
outputs move when every operator's result is moved by a unit of rounding (`MovedByRounding`). The
model's distance is one draw of what rounding does, and may be small by luck where an output has few
elements; the moved runs are further draws. They also tell whether the float64 run is of the same
function at all: a model much farther from it than rounding moves it does something else there.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..errors import FreezeError, SnExportError
from ..results import Distance, Rounding
from ..running import (
    InputSet,
    Preserved,
    Reference,
    are_large,
    as_real_pairs,
    list_tensors,
    preserved,
    restore_container,
)
from ..text import strip_frames
from .output_errors import Spread
from .precision import InFloat64, MovedByRounding, widen

FEW, MANY = 2, 16  # runs with moved results, for each input set
FACTOR = 4.0  # times what rounding accounts for: a right file, or a frozen model, is no farther
_PLAUSIBLE = 30  # times what the moved runs show: past that it is another function
_MEANINGFUL = 0.1  # of an output: what rounding moves more than that tells nothing


@dataclass(frozen=True)
class Freezing:
    """How the model is frozen.

    Attributes:
        block: makes a block, to be entered once.
        release: frees the memory that reading the frozen weights of a large model took.
    """

    block: Callable[[], AbstractContextManager[Any]]
    release: Callable[[], None] = lambda: None


class NoTruthError(SnExportError):
    """The network cannot be run in float64, or that run is not of the same function."""


def measure_rounding(
    model: nn.Module,
    freezing: Freezing,
    references: Sequence[Reference],
    run_file: Callable[[Reference], Sequence[Tensor]],
    positions: Sequence[int],
    coarsest: torch.dtype,
    runs: int,
) -> dict[int, Rounding]:
    """Return how far outputs of the model and of the file are from the network in float64.

    One input set at a time is in memory. So are weights in float64 up to 512 MB of parameters, and
    past that those of one operator.

    Args:
        model: the unfrozen model; it is left as it was.
        freezing: makes a block that freezes it: float64 then has the same weights as the model
            and the file, not others that were computed in float64.
        references: the input sets, with what the model returned.
        run_file: gives the outputs of the file for one of them.
        positions: which outputs; they are floating.
        coarsest: no unit of rounding is smaller than that of this dtype.
        runs: how often the model is run with moved results, for each input set.

    Raises:
        NoTruthError: if the forward does not run in float64, draws random numbers, or does
            something else in float64 than in its own dtype, or frozen than as it is.
    """
    running = {position: _RunningRounding(coarsest) for position in positions}
    dtypes = {coarsest}
    for number, reference in enumerate(references):
        with _frozen(model, freezing) as state:
            run = partial(_run, model, freezing.release, state, reference.inputs)
            truth = _run_in_float64(run)
            frozen = run(nullcontext())
            seeds = range(number * runs, (number + 1) * runs)
            modes = [MovedByRounding(seed, coarsest) for seed in seeds]
            moved = [run(mode) for mode in modes]
        shapes = [[tuple(output.shape) for output in one] for one in (truth, frozen, *moved)]
        if any(one != [tuple(output.shape) for output in reference.outputs] for one in shapes):
            raise NoTruthError("the forward returns tensors of other shapes in float64")
        dtypes |= {dtype for mode in modes for dtype in mode.dtypes}
        found = run_file(reference)
        for position, one in running.items():
            one.add(
                truth[position],
                model=reference.outputs[position],
                frozen=frozen[position],
                moved=[outputs[position] for outputs in moved],
                file=found[position],
            )
    units = {torch.finfo(dtype).eps: dtype for dtype in dtypes}
    name = str(units[max(units)]).removeprefix("torch.")
    return {position: one.make_result(name) for position, one in running.items()}


def measure_operators(
    references: Sequence[Reference],
    run_moved: Callable[[Reference], Sequence[Tensor]],
    positions: Sequence[int],
) -> dict[int, Distance]:
    """Return how far rounding moves outputs of a file, by its own operators.

    Two moved runs are held against each other. The file itself would not do in the place of one: it
    is run with onnxruntime's optimisations, which may drop a cast to float16 and so an error that
    is no rounding of float32.

    Args:
        references: the input sets.
        run_moved: gives outputs of the copy by `move_values`, others at every call.
        positions: which outputs; they are floating.
    """
    running = {position: _RunningDistance() for position in positions}
    for reference in references:
        first, second = run_moved(reference), run_moved(reference)
        for position, one in running.items():
            one.add(first[position], second[position])
    return {position: one.make_result() for position, one in running.items()}


def _run_in_float64(run: Callable[..., list[Tensor]]) -> list[Tensor]:
    """Return the outputs in float64, where random numbers play no part.

    In float64 other numbers are drawn than for the model, even from the same state of the
    generators. They play no part where the forward multiplies them with a scale of 0.
    """
    exact = InFloat64()
    truth = run(exact, in_float64=True)
    if exact.obstacle:
        raise NoTruthError(exact.obstacle)
    if exact.drawing:
        again = run(InFloat64(draws_other=True), in_float64=True)
        if not all(map(torch.equal, truth, again)):
            raise NoTruthError(f"the forward draws random numbers ({exact.drawing})")
    return truth


@contextmanager
def _frozen(model: nn.Module, freezing: Freezing) -> Iterator[Preserved]:
    with contextlib.ExitStack() as stack:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the block is the proof's, not the user's
                stack.enter_context(freezing.block())
        except FreezeError as error:
            raise NoTruthError(str(error)) from error
        yield stack.enter_context(preserved(model))


def _run(
    model: nn.Module,
    release: Callable[[], None],
    state: Preserved,
    inputs: InputSet,
    mode: AbstractContextManager[Any],
    in_float64: bool = False,
) -> list[Tensor]:
    """Return the outputs in a mode, from the state that the model started in."""
    given = inputs.map(widen) if in_float64 else inputs.clone()
    is_large = are_large(model.parameters())
    try:
        if in_float64 and not is_large:
            _widen_held(state)
        with _released(release) if is_large else nullcontext(), torch.no_grad(), mode:
            result = given.call(model)
        return [as_real_pairs(leaf.detach()).cpu().clone() for leaf in list_tensors(result)]
    except (Exception, SystemExit) as error:
        reason = strip_frames(str(error)).strip().split("\n")[0]
        raise NoTruthError(f"the forward does not run: {type(error).__name__}: {reason}") from error
    finally:
        state.reset()


@contextmanager
def _released(release: Callable[[], None]) -> Iterator[None]:
    """Call ``release`` whenever a module has run: no more of the weights is read at a time."""
    handle = register_module_forward_hook(lambda *_: release())
    try:
        yield
    finally:
        handle.remove()


def _widen_held(state: Preserved) -> None:
    """Put float64 in the place of every tensor that the modules hold, until the next reset.

    Some functions, as `torch.lstm`, want all tensors in one dtype before they reach an operator.
    """
    done: dict[int, Any] = {}

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in done:
            new = widen(value.detach())
            is_parameter = isinstance(value, nn.Parameter)
            done[id(value)] = nn.Parameter(new, requires_grad=False) if is_parameter else new
        return done[id(value)]

    for container, _ in state.containers:
        content = (
            {key: wide(value) for key, value in container.items()}
            if isinstance(container, dict)
            else type(container)(map(wide, container))
        )
        restore_container(container, content)


class _RunningDistance:
    """How far outputs are apart."""

    def __init__(self) -> None:
        self._spread = Spread()
        self._squares = self._largest = 0.0
        self._elements = 0

    def add(self, reference: Tensor, output: Tensor) -> None:
        left, right = reference.detach().cpu().double(), output.detach().cpu().double()
        apart = torch.where(left == right, 0.0, (left - right).abs()).flatten()
        self._spread.add(apart.numpy())
        self._squares += float(apart.square().sum())
        self._elements += apart.numel()
        if apart.numel():
            self._largest = max(self._largest, float(apart.nan_to_num(math.inf).max()))

    def make_result(self) -> Distance:
        rms = math.sqrt(self._squares / self._elements) if self._elements else 0.0
        return Distance(rms, self._spread.estimate_quantiles(990)[0], self._largest)


class _RunningRounding:
    """The distances of one output from the truth while input sets come in.

    Args:
        coarsest: the dtype whose unit of rounding is the least that counts.
    """

    def __init__(self, coarsest: torch.dtype) -> None:
        self._model, self._frozen, self._moved, self._file = (_RunningDistance() for _ in range(4))
        self._unit = torch.finfo(coarsest).eps
        self._squares = 0.0
        self._elements = 0

    def add(
        self, truth: Tensor, model: Tensor, frozen: Tensor, moved: Sequence[Tensor], file: Tensor
    ) -> None:
        """Take in the outputs for one input set."""
        self._unit = max(self._unit, torch.finfo(model.dtype).eps)
        self._model.add(truth, model)
        self._frozen.add(model, frozen)
        for one in moved:
            self._moved.add(frozen, one)
        self._file.add(truth, file)
        finite = truth[torch.isfinite(truth)].double()
        self._squares += float(finite.square().sum())
        self._elements += finite.numel()

    def make_result(self, dtype: str) -> Rounding:
        """Return the distances.

        Args:
            dtype: the coarsest one on the way.

        Raises:
            NoTruthError: if the model is farther from the truth, or the frozen model from the
                model, than rounding explains, or so far that it tells nothing.
        """
        scale = math.sqrt(self._squares / self._elements) if self._elements else 0.0
        model, moved, least = (
            self._model.make_result(),
            self._moved.make_result(),
            self._unit * scale,
        )
        if not math.isfinite(model.max) or not math.isfinite(moved.max):
            raise NoTruthError("it has NaN or infinities where the model has none")
        rounding = Distance(*(max(value, least) for value in astuple(moved)))
        frozen = Rounding(model, self._frozen.make_result(), rounding, scale)
        if frozen.ratio > FACTOR:
            raise NoTruthError(
                f"frozen, the model's own outputs move by up to {frozen.file.max:.2g}, and "
                f"rounding accounts for {frozen.expected.max:.2g}"
            )
        if model.rms > _PLAUSIBLE * rounding.rms:
            raise NoTruthError(
                f"it is {model.rms:.2g} from the model, and rounding accounts for {moved.rms:.2g}: "
                "the forward does something else in float64"
            )
        expected = Distance(*map(max, astuple(model), astuple(rounding)))
        if expected.rms > _MEANINGFUL * scale:
            raise NoTruthError(
                f"rounding alone moves the model's outputs by {expected.rms / scale:.0%} of their "
                "size: no file can be told right from wrong"
            )
        return Rounding(model, self._file.make_result(), expected, scale, dtype)
