"""Parity: run a file in onnxruntime and compare its outputs with the model's."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import ExportError, ParityError, SnExportError
from .preserving import Preserved, preserved
from .samples import InputSet, as_input_sets, tensor_leaves

# rtol, and atol in units of the largest reference value of the output.
DEFAULT_TOLERANCES: dict[str, tuple[float, float]] = {
    "float64": (1e-9, 1e-9),
    "float32": (1e-4, 1e-4),
    "float16": (1e-2, 1e-2),
    "bfloat16": (5e-2, 5e-2),
}

_PROVIDERS = ("CPUExecutionProvider",)


@dataclass(frozen=True)
class OutputParity:
    """How one output of the file compares with the model's, over all input sets.

    Attributes:
        name: name of the output in the file.
        shape: shape of the model's output for the first input set.
        dtype: its dtype, such as ``"float32"``.
        max_abs: largest absolute difference, in units of the output; NaN where either
            side is NaN, infinity where shapes or dtypes differ.
        max_rel: largest difference relative to the reference value, over non-zero ones.
        mean_abs: mean absolute difference.
        worst_index: index of the element with the largest absolute difference.
        worst_sample: label of the input set it belongs to.
        samples: number of input sets compared.
        rtol: relative tolerance applied.
        atol: largest absolute tolerance applied, in units of the output.
        passed: whether every element of every set is within ``atol + rtol * |reference|``.
        is_comparable: False where shapes or dtypes differ.
        reason: why it did not pass, in words, for the worst input set; empty if passed.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    max_abs: float
    max_rel: float
    mean_abs: float
    worst_index: tuple[int, ...]
    worst_sample: str
    samples: int
    rtol: float
    atol: float
    passed: bool
    is_comparable: bool = True
    reason: str = ""


@dataclass(frozen=True)
class ParityReport:
    """The comparison of a file with a model.

    Attributes:
        outputs: one entry for each output of the file.
        samples: number of input sets.
        providers: the onnxruntime execution providers that ran the file.
    """

    outputs: tuple[OutputParity, ...]
    samples: int
    providers: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether there is an output and every one is within tolerance."""
        return bool(self.outputs) and all(output.passed for output in self.outputs)

    def __str__(self) -> str:
        """Return one line for each output."""
        return "\n".join(
            f"{o.name}: {'passed' if o.passed else 'FAILED'}, max_abs {o.max_abs:.3g}, "
            f"max_rel {o.max_rel:.3g} over {o.samples} input sets"
            + (f"; {o.reason}" if o.reason else "")
            for o in self.outputs
        )

    def require_passed(self, what: str) -> None:
        """Raise a `ParityError` about ``what`` unless the comparison passed."""
        if not self.passed:
            raise ParityError(f"{what} does not reproduce the model:\n{self}", self)


@dataclass(frozen=True)
class Reference:
    """An input set and the model's outputs for it."""

    inputs: InputSet
    outputs: tuple[Tensor, ...]


