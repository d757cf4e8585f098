"""The cases that the tests run on several ranks of this machine, each a function.

    python tests/support/rank_cases.py results.json RANKS[=CASE,CASE ...] ...

Rank 0 writes for each case what failed on any rank, by name; nothing failed where that is empty.
The ranks are forks of a process that has imported what they need, which takes longer than most
cases. It computes nothing: a fork does not have the threads that torch then has started.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import handwritten_networks
import torch
import torch._dynamo  # which every rank would import when it makes an optimizer
import torch.distributed as dist
from faults import Fault
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch_versions import SHARDS

from sn_export import (
    ExportError,
    FreezeError,
    check_parity,
    export_onnx,
    find_parametrizations,
    find_spectral_norm,
    frozen_parametrizations,
    frozen_spectral_norm,
    gather_plain_state_dict,
)
from sn_export.distributed.fsdp import Unit
from sn_export.distributed.gathered_walk import _GatheredWalk

Wrap = Callable[[nn.Module], nn.Module]
Case = Callable[[], None]


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def chained(layer: nn.Module) -> nn.Module:
    parametrizations.spectral_norm(layer)
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


def with_two_chains(layer: nn.Module) -> nn.Module:
    parametrizations.spectral_norm(layer)
    if layer.bias is not None:
        parametrize.register_parametrization(layer, "bias", Halved())
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.3)


def untouched(layer: nn.Module) -> nn.Module:
    return layer


KINDS: dict[str, Wrap] = {
    "hook": spectral_norm,
    "parametrization": parametrizations.spectral_norm,
    "chain": chained,
    "two-chains": with_two_chains,
    "weight-norm": parametrizations.weight_norm,
    "weight-norm-hook": weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": pruned,
}
# One of each way to write it; of the first, the factory does not show the norm on the meta device.
HANDWRITTEN = (
    *("prehook-operator", "wrapper-conv", "wrapper-lstm", "biggan-conv", "property"),
    *("inline", "updating-always", "raw-name", "helped-torch"),
)
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    def add(function: Case) -> Case:
        CASES[name] = function
        return function

    return add


def network(kind: Wrap = untouched) -> nn.Sequential:
    """Rows that no number of ranks divides, a layer without bias, a head with one output."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, 1)]
    first, second, head = (kind(layer) for layer in layers)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), head)


def shard(model: nn.Sequential, layout: str, **options: Any) -> nn.Sequential:
    if layout == "layers":
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, **options)
    fully_shard(model, **options)
    return model


def rows(seed: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))


