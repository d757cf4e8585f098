"""The reference: what of a model is called, and what it returns in eval mode, without a trace."""

from __future__ import annotations

import difflib
import inspect
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..errors import SnExportError
from ..text import strip_frames
from .input_set import InputSet
from .nested import find_tensors, find_unseen_tensors, is_plain
from .preservation import Preserved, find_set_by_hooks
from .tensor_memory import as_real_pairs
from .torch_private import get_original
from .undo import undo_on_exit, undoing


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


def find_entry(model: Any, method: str | None) -> tuple[nn.Module, MethodType | None]:
    """Return the network within torch's wrappers, and which method of it is called.

    ``find_entry(net.decode, None)`` and ``find_entry(net, "decode")`` give ``(net, net.decode)``;
    None stands for the network itself, called with its hooks, and so does its forward.

    Args:
        model: a module, or a bound method of one.
        method: the name of a method, or None.

    Raises:
        TypeError: for anything else.
        ValueError: if the network has no such method.
    """
    bound = _find_method_behind(model)
    if bound is None:
        if not isinstance(model, nn.Module):
            got = type(model).__name__
            if isinstance(model, (MethodType, torch.ScriptMethod)):
                of = getattr(model, "__self__", torch.jit.ScriptModule)
                got = f"one of {(of if isinstance(of, type) else type(of)).__name__}"
            raise TypeError(
                f"model must be a torch.nn.Module, or a method of one such as net.decode, got {got}"
            )
        network = unwrap_model(model)
        if method is None or method == "forward":
            return network, None
        bound = _get_method(network, method)
    elif method is not None:
        raise TypeError(
            f"method={method!r} goes with a module, and model is the method '{bound.__name__}'"
        )
    else:
        owner: Any = bound.__self__
        network = unwrap_model(owner)
        if bound.__name__ != "forward" and owner is not network:
            raise TypeError(
                f"'{bound.__name__}' is a method of {type(owner).__name__}: pass one of "
                f"the {type(network).__name__} within"
            )
    return network, None if bound.__name__ == "forward" else bound


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module to export: the one inside torch's wrappers, or ``model`` itself.

    `torch.nn.DataParallel` and `torch.nn.parallel.DistributedDataParallel` scatter their inputs,
    and `torch.compile` gives a module that runs compiled code; each holds the network as it is,
    with the same parameters. Nested wrappers are taken off one by one. `torch.optim.swa_utils.
    AveragedModel` is a network of its own and stays.

    Args:
        model: any module. It is not changed, and nothing is compiled.
    """
    while True:
        original = get_original(model)
        if original is not None:
            model = original
        elif isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        else:
            return model


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
    found = find_tensors(result)
    outputs = tuple(as_real_pairs(leaf.detach()).clone() for _, leaf in found)
    state.reset()
    unseen = tuple(
        f"{kind} at {'_'.join(('output', *path))!r}" for path, kind in find_unseen_tensors(result)
    )
    if not outputs:
        text = f"the model returns no tensor for {inputs.label}: got {type(result).__name__}"
        advice = f", with tensors within {', '.join(unseen)}: return these as tensors"
        raise SnExportError(text + (advice if unseen else ""))
    paths = tuple(path for path, _ in found)
    return Reference(inputs.clone(), outputs, paths, is_plain(result), unseen)


@contextmanager
def _describe_failures(model: nn.Module, inputs: InputSet) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:  # a network that exits has not run
        raise SnExportError(
            f"the model fails on {inputs.label}: {type(error).__name__}: "
            f"{strip_frames(str(error))}{_locate_error(error, model)}"
        ) from error


def initialise_lazy(model: nn.Module, inputs: InputSet) -> None:
    """Run ``model`` once in eval mode where lazy modules of it never ran, so that they have shapes.

    Afterwards the lazy modules, and the random numbers that they draw, are as after any forward;
    all else in the model is put back.

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
    return "_initialize_hook" in vars(module)  # its first call removes the hook


def name_type(module: nn.Module) -> str:
    """Return the name of a module's class, as it was before something was parametrized."""
    return parametrize.type_before_parametrizations(module).__name__


def _locate_error(error: BaseException, model: nn.Module) -> str:
    """Return where below ``model`` an error was raised: ``; in 'body.0' (Conv2d)``."""
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    place = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and paths.get(id(module)):
            place = f"; in '{paths[id(module)]}' ({name_type(module)})"
    return place


def _run(model: nn.Module, state: Preserved, inputs: InputSet, drops: bool | None) -> Any:
    if drops is not None:
        with _drop_weights(model) if drops else nullcontext():
            return _call(model, inputs)
    if state.is_large:
        try:
            with _drop_weights(model):
                return _call(model, inputs)
        except Exception:  # the forward may read a weight again
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
        for module, name in list(find_set_by_hooks(model.modules())):
            stack.callback(module.register_forward_hook(partial(_drop, name)).remove)
        yield


def _drop(name: str, module: nn.Module, *_: object) -> None:
    module.__dict__.pop(name, None)


@undoing
def no_fused_attention() -> Iterator[None]:
    """Keep `torch.nn.TransformerEncoderLayer` off its fused operator, which has no ONNX form."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    with undo_on_exit(lambda: torch.backends.mha.set_fastpath_enabled(enabled)):
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def _find_method_behind(thing: Any) -> MethodType | None:
    """Return a bound method of a module, the original where `torch.compile` wrapped it."""
    thing = getattr(thing, "_torchdynamo_orig_callable", thing)
    is_method = isinstance(thing, MethodType) and isinstance(thing.__self__, nn.Module)
    return thing if is_method else None


def _get_method(network: nn.Module, name: Any) -> MethodType:
    kind = type(network).__name__
    if not isinstance(name, str):
        raise TypeError(f"method must be the name of a method, got {type(name).__name__}")
    if isinstance(network, torch.jit.ScriptModule):
        raise TypeError(
            f"method='{name}': of a TorchScript module only forward can be exported; pass the "
            "module that was compiled"
        )
    is_property = isinstance(inspect.getattr_static(network, name, None), property)
    found = property if is_property else getattr(network, name, None)
    method = _find_method_behind(found)
    if method is not None and method.__self__ is network:
        return method
    if isinstance(found, nn.Module):
        raise ValueError(
            f"method='{name}' is a module within {kind}, not a method: export that module"
        )
    own = sorted(
        key
        for cls in type(network).__mro__[: type(network).__mro__.index(nn.Module)]
        for key, value in vars(cls).items()
        if not key.startswith("_") and inspect.isfunction(value)
    )
    near = difflib.get_close_matches(name, dict.fromkeys(own))
    has = f"it has {', '.join(near or dict.fromkeys(own)) or 'none of its own'}"
    what = "is no method" if found is not None else "is not there"
    raise ValueError(f"method='{name}' {what} in {kind}; {has}")
