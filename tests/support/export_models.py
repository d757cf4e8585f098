"""Networks and helpers for the tests of exporting: each net comes with its plain twin."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from fingerprint import Fingerprint, changes_since
from networks import APPLY
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.onnx._internal.exporter._registration import ONNXRegistry

# From inside: TorchScript's exporter prints from C++, which no fixture of pytest holds back.
from sn_export.exporting.torch_exporters import quiet

KINDS = ("hook", "parametrization")
EXPORTERS = ("dynamo", "torchscript")
MODES = ("train", "eval", "mixed")

# Each dynamo export builds torch's table of operators anew, which takes most of its time.
ONNXRegistry.from_torchlib = staticmethod(  # type: ignore[method-assign]
    functools.cache(ONNXRegistry.from_torchlib)
)

# What torch adds to the text of an error in C++.
FRAMES = """\
Exception raised from unpack at /pytorch/torch/csrc/numbers.h:79 (most recent call first):
frame #0: c10::Error::Error(c10::SourceLocation) + 0x9d (0x7f in /lib/libc10.so)
<omitting python frames>
frame #46: <unknown function> + 0x2724a (0x7f in /lib/libc.so.6)
"
"""


def small_net(kind: str) -> nn.Sequential:
    """A convolution and a linear layer under spectral norm, with dropout between them."""
    sn = APPLY[kind]
    return nn.Sequential(
        sn(nn.Conv2d(1, 4, 3)),
        nn.LeakyReLU(0.1),
        nn.Dropout(0.5),
        nn.Flatten(),
        sn(nn.Linear(4 * 6 * 6, 3)),
    )


def large_net(kind: str) -> nn.Sequential:
    """A convolution of the size that real critics have."""
    return nn.Sequential(OrderedDict(body=APPLY[kind](nn.Conv2d(512, 512, 3, padding=1))))


def images(seed: int = 5, batch: int = 2) -> Tensor:
    """Example images for `small_net`."""
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def rows(width: int = 3, seed: int = 6, height: int = 2) -> Tensor:
    """Example rows for a linear layer."""
    return torch.randn(height, width, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module, *args: Tensor) -> nn.Module:
    """Let u and v move, then the weights, so that every value stored in passing is stale."""
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(*args)
        for parameter in model.parameters():
            parameter.mul_(1.25)
    return model


def set_mode(model: nn.Module, mode: str) -> nn.Module:
    """Bring a model to train mode, to eval mode, or every other module to train mode."""
    model.train(mode == "train")
    if mode == "mixed":
        for module in list(model.modules())[::2]:
            module.training = True
    return model


def plain_values(model: nn.Module) -> dict[str, Tensor]:
    """Compute the weights that an eval-mode forward uses, by torch's own code, on a copy."""
    model = copy.deepcopy(model).eval()
    values: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                weight = hook.compute_weight(module, do_power_iteration=False)
                values[prefix + hook.name] = weight.detach()
        parametrized = getattr(module, "parametrizations", {})
        for name in parametrized:
            values[prefix + name] = getattr(module, name).detach()
    return values


def plain_twin(model: nn.Module, build: Callable[[str], nn.Module]) -> nn.Module:
    """Build the network without spectral norm, with the weights that ``model`` evaluates to."""
    twin = build("plain")
    state = {**model.state_dict(), **plain_values(model)}
    twin.load_state_dict({name: state[name] for name in twin.state_dict()})
    return twin.eval()


class Head(nn.Module):
    """A linear layer under spectral norm, to build other forwards on."""

    def __init__(self, kind: str = "parametrization", width: int = 3) -> None:
        super().__init__()
        self.layer = APPLY[kind](nn.Linear(width, width))
        self.prepare()

    def prepare(self) -> None:
        """Add what a subclass needs."""

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


class Liar(Head):
    """Computes something else while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + 0.5 if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() else y


class Unsupported(Head):
    """Uses an operator that has no ONNX form."""

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = torch.linalg.svdvals(self.layer(x))
        return values


class Raising(Head):
    """Rejects every input."""

    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("no input is good enough")


class NotANumber(Head):
    """Answers NaN, in torch and in the file."""

    def prepare(self) -> None:
        with torch.no_grad():
            self.layer.bias.fill_(torch.nan)


def bare_export(
    model: nn.Module, args: tuple[Any, ...], path: Path, exporter: str, **options: Any
) -> None:
    """Export a network as torch does it on its own, without what its exporters print."""
    with quiet(False), torch.no_grad():
        torch.onnx.export(model, args, path, dynamo=exporter == "dynamo", verbose=False, **options)


def assert_as_before(before: Fingerprint, *models: nn.Module) -> None:
    """Assert that the models have the same fingerprint, but for the number of hooks ever made."""
    found = changes_since(before, *models)
    assert not found, "\n".join(found)


def file_of(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[str] = ("x",),
    outputs: Sequence[str] = ("y",),
    dtype: int = TensorProto.FLOAT,
    initializers: Sequence[onnx.TensorProto] = (),
) -> Path:
    """Write an ONNX file by hand, with tensors of one dtype and any shape."""
    graph = helper.make_graph(
        list(nodes),
        "by_hand",
        [helper.make_tensor_value_info(name, dtype, None) for name in inputs],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        list(initializers),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


def run_file(path: Path, *args: Tensor) -> list[NDArray[Any]]:
    """Run an ONNX file on its inputs in order."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feed = dict(zip(names, (arg.numpy() for arg in args), strict=True))
    return [np.asarray(value) for value in session.run(None, feed)]


def input_names(path: Path) -> list[str]:
    """Return the names of a file's inputs."""
    return [entry.name for entry in onnx.load(path).graph.input]


def all_names(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield every name in a graph."""
    for node in graph.node:
        yield node.name
        yield from node.input
        yield from node.output
    for entry in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
        yield entry.name


def contents_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"a folder"
        for path in sorted(folder.rglob("*"))
    }


def product_in_float16(file: onnx.ModelProto) -> None:
    """Let the middle one of the products of a network be computed in float16."""
    products = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    nodes = file.graph.node
    node = (found := [n for n in nodes if n.op_type in products])[len(found) // 2]
    at, output = list(nodes).index(node), node.output[0]
    narrow = [f"{name}.half" for name in node.input]
    for half, name in zip(narrow, list(node.input), strict=True):
        nodes.insert(at, helper.make_node("Cast", [name], [half], to=TensorProto.FLOAT16))
    node = nodes[at + len(narrow)]
    node.input[:], node.output[0] = narrow, f"{output}.half"
    cast = helper.make_node("Cast", [node.output[0]], [output], to=TensorProto.FLOAT)
    nodes.insert(at + len(narrow) + 1, cast)