class Training:
    """A network that trains, by Adam, on the same rows on every rank."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step(self, seed: int) -> None:
        self.optimizer.zero_grad()
        self.model(rows(seed)).pow(2).mean().backward()
        self.optimizer.step()

    def answer(self) -> Tensor:
        """Return the eval-mode output; modes are left as they were."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            output = self.model(rows(100))
        self.model.train(training)
        return output

    def state(self) -> list[Tensor]:
        model, optimizer = self.model, self.optimizer
        tensors = [*model.parameters(), *model.buffers()]
        for parameter in model.parameters():
            tensors += [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor)]
        return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def objects(model: nn.Module) -> dict[str, Any]:
    """Return by name everything that must be the same object afterwards."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[f"{path} class"] = type(module)
        for name, content in vars(module).items():
            if isinstance(content, dict):
                found[f"{path} {name}"] = [(key, id(entry)) for key, entry in content.items()]
        if hasattr(module, "_get_fsdp_state"):
            for number, group in enumerate(module._get_fsdp_state()._fsdp_param_groups):
                ids = [(id(p), id(p._module_info), id(p.sharded_param)) for p in group.fsdp_params]
                found[f"{path} group {number}"] = ids
    return found


def require_equal(left: Tensor, right: Tensor, what: str) -> None:
    assert torch.equal(left, right), f"{what} differ by {(left - right).abs().max()}"


def check_block(kind: str, layout: str, *, steps: int = 2, **options: Any) -> None:
    """Hold the promise: equal outputs, plain state dict, same objects, training bit for bit."""
    ours = Training(shard(network(KINDS[kind]), layout, **options))
    twin = Training(shard(network(KINDS[kind]), layout, **options))
    for seed in range(steps):
        ours.step(seed)
        twin.step(seed)
    expected = twin.answer()
    if steps:  # else FSDP initialises itself in the block
        before = objects(ours.model)
    with frozen_parametrizations(ours.model):
        plain = network()
        assert [*ours.model.state_dict()] == [*plain.state_dict()]
        outputs = [ours.answer(), ours.answer()]
        whole = get_model_state_dict(
            ours.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        assert all(isinstance(p, DTensor) for p in ours.model.parameters())
        assert not any(p.requires_grad for n, p in ours.model.named_parameters() if "weight" in n)
    if steps:
        assert objects(ours.model) == before
    for seed in range(steps, steps + 3):
        ours.step(seed)
        twin.step(seed)
    states = [*zip(ours.state(), twin.state(), strict=True)]
    # No rank fails alone before here: the others would wait for it.
    for left, right in states:
        require_equal(left, right, "what was trained on and its twin")
    for output in outputs:
        require_equal(output, expected, "outputs inside and outside")
    if dist.get_rank() == 0:
        plain.load_state_dict(whole)
        output = Training(plain.eval()).answer()
        # A state dict has no strides, and orthogonal weights have others: other kernels.
        tolerance = 1e-6 if kind == "orthogonal" else 0
        torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)


def add_blocks() -> None:
    for kind in KINDS:
        for layout in ("layers", "root"):
            for reshard in (True, False):
                name = f"block-{kind}-{layout}-{'resharded' if reshard else 'kept'}"
                CASES[name] = lambda k=kind, o=layout, r=reshard: check_block(
                    k, o, reshard_after_forward=r
                )
        CASES[f"before-the-first-forward-{kind}"] = lambda k=kind: check_block(k, "layers", steps=0)


add_blocks()


@case("cpu-offload")
def _() -> None:
    check_block("hook", "layers", offload_policy=CPUOffloadPolicy(pin_memory=False))


@case("resharded-to-two")
def _() -> None:
    if dist.get_world_size() == 4:
        check_block("parametrization", "layers", reshard_after_forward=2)


@case("hsdp")
def _() -> None:
    if dist.get_world_size() == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        check_block("hook", "layers", mesh=mesh)
        check_block("parametrization", "root", mesh=mesh)


@case("parametrization-sharded-on-its-own")
def _() -> None:
    """If a parametrization is a unit, as by Accelerate, each rank has the frozen weight whole."""
    ours = Training(network(KINDS["parametrization"]))
    for module in (ours.model[0].parametrizations.weight, ours.model[0], ours.model):
        fully_shard(module)
    ours = Training(ours.model)
    ours.step(0)
    assert find_spectral_norm(ours.model)[0].sigma > 0
    with frozen_spectral_norm(ours.model):
        output = ours.answer()
        assert [*ours.model.state_dict()] == [*network().state_dict()]
    require_equal(output, ours.answer(), "outputs inside and outside")
    ours.step(1)


@case("handwritten")
def _() -> None:
    """Handwritten norms are frozen exactly, and exported by a factory that applies them too."""
    path = shared_folder() / "net.onnx"
    for name in HANDWRITTEN:
        known = handwritten_networks.CASES[name]
        model = nn.Sequential(known.make(), nn.Identity())
        fully_shard(model[0])
        fully_shard(model)
        known.run(model).sum().backward()
        model.eval().reshard()
        before = objects(model)
        with frozen_spectral_norm(model), torch.no_grad():
            plain = known.run(model)
            keys = [key.removeprefix("0.") for key in model.state_dict()]
            assert known.layer or keys == [*known.plain().state_dict()]
        assert objects(model) == before
        if name in HANDWRITTEN[:2]:
            factory = functools.partial(build_handwritten, known)
            export_onnx(
                *(model, (known.x(),), path),
                model_factory=factory,
                samples=0,
                exporter="torchscript",
            )
            assert objects(model) == before
        with torch.no_grad():
            require_equal(plain, known.run(model), f"outputs of {name}")
        known.run(model.train()).sum().backward()


def build_handwritten(known: handwritten_networks.Case) -> nn.Module:
    return nn.Sequential(known.make(seed=3), nn.Identity())


@case("mixed-precision")
def _() -> None:
    """Under mixed precision with vectors in bfloat16 the outputs are equal."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for kind in ("hook", "parametrization"):
        model = shard(network(KINDS[kind]), "layers", mp_policy=policy).eval()
        for buffer in model.buffers():
            buffer.data = buffer.data.bfloat16()
        with torch.no_grad():
            expected = model(rows(0))
            with frozen_spectral_norm(model):
                assert {p.dtype for p in model.parameters()} == {torch.float32}
                require_equal(model(rows(0)), expected, "outputs")
            require_equal(model(rows(0)), expected, "outputs")


