"""Conversion of files: the rest is kept, memory is bounded, and files appear together.

It reaches inside to write safetensors of shapes that no state dict of torch has.
"""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_networks import Critic, Kind, prefixed, save_folder, trained_critic
from fingerprint import same_bits
from safetensors.torch import load_file, save, save_file
from vocoder_networks import WEIGHT_NORM

from sn_export.checkpoints import convert_checkpoint, read_checkpoint
from sn_export.checkpoints.lazy_tensors import Entry, get_spec
from sn_export.checkpoints.safetensors_file import write_safetensors
from sn_export.errors import CheckpointError

SPELLINGS: list[Kind] = ["plain", "hook", "parametrization"]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _message(folder: Path, *args: Any, **options: Any) -> str:
    before = _files(folder)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(*args, **options)
    assert _files(folder) == before
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize("to", SPELLINGS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("source", [".pt", ".safetensors"])
def test_file_to_file(source: str, suffix: str, to: Kind, tmp_path: Path) -> None:
    """Between any two formats, the other network loads the file strictly and computes the same.

    The names are the longest that the disk takes, so an index of shards could not be beside them.
    """
    model = trained_critic("hook")
    path, target = tmp_path / f"{source:a>255}", tmp_path / f"{suffix:b>255}"
    (torch.save if source == ".pt" else save_file)(model.state_dict(), path)
    made = convert_checkpoint(path, target, to)
    assert made.files == (target,)
    other = Critic(to).eval()
    other.load_state_dict(load_file(target) if suffix != ".pt" else torch.load(target))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), model(x))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([path.name, target.name])


def _training(model: Critic) -> dict[str, Any]:
    state = prefixed(model.state_dict(), "module.")
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {"epoch": 3, "nets": {"d": state, "note": "x"}, "optimizer": optimizer.state_dict()}


def test_everything_else_is_kept(tmp_path: Path) -> None:
    """Epoch, optimizer and the order of keys are kept."""
    torch.save(_training(trained_critic()), tmp_path / "a.ckpt")
    made = convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "b.ckpt", "parametrization")
    before, after = torch.load(tmp_path / "a.ckpt"), torch.load(tmp_path / "b.ckpt")
    assert made.key == "nets.d"
    assert list(after) == list(before)
    assert after["epoch"] == 3
    assert after["nets"]["note"] == "x"
    assert str(after["optimizer"]) == str(before["optimizer"])
    wanted = prefixed(Critic("parametrization").state_dict(), "module.")
    assert list(after["nets"]["d"]) == list(wanted)
    assert after["nets"]["d"]._metadata == wanted._metadata  # type: ignore[attr-defined]


def _save_three(path: Path) -> dict[str, Any]:
    content = {
        "plain": Critic("plain").state_dict(),
        "critic": trained_critic().state_dict(),
        "vocoder": WEIGHT_NORM["hook"](torch.nn.Linear(3, 4)).state_dict(),
    }
    torch.save(content, path)
    return content


@pytest.mark.parametrize(("only", "key"), [("spectral_norm", "critic"), ("weight_norm", "vocoder")])
def test_the_network_that_has_what_is_to_be_converted(only: Any, key: str, tmp_path: Path) -> None:
    """Of several networks it is taken without being named, and the others stay as they are."""
    content = _save_three(tmp_path / "a.pt")
    assert convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", "plain", only=only).key == key
    found = torch.load(tmp_path / "b.pt")
    assert {name for name in content if found[name].keys() != content[name].keys()} == {key}


def test_several_networks_that_could_be_converted(tmp_path: Path) -> None:
    """The message lists those alone that have something to convert."""
    _save_three(tmp_path / "a.pt")
    assert _message(tmp_path, tmp_path / "a.pt", tmp_path / "b.pt", "plain") == (
        "'a.pt' holds 2 state dicts, each of which has spectral norm, weight norm or the like in "
        "it; choose with --key one of 'critic' (20 tensors), 'vocoder' (3 tensors)"
    )


def test_weights_only_keeps_the_state_dict_alone(tmp_path: Path) -> None:
    """With weights_only the file is the state dict itself."""
    torch.save(_training(trained_critic()), tmp_path / "a.ckpt")
    convert_checkpoint(tmp_path / "a.ckpt", tmp_path / "b.pt", "plain", weights_only=True)
    assert list(torch.load(tmp_path / "b.pt")) == [
        f"module.{name}" for name in Critic("plain").state_dict()
    ]


def test_a_file_may_replace_its_own_source(tmp_path: Path) -> None:
    """A checkpoint can be replaced by its own conversion."""
    model = trained_critic()
    for name in ("a.pt", "a.safetensors"):
        path = tmp_path / name
        (torch.save if name == "a.pt" else save_file)(model.state_dict(), path)
        convert_checkpoint(path, path, "plain")
        (found,) = read_checkpoint(path).state_dicts()
        assert set(found.tensors) == set(Critic("plain").state_dict())


