"""Give the readers bytes that atheris makes up, guided by which lines they reach.

A reader may return or raise an error of the package. Another exception, a line of the file that
runs, 10 seconds for one file or memory without bound is a failure. Each reader has a process of its
own; with the corpus that is left, another one counts the lines that were reached.
"""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prove_common import Row

_SECONDS = 90  # for each reader
_HANG, _MEGABYTES, _LONGEST = 10, 3000, 4096
# What nothing in a file may bring about, as audit hooks hear of it.
_DEEDS = re.compile(
    r"os\.(system|exec|fork|posix_spawn|spawn|mkdir|remove|rename|rmdir|chmod|link|symlink|kill).*"
    r"|subprocess\..*|socket\..*|shutil\..*|pickle\.find_class|ctypes\.dlopen|webbrowser\..*"
)


@dataclass(frozen=True)
class Reader:
    """What is given bytes.

    Attributes:
        seeds: makes the bytes to begin with.
        read: reads bytes, from a file in the current folder.
        files: modules of the package that do it, of which the lines are counted.
    """

    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes], object]
    files: tuple[str, ...]


def rows(quick: bool) -> Iterator[Row]:
    """Yield a row for each reader."""
    for name, reader in READERS.items():
        with tempfile.TemporaryDirectory() as folder:
            yield _make_row(name, reader, Path(folder), 5 if quick else _SECONDS)


def _make_row(name: str, reader: Reader, folder: Path, seconds: int) -> Row:
    corpus, work, log = folder / "corpus", folder / "work", folder / "failures"
    for path in (corpus, work):
        path.mkdir()
    program = [sys.executable, __file__, name]
    options = [
        *(f"-max_total_time={seconds}", f"-timeout={_HANG}", f"-rss_limit_mb={_MEGABYTES}"),
        *(
            f"-max_len={_LONGEST}",
            f"-artifact_prefix={folder}/",
            "-seed=18",
            "-print_final_stats=1",
        ),
    ]
    ran = subprocess.run(
        [*program, str(log), str(corpus), *options],
        cwd=work,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=seconds + 300,
    )
    said = ran.stderr.decode("utf-8", "replace")
    tried = int((re.findall(r"number_of_executed_units:\s*(\d+)", said) or ["0"])[-1])
    failures = log.read_text().splitlines() if log.exists() else []
    if ran.returncode:
        ends = [line for line in said.splitlines() if "ERROR" in line or "Error" in line]
        failures.append(f"ended by {ran.returncode}: {' '.join(ends[-2:]) or said[-500:]}")
    features = (re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", said) or [("0", "0", "0")])[-1]
    lines = subprocess.run(
        [*program, "--lines", str(corpus)], cwd=work, stdout=subprocess.PIPE, check=True
    )
    covered = lines.stdout.decode().splitlines()[-1]  # onnxruntime prints before it
    note = f"{covered}; {features[0]} edges, {features[2]} files kept"
    return Row(f"made-up {name}", tried, tried - len(failures), note, failures)


def _make_reader(name: str) -> Callable[[bytes], object]:
    def read(data: bytes) -> object:
        from sn_export.checkpoints import inspect_checkpoint

        Path(name).write_bytes(data)
        return inspect_checkpoint(name)

    return read


def _write_zip(entries: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return made.getvalue()


def _read_pickle(data: bytes) -> object:
    """Read bytes as the pickle within a sound archive."""
    storages = {f"a/data/{number}": bytes(256) for number in range(4)}
    whole = {"a/data.pkl": data, "a/byteorder": b"little", **storages, "a/version": b"3\n"}
    return _make_reader("a.pt")(_write_zip(whole))


def _make_networks() -> list[dict[str, Any]]:
    import torch
    from torch import nn
    from torch.nn.utils import parametrizations, spectral_norm, weight_norm

    made = [
        nn.Sequential(spectral_norm(nn.Linear(2, 2)), nn.BatchNorm1d(2)),
        nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(1, 2, 1))),
        nn.Sequential(weight_norm(nn.Linear(2, 2)), parametrizations.weight_norm(nn.Linear(2, 2))),
    ]
    optimizer = torch.optim.Adam(made[0].parameters())
    made[0](torch.ones(2, 2)).sum().backward()
    optimizer.step()
    half = {"w": torch.ones(2, dtype=torch.bfloat16), "i": torch.arange(3), "s": torch.eye(2)}
    half["s"] = half["s"].to_sparse()
    return [
        *(dict(model.state_dict()) for model in made),
        {"model": made[0].state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3},
        half,
        {"a": [1, 2.5, None, True, "x", b"y", (1,), {2}], "dtype": torch.float16},
    ]


