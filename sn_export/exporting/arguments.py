"""The arguments of `sn_export.export_onnx`: refused before anything runs, or one `Request`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from ..distributed import Description, find_sharded_units, lead_export, refuse_sharded
from ..errors import ExportError, SnExportError
from ..files import (
    are_one_place,
    as_path,
    name_side_file,
    require_onnx_place,
    require_writable,
)
from ..freezing import (
    Only,
    ParametrizationInfo,
    SpectralNormInfo,
    describe_sites,
    find_unconverged,
    measure_exact_sigma,
)
from ..proving import ProofSettings
from ..results import EXPORTERS, Exporter, ExportReport
from ..running import (
    DynamicDim,
    InputSet,
    Reference,
    are_large,
    as_input_sets,
    as_kwargs,
    find_dynamic_dims,
    require_seen,
)
from ..text import as_plain_integer, require_choice

ExternalData = Literal["auto"] | bool


class Source(Protocol):
    """Where the network and its reference come from: `OwnNetwork`, or `GatheredNetwork`."""

    @property
    def network(self) -> nn.Module:
        """What is exported."""

    @property
    def run(self) -> Callable[[InputSet], Reference] | None:
        """Runs the model that the reference comes from; None where that is the network itself."""

    def describe(self, sigma_exact: bool) -> Description:
        """Return what is frozen; with ``sigma_exact``, the largest singular values too."""


class OwnNetwork:
    """The caller's own network, taken out of torch's wrappers.

    Args:
        model: the network, without torch's wrappers.
        only: what is frozen, as `frozen_parametrizations` takes it.
    """

    run = None

    def __init__(self, model: nn.Module, only: Only) -> None:
        self.network = model
        self._only = only

    def describe(self, sigma_exact: bool) -> Description:
        """Return the tensors that are frozen, and warn of nothing: the block does that."""
        frozen = tuple(describe_sites(self.network, self._only))
        try:
            unconverged = find_unconverged(self.network, frozen)
        except SnExportError:  # spectral norm that cannot be read, as in a ScriptModule
            unconverged = ()
        frozen = measure_exact_sigma(self.network, frozen) if sigma_exact else frozen
        return Description(frozen, unconverged)


def export_from(
    network: nn.Module,
    method: MethodType | None,
    factory: Any,
    only: Only,
    export: Callable[[Source], ExportReport],
) -> ExportReport:
    """Return what ``export`` returns, given the model itself or the network gathered from ranks.

    Args:
        network: the model, without torch's wrappers.
        method: the method of it to export, or None.
        factory: builds the network of a sharded model in one process; not called for others.
        only: what is frozen, as `frozen_parametrizations` takes it.
        export: called once; for a sharded model on the first rank alone.

    Raises:
        TypeError: if the factory cannot be called.
        ExportError: for a sharded model without a factory, or a method of it.
    """
    if factory is not None and not callable(factory):
        raise TypeError(f"model_factory must be callable, got {type(factory).__name__}")
    if factory is None or not find_sharded_units(network):
        return export(OwnNetwork(network, only))
    if method is not None:
        raise ExportError(
            f"'{method.__name__}' is a method of a sharded {type(network).__name__}, of which only "
            "forward can be exported: let its forward call that method"
        )
    # torch's programs hold the weights, which the other ranks have no use for.
    return lead_export(
        network, factory, only, export, lambda report: replace(report, onnx_program=None)
    )


@dataclass(frozen=True)
class Call:
    """The inputs of an export, bound to the forward of its model.

    Attributes:
        example: a copy of the example call, in which no tensor stands twice.
        own: the user's further inputs for the proof.
    """

    example: InputSet
    own: Sequence[InputSet]

    def move_to_cpu(self) -> Call:
        """Return the call with all tensors on the CPU, where a gathered network is."""
        return Call(self.example.map(Tensor.cpu), [one.map(Tensor.cpu) for one in self.own])


@dataclass(frozen=True)
class Request:
    """What `export_onnx` was asked for, checked.

    Attributes:
        model: the network within torch's wrappers.
        target: the ONNX file to write.
        exporters: torch's exporters, in the order in which they are tried.
        external_data: whether weights go to a side file.
        samples: number of random inputs.
        opset_version: the opset, or None for torch's default.
        settings: how files are run and held against the model.
        metadata: keys and values of the user's own for the file.
        case: where the inputs and outputs of the proof are saved.
        source: the checkpoint that the weights came from.
        call: the inputs.
        dims: the dimensions that may vary.
        input_names: names in the file by the names in the forward's signature, in its order.
        output_names: names that the user wants for the first outputs; once the example has run,
            the names of all.
        frozen_kinds: what is frozen, as `frozen_parametrizations` takes it.
        run: runs the reference where that is another model than ``model``; else None.
        per_module: whether modules are compared though all outputs pass.
        keep_programs: whether torch's programs are kept in the report.
        verbose: whether torch may print, log and warn.
        frozen: the tensors that are frozen; known once lazy modules are initialised.
        note: a sentence on spectral norms that are far from converged, or nothing.
    """

    model: nn.Module
    target: Path
    exporters: tuple[Exporter, ...]
    external_data: ExternalData
    samples: int
    opset_version: int | None
    settings: ProofSettings
    metadata: Mapping[str, str]
    case: Path | None
    source: Path | None
    call: Call
    dims: Sequence[DynamicDim]
    input_names: Mapping[str, str]
    output_names: Sequence[str]
    frozen_kinds: Only
    run: Callable[[InputSet], Reference] | None
    per_module: bool
    keep_programs: bool
    verbose: bool
    frozen: tuple[SpectralNormInfo | ParametrizationInfo, ...] = ()
    note: str = ""


def require_whole(network: nn.Module) -> nn.Module:
    """Return the network if no parameter of it is a shard, and raise an ExportError if one is."""
    refuse_sharded(network)
    return network


def require_call(
    model: nn.Module,
    method: MethodType | None,
    args: Any,
    kwargs: Any,
    inputs: Any,
    draws: str | None,
) -> Call:
    """Return the example, and the user's inputs for the proof, by the names of what is called.

    Args:
        model: the network.
        method: the method of it that is called, or None.
        args: as `export_onnx` is given them.
        kwargs: likewise.
        inputs: likewise.
        draws: how the model draws random numbers, as `export_onnx` takes it.

    Raises:
        TypeError: for what is no argument of a call, or holds tensors that no exporter sees.
        ValueError: for a tensor in ``inputs`` that the example does not have.
    """
    keywords = {} if kwargs is None else as_kwargs(kwargs, "kwargs")
    given = InputSet(as_args(args), keywords, "the example input").bind(model, method)
    require_seen(given)
    example = given.clone()
    own = as_input_sets(model, inputs, len(example.args), "inputs", example, method)
    for one in own:
        require_seen(one, example)
    return Call(replace(example, draws=draws), [replace(one, draws=draws) for one in own])


def require_dims(
    example: InputSet, dynamic_shapes: Any, dynamic_axes: Any, input_names: Any
) -> list[DynamicDim]:
    """Return the dimensions that may vary.

    Raises:
        TypeError: for ``dynamic_axes``, with what to pass instead; for an entry of another type.
        ValueError: for dynamic shapes that do not fit the example.
    """
    if dynamic_axes is None:
        return find_dynamic_dims(example, dynamic_shapes)
    shapes = _translate_axes(example, dynamic_axes, input_names)
    raise TypeError(
        "dynamic_axes is not taken, since the dynamo exporter does not know it: pass "
        f"dynamic_shapes={shapes or '{...}'}, by parameter of the forward; dimensions of outputs "
        "follow from those of the inputs"
    )


def _translate_axes(example: InputSet, axes: Any, input_names: Any) -> dict[str, Any]:
    """Return ``dynamic_axes`` as ``dynamic_shapes``; names of outputs are left out.

    With the input name ``image`` of ``forward(x)``::

        {"image": {0: "batch"}, "y": {0: "batch"}}  # gives {"x": {0: "batch"}}
        {"image": [0, 2]}  # gives {"x": {0: "x_0", 2: "x_2"}}
    """
    arguments = [name for name, value in example.arguments.items() if isinstance(value, Tensor)]
    chosen = input_names if isinstance(input_names, (list, tuple)) else ()
    by_file_name = dict(zip(chosen, arguments, strict=False))
    shapes: dict[str, Any] = {}
    for name, dims in axes.items() if isinstance(axes, Mapping) else ():
        argument = by_file_name.get(name, name)
        if argument not in arguments:
            continue
        if isinstance(dims, Mapping):
            shapes[argument] = dict(dims)
        elif isinstance(dims, (list, tuple)):
            shapes[argument] = {dim: f"{argument}_{dim}" for dim in dims}
    return shapes


def as_args(args: Any) -> tuple[Any, ...]:
    """Return the positional arguments of a call.

    Raises:
        TypeError: if they are neither a tensor nor a tuple or list.
    """
    if isinstance(args, Tensor):
        return (args,)
    if isinstance(args, (tuple, list)):
        return tuple(args)
    raise TypeError(f"args must be a tuple of arguments or a tensor, got {type(args).__name__}")


def require_target(
    path: str | os.PathLike[str], model: nn.Module, external_data: ExternalData, overwrite: bool
) -> Path:
    """Return the path of the ONNX file to write, with its external data beside it if it has any.

    Raises:
        TypeError: if it is no path.
        ValueError: if it names no file, or one of another format and ``overwrite`` is False, or
            one that onnx would write text to.
        OSError: if it cannot be there, or its external data beside it, or if something else than
            an ONNX file is there and ``overwrite`` is False.
    """
    target = _require_file(path, "path")
    advice = "pass overwrite=True to write it all the same"
    has_data = are_large(model.parameters()) if external_data == "auto" else external_data
    require_onnx_place(target, has_data=has_data, overwrite=overwrite, advice=advice)
    return target


def require_case(path: str | os.PathLike[str] | None, target: Path) -> Path | None:
    """Return the path of a saved case beside ``target``; raises as `require_target` does."""
    if path is None:
        return None
    case = _require_file(path, "save_case")
    if are_one_place(case, target) or are_one_place(case, name_side_file(target)):
        raise ValueError(f"save_case must be another file than path, got '{path}'")
    return case


def _require_file(path: str | os.PathLike[str], option: str) -> Path:
    target = as_path(path, option)
    if not target.name:
        raise ValueError(f"{option} must name a file, got '{path}'")
    require_writable(target)
    return target


def require_samples(samples: int) -> int:
    """Return a number of random inputs.

    Raises:
        ValueError: if it is no integer, or negative.
    """
    number = as_plain_integer(samples)
    if number is None or number < 0:
        raise ValueError(f"samples must be an integer of 0 or more, got {samples!r}")
    return number


def require_exporter(exporter: Any) -> tuple[Exporter, ...]:
    """Return the exporters to try, in order, or raise a ValueError."""
    chosen = require_choice("exporter", exporter, ("auto", *EXPORTERS))
    return EXPORTERS if chosen == "auto" else (chosen,)


def require_freeze(freeze: Any) -> Only:
    """Return what is frozen, as `frozen_parametrizations` takes it, or raise a ValueError."""
    chosen = require_choice("freeze", freeze, ("spectral_norm", "all"))
    return None if chosen == "all" else "spectral_norm"
