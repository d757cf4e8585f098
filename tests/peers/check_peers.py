"""Hold every module of torch's own test database to the promises, and print one table.

Run by ``scripts/test --peers [--each N] [NAME ...]``: N cases of each class, spread over those
that torch has; with NAMEs, of the classes alone whose name contains one of them. Each case is
taken plain and, where it has a weight, with every weight under each of the reparametrizations.
The table counts

- **equal**: eval outputs inside the block are those outside, bit for bit;
- **restored**: after the block, and after the export, the model has its fingerprint again;
- **trains on**: two steps of SGD give the bits that a twin gets which was never frozen;
- **bare**: torch's own export of the plain module computes what the module does;
- **proved**: `export_onnx` exported and proved those.

Below it stands each case that misses one of them. Ends with 1 if there is any.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime as ort
import torch
from export_models import EXPORTERS, bare_export
from fingerprint import Fingerprint, all_same_bits, changes_since, fingerprint
from sweeps import is_named, parse_sweep, shorten_error, start_sweep
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing._internal.common_modules import module_db
from torch.utils import _pytree as pytree

from sn_export import export_onnx, frozen_parametrizations

KINDS: dict[str, Callable[[nn.Module, str], object]] = {
    "plain": lambda module, name: None,
    "hook": nn.utils.spectral_norm,
    "parametrization": parametrizations.spectral_norm,
    "weight norm (hook)": nn.utils.weight_norm,
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
}
COLUMNS = ("cases", "equal", "restored", "trains on", "bare", "proved")


class Case(NamedTuple):
    """One entry of torch's database."""

    name: str
    build: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def call(self, model: nn.Module) -> Any:
        """Run ``model`` on copies of the inputs, from the same random numbers each time."""
        torch.manual_seed(0)
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        return model(*args, **kwargs)

    def evaluate(self, model: nn.Module) -> tuple[Tensor, ...]:
        """Return the tensors that an eval-mode forward gives, and leave ``model`` as it was."""
        with torch.no_grad():
            outputs = self.call(copy.deepcopy(model).eval())
        return tuple(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))


def main() -> int:
    """Print the table, and what misses."""
    names, each = parse_sweep(__doc__, "class", "--each", 2, "cases of a class")
    start_sweep()
    begin, counts, missed = time.monotonic(), Counter[tuple[str, str]](), list[str]()
    for case in cases(names, each):
        bare = exports_bare(case)
        for kind in KINDS:
            model = made(case, kind)
            if model is None:
                continue
            held = check(case, kind, model, bare)
            counts.update((kind, column) for column, told in held.items() if told is None)
            found = [(column, told) for column, told in held.items() if told and column != "bare"]
            missed += [f"{case.name}, {kind}: not {column}: {told}" for column, told in found]
            for line in missed[len(missed) - len(found) :]:
                print(line, file=sys.stderr, flush=True)
    print_table(counts)
    print(*(f"- {line}" for line in missed), sep="\n")
    packages = ("torch", "onnx", "onnxruntime", "onnxscript")
    print(", ".join(f"{name} {version(name)}" for name in packages), end="; ")
    print(f"{len(missed)} missed, {time.monotonic() - begin:.0f} s")
    return bool(missed)


def cases(names: list[str], each: int) -> Iterator[Case]:
    """Yield the first, the last and others between them of each class, ``each`` in all."""
    for info in module_db:
        torch.manual_seed(0)
        if not is_named(info.name, names):
            continue
        found = info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
        )
        chosen = {round(i * (len(found) - 1) / max(each - 1, 1)) for i in range(each)}
        for index in sorted(chosen):
            entry = found[index]
            built, called = entry.constructor_input, entry.forward_input
            build = partial(info.module_cls, *built.args, **built.kwargs)
            case = Case(f"{info.name} {index}", build, tuple(called.args), dict(called.kwargs))
            try:
                with torch.no_grad():
                    case.call(case.build())
            except RuntimeError as error:  # FractionalMaxPool is made for float64 there
                print(f"{case.name} takes no float32: {short(error)}", file=sys.stderr)
            else:
                yield case


