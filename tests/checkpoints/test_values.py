"""Values that torch writes beside plain tensors are read as torch reads them, in every format."""

from __future__ import annotations

import collections
import datetime
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_networks import Critic, save_folder, trained_critic
from hostile_pickles import FORMATS
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sn_export.checkpoints import (
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    read_checkpoint,
)
from sn_export.checkpoints.unpickling import RestrictedUnpickler
from sn_export.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled",
    "ignore:Sparse CSR tensor support is in beta",
    "ignore:.*quantize",
)


def _with_attribute(value: Any) -> Any:
    value.note = "of its own"
    return value


def _quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.5, 1, torch.qint8)


VALUES: dict[str, Callable[[], Any]] = {
    "view": lambda: torch.arange(12.0).reshape(3, 4).t()[1:, ::2],
    "parameter": lambda: nn.Parameter(torch.ones(2)),
    "frozen parameter": lambda: nn.Parameter(torch.ones(2), requires_grad=False),
    "parameter of integers": lambda: nn.Parameter(torch.ones(2).long(), requires_grad=False),
    "parameter with an attribute": lambda: _with_attribute(nn.Parameter(torch.ones(2))),
    "tensor with an attribute": lambda: _with_attribute(torch.ones(2)),
    "tensor that wants gradients": lambda: torch.ones(2, requires_grad=True),
    "conjugated": lambda: torch.tensor([1 + 2j, 3j]).conj(),
    "negated": lambda: torch.tensor([1 + 2j, 3j]).conj().imag,
    "dtype without a storage of its own": lambda: torch.ones(3, dtype=torch.uint16),
    "quantized": _quantized,
    "coordinates": lambda: torch.eye(3).to_sparse(),
    "compressed rows": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.empty(2, 3, device="meta"),
    "dtype": lambda: torch.float16,
    "device": lambda: [torch.device("cpu"), torch.device("cuda", 1)],
    "layout": lambda: torch.sparse_coo,
    "size": lambda: torch.Size([2, 3]),
    "ordered": lambda: collections.OrderedDict(b=1, a=2),
    "counter": lambda: collections.Counter("aab"),
    "default": lambda: collections.defaultdict(list, a=[1]),
    "default of none": lambda: collections.defaultdict(None, a=1),
    "deque": lambda: collections.deque([1, 2], maxlen=2),
    "sets": lambda: [{1, 2}, frozenset({"a"}), set()],
    "bytes": lambda: [b"\x00\xff", bytearray(b"ab"), bytearray()],
    "numbers": lambda: [1, -(2**70), 0.5, 1j, True, None],
}


def _parts(value: Any) -> list[Any]:
    """Return the properties by which two values differ."""
    if not isinstance(value, Tensor):
        return [type(value), value, getattr(value, "default_factory", getattr(value, "maxlen", 0))]
    dense = value.dequantize() if value.is_quantized else value.to_dense()
    facts = [type(value), value.dtype, value.layout, value.shape, value.device, value.requires_grad]
    return facts + ([] if value.is_meta else [dense.tolist()])


# Torch itself cannot read such a dtype in the old format, which it writes all the same.
CASES = [
    (form, name)
    for form in ("zip", "legacy", "protocol 4")
    for name in VALUES
    if (form, name) != ("legacy", "dtype without a storage of its own")
]


@pytest.mark.parametrize(("form", "name"), CASES)
def test_a_value_is_read_as_torch_reads_it(form: str, name: str, tmp_path: Path) -> None:
    """Type, dtype, layout, gradient and content are kept; attributes of a tensor are not."""
    value = VALUES[name]()
    protocol, is_zip = 4 if form == "protocol 4" else 2, form != "legacy"
    content = {"w": torch.ones(1), "x": value}
    torch.save(
        content, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip
    )
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    wanted = torch.load(tmp_path / "a.pt", weights_only=False)["x"]
    assert _parts(checkpoint.content["x"]) == _parts(wanted)
    assert checkpoint.notes == ()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_in_every_protocol_of_pickle(protocol: int) -> None:
    """Plain values are read in every protocol of pickle, which have instructions of their own.

    The unpickler is used inside, since torch writes no protocol below 2.
    """
    content = [
        {"a": [1, 2.5, {}]},
        {1, 2},
        frozenset({"a"}),
        (),
        (1, [None, True]),
        "\u00e9",
        b"\xff",
    ]
    content += [bytearray(b"ab"), collections.OrderedDict(a=1), 2**70, 1j, [[]] * 3, {}, []]
    file = io.BytesIO(pickle.dumps({"x": content, "y": content}, protocol))
    found = RestrictedUnpickler(file).load()
    assert found == {"x": content, "y": content}
    assert list(map(type, found["x"])) == list(map(type, content))


