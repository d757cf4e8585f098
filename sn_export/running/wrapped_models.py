"""What of a model is called: the network within torch's wrappers, or a method of it."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .torch_private import compiled_class


def original_of(module: nn.Module) -> nn.Module | None:
    """Return the module behind one that `torch.compile` returned, None for any other."""
    kind = compiled_class()
    if kind is None or not isinstance(module, kind):
        return None
    return module._modules["_orig_mod"]


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
        original = original_of(model)
        if original is not None:
            model = original
        elif isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        else:
            return model


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
    bound = _method_behind(model)
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
        bound = _method_named(network, method)
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


def _method_behind(thing: Any) -> MethodType | None:
    """Return a bound method of a module; of one that `torch.compile` returned the original."""
    thing = getattr(thing, "_torchdynamo_orig_callable", thing)
    is_method = isinstance(thing, MethodType) and isinstance(thing.__self__, nn.Module)
    return thing if is_method else None


def _method_named(network: nn.Module, name: Any) -> MethodType:
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
    method = _method_behind(found)
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
    has = f"it has {', '.join(dict.fromkeys(own))}" if own else "it has none of its own"
    what = "is no method" if found is not None else "is not there"
    raise ValueError(f"method='{name}' {what} in {kind}; {has}")