def _make_torch_files() -> list[bytes]:
    import torch

    files = []
    for content in _make_networks():
        for is_zip in (True, False):
            made = io.BytesIO()
            torch.save(content, made, _use_new_zipfile_serialization=is_zip)
            files.append(made.getvalue())
    return files


def _make_pickles() -> list[bytes]:
    from hostile_pickles import hostile_pickles, with_protocol

    archives = [io.BytesIO(data) for data in _make_torch_files() if data.startswith(b"PK")]
    found = []
    for file in archives:
        with zipfile.ZipFile(file) as archive:
            found += [archive.read(n) for n in archive.namelist() if n.endswith("data.pkl")]
    return found + [with_protocol(body) for body in hostile_pickles(Path("trace")).values()]


def _read_safetensors(data: bytes) -> object:
    """Read bytes as the header of a file, whose length is right."""
    return _make_reader("a.safetensors")(struct.pack("<Q", len(data)) + data + bytes(64))


def _make_headers() -> list[bytes]:
    from safetensors.torch import save

    files = [save(dict(state)) for state in _make_networks()[:3]]
    return [data[8 : 8 + struct.unpack("<Q", data[:8])[0]] for data in files]


def _read_index(data: bytes) -> object:
    import torch
    from safetensors.torch import save_file

    if not Path("a-1.safetensors").exists():
        for number in (1, 2):
            save_file({f"{number}.weight": torch.ones(2)}, f"a-{number}.safetensors")
            torch.save({f"{number}.weight": torch.ones(2)}, f"a-{number}.bin")
    for kind in ("safetensors", "bin"):
        with suppress(_import_own_error()):
            _make_reader(f"a.{kind}.index.json")(data)
    return None


def _make_indexes() -> list[bytes]:
    places = {f"{number}.weight": f"a-{number}.safetensors" for number in (1, 2)}
    others = {f"{number}.weight": f"a-{number}.bin" for number in (1, 2)}
    maps: list[Any] = [places, others, {}, {"w": "../a"}, {"w": 3}, [["w"]]]
    return [json.dumps({"metadata": {}, "weight_map": one}).encode() for one in maps]


def _read_distributed(data: bytes) -> object:
    folder = Path("dcp")
    if not folder.exists():
        _save_distributed(folder, _make_networks()[3])
    return _make_reader("dcp/.metadata")(data) if not data else _read_folder(folder, data)


def _read_folder(folder: Path, data: bytes) -> object:
    from sn_export.checkpoints import inspect_checkpoint

    (folder / ".metadata").write_bytes(data)
    return inspect_checkpoint(folder)


def _save_distributed(folder: Path, content: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    save(content, checkpoint_id=folder, no_dist=True)


def _make_metadatas() -> list[bytes]:
    found = []
    for content in (_make_networks()[0], _make_networks()[3]):
        with tempfile.TemporaryDirectory() as name:
            _save_distributed(Path(name) / "dcp", content)
            found.append((Path(name) / "dcp" / ".metadata").read_bytes())
    return found


def _write_sound_files() -> None:
    """Make ``sound.onnx`` and ``sound.npz`` in the current folder, where they are not there."""
    if not Path("sound.npz").exists():
        import torch
        from torch import nn

        from sn_export import export_onnx

        model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(2, 2)), nn.ReLU())
        for path, external in (("sound.onnx", False), ("split.onnx", True)):
            export_onnx(
                model,
                torch.ones(1, 2),
                path,
                exporter="torchscript",
                external_data=external,
                samples=1,
                save_case="sound.npz",
            )


def _read_case(data: bytes) -> object:
    """Read bytes as a case, and as what a case with sound arrays says of itself."""
    import numpy as np

    from sn_export import check_case

    _write_sound_files()
    Path("a.npz").write_bytes(data)
    with suppress(_import_own_error()):
        check_case("sound.onnx", "a.npz")
    with np.load("sound.npz") as sound:
        arrays = {**sound, "case": np.frombuffer(data, np.uint8)}
    np.savez("a.npz", **arrays)
    return check_case("sound.onnx", "a.npz")


def _make_cases() -> list[bytes]:
    import numpy as np

    _write_sound_files()
    with np.load("sound.npz") as sound:
        return [Path("sound.npz").read_bytes(), sound["case"].tobytes()]


