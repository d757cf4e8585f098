"""A deep fingerprint of a model: every object, every order, every byte, every version."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle


@dataclass
class Fingerprint:
    """Facts by name. The objects are kept alive, so that no id is given out twice."""

    facts: dict[str, object] = field(default_factory=dict)
    kept: dict[int, object] = field(default_factory=dict)

    def differences(self, other: Fingerprint) -> list[str]:
        """Return the names of the facts that are not the same in both, with both values."""
        missing = object()
        return [
            f"{name}: {self.facts.get(name, 'absent')!r} -> {other.facts.get(name, 'absent')!r}"
            for name in {**self.facts, **other.facts}
            if self.facts.get(name, missing) != other.facts.get(name, missing)
        ]


def fingerprint(*models: nn.Module) -> Fingerprint:
    """Take the fingerprint of models, torch's global hooks and the random generators."""
    result = Fingerprint()
    facts = result.facts
    for index, model in enumerate(models):
        for path, module in model.named_modules(remove_duplicate=False):
            _module(f"{index}:{path}", module, result)
        state = model.state_dict()
        facts[f"{index} state keys"] = tuple(state)
        facts[f"{index} state bytes"] = [contents(t) for t in state.values()]
        facts[f"{index} state metadata"] = repr(getattr(state, "_metadata", None))
        facts[f"{index} parameters"] = [(n, id(p)) for n, p in model.named_parameters()]
        facts[f"{index} buffers"] = [(n, id(b)) for n, b in model.named_buffers()]
    facts["rng torch"] = torch.get_rng_state().numpy().tobytes()
    name, keys, *position = np.random.get_state(legacy=True)
    facts["rng numpy"] = (name, np.asarray(keys).tobytes(), *position)
    facts["rng python"] = random.getstate()
    facts["gc"] = gc.isenabled()
    facts["grad mode"] = torch.is_grad_enabled()
    facts["next hook id"] = RemovableHandle.next_id
    for name, value in vars(torch_module).items():
        if name.startswith("_global_") and isinstance(value, dict):
            facts[name] = tuple((key, id(hook)) for key, hook in value.items())
    return result


def assert_unchanged(before: Fingerprint, *models: nn.Module) -> None:
    """Assert that the models have the same fingerprint again."""
    differences = before.differences(fingerprint(*models))
    assert not differences, "\n".join(differences)


def changes_since(before: Fingerprint, *models: nn.Module) -> list[str]:
    """Return what differs, but for how many hooks were ever made: that is no state of a model."""
    found = before.differences(fingerprint(*models))
    return [line for line in found if not line.startswith("next hook id")]


def contents(tensor: Tensor) -> bytes:
    """Return the elements of a tensor of any dtype, bit for bit; none on the meta device."""
    if tensor.is_meta or not tensor.numel():
        return b""
    tensor = tensor.detach().contiguous()
    return tensor.view(-1).view(torch.uint8).numpy().tobytes()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit."""
    return a.shape == b.shape and a.dtype == b.dtype and contents(a) == contents(b)


def all_same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Whether two tuples of tensors agree pairwise, bit for bit."""
    return len(a) == len(b) > 0 and all(map(same_bits, a, b))


def live_tensors() -> int:
    """Count the tensors that the garbage collector knows of."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def _module(path: str, module: nn.Module, result: Fingerprint) -> None:
    facts, cls = result.facts, type(module)
    result.kept[id(module)], result.kept[id(cls)] = module, cls
    facts[f"{path} is"] = id(module)
    facts[f"{path} class"] = id(cls)
    facts[f"{path} class entries"] = tuple((name, id(entry)) for name, entry in vars(cls).items())
    facts[f"{path} training"] = module.training
    facts[f"{path} attributes"] = tuple(vars(module))
    for name, value in vars(module).items():
        _value(f"{path} {name}", value, result)


def _value(path: str, value: object, result: Fingerprint) -> None:
    result.facts[path] = id(value)
    if id(value) in result.kept:
        return
    result.kept[id(value)] = value
    if isinstance(value, Tensor):
        _tensor(path, value, result)
    for key, entry in _items(value):
        _value(f"{path}[{key!r}]", entry, result)
    if isinstance(value, (dict, list, tuple, set)):
        result.facts[f"{path} keys"] = tuple(str(key) for key, _ in _items(value))


def _items(value: object) -> Iterator[tuple[Any, object]]:
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (list, tuple)):
        yield from enumerate(value)
    elif isinstance(value, (set, frozenset)):
        yield from ((entry, None) for entry in sorted(value, key=repr))


def _tensor(path: str, tensor: Tensor, result: Fingerprint) -> None:
    result.kept[id(tensor.grad_fn)] = tensor.grad_fn
    result.facts[f"{path} tensor"] = (
        None if tensor.is_inference() else tensor._version,
        tensor.data_ptr(),
        tensor.dtype,
        tensor.device,
        tuple(tensor.shape),
        tensor.stride() if tensor.layout is torch.strided else None,
        tensor.requires_grad,
        tensor.is_leaf,
        id(tensor.grad_fn),
    )
    result.facts[f"{path} bytes"] = contents(tensor)
    if tensor.is_leaf:
        result.facts[f"{path} grad"] = id(tensor.grad)
        if tensor.grad is not None:
            grad = result.kept[id(tensor.grad)] = tensor.grad
            result.facts[f"{path} grad tensor"] = (grad._version, grad.data_ptr(), contents(grad))