HARMLESS = """
argparse.Namespace types.SimpleNamespace typing.Any uuid.UUID builtins.range builtins.slice
decimal.Decimal fractions.Fraction datetime.date datetime.datetime datetime.time datetime.timedelta
datetime.timezone pathlib.Path pathlib.PosixPath pathlib.WindowsPath pathlib.PurePosixPath
pathlib._local.PosixPath pathlib.PureWindowsPath numpy.ndarray numpy.dtype numpy.matrix numpy.bool
numpy.bool_ numpy.float64 numpy.int8 numpy.core.multiarray._reconstruct
numpy._core.multiarray.scalar numpy._core.numeric._frombuffer torch.torch_version.TorchVersion
omegaconf.dictconfig.DictConfig omegaconf.base.Metadata easydict.EasyDict addict.addict.Dict
munch.Munch yacs.config.CfgNode ml_collections.config_dict.config_dict.ConfigDict
ml_collections.config_dict.config_dict.FrozenConfigDict mmengine.config.config.ConfigDict
mmengine.logging.history_buffer.HistoryBuffer mmcv.utils.config.Config
pytorch_lightning.utilities.parsing.AttributeDict lightning.pytorch.utilities.parsing.AttributeDict
lightning.fabric.utilities.data.AttributeDict lightning_fabric.utilities.data.AttributeDict
"""


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *((name, b")R") for name in HARMLESS.split()),
        ("uuid.UUID", b")\x81"),
        ("uuid.UUID", b")}\x92"),
    ],
)
def test_values_that_surround_weights_are_left_unread(
    name: str, call: bytes, tmp_path: Path
) -> None:
    """Harmless values are left unread and named, whatever they are given after they were made.

    That is a state, entries of a dictionary and elements of a list; the packages may be absent.
    """
    module, _, short = name.rpartition(".")
    entry = b"X\x01\x00\x00\x00aK\x01"
    given = b"}" + entry + b"sb" + entry + b"s(" + entry + b"uK\x01a(K\x01e"
    built = f"c{module}\n{short}\n".encode() + call + given
    path = FORMATS["zip"](tmp_path / "a.pt", b"\x80\x02}X\x01\x00\x00\x00x" + built + b"s.")
    (note,) = read_checkpoint(path).notes
    shown = "numpy" if name.startswith("numpy.") else name
    assert note.startswith(f"left unread: '{shown}', which weights do not need")


@pytest.mark.parametrize(
    "name",
    ["builtins.open", "datetime.sys", "numpy.load", "pathlib.os", "easydict.os", "types.CodeType"],
)
def test_what_stands_beside_harmless_values_is_not_called(name: str, tmp_path: Path) -> None:
    """Other names in the module of a harmless class cannot be called."""
    module, _, short = name.rpartition(".")
    path = FORMATS["zip"](tmp_path / "a.pt", f"c{module}\n{short}\n)R.".encode())
    with pytest.raises(CheckpointError, match=r"wants to call '.*' while it is read"):
        read_checkpoint(path)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_numpy_are_called_so(protocol: int, tmp_path: Path) -> None:
    """Each protocol writes them by another function; the message says what to do."""
    content = {"a": np.ones(2), "b": 3}
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol)
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(tmp_path / "a.pt")
    assert str(caught.value) == (
        f"'{tmp_path / 'a.pt'}' holds no state dict: it holds 1 numpy array ('a'); write "
        "a .npz with numpy.savez instead"
    )


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "class": type,
    "list": lambda value: [[value]],
    "tuple": lambda value: (1, (value,)),
    "deque": lambda value: collections.deque([value]),
    "dictionary": lambda value: {"a": {"b": value}},
    "key": lambda value: {value: 1},
    "set": lambda value: {value},
    "frozen set": lambda value: frozenset([value]),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_was_left_unread_is_not_lost(name: str, tmp_path: Path) -> None:
    """A checkpoint is not written again without the values that were left unread."""
    state = trained_critic().state_dict()
    content = {"net": dict(state), "x": CONTAINERS[name](datetime.date(2026, 1, 2))}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"also holds 'datetime\.date', which was left unread"
    ):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", "plain")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("target", ["b.pt", "b.pth", "b.bin", "b.ckpt", "b.safetensors", "b"])
