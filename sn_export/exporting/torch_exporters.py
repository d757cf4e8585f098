"""Run torch's exporters: quietly, and on a module that is given tensors alone.

Numbers, None, keywords, nested containers, dataclasses and objects of any class are put back before
the model, or the method of it that is exported, sees the call. What the exporters are given then is
a module of our own, which has the very parameters, buffers and children of the model under the same
names, and calls it; nothing of the model changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import io
import keyword
import logging
import os
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
import torch
import torch.onnx
from torch import Tensor, nn

from ..files import find_disk_error
from ..proving import name_called
from ..results import Exporter, ExporterChoice
from ..running import (
    InputSet,
    Reference,
    find_tensors,
    flatten_shapes,
    make_dynamic_axes,
    no_fused_attention,
    safe_captures,
    setting_weights_aside,
    undo_on_exit,
    undoing,
)
from .arguments import Request
from .failures import TorchExporterError, explain_failure
from .graph import find_exporters

# What a `_Call` shares with its model, so that weights keep their names; the rest is new.
_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_LOGGERS = ("torch", "torch.onnx", "onnxscript", "onnx_ir")
_parsed: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def run_exporter(
    request: Request, reference: Reference, exporter: Exporter
) -> tuple[ir.Model, Any]:
    """Return the graph that torch makes, and its program where it has one."""
    model = request.model
    try:
        with quiet(request.verbose), no_fused_attention():
            call = flatten_call(model, reference)
            if exporter == "torchscript":
                return _run_torchscript(request, call), None
            program = _run_dynamo(request, call)
            return program.model, program
    except Exception as error:
        full = find_disk_error(error)
        if full is not None:  # the exporter is not to blame, and the other would fail too
            raise OSError(full.errno, full.strerror) from error
        other, inputs = _choose_other(request, exporter), list(request.input_names)
        raise TorchExporterError(
            f"the {exporter} exporter cannot export {name_called(model, reference.inputs)}",
            explain_failure(error, model, reference.inputs.method, other, inputs),
        ) from error


def _choose_other(request: Request, exporter: Exporter) -> ExporterChoice | None:
    """Return what to try where an exporter fails: after dynamo torchscript, after that both.

    So advice comes to an end. None where both were tried, or one alone makes this opset.
    """
    if len(request.exporters) > 1 or len(find_exporters(request.opset_version)) < 2:
        return None
    return "torchscript" if exporter == "dynamo" else "auto"


def _run_dynamo(request: Request, call: FlatCall) -> Any:
    shapes = flatten_shapes(list(request.input_names), request.dims)
    with parse_operators_once(), safe_captures(), uncollected():
        program = torch.onnx.export(
            call.module,
            call.tensors,
            dynamo=True,
            verbose=request.verbose,
            opset_version=request.opset_version,
            dynamic_shapes=shapes,
        )
    assert program is not None  # torch returns None only for dynamo=False
    return program


def _run_torchscript(request: Request, call: FlatCall) -> ir.Model:
    model = request.model
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    content: Any = io.BytesIO()  # as torch's annotations do not have it
    with torch.no_grad(), setting_weights_aside() as weights:
        torch.onnx.export(
            call.module,
            call.tensors,
            content,
            dynamo=False,
            verbose=request.verbose,
            opset_version=request.opset_version,
            input_names=list(request.input_names.values()),
            dynamic_axes=make_dynamic_axes(request.input_names, request.dims) or None,
        )
    graph = ir.from_proto(onnx.load_from_string(content.getvalue()))
    for name, value in graph.graph.initializers.items():
        weight = weights[name].detach()
        # Tracing runs the model, and the exporter reads the buffers afterwards: those that a
        # forward writes (vectors that iterate in eval mode) would be one step ahead. A batch norm
        # that writes its statistics does not read them.
        if name in buffers and all(n.op_type != "BatchNormalization" for n in value.consumers()):
            weight = buffers[name]
        value.const_value = tensor = ir.tensor_adapters.TorchTensor(weight, name)
        value.shape = tensor.shape
    return graph


class FlatCall(NamedTuple):
    """A call with tensors alone.

    Attributes:
        module: what is called: the model, or a module around it.
        tensors: in the order of the signature.
    """

    module: nn.Module
    tensors: tuple[Tensor, ...]


def flatten_call(model: nn.Module, reference: Reference) -> FlatCall:
    """Return the call of a module that takes the tensors of the example, and returns tensors.

    Args:
        model: exported itself where its forward takes and returns tensors alone.
        reference: the example; every call has the structure and the constants of its inputs, and
            returns the tensors of its result.
    """
    example = reference.inputs.clone()
    tensors = dict(example.named_tensors())
    is_compiled = isinstance(model, torch.jit.ScriptModule)
    if is_compiled or (reference.is_plain and _is_flat(model, example)):
        return FlatCall(model, tuple(tensors.values()))
    return FlatCall(_Call(model, example, tensors, reference.paths), tuple(tensors.values()))


class _Call(nn.Module):
    """Calls a model in one way; its parameters, buffers and children are those of the model."""

    def __init__(
        self,
        model: nn.Module,
        example: InputSet,
        tensors: Mapping[str, Tensor],
        paths: Sequence[tuple[str, ...]],
    ) -> None:
        super().__init__()
        own = self.__dict__
        own["training"] = model.training
        # torch names constants of the file by the attributes that hold them.
        own.update({key: value for key, value in model.__dict__.items() if key not in own})
        own.update({key: model.__dict__[key] for key in _SHARED})
        position = {id(tensor): index for index, tensor in enumerate(tensors.values())}

        def forward(*args: Tensor) -> tuple[Tensor, ...]:
            full = example.map(lambda tensor: args[position[id(tensor)]])
            # By their paths: while a model is traced, sizes are tensors too.
            found = dict(find_tensors(full.call(model)))
            return tuple(found[path] for path in paths)

        # torch 2.9 has no guards for dimensions of ``*args``; others call them by their position.
        forward.__signature__ = _make_signature(tensors)  # type: ignore[attr-defined]
        own["forward"] = forward


def _make_signature(names: Iterable[str]) -> inspect.Signature:
    """Return the signature of a forward with these parameters.

    A name that Python does not take is replaced::

        _make_signature(["x", "pair_0", "lambda"])  # (x, pair_0, input_2)
    """
    fitting = (
        name if name.isidentifier() and not keyword.iskeyword(name) else f"input_{index}"
        for index, name in enumerate(names)
    )
    return inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in fitting]
    )


def _is_flat(model: nn.Module, example: InputSet) -> bool:
    tensors = [tensor for _, tensor in example.named_tensors()]
    if example.method is not None or example.draws is not None:
        return False
    # A parameter left at its default would be filled in by the TorchScript exporter.
    parameters = inspect.signature(model.forward).parameters.values()
    return (
        len(tensors) == len(example.args) == len(parameters)
        and not any(p.kind is p.VAR_POSITIONAL for p in parameters)
        and not example.kwargs
        and all(tensor is arg for tensor, arg in zip(tensors, example.args, strict=True))
    )


@undoing
def quiet(verbose: bool) -> Iterator[None]:
    """Discard what is printed, logged and warned of, unless ``verbose``."""
    if verbose:
        yield
        return
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    streams = sys.stdout, sys.stderr
    output = _duplicate_output()
    caught = warnings.catch_warnings()
    caught.__enter__()

    def undo() -> None:
        _restore_output(output)
        sys.stdout, sys.stderr = streams
        for logger, level in zip(loggers, levels, strict=True):
            if logger.level != level:  # each change empties the caches of all loggers
                logger.setLevel(level)
        caught.__exit__(None, None, None)

    with undo_on_exit(undo):
        warnings.simplefilter("ignore")
        for logger in loggers:
            if logger.isEnabledFor(logging.ERROR):  # it may have a level of its own
                logger.setLevel(logging.CRITICAL)
        if output:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        yield


@undoing
def parse_operators_once() -> Iterator[None]:
    """Let the operators of onnxscript be parsed once in a process, not at every export.

    `torch.onnx.export` reads and parses the source of some 500 functions whenever it is called,
    for a domain that is the same of all: a third of what the export of a small network takes.
    """
    from onnxscript.values import TracedOnnxFunction  # TorchScript does without, and starts sooner

    parse = vars(TracedOnnxFunction).get("function_ir")
    if not isinstance(parse, property):  # another onnxscript
        yield
        return

    def parse_once(function: TracedOnnxFunction) -> Any:
        if function not in _parsed:
            _parsed[function] = parse.__get__(function)
        return _parsed[function]

    with undo_on_exit(lambda: setattr(TracedOnnxFunction, "function_ir", parse)):
        setattr(TracedOnnxFunction, "function_ir", property(parse_once))  # noqa: B010
        yield


@undoing
def uncollected() -> Iterator[None]:
    """Let Python's garbage collector wait.

    Where it runs within torch 2.9's exporter, fake tensors that are in use may lose their memory.
    With any torch it finds little there: the exporter makes objects by the million, and keeps them.
    """
    is_enabled = gc.isenabled()

    def undo() -> None:
        if is_enabled:
            gc.enable()

    with undo_on_exit(undo):
        gc.disable()
        yield


def _duplicate_output() -> list[int]:
    """Return a second descriptor of the standard output, if the process has one.

    The TorchScript exporter dumps its graph from C++, past sys.stdout.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        return [os.dup(1)]
    except OSError:
        return []


def _restore_output(kept: list[int]) -> None:
    """Let the standard output be what ``kept`` is, and close that; can be repeated."""
    if kept:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).fflush(None)  # what C++ still buffers
        os.dup2(kept[0], 1)
        os.close(kept.pop())
