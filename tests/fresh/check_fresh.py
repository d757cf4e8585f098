"""Export networks that were just built, spoil their files, and measure operators alone.

Run by ``scripts/test --fresh [--seeds N] [NAME ...]``: each network with each seed, by both
exporters, with a fixed and with a dynamic batch; with NAMEs, of the networks alone whose name
contains one of them. Sigma is far from converged in all of them, so rounding is amplified. The
first table counts

- **proved**: files that `export_onnx` published, of all that were made;
- **beyond**: those with elements outside the default tolerance, which the truth in float64 decided;
- **ratio**: the largest distance of a file from the truth, in what rounding accounts for;
- **refused, passed, no change**: what `check_parity` says to files with a fault (a weight off
  by 1 %, rolled channels, a lost bias, one product in float16). A fault shows where it changes an
  output by more than ten times what the right file is off by, and by more than three millionths of
  the largest output; where it does not, it cannot be told from rounding, and is no change.

The second one has the ratio of operators alone. Ends with 1 if a right file was refused; each
spoiled one that shows and passed is named.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from export_models import EXPORTERS, product_in_float16
from fresh_networks import Norm, Recurrent, generator
from onnx import TensorProto, numpy_helper
from sweeps import is_named, parse_sweep, shorten_error, start_sweep
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from sn_export import ExportError, ParityError, SnExportError, check_parity, export_onnx


def critic(norm: Norm) -> nn.Module:
    """Return a critic of three layers."""
    return nn.Sequential(
        norm(nn.Conv2d(3, 16, 4, 2, 1)),
        nn.LeakyReLU(0.1),
        norm(nn.Conv2d(16, 32, 4, 2, 1)),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        norm(nn.Linear(32 * 4 * 4, 1)),
    )


class Residual(nn.Module):
    """Two residual blocks and a mean."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.first = norm(nn.Conv2d(3, 16, 3, padding=1))
        self.inner = nn.ModuleList(norm(nn.Conv2d(16, 16, 3, padding=1)) for _ in range(4))
        self.last = norm(nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        x = self.first(x)
        for one, two in zip(self.inner[::2], self.inner[1::2], strict=True):
            x = nn.functional.avg_pool2d(x + two(torch.relu(one(torch.relu(x)))), 2)
        return self.last(torch.relu(x).sum((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """The self-attention of SAGAN between convolutions."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.first, self.last = norm(nn.Conv2d(3, 16, 3, 2, 1)), norm(nn.Conv2d(16, 4, 3))
        self.query, self.key = norm(nn.Conv2d(16, 4, 1)), norm(nn.Conv2d(16, 4, 1))
        self.value = norm(nn.Conv2d(16, 16, 1))
        self.gamma = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of scores."""
        x = torch.relu(self.first(x))
        query, key, value = (f(x).flatten(2) for f in (self.query, self.key, self.value))
        weights = torch.softmax(query.transpose(1, 2) @ key, -1)
        x = x + self.gamma * (value @ weights.transpose(1, 2)).view_as(x)
        return self.last(x)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A ViT of one layer, with the norm on what it multiplies with."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.patches = norm(nn.Conv2d(3, 16, 4, 4))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        norm(self.layer.linear1)
        norm(self.layer.linear2)
        self.head = norm(nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))  # type: ignore[no-any-return]


def vocoder(norm: Norm) -> nn.Module:
    """Return what HiFi-GAN repeats."""
    return nn.Sequential(
        norm(nn.Conv1d(8, 16, 7, padding=3)),
        nn.LeakyReLU(0.1),
        norm(nn.ConvTranspose1d(16, 8, 4, 2, 1)),
        nn.LeakyReLU(0.1),
        norm(nn.Conv1d(8, 1, 7, padding=3)),
        nn.Tanh(),
    )


IMAGE, STEPS = (2, 3, 16, 16), (2, 7, 16)
NETWORKS: dict[str, tuple[Callable[[Norm], nn.Module], tuple[int, ...]]] = {
    "generator": (generator, (2, 16, 1, 1)),
    "critic": (critic, IMAGE),
    "ResNet": (Residual, IMAGE),
    "SAGAN": (Attention, IMAGE),
    "LSTM": (partial(Recurrent, nn.LSTM), STEPS),
    "GRU": (partial(Recurrent, nn.GRU), STEPS),
    "ViT": (Transformer, IMAGE),
    "vocoder": (vocoder, (2, 8, 9)),
}
NORMS: dict[str, Norm] = {
    "hook": spectral_norm,
    "parametrization": parametrizations.spectral_norm,
    "weight norm": weight_norm,
}

OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "expm1": lambda x: torch.expm1(x * 1e-3),
    "log1p": lambda x: torch.log1p(x.abs() * 1e-3),
    "logsigmoid": lambda x: nn.functional.logsigmoid(x * 2),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "mish": nn.functional.mish,
    "softplus": nn.functional.softplus,
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
    "layer_norm": lambda x: nn.functional.layer_norm(x, x.shape[1:]),
    "var": lambda x: x.var(-1),
    "norm": lambda x: x.norm(dim=-1),
    "sum": lambda x: x.sum(-1),
    "cumsum": lambda x: x.cumsum(-1),
    "matmul": lambda x: x @ x.transpose(0, 1),
    "cdist": lambda x: torch.cdist(x, x * 0.5),
    "sin": torch.sin,
    "atan": torch.atan,
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.1),
    "pow": lambda x: x.abs() ** 2.5,
}


class Operator(nn.Module):
    """One operator, as a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return what it gives."""
        return self.function(x)


def scale_weight(file: onnx.ModelProto) -> None:
    """Make the last weight one per cent larger."""
    _change(file, lambda w: w * 1.01)


def swap_channels(file: onnx.ModelProto) -> None:
    """Roll the last weight of several rows along its first dimension."""
    _change(file, lambda w: np.roll(w, 1, 0), rows=2)


def lose_bias(file: onnx.ModelProto) -> None:
    """Set the last vector to zero."""
    _change(file, lambda b: b * 0, rank=1)


FAULTS = (scale_weight, swap_channels, lose_bias, product_in_float16)


def _change(
    file: onnx.ModelProto, change: Callable[..., object], rank: int = 2, rows: int = 1
) -> None:
    fitting = [one for one in file.graph.initializer if min(len(one.dims), 2) == rank]
    floats = [one for one in fitting if one.data_type == TensorProto.FLOAT and one.dims[0] >= rows]
    array = np.asarray(change(numpy_helper.to_array(floats[-1])), np.float32)
    floats[-1].CopyFrom(numpy_helper.from_array(array, floats[-1].name))


def main() -> int:
    """Print both tables, and what misses."""
    names, seeds = parse_sweep(__doc__, "network", "--seeds", 20, "how many")
    start_sweep()
    begin, missed, passed = time.monotonic(), list[str](), list[str]()
    print(
        "| network | norm | proved | beyond | ratio | refused, passed, no change |\n"
        + "| --- " * 6
        + "|"
    )
    for name in NETWORKS:
        if is_named(name, names):
            for norm in NORMS:
                check_network(name, norm, seeds, missed, passed)
    if not names:
        missed += check_operators()
    print("", *(f"- {line}" for line in (*missed, *passed)), sep="\n")
    print(f"torch {torch.__version__}: {len(missed)} missed, {len(passed)} passed, ", end="")
    print(f"{time.monotonic() - begin:.0f} s")
    return bool(missed)


def check_network(name: str, norm: str, seeds: int, missed: list[str], passed: list[str]) -> None:
    """Print the row of one network under one norm; note what misses, and what passed."""
    build, shape = NETWORKS[name]
    counts, largest = Counter[str](), 0.0
    for seed in range(seeds):
        for exporter in EXPORTERS:
            for dims in (None, ({0: torch.export.Dim("batch", min=1, max=64)},)):
                torch.manual_seed(seed)
                model, x = build(NORMS[norm]), torch.randn(shape)
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "net.onnx"
                    counts["made"] += 1
                    try:
                        report = export_onnx(
                            model,
                            (x,),
                            path,
                            exporter=exporter,  # type: ignore[arg-type]
                            dynamic_shapes=dims,
                            freeze="all",
                        )
                    except SnExportError as error:
                        told = shorten_error(error)
                        missed.append(f"{name}, {norm}, seed {seed}, {exporter}: {told}")
                        continue
                    counts["proved"] += 1
                    (output,) = report.parity.outputs
                    counts["beyond"] += bool(output.fraction_outside)
                    largest = max(largest, output.rounding.ratio if output.rounding else 0.0)
                    if dims is None:
                        where = f"{name}, {norm}, seed {seed}, {exporter}"
                        passed += check_faults(model, x, path, counts, where)
    print(
        f"| {name} | {norm} | {counts['proved']} of {counts['made']} | {counts['beyond']} | "
        f"{largest:.1f} | {counts['refused']}, {counts['passed']}, {counts['no change']} |",
        flush=True,
    )


def check_faults(
    model: nn.Module, x: Tensor, path: Path, counts: Counter[str], where: str
) -> list[str]:
    """Spoil the file in each way, and return which passed though the fault shows."""
    passed, inputs = [], [x, torch.randn_like(x)]
    with torch.no_grad():
        wanted = [model.eval()(one).numpy() for one in inputs]
    right = run_file(path, inputs)
    off = max(_apart(right, wanted), 3e-7 * max(np.abs(one).max() for one in wanted))
    for fault in FAULTS:
        file = onnx.load(path)
        fault(file)
        spoiled = path.with_name(f"{fault.__name__}.onnx")
        onnx.save(file, spoiled)
        try:
            report = check_parity(model, spoiled, inputs)
        except SnExportError:  # onnxruntime has no such kernel
            continue
        shows = _apart(run_file(spoiled, inputs), right) > 10 * off
        told = "refused" if not report.passed else "passed" if shows else "no change"
        counts[told] += 1
        if told == "passed":
            passed.append(f"{where}: {fault.__name__} passed: {report.outputs[0].verdict}")
    return passed


def run_file(path: Path, inputs: list[Tensor]) -> list[np.ndarray]:
    """Return the first output of a file for each input."""
    session = ort.InferenceSession(str(path))
    (entry,) = session.get_inputs()
    return [session.run(None, {entry.name: one.numpy()})[0] for one in inputs]


def _apart(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def check_operators() -> list[str]:
    """Print how far the files of operators alone are, and return which are refused."""
    missed = []
    print("\n| operator | dynamo | TorchScript |\n| --- | --- | --- |")
    for name, function in OPERATORS.items():
        cells = []
        for exporter in EXPORTERS:
            torch.manual_seed(0)
            model, x = Operator(function), torch.randn(64, 64)
            with tempfile.TemporaryDirectory() as folder:
                try:
                    path = Path(folder) / "net.onnx"
                    report = export_onnx(model, (x,), path, exporter=exporter)  # type: ignore[arg-type]
                    rounding = report.parity.outputs[0].rounding
                    cells.append(f"{rounding.ratio:.1f}" if rounding else "not asked")
                except ExportError:
                    cells.append("cannot be exported")
                except ParityError as error:
                    cells.append("refused")
                    missed.append(f"{name}, {exporter}: {shorten_error(error)}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return missed


if __name__ == "__main__":
    sys.exit(main())