def test_every_tensor_is_told_when_it_is_written(target: str, tmp_path: Path) -> None:
    """progress gets each new name once, with the total; of inspect each layer."""
    save_folder({"net": trained_critic().state_dict()}, tmp_path / "a")
    told: list[tuple[str, int]] = []

    def progress(name: str, total: int) -> None:
        told.append((name, total))

    convert_checkpoint(tmp_path / "a", tmp_path / target, "plain", progress=progress)
    names = list(Critic("plain").state_dict())
    assert sorted(told) == sorted((name, len(names)) for name in names)
    (found,) = read_checkpoint(tmp_path / target).state_dicts()
    assert set(found.tensors) == set(names)
    told.clear()
    layers = inspect_checkpoint(tmp_path / "a", progress=progress).layers
    assert told == [(f"{one.module}.{one.tensor}", len(layers)) for one in layers]


def test_a_folder_becomes_a_file_with_all_that_is_in_it(tmp_path: Path) -> None:
    """A folder that becomes a file keeps its nested values and tensors."""
    content = {
        "net": trained_critic().state_dict(),
        "ema": {"shadow": torch.ones(3), "decay": 0.5},
        "nets": [{"a": torch.ones(2), "rate": 0.1}],
        "step": 7,
    }
    save_folder(content, tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b.pt", "plain")
    found = torch.load(tmp_path / "b.pt")
    plain = Critic("plain").eval()
    plain.load_state_dict(found["net"])
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain(images), trained_critic()(images))
    assert str({**found, "net": 0}) == str({**content, "net": 0})


@pytest.mark.parametrize("size", [None, 700])
def test_texts_of_a_safetensors_file_are_kept(size: int | None, tmp_path: Path) -> None:
    """The metadata in the header of a safetensors file is kept in each new file."""
    texts = {"format": "pt", "licence": "MIT"}
    save_file(trained_critic().state_dict(), tmp_path / "a.safetensors", texts)
    source = tmp_path / "a.safetensors"
    for number in range(2):  # from one file, then from what was made of it
        (tmp_path / f"{number}").mkdir()
        target = tmp_path / f"{number}" / "b.safetensors"
        made = convert_checkpoint(source, target, "parametrization", max_shard_size=size).files
        for path in made[: len(made) - (size is not None)]:
            with safe_open(path, "pt") as file:
                assert file.metadata() == texts
        source = made[-1]


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1.0, torch.nan]),
        torch.tensor([1.0, -torch.inf]).half(),
        torch.tensor([1 + 1j, complex(0, torch.inf)]),
        torch.tensor([1 + 1j, complex(0, torch.nan)]).conj(),
        torch.tensor([0.0, torch.nan]).to_sparse().float(),
        torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn),
    ],
    ids=lambda value: f"{value.dtype} {value.layout}",
)
def test_values_that_are_no_number(value: Tensor, tmp_path: Path) -> None:
    """NaN and infinities are counted and named in any dtype and layout, and the model stays."""
    model = nn.Module()
    own = torch.zeros_like(value)
    model.register_buffer("w", own)
    torch.save({"w": value}, tmp_path / "a.pt")
    count = 1 if value.layout is torch.sparse_coo else 2
    with pytest.raises(CheckpointError, match=f"^'w' is NaN or infinite in 1 of {count} value"):
        load_checkpoint(model, read_checkpoint(tmp_path / "a.pt"))
    assert model.w is own


def test_the_state_dict_whose_tensors_have_the_shapes_of_the_model(tmp_path: Path) -> None:
    """Of two state dicts with equal names the one with the model's shapes is taken."""
    states = {
        f"{columns}": nn.utils.spectral_norm(nn.Linear(columns, 4)).state_dict()
        for columns in (20, 30)
    }
    torch.save(states, tmp_path / "a.pt")
    for columns in (20, 30):
        found = load_checkpoint(nn.Linear(columns, 4), read_checkpoint(tmp_path / "a.pt"))
        assert found.key == f"{columns}"


@pytest.mark.parametrize(("depth", "is_found"), [(6, True), (7, False)])
@pytest.mark.parametrize("kind", ["dictionary", "list"])
def test_how_deep_a_state_dict_is_looked_for(
    kind: str, depth: int, is_found: bool, tmp_path: Path
) -> None:
    """At most six keys lead to a state dict, positions in lists among them."""
    content: Any = {"w": torch.ones(1)}
    for _ in range(depth):
        content = [content] if kind == "list" else {"a": content}
    torch.save(content, tmp_path / "a.pt")
    assert bool(read_checkpoint(tmp_path / "a.pt").state_dicts()) is is_found