@case("mixed-precision-with-vectors-in-float32")
def _() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = shard(network(spectral_norm), "layers", mp_policy=policy)
    block = frozen_spectral_norm(model)
    require_refused(block, "torch.bfloat16", "torch.float32", "dtype of the policy")


@case("shared-module")
def _() -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(8, 8))
    model = fully_shard(nn.Sequential(layer, nn.ReLU(), layer)).eval()
    expected = model(rows(0))
    with frozen_spectral_norm(model), torch.no_grad():
        require_equal(model(rows(0)), expected, "outputs")
    require_equal(model(rows(0)), expected, "outputs")


@case("tied-raw-weight")
def _() -> None:
    """Two layers that share a raw weight have two frozen weights, since their vectors differ."""
    for frees in (True, False):
        torch.manual_seed(0)
        first, second, plain = spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 8)
        spectral_norm(second)
        second.weight_orig = first.weight_orig
        if not frees:
            plain.weight = first.weight_orig
        model = fully_shard(nn.Sequential(first, second, plain)).eval()
        with torch.no_grad():
            expected = model(rows(0))
            model.reshard()  # a root stays gathered after a forward, and the block reshards it
            before = objects(model)
            with frozen_spectral_norm(model):
                require_equal(model(rows(0)), expected, "outputs")
            assert objects(model) == before
            require_equal(model(rows(0)), expected, "outputs")


@case("lists")
def _() -> None:
    for kind, sharded in ((k, s) for k in KINDS.values() for s in ("layers", "root")):
        single = network(kind)
        wanted = find_parametrizations(single)
        norms = find_spectral_norm(single)
        model = shard(network(kind), sharded)
        assert find_parametrizations(model) == wanted
        assert find_spectral_norm(model) == norms
        model(rows(0))


@case("error-on-one-rank")
def _() -> None:
    """An error on the last rank is raised on all, and the model trains on."""
    last = dist.get_world_size() - 1
    ours, twin = (Training(shard(network(spectral_norm), "layers")) for _ in range(2))
    ours.step(0)
    twin.step(0)
    before = objects(ours.model)
    hooks = ours.model[2]._forward_pre_hooks.values()
    hook = next(hook for hook in hooks if isinstance(hook, SpectralNorm))
    if dist.get_rank() == last:

        def failing(*args: object, **kwargs: object) -> None:
            raise RuntimeError("out of luck")

        hook.compute_weight = failing
    block = frozen_spectral_norm(ours.model)
    require_refused(block, f"rank {last}: cannot freeze '2.weight'", "out of luck")
    hook.__dict__.pop("compute_weight", None)
    assert objects(ours.model) == before
    for seed in (1, 2):
        ours.step(seed)
        twin.step(seed)
    for left, right in zip(ours.state(), twin.state(), strict=True):
        require_equal(left, right, "what was trained on and its twin")


@case("exception-in-the-block-on-one-rank")
def _() -> None:
    ours = Training(shard(network(parametrizations.spectral_norm), "layers"))
    ours.step(0)
    before = objects(ours.model)
    try:
        with frozen_spectral_norm(ours.model):
            ours.answer()
            if dist.get_rank() == 1:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert objects(ours.model) == before
    ours.step(1)


class FaultWithin(Fault):
    """Counts the lines of some functions alone, of which every rank runs the same number."""

    functions = (Unit.reshard.__code__, _GatheredWalk.leave.__code__)

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        return super().__call__(frame, event, arg) if frame.f_code in self.functions else None


