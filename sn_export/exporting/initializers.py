"""The parameters and buffers of the exported model that initializers come from, by name.

A folded initializer is named after the module that uses it and the tensor that it comes from.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..freezing import make_plain_name
from ..proving import find_using_modules
from ..running import is_dense, make_distinct
from ..text import qualify

_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
_SAMPLES = 256
_ROUNDING = 2e-3  # of products in float16
_CHUNK = 2**20  # elements compared at a time
_OF_NUMPY = (torch.float16, torch.float32, torch.float64)
_PARAMETRIZED = re.compile(r"(?:(.*)\.)?parametrizations\.([^.]+)\.original\d*$")


class Sources:
    """The parameters and buffers of a model.

    Args:
        state: the tensors by qualified name, in the order of the state dict.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state
        self.positions = {name: index for index, name in enumerate(state)}
        self._normed = {t.numel() for n, t in state.items() if "var" in n.rpartition(".")[2]}

    def find_names(self, value: ir.Value) -> list[str]:
        """Return the tensors that an initializer is made from, as far as its names tell."""
        origin = value.metadata_props.get(_FOLDED_FROM)
        names = ast.literal_eval(origin) if origin else [str(value.name)]
        return [name for name in names if name in self._state]

    def is_weight(self, value: ir.Value) -> bool:
        """Tell whether an initializer is a parameter or buffer, or made from one."""
        if self.find_names(value):
            return True
        # The TorchScript exporter names a transposed weight after the node that reads it.
        tensor = value.const_value
        return (
            tensor is not None
            and str(value.name).startswith("onnx::")
            and tensor.dtype.is_floating_point()
            and len(tensor.shape) > 1
        )

    def choose_main(self, names: Iterable[str], size: int) -> str | None:
        """Return the raw weight among ``names``: of the size of the result, or the largest."""
        return max(
            names,
            key=lambda name: (self._state[name].numel() == size, self._state[name].numel()),
            default=None,
        )

    def find_origin(self, value: ir.Value) -> list[str] | None:
        """Return what an initializer was computed from; None where values only moved.

        The exporters fold too, as far as weights are small, and leave a name such as ``div_2``.
        Arithmetic shows in elements that none of the tensors behind it has.
        """
        tensor = value.const_value
        if value.name in self._state or tensor is None or not tensor.dtype.is_floating_point():
            return None
        names = self.find_names(value)
        if value.metadata_props.get(_FOLDED_FROM) is not None:
            return names if names and not self._are_elements(tensor, names) else None
        if self._is_fused(value):
            return None
        users = find_using_modules(value)
        near = [
            name
            for name in self._state
            if any(name == qualify(user, name.rpartition(".")[2]) for user in users)
        ]
        if any(_compare(tensor, self._state[name], np.array_equal) for name in near):
            return None
        nearest_first = dict.fromkeys((*near, *self._state))
        if self._are_elements(tensor, nearest_first):
            return None
        alike = [name for name in nearest_first if self._state[name].numel() == tensor.size]
        if own := [name for name in alike if name in near]:
            return own
        # A module may read the weight of another: `F.linear(x, self.embedding.weight * 0.1)`.
        scaled = (name for name in alike if _compare(tensor, self._state[name], _is_multiple))
        return next(([name] for name in scaled), None)

    def _is_fused(self, value: ir.Value) -> bool:
        """Tell whether the TorchScript exporter may have fused a batch norm into a convolution.

        It renames the bias too. Both are computed in a forward that scales them, without a norm.
        """
        return any(
            node.op_type == "Conv"
            and len(node.inputs) > 2
            and str(getattr(node.inputs[2], "name", "")).startswith("onnx::")
            and value.const_value is not None
            and value.const_value.shape[0] in self._normed  # the channels of a batch norm
            for node in value.consumers()
        )

    def _are_elements(self, tensor: ir.TensorProtocol, names: Iterable[str]) -> bool:
        missing, dtype = _sample(tensor)
        for name in names:
            source = self._state[name].detach()
            if not source.is_floating_point() or source.is_meta:
                continue
            for chunk in torch.split(source.flatten(), _CHUNK):
                if not len(missing):
                    break
                values = chunk.to("cpu", torch.float64).numpy()
                values = values.astype(dtype).astype(np.float64)
                index = np.searchsorted(missing, values).clip(max=len(missing) - 1)
                found = np.unique(index[missing[index] == values])
                missing = np.delete(missing, found)
            if not len(missing):
                break
        return not len(missing)


