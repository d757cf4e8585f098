"""The plain records of an export and its proof, and `ParityError`, which carries two of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import SnExportError
from .freezing import ParametrizationInfo, SpectralNormInfo
from .text import format_count, to_json_values

# One number for every output, or numbers by the name (str) or position (int) of an output.
Tolerance = float | Mapping[Any, float] | None

if TYPE_CHECKING:  # torch takes seconds to import, and sn-export --help reads the options here
    from torch.export import ExportedProgram
    from torch.onnx import ONNXProgram

Exporter = Literal["dynamo", "torchscript"]

EXPORTERS: tuple[Exporter, ...] = ("dynamo", "torchscript")  # in the order of "auto"

# The values of options, for the API and the command line, which reads them without torch.
ExporterChoice = Literal["auto", Exporter]

Freeze = Literal["spectral_norm", "all"]

ProofDtype = Literal["float32"]

Draws = Literal["zeros"]  # what takes the place of a forward's random numbers; None: nothing

Spelling = Literal["plain", "hook", "parametrization"]  # of a tensor in a state dict

Respellable = Literal["spectral_norm", "weight_norm"]

OrthogonalMap = Literal["default", "matrix_exp", "cayley", "householder"]

REPORT_SCHEMA = 1  # changes when a field changes its meaning or goes; new ones may come


@dataclass(frozen=True)
class Histogram:
    """How many elements have an absolute error in each decade, over all input sets.

    Attributes:
        edges: bounds of the buckets, in units of the output: the powers of ten from 1e-18 to 1e6.
        counts: number of elements from each edge (included) to the next (excluded); one fewer
            than edges. The first and the last bucket also count what lies beyond them.
        zeros: elements without any error.
        not_finite: elements whose error is NaN or infinite.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    zeros: int = 0
    not_finite: int = 0


@dataclass(frozen=True)
class Picture:
    """One sample of an output that is a picture or a sound, in the model and in the file.

    Of a picture at most 128 pixels a side are kept, each of them a pixel of the output; of the
    difference the largest error around it. Of a sound at most 400 columns are kept, each with the
    lowest and the highest number in it.

    Attributes:
        sample: label of the input set, and where the sample stands in its batch.
        kind: ``"picture"`` or ``"sound"``.
        width: pixels of a row, or columns of a sound.
        height: rows; 2 of a sound, all of the lowest numbers before all of the highest.
        channels: 1, 3 (RGB) or 4 (RGBA); 1 of a sound and of every difference.
        low: what a byte of 0 stands for in model and file, in units of the output.
        high: what 255 stands for.
        largest: the largest absolute error of the sample, which 255 stands for in the difference.
        model: what the model gives, a byte for each channel, row after row, in base64.
        file: what the file gives.
        difference: the absolute difference.
    """

    sample: str
    kind: Literal["picture", "sound"]
    width: int
    height: int
    channels: int
    low: float
    high: float
    largest: float
    model: str = field(repr=False)
    file: str = field(repr=False)
    difference: str = field(repr=False)


@dataclass(frozen=True)
class Distance:
    """How far an output is from the truth, over all elements of all input sets.

    Attributes:
        rms: root of the mean square, in units of the output.
        p99: the smallest distance that 99 % of the elements do not exceed.
        max: the largest.
    """

    rms: float
    p99: float
    max: float


@dataclass(frozen=True)
class Rounding:
    """How far model and file are from the same network in float64, and how far rounding goes.

    Attributes:
        model: distance of the model, in its own dtype, from the network in float64 with the same
            frozen weights and inputs.
        file: distance of the file from it.
        expected: how far rounding goes: the largest of the model's distance, of the distance that
            its outputs move when every operator's result moves by a unit of rounding, and of one
            unit.
        scale: root mean square of the output in float64.
        dtype: the coarsest floating dtype on the way: of the model, or where that is float64 of
            the file.
        operators: how far rounding moves the outputs of the file, whose operators are not those of
            the model; None where that was not measured.
    """

    model: Distance
    file: Distance
    expected: Distance
    scale: float
    dtype: str = ""
    operators: Distance | None = None

    @property
    def ratio(self) -> float:
        """The file's distance divided by ``expected``: the largest quotient of rms, p99 and max."""
        return self._compute_ratio(self.expected)

    @property
    def operators_ratio(self) -> float:
        """The same divided by ``operators``; infinite where that was not measured."""
        return math.inf if self.operators is None else self._compute_ratio(self.operators)

    def _compute_ratio(self, expected: Distance) -> float:
        pairs = zip(astuple(self.file), astuple(expected), strict=True)
        return max(_divide(value, of) for value, of in pairs)