@case("fault-while-a-unit-is-put-back")
def _() -> None:
    """If every rank is interrupted at one line, each has its shards again, and trains on.

    It reaches inside for these lines: elsewhere the ranks would not be stopped at one step.
    """
    model = shard(network(parametrizations.spectral_norm), "layers")
    model(rows(0))
    before = objects(model)

    def enter(fault: Fault) -> None:
        with fault:
            fault.start()
            with frozen_spectral_norm(model):
                fault.stop()

    enter(dry := FaultWithin())
    assert len(dry.places) > 10
    for step in range(1, len(dry.places) + 1):
        fault = FaultWithin(KeyboardInterrupt, step)
        enter(fault)
        assert fault.struck and objects(model) == before, fault.struck
    model(rows(0))


@case("names-that-fit-nothing")
def _() -> None:
    model = shard(network(spectral_norm), "layers")
    require_refused(frozen_parametrizations(model, only="nothing.weight"), "nothing.weight")
    model(rows(0))


@case("gathered-state-dict")
def _() -> None:
    """Rank 0 alone gets a state dict, with which the plain network gives the same outputs."""
    for kind, layout in ((k, o) for k in KINDS for o in ("layers", "root")):
        ours = Training(shard(network(KINDS[kind]), layout))
        ours.step(0)
        expected = ours.answer()
        state = gather_plain_state_dict(ours.model)
        ours.step(1)
        if dist.get_rank():
            assert state == {}
        else:
            plain = network()
            plain.load_state_dict(state)
            torch.testing.assert_close(Training(plain).answer(), expected, rtol=0, atol=1e-6)


class Mixed(nn.Module):
    """Tied weights, buffers of both sorts, a tensor in an attribute, a norm that is left."""

    def __init__(self, kind: Wrap = untouched) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = kind(nn.Linear(8, 8))
        self.norm = nn.BatchNorm1d(8)
        self.coder, self.decoder = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.decoder.weight = self.coder.weight
        self.other = weight_norm(nn.Linear(8, 8))
        self.head = kind(nn.Linear(8, 1))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8), persistent=False)
        self.shift = torch.arange(8.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.norm(x)) * self.scale + self.shift
        return self.head(self.other(self.decoder(torch.relu(self.coder(x)))))


def shard_mixed(kind: Wrap) -> nn.Module:
    model = Mixed(kind)
    model.scale.mul_(2)  # what counts is the model's, not what the factory draws
    for layer in (model.first, model.head):
        fully_shard(layer)
    return fully_shard(model)


def shared_folder() -> Path:
    """Return a folder that rank 0 has made."""
    made: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return Path(made[0])


def require_same_everywhere(value: Any) -> None:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    assert all(one == everyone[0] for one in everyone), f"ranks differ: {everyone}"


@case("export")
def _() -> None:
    """There is one file with the gathered weights bit for bit, and one report; training goes on."""
    path, found = shared_folder() / "net.onnx", []
    hook, chain = KINDS["hook"], KINDS["parametrization"]
    for build, factory, freeze in (
        (lambda: shard(network(chain), "root"), network, "all"),
        (lambda: shard_mixed(hook), Mixed, "spectral_norm"),
        (lambda: shard_mixed(chain), lambda: Mixed(chain), "spectral_norm"),
    ):
        ours, twin = Training(build()), Training(build())
        for seed in (0, 1):
            ours.step(seed)
            twin.step(seed)
        before, random = objects(ours.model), torch.get_rng_state()
        report = export_onnx(
            *(ours.model, (rows(100),), path),
            model_factory=factory,
            freeze=freeze,
            samples=1,
            exporter="torchscript",  # the other one takes seconds on its first export
        )
        assert torch.equal(random, torch.get_rng_state())
        assert objects(ours.model) == before
        require_same_everywhere(report.content())
        assert report.parity.passed
        assert report.frozen == tuple(find_spectral_norm(ours.model))
        state = gather_plain_state_dict(ours.model, only="spectral_norm")
        for seed in (2, 3):
            ours.step(seed)
            twin.step(seed)
        for left, right in zip(ours.state(), twin.state(), strict=True):
            require_equal(left, right, "what was trained on and its twin")
        matrices = {name: weight for name, weight in state.items() if weight.ndim == 2}
        found.append(missing_from_file(path, matrices) if matrices else [])
    assert not any(found), found  # no rank fails alone before here


