"""Saved cases: inputs and the model's outputs in one file, replayed without the model.

The file is an ``.npz``. It holds plain arrays and nothing that runs: ``case`` is a JSON object in
UTF-8, ``input_S_I`` and ``output_S_O`` are the tensors of input set S. bfloat16, which numpy lacks,
is kept as its bits.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ExportError, SnExportError
from ..files import as_path, open_regular
from ..results import ParityReport, ProofDtype, Tolerance
from ..running import DRAWS, describe_draws
from ..text import describe_error, format_count, name_dtype
from .external_data import require_data_inside
from .parity import add_results, make_results, make_running_errors, mark_shown, open_proof_session
from .precision import PROOF_DTYPES, as_float32
from .session import DEFAULT_PROVIDERS
from .tolerances import ProofSettings

_FORMAT, _VERSION = "sn_export.case", 1
# The dtype in the file, by that of the tensor.
_STORED: dict[str, type[np.generic]] = {
    "bfloat16": np.uint16,
    "bool": np.bool_,
    **{
        name: getattr(np, name)
        for name in (
            *("float16", "float32", "float64"),
            *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        )
    },
}


@dataclass(frozen=True)
class Case:
    """Input sets, and what the model returned for them.

    Attributes:
        inputs: names of the file's inputs.
        outputs: names of the file's outputs.
        rtol: relative tolerance of each output, None for the default of its dtype.
        atol: absolute tolerance of each output, in units of the output, likewise.
        sets: label, inputs and outputs of each input set.
        proof_dtype: dtype of the copy that was run in the place of the file.
        draws: how the model drew random numbers: see `sn_export.running.draws`.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rtol: tuple[float | None, ...]
    atol: tuple[float | None, ...]
    sets: Sequence[tuple[str, Sequence[Tensor], Sequence[Tensor]]]
    proof_dtype: ProofDtype | None = None
    draws: str | None = None


def check_case(
    onnx_path: str | os.PathLike[str],
    case_path: str | os.PathLike[str],
    *,
    rtol: Tolerance = None,
    atol: Tolerance = None,
    providers: Sequence[str] = DEFAULT_PROVIDERS,
    proof_dtype: ProofDtype | None = None,
) -> ParityReport:
    """Compare an ONNX file with the outputs in a saved case; no model is needed.

    ::

        export_onnx(critic, (images,), "critic.onnx", save_case="critic.npz")
        check_case("critic.onnx", "critic.npz").passed  # True

    Args:
        onnx_path: the file. Its inputs are matched by name, or by position where it has others.
        case_path: the case, as `sn_export.export_onnx` writes it with ``save_case``.
        rtol: relative tolerance in the place of the saved one, as for `sn_export.check_parity`.
        atol: absolute tolerance in the place of the saved one, likewise.
        providers: onnxruntime execution providers, in order of preference.
        proof_dtype: as for `sn_export.check_parity`; by default that of the proof that was saved.

    Returns:
        The report, passed or not, without modules.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for a negative tolerance, a tolerance for an output that the file does not
            have, or an unknown provider.
        FileNotFoundError: if there is no such file.
        SnExportError: if the case cannot be read.
        ExportError: if onnxruntime cannot load or run the file, or its inputs or outputs
            are not those of the case.
    """
    settings = ProofSettings(rtol, atol, providers, proof_dtype).check()
    path, saved = as_path(onnx_path, "onnx_path"), as_path(case_path, "case_path")
    for kind, file in (("ONNX file", path), ("case", saved)):
        if not file.is_file():
            raise FileNotFoundError(f"no {kind} at '{file}'")
    require_data_inside(path)
    with open_case(saved) as (case, sets):
        settings = replace(
            settings,
            rtol=_key_by_position(case.rtol) if settings.rtol is None else settings.rtol,
            atol=_key_by_position(case.atol) if settings.atol is None else settings.atol,
            proof_dtype=proof_dtype or case.proof_dtype,
        )
        session = open_proof_session(path, settings)
        names = [output.name for output in session.get_outputs()]
        if len(names) != len(case.outputs):
            raise ExportError(
                f"the file has {format_count(len(names), 'output')}, the case '{saved.name}' "
                f"{len(case.outputs)}"
            )
        running = make_running_errors(names, settings)
        wanted = [entry.name for entry in session.get_inputs()]
        if len(wanted) != len(case.inputs):
            raise ExportError(
                f"the file takes the inputs {wanted}, the case has {list(case.inputs)}"
            )
        known = case.inputs if set(wanted) == set(case.inputs) else wanted
        for label, inputs, outputs in sets:
            if running and not running[0].samples:
                mark_shown(running, outputs, None)
            given = map(as_float32, inputs) if settings.proof_dtype else inputs
            feed = dict(zip(known, given, strict=True))
            add_results(running, session, feed, label, outputs, settings.proof_dtype)
    return ParityReport(
        make_results(running),
        len(case.sets),
        tuple(session.get_providers()),
        proof_dtype=settings.proof_dtype,
        notes=tuple(filter(None, [describe_draws(case.draws)])),
    )


def _key_by_position(tolerances: Sequence[float | None]) -> dict[int, float]:
    return {i: value for i, value in enumerate(tolerances) if value is not None}