def _divide(value: float, of: float) -> float:
    return value / of if of else (math.inf if value else 0.0)


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
        passed: whether every element of every set is within ``atol + rtol * |reference|``, or,
            with the default tolerances, as near to the network in float64 as rounding allows.
        is_comparable: False where shapes or dtypes differ.
        reason: why it did not pass, in words, for the worst input set; empty if passed.
        median_abs: the smallest absolute difference that half of the elements do not exceed.
        p999_abs: the same for 99.9 % of the elements.
        quantiles_are_exact: whether these two are differences that occur, as they are up to
            1048576 elements in all; past that each is at most 2.4 % too large.
        fraction_outside: fraction of the elements outside tolerance, exact. Where shapes or
            dtypes differ, every element of the reference counts.
        worst_expected: the reference value of the worst element; None where there is none, or
            where it is complex.
        worst_got: the file's value of that element.
        histogram: the absolute differences by decade, exact counts; None where nothing was
            compared.
        verdict: why it passed or not, in one sentence.
        rounding: how far file and model are from the network in float64; None where that was not
            asked, since the difference is far within the tolerance or a tolerance was given, or
            could not be, which the verdict says.
        pictures: a few samples, of an output that is pictures or sound.
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
    median_abs: float = 0.0
    p999_abs: float = 0.0
    quantiles_are_exact: bool = True
    fraction_outside: float = 0.0
    worst_expected: float | None = None
    worst_got: float | None = None
    histogram: Histogram | None = None
    verdict: str = ""
    rounding: Rounding | None = None
    pictures: tuple[Picture, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class ModuleParity:
    """How the output of one call of a module compares, on one input set.

    Attributes:
        module: path of the module in the model, ``""`` for the model itself.
        type: its class, such as ``"Conv2d"``.
        max_abs: largest absolute difference, in units of the output; NaN for NaN.
        max_rel: largest difference relative to the reference value, over non-zero ones.
        passed: whether every element is within tolerance.
        call: how many calls of the module came before.
        shape: shape of its (first) output in the model.
        dtype: its dtype, such as ``"float32"``.
        value: name of the compared value in the file.
    """

    module: str
    type: str
    max_abs: float
    max_rel: float
    passed: bool
    call: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""
    value: str = ""


@dataclass(frozen=True)
class Divergence:
    """The comparison module by module, which finds where file and model begin to differ.

    Attributes:
        modules: the modules in the order in which they finish, a container after what it
            contains, the model itself last.
        first: path of the first module that is outside tolerance, ``""`` if only the model itself
            is. Where the model is not deterministic, path of the first module that draws random
            numbers. None where there is no such module, or it cannot be told.
        reason: the finding in words.
        unmatched: paths of the modules that ran and have no value of their own in the file: they
            do nothing in eval mode, or were fused into others.
        is_deterministic: whether the model gave the same outputs for the same input twice.
        sample: label of the input set.
    """

    modules: tuple[ModuleParity, ...]
    first: str | None
    reason: str
    unmatched: tuple[str, ...] = ()
    is_deterministic: bool = True
    sample: str = ""


@dataclass(frozen=True)
class ParityReport:
    """The comparison of a file with a model.

    Attributes:
        outputs: one entry for each output of the file.
        samples: number of input sets.
        providers: the onnxruntime execution providers that ran the file.
        divergence: the comparison module by module; None unless it was asked for or an output
            did not pass.
        proof_dtype: ``"float32"`` if a copy of the file in that dtype was run, since the
            providers lack operators for the file's own.
        notes: what else is to be known of the proof: layers whose stored sigma is far below the
            true one, random inputs that the model rejects.
    """

    outputs: tuple[OutputParity, ...]
    samples: int
    providers: tuple[str, ...]
    divergence: Divergence | None = None
    proof_dtype: ProofDtype | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def passed(self) -> bool:
        """Whether there is an output and every one is within tolerance."""
        return bool(self.outputs) and all(output.passed for output in self.outputs)

    @property
    def modules(self) -> tuple[ModuleParity, ...]:
        """The modules in network order; empty unless asked for or an output did not pass."""
        return self.divergence.modules if self.divergence else ()

    @property
    def first_divergent(self) -> str | None:
        """Path of the first module that is outside tolerance, as in `Divergence.first`."""
        return self.divergence.first if self.divergence else None

    def content(self) -> dict[str, Any]:
        """Return what the JSON of the report holds: its fields, and what the properties say."""
        content: dict[str, Any] = to_json_values(self)
        divergence = content.pop("divergence")
        content["passed"] = self.passed
        content["modules"] = divergence.pop("modules") if divergence else []
        content["first_divergent"] = divergence.pop("first") if divergence else None
        content["divergence"] = divergence
        return content

    def __str__(self) -> str:
        """Return one line for each output, and the finding of `Divergence` if one did not pass."""
        lines = [
            f"{o.name}: {'passed' if o.passed else 'FAILED'}, max_abs {o.max_abs:.3g}, "
            f"max_rel {o.max_rel:.3g} over {o.samples} input sets"
            + (f"; {o.reason}" if o.reason else f"; {o.verdict}" if o.rounding else "")
            for o in self.outputs
        ]
        if self.divergence is not None and not self.passed:
            lines.append(self.divergence.reason)
        return "\n".join(lines)

    def require_passed(self, what: str) -> None:
        """Raise a `ParityError` about ``what`` unless the comparison passed."""
        if not self.passed:
            raise ParityError(f"{what} does not reproduce the model:\n{self}", self)


class ParityError(SnExportError):
    """The outputs of the exported file differ from the model's; nothing was published.

    Attributes:
        report: the `sn_export.ParityReport` with every output's errors.
        export: the `sn_export.ExportReport` of the file that was not published; None where
            a file was only compared.
    """

    def __init__(
        self, message: str, report: ParityReport, export: ExportReport | None = None
    ) -> None:
        super().__init__(message)
        self.report = report
        self.export = export

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error as its arguments, since processes hand errors to each other."""
        return type(self), (str(self), self.report, self.export)

    @property
    def divergence(self) -> Divergence | None:
        """The comparison module by module: ``report.divergence``."""
        return self.report.divergence


@dataclass(frozen=True)
class FoldedInitializer:
    """An initializer that replaces operators whose inputs are initializers alone.

    Attributes:
        name: its name in the file.
        module: path of the module that uses it, or holds what it is made from where several
            modules do; the model itself is ``""``.
        shape: its shape.
        sources: parameters and buffers that it is computed from.
        op_types: the operators folded, each once; empty where the exporter had folded them.
        nodes: how many nodes were folded, constants not counted.
        is_weight: whether a convolution, matrix product, embedding or recurrent layer reads it
            as a weight: then the model computes its weights in a way of its own.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    op_types: tuple[str, ...]
    nodes: int
    is_weight: bool


@dataclass(frozen=True)
class Attempt:
    """An exporter that was tried and did not make the file.

    Attributes:
        exporter: ``"dynamo"`` or ``"torchscript"``.
        error: why its file is not the one that was published.
    """

    exporter: Exporter
    error: str


@dataclass(frozen=True)
class FileInput:
    """One input of a file, as whoever serves it needs it.

    Attributes:
        name: its name in the file.
        dtype: such as ``"float32"``.
        shape: sizes, and names where they vary: ``("batch", 3, 64, 64)``; ``"?"`` for a size that
            varies without a name.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` made, and the proof.

    Attributes:
        path: the ONNX file; where the proof failed, the one that was not written.
        exporter: the exporter that made it, ``"dynamo"`` or ``"torchscript"``.
        opset: version of the default opset in the file.
        parity: the comparison of the file with the unfrozen model.
        frozen: the tensors that were frozen, as they were found.
        versions: versions of sn_export and of the packages that made and ran the file.
        metadata: what was written to the file's ``metadata_props``.
        folded: initializers that replace arithmetic which depends on initializers alone: weights
            that modules compute in a way the block does not know.
        attempts: exporters that were tried besides, and why they did not make it.
        inputs: the inputs of the file, in its order.
        model: name of the model's class.
        onnx_program: torch's ONNXProgram, for those who go on from there; None where the
            TorchScript exporter made the file. It is not part of the JSON. Past 512 MB of
            parameters its frozen weights lie in files without a name beside ``path``, whose room
            on the disk is free again when the program goes.
    """

    path: Path
    exporter: Exporter
    opset: int
    parity: ParityReport
    frozen: tuple[SpectralNormInfo | ParametrizationInfo, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    folded: tuple[FoldedInitializer, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    inputs: tuple[FileInput, ...] = ()
    model: str = ""
    onnx_program: ONNXProgram | None = field(default=None, repr=False, compare=False)

    @property
    def exported_program(self) -> ExportedProgram | None:
        """Torch's ExportedProgram of the frozen network; None as for ``onnx_program``.

        It takes the tensors of the inputs in the order of the file. Tensors that were not frozen
        share their memory with the model: copy it before the model is trained on.
        """
        return self.onnx_program.exported_program if self.onnx_program is not None else None

    def __str__(self) -> str:
        """Return the verdict, what made the file, and a line for each output."""
        tensors = format_count(len(self.frozen), "tensor")
        made = f"opset {self.opset}, {self.exporter}, {tensors} frozen"
        if self.parity.passed:
            return f"proved: {self.path} ({made})\n{self.parity}"
        return f"not proved, so '{self.path}' was not written ({made})\n{self.parity}"

    def content(self) -> dict[str, Any]:
        """Return what the JSON of the report holds; ``onnx_program`` is left out."""
        content = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        del content["onnx_program"]
        content |= {"target": self.path, "parity": self.parity.content()}
        if not self.parity.passed:
            content["path"] = None
        return {"schema": REPORT_SCHEMA, **to_json_values(content)}

    def to_json(self, indent: int | None = 2) -> str:
        """Return the report as JSON text; NaN and infinities become null and strings.

        ``sn_export/reporting/report.schema.json`` describes it; ``"schema"`` is the version of
        that. ``"path"`` is null where no file was published, ``"target"`` is where it was to be.
        """
        return json.dumps(self.content(), indent=indent, allow_nan=False)

    def save(self, path: str | os.PathLike[str], *, command: str = "") -> Path:
        """Write the report as ``.json``, ``.html`` or ``.md``; see `sn_export.reporting`."""
        from .reporting import save_report  # its templates take a moment to load

        return save_report(self, path, command=command)