def missing_from_file(path: Path, weights: dict[str, Tensor]) -> list[str]:
    """Return the weights that are not once in the file, as they are or transposed."""
    import onnx
    from onnx.numpy_helper import to_array

    held = [torch.tensor(to_array(one)) for one in onnx.load(path).graph.initializer]
    return [
        f"{name}: {count} in the file"
        for name, weight in weights.items()
        for count in [sum(torch.equal(one, weight) or torch.equal(one.T, weight) for one in held)]
        if count != 1 and not name.startswith("other.")
    ]


class _OddError(Exception):
    def __init__(self, left: object, right: object) -> None:
        super().__init__(left)


@case("export-refused")
def _() -> None:
    """If any rank fails, all raise one error, nothing is written, and training goes on."""
    path = shared_folder() / "net.onnx"
    ours, twin = (Training(shard(network(spectral_norm), "layers")) for _ in range(2))
    ours.step(0)
    twin.step(0)
    before = objects(ours.model)
    last = dist.get_world_size() - 1
    for factory, prepare, texts in (
        (raising(ValueError("no luck")), (), ("no luck",)),
        (raising(KeyboardInterrupt()), (), ("rank 0 has left with KeyboardInterrupt",)),
        (raising(_OddError(1, 2)), (), ("1",)),
        (lambda: 3, (), ("must return a torch.nn.Module, got int",)),
        (3, (), ("model_factory must be callable, got int",)),
        (lambda: nn.Sequential(nn.Linear(8, 7)), (), ("model_factory must build the", "[6, 8]")),
        (with_tanh, (), ("gives other outputs than the sharded model",)),
        (network, (0, 2, RuntimeError("no luck")), ("no luck; in '2'",)),
        (network, (last, 0, RuntimeError("no luck")), (f"rank {last}: the model fails", "no luck")),
        (network, (last, 4, KeyboardInterrupt()), (f"rank {last} has left",)),
        (network, (0, 0, KeyboardInterrupt()), ("rank 0 has left",)),
    ):
        with failing_layer(ours.model, *prepare):
            try:
                export_onnx(ours.model, (rows(0),), path, model_factory=factory)
            except KeyboardInterrupt:
                assert "has left" in texts[0]
            except Exception as error:
                for text in texts:
                    assert text in str(error), f"{text!r} is not in {error!r}"
            else:
                raise AssertionError("it was exported")
        assert objects(ours.model) == before
        assert [*path.parent.iterdir()] == []
    for seed in (1, 2):
        ours.step(seed)
        twin.step(seed)
    for left, right in zip(ours.state(), twin.state(), strict=True):
        require_equal(left, right, "what was trained on and its twin")


def with_tanh() -> nn.Module:
    model = network()
    model[1] = nn.Tanh()
    return model


def raising(error: BaseException) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        raise error

    return build


@contextmanager
def failing_layer(
    model: nn.Module, rank: int = -1, layer: int = 0, error: BaseException | None = None
) -> Iterator[None]:
    """Let one layer raise on one rank, once it has run."""
    if error is None or dist.get_rank() != rank:
        yield
        return
    raised = error

    def fail(*_: object) -> None:
        raise raised

    handle = model[layer].register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@case("interrupt-of-a-rank-that-waits")
def _() -> None:
    """A Ctrl-C on a waiting rank ends the export on all ranks, and none hangs."""
    path = shared_folder() / "net.onnx"
    model = shard(network(spectral_norm), "layers")
    last = dist.get_world_size() - 1

    def build_slowly() -> nn.Module:
        time.sleep(0.4)
        return network()

    if dist.get_rank() == last:
        threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    try:
        export_onnx(model, (rows(0),), path, model_factory=build_slowly)
    except KeyboardInterrupt:
        assert dist.get_rank() == last
    except ExportError as error:
        assert f"rank {last} has left with KeyboardInterrupt" in str(error)
    else:
        raise AssertionError("it was exported")
    model(rows(0))