def write_case(path: Path, case: Case) -> None:
    """Write a case; the same one gives the same bytes.

    Raises:
        ExportError: for a dtype that a case cannot hold.
    """
    arrays: dict[str, NDArray[Any]] = {}
    sets = []
    for number, (label, inputs, outputs) in enumerate(case.sets):
        for kind, tensors in (("input", inputs), ("output", outputs)):
            for position, tensor in enumerate(tensors):
                arrays[f"{kind}_{number}_{position}"] = _to_array(tensor)
        sets.append(
            {
                "label": label,
                "inputs": [name_dtype(tensor) for tensor in inputs],
                "outputs": [name_dtype(tensor) for tensor in outputs],
            }
        )
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "inputs": case.inputs,
        "outputs": case.outputs,
        "rtol": case.rtol,
        "atol": case.atol,
        "sets": sets,
        "proof_dtype": case.proof_dtype,
        "draws": case.draws,
    }
    text = json.dumps(content).encode()
    with path.open("wb") as file:
        np.savez(file, case=np.frombuffer(text, np.uint8), **arrays)  # type: ignore[arg-type]


Sets = Iterator[tuple[str, list[Tensor], list[Tensor]]]


@contextmanager
def open_case(path: Path) -> Iterator[tuple[Case, Sets]]:
    """Yield the case without tensors, and an iterator that reads one input set after the other."""
    try:
        file = open_regular(path)
    except OSError as error:
        raise _make_error(path, error.strerror or str(error)) from error
    with file:
        yield _open_archive(path, file)


def _open_archive(path: Path, file: BinaryIO) -> tuple[Case, Sets]:
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [e.filename for e in archive.infolist() if e.compress_type]
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _make_error(path, f"it is no npz archive: {error}") from error
    if packed:  # a few bytes may unpack to any size
        raise _make_error(path, f"'{packed[0]}' is compressed, wanted uncompressed arrays")
    file.seek(0)
    try:
        arrays = np.load(file, allow_pickle=False)
    except Exception as error:
        raise _make_error(path, describe_error(error)) from error
    content = _read_content(path, arrays)
    case = Case(
        tuple(content["inputs"]),
        tuple(content["outputs"]),
        tuple(content["rtol"]),
        tuple(content["atol"]),
        [(entry["label"], (), ()) for entry in content["sets"]],
        content.get("proof_dtype"),
        content.get("draws"),
    )
    return case, _read_sets(path, arrays, content)


def _read_content(path: Path, archive: Mapping[str, Any]) -> Any:
    try:
        content = json.loads(_read_array(path, archive, "case").tobytes())
    except (ValueError, RecursionError) as error:
        raise _make_error(path, f"'case' is no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise _make_error(path, f"'case' does not say that its format is '{_FORMAT}'")
    if content.get("version") != _VERSION:
        raise _make_error(path, f"it has version {content.get('version')!r}, wanted {_VERSION}")
    names: Any = content.get("inputs")
    results: Any = content.get("outputs")
    sets: Any = content.get("sets")
    is_sound = (
        _is_list_of(names, lambda name: isinstance(name, str))
        and _is_list_of(results, lambda name: isinstance(name, str))
        and all(
            _is_list_of(content.get(key), _is_tolerance) and len(content[key]) == len(results)
            for key in ("rtol", "atol")
        )
        and _is_list_of(sets, lambda entry: _is_set(entry, len(names), len(results)))
        and len(sets) > 0
        and len(results) > 0
        and content.get("proof_dtype") in PROOF_DTYPES
        and content.get("draws") in DRAWS
    )
    if not is_sound:
        raise _make_error(path, "'case' lacks names, tolerances or sets, or they do not fit")
    return content


def _is_tolerance(value: Any) -> bool:
    if type(value) is int and value > sys.float_info.max:  # which no number of a report can be
        return False
    return value is None or (type(value) in (int, float) and value >= 0)


def _is_set(entry: Any, inputs: int, outputs: int) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("label"), str)
        and all(
            _is_list_of(entry.get(key), lambda name: isinstance(name, str) and name in _STORED)
            and len(entry[key]) == count
            for key, count in (("inputs", inputs), ("outputs", outputs))
        )
    )


def _is_list_of(values: Any, test: Any) -> bool:
    return isinstance(values, list) and all(map(test, values))


def _read_sets(path: Path, archive: Mapping[str, Any], content: Any) -> Sets:
    for number, entry in enumerate(content["sets"]):
        tensors = {
            kind: [
                _to_tensor(path, archive, f"{kind}_{number}_{position}", dtype)
                for position, dtype in enumerate(entry[f"{kind}s"])
            ]
            for kind in ("input", "output")
        }
        yield entry["label"], tensors["input"], tensors["output"]


def _to_array(tensor: Tensor) -> NDArray[Any]:
    name = name_dtype(tensor)
    if name not in _STORED:
        raise ExportError(f"a case cannot hold {name}, only {', '.join(_STORED)}")
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return np.asarray(tensor.numpy())


def _to_tensor(path: Path, archive: Mapping[str, Any], name: str, dtype: str) -> Tensor:
    array = _read_array(path, archive, name)
    if array.dtype != np.dtype(_STORED[dtype]):
        raise _make_error(
            path, f"'{name}' holds {array.dtype}, wanted {np.dtype(_STORED[dtype])} for {dtype}"
        )
    tensor = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _read_array(path: Path, archive: Mapping[str, Any], name: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = archive[name]
    except KeyError as error:
        raise _make_error(path, f"it has no array '{name}'") from error
    except Exception as error:
        raise _make_error(path, f"array '{name}': {describe_error(error)}") from error
    if not isinstance(array, np.ndarray):
        raise _make_error(path, f"'{name}' is no array")
    return array


def _make_error(path: Path, reason: str) -> SnExportError:
    return SnExportError(f"cannot read the case '{path}': {reason}")