def test_shards_and_their_index(tmp_path: Path) -> None:
    """No shard is larger than asked, and the index lists all; together they read back equal."""
    state = trained_critic().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    target = tmp_path / "b.safetensors"
    made = convert_checkpoint(
        tmp_path / "a.safetensors", target, "parametrization", max_shard_size=700
    )
    *shards, index = made.files
    assert index.name == "b.safetensors.index.json"
    assert shards[0].name == f"b-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 1
    for shard in shards:
        assert sum(value.nbytes for value in load_file(shard).values()) <= 700
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    (found,) = read_checkpoint(index).state_dicts()
    other, model = Critic("parametrization").eval(), trained_critic()
    other.load_state_dict(dict(found.tensors))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), model(x))


@pytest.mark.filterwarnings("ignore:BComplex32 support is experimental")  # torch 2.14
def test_the_writer_makes_the_bytes_of_safetensors_own(tmp_path: Path) -> None:
    """A file that was written tensor by tensor equals that of `safetensors.torch.save_file`.

    So it does for each dtype that both know, and each is read as what it was.
    """
    state: dict[str, Any] = {"ü": torch.randn(3, 5), "n": torch.tensor(3), "none": torch.empty(0)}
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    for dtype in sorted(dtypes - {torch.complex32}, key=str):
        with suppress(KeyError, NotImplementedError, RuntimeError):  # of less than a byte, say
            one = {f"{dtype}"[6:]: torch.tensor([1, 0, 1]).to(dtype)}
            save(one)
            state |= one
    assert len(state) > 20
    save_file(state, tmp_path / "a.safetensors", {"format": "pt"})
    entries = {name: Entry(get_spec(state, name), lambda v=v: v) for name, v in state.items()}
    write_safetensors(tmp_path, "b", entries, {}, None, lambda name: None)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    found = read_checkpoint(tmp_path / "a.safetensors").content
    assert list(found) == sorted(state)
    assert all(same_bits(found[name], value) for name, value in state.items())


def test_one_tensor_at_a_time_is_read(tmp_path: Path) -> None:
    """Peak memory of converting 160 MB of safetensors stays far below their size."""
    layers = 20
    big = {}
    for i in range(layers):
        big[f"{i}.weight_orig"] = torch.randn(1024, 2048)
        big[f"{i}.weight_u"], big[f"{i}.weight_v"] = torch.randn(1024), torch.randn(2048)
    save_file(big, tmp_path / "a.safetensors")
    code = (
        "import resource, sys\n"
        "from sn_export.checkpoints import convert_checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak()\n"
        "convert_checkpoint(sys.argv[1], sys.argv[2], 'plain', max_shard_size=80_000_000)\n"
        "print(peak() - before)\n"
    )
    arguments = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 100, "MB"