def made(case: Case, kind: str) -> nn.Module | None:
    """Build the module, run it once in train mode, or return None where it has no weight."""
    torch.manual_seed(0)
    model = case.build()
    with torch.no_grad():
        case.call(model)  # lazy modules learn their shapes
        weights = [n for n, p in model.named_parameters() if p.ndim > 1 and p.is_floating_point()]
        if kind != "plain" and not weights:
            return None
        for path in weights:
            owner, _, name = path.rpartition(".")
            KINDS[kind](model.get_submodule(owner), name)
        case.call(model)
    return model


def check(case: Case, kind: str, model: nn.Module, bare: str | None) -> dict[str, str | None]:
    """Return, for each column, None where it holds, or what was seen instead."""
    held: dict[str, str | None] = {"cases": None, "restored": None}
    twin, before, wanted = copy.deepcopy(model), fingerprint(model), case.evaluate(model)
    try:
        with frozen_parametrizations(model) if kind != "plain" else nullcontext():
            held["equal"] = differences(wanted, case.evaluate(model))
    except Exception as error:
        held["equal"] = short(error)
    held["restored"] = changes(before, model)
    held["bare"] = bare
    if bare is None:
        held["proved"] = exports(case, model)
        held["restored"] = held["restored"] or changes(before, model)
    held["trains on"] = differences(trained(case, twin), trained(case, model))
    return held


def exports(case: Case, model: nn.Module) -> str | None:
    """Export and prove, and return what was raised."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_onnx(model, case.args, Path(folder) / "m.onnx", kwargs=case.kwargs, freeze="all")
        except Exception as error:
            return short(error)
    return None


def exports_bare(case: Case) -> str | None:
    """Return None where one of torch's exporters makes a right file of the plain module."""
    model = made(case, "plain")
    assert model is not None
    wanted, told = list(case.evaluate(model)), []
    if not any(tensor.numel() for tensor in wanted):
        return "nothing to compare: all outputs are empty"
    for exporter in EXPORTERS:
        try:
            got = run_bare(model.eval(), case, exporter)
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
            return None
        except Exception as error:
            told.append(short(error))
    return "; ".join(told)


def run_bare(model: nn.Module, case: Case, exporter: str) -> list[Tensor]:
    """Export as torch does it on its own, and run the file on the tensors that it takes."""
    tensors = [t for t in pytree.tree_leaves((case.args, case.kwargs)) if isinstance(t, Tensor)]
    names = [f"x{index}" for index in range(len(tensors))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        bare_export(model, case.args, path, exporter, kwargs=case.kwargs, input_names=names)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        taken = {entry.name for entry in session.get_inputs()}
        feed = {name: t.numpy() for name, t in zip(names, tensors, strict=True) if name in taken}
        return [torch.as_tensor(value) for value in session.run(None, feed)]


def trained(case: Case, model: nn.Module) -> tuple[Tensor, ...]:
    """Take two steps of SGD, where there is anything to train, and return the state."""
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.01) if parameters else None
    model.train()
    for _ in range(2):
        leaves = pytree.tree_leaves(case.call(model))
        losses = [t.sum() for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        if optimizer is not None and losses:
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
    return tuple(model.state_dict().values())


def differences(wanted: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> str | None:
    """Return None where all bits are equal, and how far they are apart otherwise."""
    if (not wanted and not got) or all_same_bits(wanted, got):
        return None
    pairs = zip(wanted, got, strict=True)
    return f"apart by {max(float((a - b).abs().max()) for a, b in pairs if a.numel()):.2g}"


def changes(before: Fingerprint, model: nn.Module) -> str | None:
    """Return what is not as it was, on one line."""
    return "; ".join(changes_since(before, model))[:200] or None


def short(error: Exception) -> str:
    """Return the kind and the beginning of an error's text, on one line."""
    return f"{type(error).__name__}: {shorten_error(error)}"


def print_table(counts: Counter[tuple[str, str]]) -> None:
    """Print a row for each kind."""
    print("| kind | " + " | ".join(COLUMNS) + " |")
    print("| --- |" + " --- |" * len(COLUMNS))
    for kind in KINDS:
        print(f"| {kind} | " + " | ".join(str(counts[kind, c]) for c in COLUMNS) + " |")


if __name__ == "__main__":
    sys.exit(main())