def check_parity(
    model: nn.Module,
    onnx_path: str | os.PathLike[str],
    inputs: Any,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    providers: Sequence[str] = _PROVIDERS,
) -> ParityReport:
    """Compare an ONNX file with a model in eval mode, on the given inputs.

    Args:
        model: the reference, with or without spectral norm. It and the inputs are left as
            they were.
        onnx_path: the file.
        inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or a list of
            these for several calls.
        rtol: relative tolerance; by default by dtype, see `DEFAULT_TOLERANCES`.
        atol: absolute tolerance in units of the output; by default by dtype and relative to
            the largest reference value of each output.
        providers: onnxruntime execution providers, in order of preference.

    Returns:
        The report, passed or not.

    Raises:
        TypeError: if ``model`` is not a module or ``inputs`` are of no known form.
        ValueError: for no inputs, a negative tolerance or an unknown provider.
        FileNotFoundError: if there is no such file.
        SnExportError: if the model rejects an input.
        ExportError: if onnxruntime cannot load or run the file, or its inputs or outputs
            are not those of the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    require_tolerances(rtol, atol)
    path = Path(onnx_path)
    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file at '{path}'")
    session = open_session(path, providers)
    sets = as_input_sets(inputs, arity=len(session.get_inputs()))
    if not sets:
        raise ValueError("inputs must hold at least one input, got none")
    with preserved(model) as state:
        references = [run_reference(model, state, one) for one in sets]
    return compare(model, session, references, rtol, atol)


def run_reference(model: nn.Module, state: Preserved, inputs: InputSet) -> Reference:
    """Run ``model`` without grad on a copy of ``inputs``, from the state it started in.

    Raises:
        SnExportError: if the model rejects the inputs or returns no tensor.
    """
    given = inputs.clone()
    try:
        with torch.no_grad():
            result = model(*given.args, **given.kwargs)
    except Exception as error:
        raise SnExportError(
            f"the model fails on {inputs.label}: {type(error).__name__}: {error}"
        ) from error
    outputs = tuple(leaf.detach().clone() for leaf in tensor_leaves(result))
    state.reset()
    if not outputs:
        raise SnExportError(
            f"the model returns no tensor for {inputs.label}: got {type(result).__name__}"
        )
    return Reference(inputs.clone(), outputs)


def open_session(path: Path, providers: Sequence[str]) -> Any:
    """Return an onnxruntime session.

    Raises:
        ValueError: for a provider that is not installed.
        ExportError: if onnxruntime cannot load the file.
    """
    require_providers(providers)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the exception says it
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:
        raise ExportError(f"onnxruntime cannot load '{path.name}': {error}") from error


def compare(
    model: nn.Module,
    session: Any,
    references: Iterable[Reference],
    rtol: float | None,
    atol: float | None,
    by_position: bool = False,
) -> ParityReport:
    """Run every reference's inputs through ``session`` and compare the outputs.

    The file's inputs are matched by name where all names are parameters of the forward, unless
    ``by_position`` says that a user chose the names.

    Raises:
        ExportError: if onnxruntime cannot run the inputs, or the number of inputs or
            outputs differs.
    """
    names = [output.name for output in session.get_outputs()]
    running = [_Running(name, rtol, atol) for name in names]
    count = 0
    for reference in references:
        results = _run_session(model, session, reference.inputs, by_position)
        if len(results) != len(reference.outputs):
            raise ExportError(
                f"the file has {len(results)} outputs, the model {len(reference.outputs)}"
            )
        for state, expected, got in zip(running, reference.outputs, results, strict=True):
            state.add(reference.inputs.label, expected, got)
        count += 1
    providers = tuple(session.get_providers())
    return ParityReport(tuple(state.result() for state in running), count, providers)


def require_providers(providers: Sequence[str]) -> None:
    """Raise a ValueError for an onnxruntime execution provider that is not installed."""
    available = ort.get_available_providers()
    if isinstance(providers, str):
        raise ValueError(f"providers must be a sequence of names, got the text {providers!r}")
    for provider in providers:
        if provider not in available:
            raise ValueError(
                f"unknown onnxruntime provider '{provider}', installed are {', '.join(available)}"
            )


def require_tolerances(rtol: float | None, atol: float | None) -> None:
    """Raise a ValueError for a tolerance that is negative or not a number."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")