def test_what_is_there_is_untouched_when_a_value_is_bad(tmp_path: Path) -> None:
    """An error in the last tensor keeps the old output, and leaves no temporary file."""
    state = dict(trained_critic().state_dict())
    state["head.weight_orig"] = state["head.weight_orig"] * torch.nan
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("old")
    (tmp_path / "b.pt").write_text("old")
    for target in ("b.safetensors", "b.pt"):
        assert _message(tmp_path, tmp_path / "a.safetensors", tmp_path / target, "plain") == (
            "'head.weight_orig' is NaN or infinite in 10 of 10 values"
        )


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    """An absent folder, a folder in the file's place and an unknown suffix are refused."""
    path = tmp_path / "a.pt"
    torch.save(trained_critic().state_dict(), path)
    assert _message(tmp_path, path, tmp_path / "no" / "b.pt", "plain") == (
        "cannot write 'no/b.pt': no folder 'no'"
    )
    assert _message(tmp_path, path, tmp_path / "b.onnx", "plain") == (
        "cannot write 'b.onnx': it must end in .pt, .pth, .ckpt, .bin or .safetensors"
    )
    assert _message(tmp_path, path, tmp_path / "b.pt", "plain", max_shard_size=9) == (
        "only safetensors can be sharded, and 'b.pt' is not"
    )
    (tmp_path / "f.pt").mkdir()
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(path, tmp_path / "f.pt", "plain")
    assert str(caught.value) == f"cannot write '{tmp_path}/f.pt': it is a folder"
    assert list((tmp_path / "f.pt").iterdir()) == []


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message has the system's words. The refusal is simulated, as root may write anywhere."""
    torch.save(trained_critic().state_dict(), tmp_path / "a.pt")

    def refuse(*args: object, **kwargs: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert _message(tmp_path, tmp_path / "a.pt", tmp_path / "b.pt", "plain") == (
        "cannot write 'b.pt': Permission denied"
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("target", ["b.pt", "b.safetensors", "b"])
def test_a_full_disk(target: str, tmp_path: Path) -> None:
    """If the disk is full, the old output stays, and nothing else is left."""
    state = {"w_orig": torch.ones(99, 999), "w_u": torch.ones(99), "w_v": torch.ones(999)}
    source, made = tmp_path / "a", tmp_path / "made"
    save_folder(state, source)
    made.mkdir()
    if target != "b":
        (made / target).write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        message = _message(made, source, made / target, "plain")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message == f"cannot write '{target}': File too large"


def test_what_safetensors_cannot_hold(tmp_path: Path) -> None:
    """An optimizer, an extra state or an unknown dtype is named, not dropped."""
    torch.save(_training(trained_critic()), tmp_path / "a.ckpt")
    assert _message(tmp_path, tmp_path / "a.ckpt", tmp_path / "b.safetensors", "plain") == (
        "'b.safetensors' can hold tensors only, and 'a.ckpt' also holds 'epoch', 'optimizer', "
        "'nets.note'; leave them out with --weights-only, or write a .pt"
    )
    state: dict[str, Any] = dict(trained_critic().state_dict())
    torch.save({**state, "head._extra_state": {"a": 1}}, tmp_path / "c.pt")
    assert _message(tmp_path, tmp_path / "c.pt", tmp_path / "b.safetensors", "plain") == (
        "safetensors holds dense tensors only, and 'head._extra_state' is dict; write a .pt"
    )
    torch.save({**state, "c": torch.ones(1, dtype=torch.complex128)}, tmp_path / "d.pt")
    assert _message(tmp_path, tmp_path / "d.pt", tmp_path / "b.safetensors", "plain") == (
        "safetensors has no dtype for 'c', which is torch.complex128; write a .pt"
    )


def test_shards_that_a_new_index_leaves_over(tmp_path: Path) -> None:
    """Shards of the replaced index are removed; other files stay, whatever an index says."""
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(trained_critic().state_dict(), source)
    many = convert_checkpoint(source, target, "hook", max_shard_size=300).files
    content = json.loads(many[-1].read_text())
    for name in ("mine.safetensors", "b-1-of-2.safetensors"):
        save_file({"w": torch.ones(1)}, tmp_path / name)
        content["weight_map"][name] = name
    many[-1].write_text(json.dumps(content))
    (tmp_path / "b-00009-of-00009.safetensors").write_bytes(b"of no index")
    few = convert_checkpoint(source, target, "hook", max_shard_size=900)
    assert len(many) > len(few.files) > 2
    assert few.notes[-1].startswith("removed, as the new index names other shards: 'b-00001-of-")
    left = {"a.safetensors", "mine.safetensors", "b-1-of-2.safetensors"}
    left |= {"b-00009-of-00009.safetensors", *(path.name for path in few.files)}
    assert {path.name for path in tmp_path.iterdir()} == left
    assert not convert_checkpoint(source, target, "hook", max_shard_size=900).notes


def test_old_shards_or_files_that_would_contradict_the_new(tmp_path: Path) -> None:
    """An old file beside a new index, or the reverse, is refused: a reader takes one of them."""
    save_file(trained_critic().state_dict(), tmp_path / "a.safetensors")
    target = tmp_path / "b.safetensors"
    convert_checkpoint(tmp_path / "a.safetensors", target, "hook")
    assert _message(tmp_path, tmp_path / "a.safetensors", target, "plain", max_shard_size=700) == (
        "'b.safetensors' is there and would contradict the new shards; remove it or choose "
        "another name"
    )
    target = tmp_path / "c.safetensors"
    convert_checkpoint(tmp_path / "a.safetensors", target, "hook", max_shard_size=700)
    assert _message(tmp_path, tmp_path / "a.safetensors", target, "plain") == (
        "'c.safetensors.index.json' is there and would contradict the new file; remove it or "
        "choose another name"
    )


def test_no_spectral_norm_in_it(tmp_path: Path) -> None:
    """For a plain checkpoint the message says which keys were looked for."""
    torch.save(Critic("plain").state_dict(), tmp_path / "a.pt")
    assert _message(tmp_path, tmp_path / "a.pt", tmp_path / "b.pt", "hook") == (
        "'a.pt' holds no spectral norm to convert: no 'weight_orig' with 'weight_u', no "
        "'parametrizations.weight.original' with '0._u'; and no weight norm to convert: no "
        "'weight_g' with 'weight_v', no 'parametrizations.weight.original0' with 'original1'"
    )


def test_a_dim_for_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    """A misspelt name of a dim is refused."""
    torch.save(trained_critic().state_dict(), tmp_path / "a.pt")
    options = {"dims": {"haed.weight": 0}}
    assert _message(tmp_path, tmp_path / "a.pt", tmp_path / "b.pt", "plain", **options) == (
        "--dim haed.weight=0 names no tensor under spectral or weight norm; there are "
        "'body.0.weight', 'body.3.weight', 'body.4.weight', 'head.weight'"
    )