def _compare(
    tensor: ir.TensorProtocol,
    source: Tensor,
    is_alike: Callable[[NDArray[Any], NDArray[Any]], bool],
) -> bool:
    """Tell whether an initializer is alike a weight in its places, or in transposed ones."""
    weight = source.detach()
    if weight.dtype not in _OF_NUMPY or not is_dense(weight) or weight.is_meta:
        return False
    array, weight = tensor.numpy(), weight.cpu()
    shape, places = array.shape, _choose_places(array.size)
    found = array.flat[places]
    del array
    _release(tensor)
    return any(
        shape == tuple(candidate.shape) and is_alike(found, candidate.numpy().flat[places])
        for candidate in (weight, weight.mT if weight.ndim == 2 else weight)
    )


def _is_multiple(found: NDArray[Any], source: NDArray[Any]) -> bool:
    """Tell whether ``found`` is ``source`` times one number; of a constant nobody can tell."""
    there = source != 0
    if not np.array_equal(there, found != 0) or len(np.unique(source[there])) < 2:
        return False
    ratios = found[there].astype(np.float64) / source[there].astype(np.float64)
    return bool(np.ptp(ratios) <= _ROUNDING * abs(ratios[0]))


def _choose_places(size: int) -> NDArray[np.int64]:
    return np.arange(0, size, max(1, size // _SAMPLES))


def _sample(tensor: ir.TensorProtocol) -> tuple[NDArray[np.float64], np.dtype[Any]]:
    """Return some elements, sorted and without zeros, and the dtype that they have in ``tensor``.

    A masked weight has zeros of its own.
    """
    array = tensor.numpy()
    # A transposed weight would be copied by `ravel`.
    wanted = np.unique(array.flat[_choose_places(array.size)].astype(np.float64))
    dtype = array.dtype
    del array
    _release(tensor)
    return wanted[wanted != 0], dtype


def _release(tensor: ir.TensorProtocol) -> None:
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()  # else the pages of a large file would stay in memory


def make_plain_path(raw: str) -> str:
    """Return the qualified name of a weight behind that of its raw tensor.

    ::

        make_plain_path("a.weight_orig")  # "a.weight"
        make_plain_path("a.weight_v")  # "a.weight", the direction of weight norm
        make_plain_path("a.parametrizations.weight.original0")  # "a.weight"
    """
    parametrized = _PARAMETRIZED.match(raw)
    if parametrized:
        return qualify(parametrized[1] or "", parametrized[2])
    module, _, tensor = raw.rpartition(".")
    return qualify(module, make_plain_name(tensor.removesuffix("_v") or tensor))


def name_folded(raw: str | None, users: Sequence[str], taken: Collection[str]) -> str:
    """Return a free name for a folded value: that of the weight, in the module that reads it.

    ::

        name_folded("conv.weight_orig", ["conv"], ())  # "conv.weight"
        name_folded("mlp.weight_v", ["head"], ())  # "head.weight"
        name_folded(None, ["conv"], ["conv.weight"])  # "conv.weight_folded"

    Args:
        raw: name of the tensor that it is made from, if that has one.
        users: paths of the modules that read it.
        taken: names that are in use.
    """
    user = users[0] if len(users) == 1 else None
    if raw is None:
        wanted = qualify(user or "", "weight")
    else:
        wanted = make_plain_path(raw)
        module, _, tensor = wanted.rpartition(".")
        # A module above may compute in the place of the one that holds the weight.
        if user is not None and not _is_within(module, user):
            wanted = qualify(user, tensor)
    candidates = [wanted, qualify(wanted.rpartition(".")[0], "weight"), wanted + "_folded"]
    free = (name for name in candidates if name not in taken)
    return next(free, None) or make_distinct([wanted], taken)[0]


def _is_within(module: str, parent: str) -> bool:
    return parent == "" or module == parent or module.startswith(parent + ".")