@case("export-of-replicas")
def _() -> None:
    """Rank 0 alone can export a DDP model, or all ranks can: there is one file and one verdict."""
    path = shared_folder() / "net.onnx"
    model = nn.Sequential(spectral_norm(nn.Linear(8, 64)), spectral_norm(nn.Linear(64, 64)))
    ours = Training(DistributedDataParallel(model))
    ours.step(0)
    if dist.get_rank() == 0:
        assert export_onnx(ours.model, (rows(0),), path, exporter="torchscript").parity.passed
    ours.step(1)
    report = export_onnx(
        *(ours.model, (rows(0),), path),
        external_data=True,
        model_factory=network,
        exporter="torchscript",
    )
    dist.barrier()
    there = sorted(file.name for file in path.parent.iterdir())
    assert there == ["net.onnx", "net.onnx.data"], there
    require_same_everywhere(report.content())
    assert check_parity(ours.model.eval(), path, rows(0)).passed
    ours.step(2)


@case("export-of-a-part")
def _() -> None:
    """A part can be exported before the whole model ever ran, and the whole can be trained then."""
    path = shared_folder() / "part.onnx"
    model = shard(network(KINDS["parametrization"]), "layers")
    report = export_onnx(
        *(model[0], (rows(0),), path),
        model_factory=lambda: nn.Linear(8, 6),
        samples=0,
        exporter="torchscript",
    )
    assert report.parity.passed
    Training(model).step(0)


class ReadsLater(nn.Module):
    """Reads the weight that a hook has set, after the layer has run."""

    def __init__(self, kind: Wrap = untouched) -> None:
        super().__init__()
        self.layer = kind(nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.layer.weight.sum()


@case("export-of-a-forward-that-reads-later")
def _() -> None:
    """Weights that a reference drops to save memory are kept if the forward needs them."""
    model = fully_shard(ReadsLater(spectral_norm))
    report = export_onnx(
        *(model, (rows(0),), shared_folder() / "net.onnx"),
        model_factory=ReadsLater,
        samples=0,
        exporter="torchscript",
    )
    assert report.parity.passed


@case("export-under-mixed-precision")
def _() -> None:
    """Mixed precision is refused, as the model computes in bfloat16 and the file in float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = shard(network(), "layers", mp_policy=policy)
    with refused(ExportError, "torch.bfloat16, and the file would compute in torch.float32"):
        export_onnx(model, (rows(0),), shared_folder() / "net.onnx", model_factory=network)
    model(rows(0))


@case("export-without-a-factory")
def _() -> None:
    """An export without model_factory is refused at once, on one rank alone too."""
    model = shard(network(spectral_norm), "layers")
    if dist.get_rank() == 0:
        with refused(ExportError, "call export_onnx on every rank with model_factory="):
            export_onnx(model, (rows(0),), "never-written.onnx")
    model(rows(0))


@case("tensor-parallel")
def _() -> None:
    """Spectral norm on layers that are tensor parallel is frozen exactly."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (model[0], model[2]):
        spectral_norm(layer)
    with torch.no_grad():
        expected = model(rows(0))
        with frozen_spectral_norm(model):
            assert "0.weight_orig" not in model.state_dict()
            require_equal(model(rows(0)), expected, "outputs")
        require_equal(model(rows(0)), expected, "outputs")


@case("tensor-parallel-and-sharded")
def _() -> None:
    """All ranks of a 2 x 2 mesh make one file; a norm that torch cannot run is named."""
    if dist.get_world_size() != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "parallel"))
    path = shared_folder() / "net.onnx"
    for normed in (2, 0):
        model = parallel_network()
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        parallelize_module(model, mesh["parallel"], plan)
        spectral_norm(model[normed])
        for module in (*model, model):
            fully_shard(module, mesh=mesh["shard"])
        try:
            report = export_onnx(
                *(model, (rows(0),), path),
                model_factory=parallel_network,
                samples=0,
                exporter="torchscript",
            )
        except FreezeError as error:
            assert normed == 0 and error.tensor == "0.weight", error
        else:
            assert normed == 2 and report.parity.passed
            require_same_everywhere(report.content())


def parallel_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))


@case("part-of-a-sharded-model")
def _() -> None:
    for kind in (spectral_norm, parametrizations.spectral_norm):
        model = shard(network(kind), "root")
        part = frozen_spectral_norm(model[0])
        require_refused(part, "'weight'", "Shard(dim=0)", "full_tensor()")
        model(rows(0))