class _Running:
    """The errors of one output while input sets come in."""

    def __init__(self, name: str, rtol: float | None, atol: float | None) -> None:
        self.name = name
        self.rtol, self.atol = rtol, atol
        self.shape: tuple[int, ...] = ()
        self.dtype = ""
        self.max_abs = self.max_rel = self.total = self.applied_rtol = self.applied_atol = 0.0
        self.elements = self.samples = 0
        self.worst_index: tuple[int, ...] = ()
        self.worst_sample = ""
        self.is_comparable = True
        self.blamed, self.reason = -1.0, ""

    def add(self, label: str, expected: Tensor, got: Tensor) -> None:
        if self.samples == 0:
            self.shape = tuple(expected.shape)
            self.dtype = _dtype_name(expected)
        self.samples += 1
        expected = expected.cpu()
        if expected.shape != got.shape or expected.dtype != got.dtype:
            self._fail(
                label,
                math.inf,
                f"the file gives {_dtype_name(got)}{list(got.shape)}, "
                f"the model {_dtype_name(expected)}{list(expected.shape)}",
            )
            return
        if expected.numel():
            self._measure(label, expected, got)

    def _measure(self, label: str, expected: Tensor, got: Tensor) -> None:
        rtol, atol = self._tolerances(expected)
        left, right = _wide(expected), _wide(got)
        equal = expected == got  # before widening: float64 does not hold every integer
        # Equal infinities differ by nothing; inf - inf would say NaN.
        difference = torch.where(equal, 0.0, (left - right).abs()).double()
        if not (expected.is_floating_point() or expected.is_complex()):
            difference = torch.where(equal, 0.0, difference.clamp(min=1))
        nan = torch.isnan(difference)
        magnitude = left.abs().double()
        self.applied_rtol, self.applied_atol = rtol, max(self.applied_atol, atol)
        worst = int(torch.where(nan, math.inf, difference).argmax())
        largest = float(difference.flatten()[worst])
        if math.isnan(largest) or largest > self.max_abs or not self.worst_sample:
            self._note_worst(label, largest, _index(worst, expected.shape))
        nonzero = magnitude > 0
        if bool(nonzero.any()):
            relative = difference / torch.where(torch.isinf(difference), 1.0, magnitude)
            relative = torch.where(nan, math.nan, relative)[nonzero]
            self.max_rel = _larger(self.max_rel, float(relative.max()))
        self.total += float(difference.sum())
        self.elements += expected.numel()
        # An infinite reference allows itself alone: inf <= atol + rtol * inf would allow all.
        finite = torch.isfinite(difference) & torch.isfinite(magnitude)
        outside = ~(equal | (finite & (difference <= atol + rtol * magnitude)))
        if bool(nan.any()):
            self._blame(
                math.inf, f"{int(nan.sum())} of {expected.numel()} elements are NaN on {label}"
            )
        elif bool(outside.any()):
            at = int(torch.where(outside, difference, -1.0).argmax())
            self._blame(
                float(difference.flatten()[at]),
                f"{int(outside.sum())} of {expected.numel()} elements are outside "
                f"atol {atol:.3g} + rtol {rtol:.3g} on {label}; worst at "
                f"{list(_index(at, expected.shape))}: the model says "
                f"{expected.flatten()[at].item():.7g}, the file {got.flatten()[at].item():.7g}",
            )

    def _tolerances(self, expected: Tensor) -> tuple[float, float]:
        rtol, scaled = DEFAULT_TOLERANCES.get(_dtype_name(expected), (0.0, 0.0))
        if self.rtol is not None:
            rtol = self.rtol
        if self.atol is not None:
            return rtol, self.atol
        finite = _wide(expected)[torch.isfinite(_wide(expected))]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        return rtol, scaled * scale

    def _note_worst(self, label: str, largest: float, index: tuple[int, ...]) -> None:
        if not math.isnan(self.max_abs):
            self.max_abs, self.worst_index, self.worst_sample = largest, index, label

    def _fail(self, label: str, error: float, reason: str) -> None:
        self._note_worst(label, error, ())
        self.max_rel = _larger(self.max_rel, error)
        self.total += error
        self.elements += 1
        self.is_comparable = False
        self._blame(math.inf, f"{reason} on {label}")

    def _blame(self, error: float, reason: str) -> None:
        if error > self.blamed:
            self.blamed, self.reason = error, reason

    def result(self) -> OutputParity:
        return OutputParity(
            name=self.name,
            shape=self.shape,
            dtype=self.dtype,
            max_abs=self.max_abs,
            max_rel=self.max_rel,
            mean_abs=self.total / self.elements if self.elements else 0.0,
            worst_index=self.worst_index,
            worst_sample=self.worst_sample,
            samples=self.samples,
            rtol=self.applied_rtol,
            atol=self.applied_atol,
            passed=not self.reason and self.samples > 0,
            is_comparable=self.is_comparable,
            reason=self.reason,
        )


def _run_session(
    model: nn.Module, session: Any, inputs: InputSet, by_position: bool
) -> list[Tensor]:
    wanted = [entry.name for entry in session.get_inputs()]
    named = inputs.named_tensors(model)
    by_name = dict(named)
    if by_position or not all(name in by_name for name in wanted):
        if len(named) != len(wanted):
            raise ExportError(
                f"the file takes the inputs {wanted}, {inputs.label} has "
                f"{[name for name, _ in named]}"
            )
        by_name = dict(zip(wanted, (tensor for _, tensor in named), strict=True))
    feed = {name: _to_ort(by_name[name]) for name in wanted}
    try:
        values = session.run_with_ort_values(None, feed)
    except Exception as error:
        raise ExportError(f"onnxruntime fails on {inputs.label}: {error}") from error
    return [_from_ort(value) for value in values]


def _to_ort(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16
        bits = tensor.view(torch.uint16).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, 16)
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _from_ort(value: Any) -> Tensor:
    if value.element_type() == 16:
        return torch.utils.dlpack.from_dlpack(value.to_dlpack()).clone()
    array: NDArray[Any] = np.array(value.numpy())  # a copy; the value may be reused
    return torch.from_numpy(array)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().to(torch.float64)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _index(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, tuple(shape)))


def _larger(left: float, right: float) -> float:
    return math.nan if math.isnan(left) or math.isnan(right) else max(left, right)
