"""Run a file in onnxruntime, of any build, on tensors of any dtype.

No build is a dependency: each is installed over the others.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ExportError, MissingRuntimeError
from ..files import name_side_file
from ..running import InputSet, as_real_pairs, is_large
from .external_data import Pieces
from .precision import find_missing_kernel

_INSTALL = (
    "install one build of it, 'pip install onnxruntime', or onnxruntime-gpu for CUDA: each is "
    "installed over the others"
)


def _import_runtime() -> Any:
    """Return the module onnxruntime.

    Raises:
        MissingRuntimeError: if it is not installed, or is what an uninstalled build left behind.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise MissingRuntimeError(
            f"exports are proved by onnxruntime, which is missing; {_INSTALL}"
        ) from None
    if not hasattr(onnxruntime, "InferenceSession"):
        where = ", ".join(getattr(onnxruntime, "__path__", ()))
        raise MissingRuntimeError(
            f"onnxruntime in {where} is not whole, as where one of two builds was uninstalled; "
            f"uninstall all of them and {_INSTALL}"
        )
    return onnxruntime


ort = _import_runtime()
DEFAULT_PROVIDERS = ("CPUExecutionProvider",)
_BFLOAT16 = 16  # TensorProto.BFLOAT16


def require_providers(providers: Sequence[str]) -> None:
    """Raise for execution providers that onnxruntime cannot be given.

    Raises:
        TypeError: if they are no sequence.
        ValueError: if they are one text, or one of them is not installed.
    """
    available = ort.get_available_providers()
    if isinstance(providers, str):
        raise ValueError(f"providers must be a sequence of names, got the text {providers!r}")
    if not isinstance(providers, Sequence):
        raise TypeError(f"providers must be a sequence of names, got {providers!r}")
    for provider in providers:
        if provider not in available:
            raise ValueError(
                f"unknown onnxruntime provider '{provider}', installed are {', '.join(available)}"
            )


def open_session(
    path: Path, providers: Sequence[str], content: bytes | None = None, *, at_once: bool = False
) -> Any:
    """Return an onnxruntime session, or `Pieces`, which run a large file as a session does.

    Args:
        path: the file. Past 512 MB of external data it is run in `Pieces`.
        providers: execution providers, in order of preference.
        content: a model to run in the place of the file, without graph optimisations; its
            external data is looked for beside ``path``.
        at_once: never in pieces: those are read at each run, when the file may be gone.

    Raises:
        TypeError: if the providers are no sequence.
        ValueError: for a provider that is not installed.
        ExportError: if onnxruntime cannot load the file.
    """
    require_providers(providers)
    if content is not None:
        return _open(path, providers, content, optimised=False)
    if at_once or not is_large(_measure_size(name_side_file(path))):
        return _open(path, providers)
    try:  # optimising the whole may fold its weights, so read and copy them all
        whole = _open(path, providers, optimised=False)
    except ExportError:
        return _open(path, providers)
    return Pieces(whole, path, lambda piece: _open(path, providers, piece))


def _open(
    path: Path, providers: Sequence[str], content: bytes | None = None, optimised: bool = True
) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the exception says it
    # As many as the user gives to torch. Those that wait by spinning take longer to start than most
    # networks to run.
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if is_large(_measure_size(path) + _measure_size(name_side_file(path))):
        # Weights in another order run faster and take their memory twice.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if content is not None:
        folder = str(path.resolve().parent)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", folder
        )
    try:
        return ort.InferenceSession(content or str(path), options, providers=list(providers))
    except Exception as error:
        missing = find_missing_kernel(path, str(error))
        if missing is None:
            text = str(error).replace(str(path), path.name)
            raise ExportError(f"onnxruntime cannot load '{path.name}': {text}") from error
        operator, dtype = missing
        dtype = dtype or "its dtype, which the file does not state,"
        raise ExportError(
            f"onnxruntime's {', '.join(providers)} has no {operator} for {dtype} to prove "
            f"'{path.name}' with. proof_dtype='float32' proves a copy of the file in float32"
        ) from error


def open_graph(content: bytes) -> Any:
    """Return a session of a small graph: its operators as they stand, on one thread of the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the exception says it
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _measure_size(path: Path) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0  # too long a name is no file


def name_inputs(
    session: Any, inputs: InputSet, names: Mapping[str, str] | None
) -> dict[str, Tensor]:
    """Return the tensors of ``inputs`` by the names of the file's inputs.

    They go by name where the file has no others, else by position. Complex ones are pairs of reals.

    Args:
        session: the session with the file.
        inputs: the tensors, bound.
        names: what the file calls them, by their names in the forward's signature; the same if
            None.

    Raises:
        ExportError: if the number of inputs differs.
    """
    wanted = [entry.name for entry in session.get_inputs()]
    named = inputs.named_tensors()
    by_name = {(names or {}).get(name, name): tensor for name, tensor in named}
    if not all(name in by_name for name in wanted):
        if len(named) != len(wanted):
            raise ExportError(
                f"the file takes the inputs {wanted}, {inputs.label} has "
                f"{[name for name, _ in named]}"
            )
        by_name = dict(zip(wanted, (tensor for _, tensor in named), strict=True))
    return {name: as_real_pairs(by_name[name]) for name in wanted}


def run_session(
    session: Any,
    feed: Mapping[str, Tensor],
    label: str,
    outputs: Sequence[str] | None = None,
) -> list[Tensor | None]:
    """Return the outputs of a file, all or those named; None for one that holds no numbers.

    Raises:
        ExportError: if onnxruntime cannot run the inputs, which ``label`` describes.
    """
    try:
        values = {name: _to_ort(tensor) for name, tensor in feed.items()}
        results = session.run_with_ort_values(outputs, values)
    except Exception as error:
        raise ExportError(f"onnxruntime fails on {label}: {error}") from error
    return [_from_ort(value) if _is_numeric(value) else None for value in results]


def _is_numeric(value: Any) -> bool:
    return bool(value.is_tensor()) and value.data_type() != "tensor(string)"


def _to_ort(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16
        bits = tensor.view(torch.uint16).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _from_ort(value: Any) -> Tensor:
    if value.element_type() == _BFLOAT16:
        content = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
        bits = torch.from_numpy(np.frombuffer(content, np.uint16).copy())
        return bits.view(torch.bfloat16).reshape(value.shape())
    array: NDArray[Any] = np.array(value.numpy())  # a copy; the value may be reused
    return torch.from_numpy(array)