def _read_onnx(data: bytes) -> object:
    from sn_export import check_case

    _write_sound_files()
    Path("a.onnx").write_bytes(data)
    return check_case("a.onnx", "sound.npz")


def _make_models() -> list[bytes]:
    _write_sound_files()
    return [Path(name).read_bytes() for name in ("sound.onnx", "split.onnx")]


_PICKLES = tuple(
    f"checkpoints/{name}.py" for name in ("read", "torch_file", "unpickling", "pickle_globals")
)
READERS = {
    "files of torch.save": Reader(_make_torch_files, _make_reader("a.pt"), _PICKLES),
    "pickles in them": Reader(_make_pickles, _read_pickle, _PICKLES),
    "headers of safetensors": Reader(
        _make_headers, _read_safetensors, ("checkpoints/safetensors_file.py",)
    ),
    "indexes of shards": Reader(
        _make_indexes, _read_index, ("checkpoints/read.py", "checkpoints/safetensors_file.py")
    ),
    "metadata of distributed checkpoints": Reader(
        _make_metadatas,
        _read_distributed,
        ("checkpoints/distributed.py", "checkpoints/unpickling.py"),
    ),
    "saved cases": Reader(_make_cases, _read_case, ("proving/cases.py",)),
    "ONNX files": Reader(_make_models, _read_onnx, ("proving/session.py", "proving/cases.py")),
}


def _import_own_error() -> type[Exception]:
    from sn_export.errors import SnExportError

    return SnExportError


class _Watch:
    """Runs a reader and notes each kind of failure once."""

    def __init__(self, reader: Reader, log: Path) -> None:
        self.reader = reader
        self.log = log
        self.deeds: list[str] = []
        self.known: set[str] = set()
        self.is_on = False
        self.own_error = _import_own_error()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[object, ...]) -> None:
        if self.is_on and _DEEDS.fullmatch(event):
            self.deeds.append(f"{event} {args!r:.100}")

    def __call__(self, data: bytes) -> None:
        failure = ""
        self.is_on = True
        try:
            self.reader.read(data)
        except self.own_error:
            pass
        except BaseException as error:
            failure = f"{_find_place(error)}: {type(error).__name__}: {str(error)[:150]!r}"
        finally:
            self.is_on = False
        for deed in self.deeds:
            self._note(deed.split()[0], deed, data)
        self.deeds.clear()
        if failure:
            self._note(failure.partition(":")[0], failure, data)

    def _note(self, kind: str, failure: str, data: bytes) -> None:
        if kind not in self.known:
            self.known.add(kind)
            with self.log.open("a") as file:
                file.write(f"{failure} for {data[:300]!r}\n")


def _find_place(error: BaseException) -> str:
    """Return the last line of the package that an error came through."""
    place, trace = "nowhere", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "sn_export" in name:
            place = f"{name.rpartition('sn_export/')[2]} line {trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _fuzz(name: str, log: Path, corpus: Path, options: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["sn_export"]):
        import sn_export.checkpoints
        import sn_export.proving  # noqa: F401

    reader = READERS[name]
    for number, seed in enumerate(reader.seeds()):
        (corpus / f"seed{number}").write_bytes(seed)
        with suppress(_import_own_error()):
            reader.read(seed)  # what is imported or read once is done before anybody listens
    atheris.Setup([sys.argv[0], *options, str(corpus)], _Watch(reader, log))
    atheris.Fuzz()


def _count_lines(name: str, corpus: Path) -> None:
    """Print how many lines of a reader's modules the files of a corpus reach."""
    from coverage import Coverage

    reader = READERS[name]
    files = [str(Path(__file__).parents[1] / "sn_export" / file) for file in reader.files]
    measured = Coverage(include=files, data_file=None)
    measured.start()
    for path in sorted(corpus.iterdir()):
        with suppress(Exception):
            reader.read(path.read_bytes())
    measured.stop()
    of, missed = 0, 0
    for file in files:
        _, lines, _, missing, _ = measured.analysis2(file)
        of, missed = of + len(lines), missed + len(missing)
    print(f"{100 * (of - missed) / of:.0f} % of {of} lines of {len(files)} modules")


def main() -> None:
    """Fuzz a reader, or count lines."""
    warnings.simplefilter("ignore")
    name, what, corpus, *options = sys.argv[1:]
    if what == "--lines":
        _count_lines(name, Path(corpus))
    else:
        _fuzz(name, Path(what), Path(corpus), options)


if __name__ == "__main__":
    main()