@case("fsdp1")
def _() -> None:
    """FSDP1 is refused; once its parameters are summoned, the network within is frozen exactly."""
    for kind in ("hook", "parametrization"):
        for original in (True, False):
            torch.manual_seed(0)
            model = FullyShardedDataParallel(
                network(KINDS[kind]),
                use_orig_params=original,
                device_id=torch.device("cpu"),
                sharding_strategy=ShardingStrategy.FULL_SHARD,
            )
            training = Training(model)
            training.step(0)
            expected = training.answer()
            for freeze in (frozen_spectral_norm, frozen_parametrizations):
                require_refused(freeze(model), "only a piece of", "summon_full_params")
            summoned = FullyShardedDataParallel.summon_full_params(model, writeback=False)
            with summoned, frozen_spectral_norm(model.module), torch.no_grad():
                weights = {n: p.clone() for n, p in model.module.named_parameters()}
            plain = network().eval()
            plain.load_state_dict(weights)
            require_equal(plain(rows(100)), expected, "outputs")
            training.step(1)


def replica(kind: str, with_buffers: bool) -> nn.Module:
    model = network(KINDS[kind])
    return nn.Sequential(nn.BatchNorm1d(8), model) if with_buffers else model


@case("ddp")
def _() -> None:
    """DDP runs forward and backward in the block, and training goes on as that of a twin."""
    for kind, extra in ((k, e) for k in ("hook", "parametrization") for e in (False, True)):
        ours, twin = (Training(DistributedDataParallel(replica(kind, extra))) for _ in range(2))
        for seed in (0, 1):
            ours.step(seed)
            twin.step(seed)
        expected = twin.answer()
        with frozen_spectral_norm(ours.model):
            require_equal(ours.answer(), expected, "outputs")
            ours.model.eval()(rows(5)).sum().backward()
            ours.model.train()
        assert ours.model.broadcast_buffers and ours.model.require_backward_grad_sync
        for seed in (2, 3):
            ours.step(seed)
            twin.step(seed)
        for left, right in zip(ours.state(), twin.state(), strict=True):
            require_equal(left, right, "what was trained on and its twin")


def require_refused(block: AbstractContextManager[nn.Module], *texts: str) -> None:
    with refused((FreezeError, ValueError), *texts), block:
        pass


@contextmanager
def refused(kind: type[Exception] | tuple[type[Exception], ...], *texts: str) -> Iterator[None]:
    """Hold that the body raises an error of this kind, with all of these texts in it."""
    try:
        yield
    except kind as error:
        for text in texts:
            assert text in str(error), f"{text!r} is not in {error}"
    else:
        raise AssertionError("nothing was refused")


def check_refused() -> None:
    """A torch that keeps its shards elsewhere is named."""
    model = shard(network(spectral_norm), "layers")
    require_refused(frozen_spectral_norm(model), torch.__version__, "FSDPState._fsdp_param_groups")


if torch.__version__ < SHARDS.since:  # there, what shards nothing holds, and one case for the rest
    unsharded = ("ddp", "export-of-replicas", "fsdp1", "tensor-parallel")
    CASES = {"refused": check_refused, **{name: CASES[name] for name in unsharded}}


def run(names: list[str]) -> dict[str, list[str]]:
    """Run the cases on this rank, and return what failed on any."""
    results: dict[str, list[str]] = {}
    for name in names:
        failure = ""
        try:
            CASES[name]()
        except BaseException:
            traceback.print_exc()
            failure = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        everyone: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(everyone, failure)
        results[name] = [text for text in everyone if text]
    return results


def run_rank(rank: int, ranks: int, store: str, file: Path, names: list[str]) -> None:
    """Be one of the ranks, which find each other by the file ``store``."""
    torch.set_num_threads(1)  # makes torch's pool before two threads do, which fails in a fork
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{store}", limit, world_size=ranks, rank=rank)
    results = run(names)
    if rank == 0:
        file.write_text(json.dumps(results))
    dist.destroy_process_group()


def main() -> None:
    warnings.simplefilter("ignore")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for wanted in sys.argv[2:]:
            ranks, _, names = wanted.partition("=")
            rest = (
                int(ranks),
                f"{folder}/store-{ranks}",
                folder / ranks,
                names.split(",") if names else [*CASES],
            )
            start_processes(run_rank, rest, int(ranks), start_method="fork")
            found[ranks] = json.loads((folder / ranks).read_text())
            Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
