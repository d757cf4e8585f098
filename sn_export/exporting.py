"""The one job: freeze, export, prove, publish; and leave the model as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .case_file import write_case
from .cases import case_of
from .dynamic import dynamic_dims, resized_sets
from .errors import ExportError, ReparametrizationNotRecognisedWarning, SnExportError
from .folding import FoldedInitializer
from .freezing import (
    SpectralNormInfo,
    described,
    frozen_spectral_norm,
    require_module,
    with_exact_sigma,
)
from .metadata import file_metadata, require_metadata, require_source
from .onnx_file import (
    Exporter,
    ExportOptions,
    ExternalData,
    publish,
    workspace,
    write_onnx,
)
from .parity import (
    ParityReport,
    Reference,
    compare,
    explained,
    open_session,
    require_providers,
    require_tolerances,
    run_reference,
)
from .preserving import Preserved, preserved
from .samples import InputSet, as_input_sets, random_sets
from .tolerances import Tolerance

_logger = logging.getLogger("sn_export")
_NAMED = 5  # how many weights a warning names
_RESIZED = 2  # how many other sizes are proved where shapes are dynamic
REPORT_SCHEMA = 1  # changes when a field changes its meaning or goes; new ones may come
_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy")


@dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` made, and the proof.

    Attributes:
        path: the ONNX file.
        exporter: ``"dynamo"`` or ``"torchscript"``.
        opset: version of the default opset in the file.
        parity: the comparison of the file with the unfrozen model.
        frozen: the tensors under spectral norm, as they were found.
        versions: versions of sn_export and of the packages that made and ran the file.
        metadata: what was written to the file's ``metadata_props``.
        folded: initializers that replace arithmetic which depends on initializers alone: weights
            that modules compute in a way the block does not know.
    """

    path: Path
    exporter: Exporter
    opset: int
    parity: ParityReport
    frozen: tuple[SpectralNormInfo, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    folded: tuple[FoldedInitializer, ...] = ()

    def to_json(self, indent: int | None = 2) -> str:
        """Return the report as JSON text; NaN and infinities become null and strings.

        ``sn_export/report.schema.json`` describes it; ``"schema"`` is the version of that.
        """
        content = {"schema": REPORT_SCHEMA, **dataclasses.asdict(self)}
        content["path"] = str(self.path)
        content["parity"] = self.parity.content()
        return json.dumps(_plain(content), indent=indent, allow_nan=False)

    def save(self, path: str | os.PathLike[str], *, command: str = "") -> Path:
        """Write the report as ``.json``, ``.html`` or ``.md``; see `sn_export.reporting`."""
        from .reporting import save_report  # its templates take a moment to load

        return save_report(self, path, command=command)


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    exporter: Exporter = "dynamo",
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
    save_case: str | os.PathLike[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    source: str | os.PathLike[str] | None = None,
    sigma_exact: bool = False,
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
        model: the model, in train or eval mode, with or without spectral norm.
        args: positional arguments of an example call, as for `torch.onnx.export`.
        path: the ONNX file to write; its folder must exist. External data goes to
            ``<path>.data``.
        kwargs: keyword arguments of the example call.
        exporter: ``"dynamo"`` (torch.export) or ``"torchscript"`` (tracing).
        opset_version: version of the ONNX opset; torch's default where None.
        input_names: names of the inputs in the file, by default those of the forward's
            parameters.
        output_names: names of the outputs in the file, by default the exporter's.
        dynamic_shapes: as for `torch.export.export`.
        external_data: whether weights go to a side file; ``"auto"`` does it past 2 GB.
        rtol: relative tolerance; by default by dtype, see `sn_export.tolerances`. A mapping
            gives it by name or position of outputs; the others have the default.
        atol: absolute tolerance in units of the output; by default by dtype and relative
            to the largest reference value of each output. A mapping as for ``rtol``.
        samples: number of random inputs, drawn from a private generator: floats and
            integers within the range that the example shows.
        inputs: inputs of your own for the proof: a tensor, a tuple of arguments, a dict of
            keyword arguments, or a list of these.
        providers: onnxruntime execution providers for the proof.
        per_module: compare the output of every module too, not only where the proof fails.
        save_case: a file to write too, with the inputs and the model's outputs of the proof,
            which `check_case` replays without the model; its folder must exist.
        metadata: keys and values of your own for the file's ``metadata_props``, beside what
            sn_export writes: see `sn_export.metadata`.
        source: the checkpoint that the weights came from; its SHA-256 is written to the file.
        sigma_exact: compute the largest singular value of each weight under spectral norm for
            the report, as far as that takes seconds.
        verbose: let the exporters print, log and warn.

    Returns:
        The report.

    Raises:
        TypeError: for a model that is no module, or arguments of a wrong type.
        ValueError: for an option outside its range, or a tolerance for an output that the file
            does not have.
        FileNotFoundError: if the folder of ``path`` or ``save_case``, or the file ``source``,
            does not exist.
        FreezeError: if a tensor cannot be frozen.
        SnExportError: if the model rejects an input.
        ExportError: if torch cannot export the model, or onnxruntime not run the file.
        ParityError: if outputs differ, or are NaN. No file is written then.

    Warns:
        ReparametrizationNotRecognisedWarning: if a module computes its weight in a way that the
            block does not know, so that the value had to be folded in the file.
    """
    require_module(model)
    target = _require_target(path)
    _require_options(exporter, samples, external_data, opset_version)
    require_tolerances(rtol, atol, output_names)
    require_providers(providers)
    require_metadata(metadata)
    case = _require_case(save_case, target) if save_case is not None else None
    checkpoint = require_source(source)
    example = InputSet(_as_args(args), dict(kwargs or {}), "the example input")
    own = as_input_sets(inputs, len(example.args), "inputs")
    dims = dynamic_dims(model, example, dynamic_shapes)
    frozen = tuple(described(model))  # the block itself warns
    if sigma_exact:
        frozen = with_exact_sigma(model, frozen)
    made = file_metadata(exporter, versions(), frozen, checkpoint, metadata)
    options = ExportOptions(
        exporter,
        opset_version,
        list(input_names) if input_names is not None else None,
        list(output_names) if output_names is not None else None,
        dynamic_shapes,
        dims,
        external_data,
        verbose,
        made,
    )
    with preserved(model) as state, workspace(target) as draft:
        references = [run_reference(model, state, example)]
        state.settle()
        _logger.info("running the reference")
        for one in (*random_sets(example, samples), *own):
            references.append(_run_further(model, state, one))
        references += _run_resized(model, state, resized_sets(model, example, dims))
        _logger.info("exporting with %s, %d tensors frozen", exporter, len(frozen))
        try:
            with frozen_spectral_norm(model):
                opset, folded = write_onnx(model, example, options, draft)
        except OSError as error:
            raise ExportError(f"cannot write '{target}': {error.strerror}") from error
        state.reset()
        _logger.info("comparing %d input sets with onnxruntime", len(references))
        session = open_session(draft, providers)
        runnable = _runnable(session, model, references)
        named = input_names is not None
        parity = compare(model, session, runnable, rtol, atol, named)
        saved = case_of(model, session, runnable, rtol, atol, named) if case else None
        del session
        if per_module or not parity.passed:
            _logger.info("comparing module by module")
            parity = explained(parity, model, state, draft, runnable, rtol, atol, named)
        parity.require_passed(f"the file made by the {exporter} exporter")
        _warn_of_folded(folded)
        with contextlib.ExitStack() as stack:
            beside = []
            if saved is not None and case is not None:
                beside = [(stack.enter_context(workspace(case)), case)]
                write_case(beside[0][0], saved)
            publish(draft, target, beside)
    _logger.info("wrote %s", target)
    return ExportReport(target, exporter, opset, parity, frozen, dict(versions()), made, folded)


def _warn_of_folded(folded: Sequence[FoldedInitializer]) -> None:
    weights = [entry for entry in folded if entry.is_weight]
    if not weights:
        return
    names = [f"'{entry.name}'" for entry in weights[:_NAMED]]
    more = f" and {len(weights) - _NAMED} more" if len(weights) > _NAMED else ""
    warnings.warn(
        f"the model computes {', '.join(names)}{more} by itself, in a way that "
        "frozen_spectral_norm does not know. The file holds the computed values and is proved, "
        "but a with-block of your own leaves these modules as they are. If it is spectral norm, "
        "register_spectral_norm teaches the block; what was folded is in the report's 'folded'",
        ReparametrizationNotRecognisedWarning,
        stacklevel=3,
    )


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of sn_export and of the packages behind it."""
    found = {}
    for package in ("sn-export", *_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _run_further(model: nn.Module, state: Preserved, inputs: InputSet) -> Reference:
    try:
        return run_reference(model, state, inputs)
    except SnExportError as error:
        if not inputs.label.startswith("random"):
            raise
        raise SnExportError(
            f"{error}. If it takes only certain values, pass samples=0 and real inputs=[...]"
        ) from error.__cause__


def _run_resized(model: nn.Module, state: Preserved, candidates: Any) -> list[Reference]:
    references: list[Reference] = []
    for candidate in candidates:
        if len(references) == _RESIZED:
            break
        try:
            references.append(run_reference(model, state, candidate))
        except SnExportError as error:  # the model's own limit, not the exporter's
            _logger.info("not proved at %s: %s", candidate.label, error)
    return references


def _runnable(session: Any, model: nn.Module, references: list[Reference]) -> list[Reference]:
    """Leave out sizes that the file has fixed, as ``Dim.AUTO`` allows the exporter to."""
    shapes = [entry.shape for entry in session.get_inputs()]
    kept = []
    for reference in references:
        tensors = [tensor for _, tensor in reference.inputs.named_tensors(model)]
        fixed = reference.inputs.label.startswith("size ") and any(
            isinstance(wanted, int) and wanted != size
            for shape, tensor in zip(shapes, tensors, strict=False)
            for wanted, size in zip(shape, tensor.shape, strict=False)
        )
        if fixed:
            _logger.info("the file has fixed shapes %s; not run at %s", shapes, reference.inputs)
        else:
            kept.append(reference)
    return kept


def _as_args(args: Any) -> tuple[Any, ...]:
    if isinstance(args, Tensor):
        return (args,)
    if isinstance(args, (tuple, list)):
        return tuple(args)
    raise TypeError(f"args must be a tuple of arguments or a tensor, got {type(args).__name__}")


def _require_target(path: str | os.PathLike[str], option: str = "path") -> Path:
    target = Path(path)
    if not target.name:
        raise ValueError(f"{option} must name a file, got '{path}'")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write '{target}': no folder '{target.parent}'")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write '{target}': it is a folder")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"cannot write '{target}': folder '{target.parent}' is read-only")
    return target


def _require_case(path: str | os.PathLike[str], target: Path) -> Path:
    case = _require_target(path, "save_case")
    if case.resolve() in (target.resolve(), target.with_name(target.name + ".data").resolve()):
        raise ValueError(f"save_case must be another file than path, got '{path}'")
    return case


def _require_options(exporter: str, samples: int, external_data: Any, opset: int | None) -> None:
    if exporter not in ("dynamo", "torchscript"):
        raise ValueError(f"exporter must be 'dynamo' or 'torchscript', got {exporter!r}")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise ValueError(f"samples must be an integer of 0 or more, got {samples!r}")
    if external_data not in ("auto", True, False):
        raise ValueError(f"external_data must be 'auto', True or False, got {external_data!r}")
    if opset is not None and not isinstance(opset, int):
        raise TypeError(f"opset_version must be an integer, got {type(opset).__name__}")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
