"""Files that nobody vouches for, through every command: one message, exit code 2, nothing else."""

from __future__ import annotations

import copyreg
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from cli_networks import trained_critic
from hostile_pickles import CODE, FORMATS, hostile_pickles, with_protocol
from prove_common import Row

from sn_export import export_onnx
from sn_export.cli import main

_SECONDS, _BYTES = 30, 2**31  # that a command may take, beyond what is there when it starts
_NETWORK = ("--model", "cli_networks:critic", "--input", "2x3x8x8")
Builder = Callable[[Path], Path]


def rows(quick: bool) -> Iterator[Row]:
    """Yield a row for each command."""
    copyreg.add_extension("posix", "mkdir", CODE)  # what a pickle may name by its number
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder)
        model = trained_critic().eval()
        export_onnx(
            model,
            torch.randn(2, 3, 8, 8),
            sound / "sound.onnx",
            exporter="torchscript",
            save_case=sound / "sound.npz",
        )
        torch.save(model.state_dict(), sound / "sound.pt")
        for command, (files, whole, arguments) in _COMMANDS.items():
            hostile = files()
            stride = max(len(hostile) // 8, 1) if quick else 1
            yield _row(command, hostile, whole, arguments, sound, stride)


def _row(
    command: str,
    files: dict[str, Builder],
    whole: str,
    arguments: Callable[[str], list[str]],
    sound: Path,
    stride: int,
) -> Row:
    chosen, failures = list(files.items())[::stride], list[str]()
    if said := _refusal(sound, arguments(whole)):  # or nothing is said of hostile files
        raise RuntimeError(f"{command} refuses a sound file: {said}")
    for name, build in chosen:
        with tempfile.TemporaryDirectory() as name_of_folder:
            folder = Path(name_of_folder)
            for path in sound.iterdir():
                shutil.copy(path, folder)
            made = build(folder)
            before = sorted(folder.rglob("*"))
            code, out, err = _run(folder, arguments(made.name))
            # What inspect shows without reading the hostile part of a file is as good.
            is_shown = command == "inspect" and not code and not err
            said = err.decode("utf-8", "replace")
            reason = ""
            if sorted(folder.rglob("*")) != before:
                reason = "files have changed"
            elif is_shown:
                continue
            elif code != 2:
                reason = f"exit code {code}"
            elif out or said.count("\n") != 1 or not said.startswith("sn-export: "):
                reason = "more than one message"
            elif "unexpected" in said or "Traceback" in said:
                reason = "an unexpected error"
            if reason:
                failures.append(f"{command}, {name}: {reason}: {said[-300:]!r}")
    note = f"{_SECONDS} s and {_BYTES >> 30} GiB each"
    return Row(
        f"hostile file to {command}", len(chosen), len(chosen) - len(failures), note, failures
    )


def _refusal(sound: Path, arguments: list[str]) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = shutil.copytree(sound, Path(name) / "sound")
        code, _, err = _run(folder, arguments)
    return err.decode() if code else ""


def _run(folder: Path, arguments: list[str]) -> tuple[int, bytes, bytes]:
    """Run a command in a process of its own; a negative code is the signal that ended it."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            try:
                os.chdir(folder)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
                resource.setrlimit(resource.RLIMIT_AS, (used + _BYTES, used + _BYTES))
                signal.alarm(_SECONDS)
                sys.argv = ["sn-export", *arguments]
                main()
            except SystemExit as error:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(int(error.code or 0))
            finally:
                os._exit(99)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return os.waitstatus_to_exitcode(status), out.read(), err.read()


def _hostile_checkpoints() -> dict[str, Builder]:
    return {**_pickles(), **_broken_checkpoints()}


def _pickles() -> dict[str, Builder]:
    attempts = hostile_pickles(Path("trace"))
    return {
        f"{form}: {attempt}": lambda folder, form=form, body=body: FORMATS[form](  # type: ignore[misc]
            folder / "hostile", with_protocol(body)
        )
        for form in FORMATS
        for attempt, body in attempts.items()
    }


def _file(content: bytes, name: str = "hostile.pt") -> Builder:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return build


def _pipe(name: str) -> Builder:
    def build(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    return build


def _link(name: str, to: str) -> Builder:
    def build(folder: Path) -> Path:
        (folder / name).symlink_to(to)
        return folder / name

    return build


def _ends(suffix: str) -> dict[str, Builder]:
    name = f"hostile{suffix}"
    return {
        "absent": lambda folder: folder / name,
        "empty": _file(b"", name),
        "zeros": _file(bytes(10_000), name),
        "noise": _file(random.Random(0).randbytes(10_000), name),
        "pipe": _pipe(name),
        "endless device": _link(name, "/dev/zero"),
        "silent device": _link(name, "/dev/tty"),
        "loop": _link(name, name),
        "dangling link": _link(name, "nothing"),
    }


def _safetensors(header: object, data: bytes = b"", length: int | None = None) -> Builder:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return _file(struct.pack("<Q", size) + text + data, "hostile.safetensors")


def _index(weight_map: object) -> Builder:
    return _file(json.dumps({"weight_map": weight_map}).encode(), "m.safetensors.index.json")


def _torch_file() -> bytes:
    made = io.BytesIO()
    torch.save(trained_critic().state_dict(), made)
    return made.getvalue()


def _zip(entries: dict[str, bytes], packed: bool = False) -> bytes:
    made = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(made, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return made.getvalue()


def _broken_checkpoints() -> dict[str, Builder]:
    whole, chance = _torch_file(), random.Random(0)
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    found = {f"torch: {key}": build for key, build in _ends(".pt").items()}
    found |= {f"safetensors: {key}": build for key, build in _ends(".safetensors").items()}
    found |= {f"cut at {n}": _file(whole[:n]) for n in range(1, len(whole), len(whole) // 20)}
    for number in range(20):
        changed = bytearray(whole)
        for _ in range(20):
            changed[chance.randrange(200)] = chance.randrange(256)  # headers of the first entries
        found[f"flipped {number}"] = _file(bytes(changed))
    found |= {
        "deep pickle": _file(_zip({"a/data.pkl": with_protocol(b"(" * 10**6), "a/version": b"3"})),
        "bomb": _file(_zip({"a/data.pkl": bytes(2**28), "a/version": b"3"}, packed=True)),
        "names of files above": _file(_zip({"../../data.pkl": b"\x80\x02}."})),
        "long header": _safetensors({}, length=2**62),
        "header of more than there is": _safetensors({}, length=2**20),
        "no object": _safetensors([1]),
        "deep header": _safetensors(b"[" * 10**5),
        "not UTF-8": _safetensors(b'{"\xff": 1}'),
        "offsets beyond": _safetensors({"w": entry}, b"1234"),
        "negative offsets": _safetensors({"w": {**entry, "data_offsets": [-8, 0]}}, b"12345678"),
        "huge shape": _safetensors({"w": {**entry, "shape": [2**62, 2**62]}}, b"12345678"),
        "unknown dtype": _safetensors({"w": {**entry, "dtype": "F31"}}, b"12345678"),
        "overlap": _safetensors({"v": entry, "w": entry}, b"12345678"),
        "texts for numbers": _safetensors({"w": {**entry, "shape": ["2"]}}, b"12345678"),
        "index above": _index({"w": "../../../etc/passwd"}),
        "index absolute": _index({"w": "/etc/passwd"}),
        "index of itself": _index({"w": "m.safetensors.index.json"}),
        "index of a device": _index({"w": "/dev/zero"}),
        "index of lists": _index([["w"]]),
        "index of numbers": _index({"w": 3}),
    }
    return found


def _npz(arrays: dict[str, np.ndarray], packed: bool = False) -> bytes:
    made = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(made, **arrays)  # type: ignore[arg-type]
    return made.getvalue()


def _case(**changes: object) -> bytes:
    content: dict[str, object] = {
        "format": "sn_export.case",
        "version": 1,
        "inputs": ["x"],
        "outputs": ["output"],
        "rtol": [None],
        "atol": [None],
        "sets": [{"label": "a", "inputs": ["float32"], "outputs": ["float32"]}],
        **changes,
    }
    return json.dumps(content).encode()


def _array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


def _broken_cases() -> dict[str, Builder]:
    x, objects = np.zeros((2, 3, 8, 8), np.float32), np.array([{"a": 1}], dtype=object)
    sound = {"case": _array(_case()), "input_0_0": x, "output_0_0": x}
    return {
        **_ends(".npz"),
        "cut": _file(_npz(sound)[:-100], "hostile.npz"),
        "compressed": _file(_npz({"case": np.zeros(2**24)}, packed=True), "hostile.npz"),
        "objects": _file(_npz({**sound, "input_0_0": objects}), "hostile.npz"),
        "case of objects": _file(_npz({"case": objects}), "hostile.npz"),
        "no case": _file(_npz({"input_0_0": x}), "hostile.npz"),
        "deep": _file(_npz({"case": _array(b"[" * 10**5)}), "hostile.npz"),
        "absent arrays": _file(_npz({"case": _array(_case())}), "hostile.npz"),
        **{
            f"with {key}": _file(
                _npz({**sound, "case": _array(_case(**{key: value}))}), "hostile.npz"
            )
            for key, value in {
                "format": "other",
                "version": 2,
                "inputs": "x",
                "outputs": [],
                "rtol": ["a"],
                "atol": [],
                "sets": [{}],
                "proof_dtype": "float8",
            }.items()
        },
        "another model's": _file(_npz({**sound, "input_0_0": x[:, :1]}), "hostile.npz"),
    }


def _model(location: str, **options: object) -> bytes:
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], bytes(8), raw=True)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **options}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["output"])],
        "graph",
        [value("x", onnx.TensorProto.FLOAT, [2])],
        [value("output", onnx.TensorProto.FLOAT, [2])],
        [tensor],
    )
    content: bytes = onnx.helper.make_model(graph).SerializeToString()
    return content


def _broken_models() -> dict[str, Builder]:
    return {
        **_ends(".onnx"),
        "data above": _file(_model("../../../../../../etc/passwd"), "hostile.onnx"),
        "data absolute": _file(_model("/etc/passwd"), "hostile.onnx"),
        "data of a device": _file(_model("/dev/zero"), "hostile.onnx"),
        "absent data": _file(_model("nothing"), "hostile.onnx"),
        "data beyond the end": _file(_model("sound.npz", offset=2**40, length=8), "hostile.onnx"),
        "data of minus one": _file(_model("sound.npz", offset=-1, length=8), "hostile.onnx"),
    }


# What is hostile, a file that is not, and the command that reads either.
_COMMANDS: dict[str, tuple[Callable[[], dict[str, Builder]], str, Callable[[str], list[str]]]] = {
    "onnx": (
        _hostile_checkpoints,
        "sound.pt",
        lambda path: ["onnx", path, *_NETWORK, "-o", "out.onnx"],
    ),
    "inspect": (_hostile_checkpoints, "sound.pt", lambda path: ["inspect", path]),
    "convert": (
        _hostile_checkpoints,
        "sound.pt",
        lambda path: ["convert", path, "--to", "plain", "-o", "out.pt"],
    ),
    "check, as a case": (
        _broken_cases,
        "sound.npz",
        lambda path: ["check", "sound.onnx", "--case", path],
    ),
    "check, as a model": (
        _broken_models,
        "sound.onnx",
        lambda path: ["check", path, "--case", "sound.npz"],
    ),
}
