"""Benchmarks of the block: against torch's own evaluation, copying, growth, memory."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench_common import KINDS, Row, Step, make_linear_stack, measure_ratio, measure_seconds
from torch import Tensor, nn
from torch.nn.utils import remove_spectral_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.nn.utils.spectral_norm import SpectralNorm

from sn_export import frozen_spectral_norm

SHAPES = ((24, 2048), (2000, 16))
# What a layer has otherwise while it is frozen.
_CHANGED = {
    "hook": (
        *("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"),
        *("_parameters", "_buffers"),
    ),
    "parametrization": ("_parameters", "_modules"),
}


def compare_with_torch(quick: bool) -> list[Row]:
    """Time freeze and restore against torch computing the same weights and nothing else."""
    aims = {2048: 1.05, 16: 2.0}
    return [
        measure_ratio(
            f"freeze + restore, {layers} x Linear {width}, {kind}, to torch's own evaluation",
            _make_freeze(model),
            _make_evaluation(kind, model),
            repeats=5 if quick else 31,
            aim=aims[width],
        )
        for layers, width in SHAPES
        for kind in KINDS
        for model in [make_linear_stack(kind, layers, width)]
    ]


def compare_by_hand(quick: bool) -> list[Row]:
    """Time the same swap by hand: nothing looked for, no check, and no way back after a fault."""
    layers, width = SHAPES[1]
    return [
        measure_ratio(
            f"swap by hand and back, {layers} x Linear {width}, {kind}, to torch's own evaluation",
            _make_swap(kind, model),
            _make_evaluation(kind, model),
            repeats=5 if quick else 31,
        )
        for kind in KINDS
        for model in [make_linear_stack(kind, layers, width)]
    ]


def compare_with_copying(quick: bool) -> list[Row]:
    """Time freeze and restore against deepcopy and removal in the copy."""
    aims = {2048: 0.5, 16: 0.15}
    rows = []
    for layers, width in SHAPES:
        for kind in KINDS:
            model = make_linear_stack(kind, layers, width)
            name = f"freeze + restore, {layers} x Linear {width}, {kind}, to deepcopy + removal"
            row = measure_ratio(
                name,
                _make_freeze(model),
                _make_copy(kind, model),
                repeats=3 if quick else 9,
                aim=aims[width],
                after=_make_class_repair(model),
            )
            rows.append(row)
    return rows


def measure_growth(quick: bool) -> list[Row]:
    """Fit how the time of freeze and restore grows with the number of layers."""
    sizes = (500, 1000, 2000, 4000)
    rows = []
    for kind in KINDS:
        steps = {size: _make_freeze(make_linear_stack(kind, size, 16)) for size in sizes}
        best = dict.fromkeys(sizes, math.inf)
        for _ in range(4 if quick else 15):
            for size, step in steps.items():
                best[size] = min(best[size], measure_seconds(step))
        exponent = fit_slope([math.log(n) for n in sizes], [math.log(best[n]) for n in sizes])
        name = f"growth of freeze + restore, 500 to 4000 x Linear 16, {kind}"
        rows.append(Row(name, exponent, 1.05, "exponent", {"seconds": best}))
    return rows


def measure_memory(_quick: bool) -> list[Row]:
    """Compare the extra peak memory of the block with the size of the weights."""
    layers, width = SHAPES[0]  # large enough for pages and Python objects not to count
    # glibc gives every large tensor pages of its own: a freed one is not taken again unseen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    rows = []
    for kind in KINDS:
        command = [sys.executable, str(Path(__file__)), kind, str(layers), str(width)]
        finished = subprocess.run(command, capture_output=True, text=True, env=environment)
        if finished.returncode:
            raise RuntimeError(f"the memory of {kind} was not measured:\n{finished.stderr}")
        found = json.loads(finished.stdout)
        name = f"extra peak memory in the block, {layers} x Linear {width}, {kind}, to the weights"
        rows.append(Row(name, found["extra"] / found["weights"], 1.0, "ratio", found))
    return rows


def _make_freeze(model: nn.Module) -> Step:
    def freeze_and_restore() -> None:
        with frozen_spectral_norm(model):
            pass

    return freeze_and_restore


def _make_evaluation(kind: str, model: nn.Sequential) -> Callable[[], list[Tensor]]:
    layers = list(model)

    def evaluate_hooks() -> list[Tensor]:  # all at once, as in the block
        with torch.no_grad():
            return [hook.compute_weight(layer, do_power_iteration=False) for layer, hook in hooks]

    def evaluate_parametrizations() -> list[Tensor]:
        with torch.no_grad():
            return [layer.weight for layer in layers]  # type: ignore[misc]

    if kind == "parametrization":
        return evaluate_parametrizations
    hooks = [
        (layer, hook)
        for layer in layers
        for hook in layer._forward_pre_hooks.values()
        if isinstance(hook, SpectralNorm)
    ]
    return evaluate_hooks


def _make_swap(kind: str, model: nn.Sequential) -> Step:
    evaluate, names = _make_evaluation(kind, model), _CHANGED[kind]

    def swap_and_restore() -> None:
        swapped = []
        for layer, value in zip(model, evaluate(), strict=True):
            attributes, cls = vars(layer), type(layer)
            changed = [(attributes[name], attributes[name].copy()) for name in names]
            swapped.append((layer, cls, changed, attributes.pop("weight", None)))
            for container, _ in changed:
                container.clear()
            attributes["_parameters"]["weight"] = nn.Parameter(value, requires_grad=False)
            object.__setattr__(layer, "__class__", nn.Linear)
        for layer, cls, changed, old in swapped:
            for container, before in changed:
                container.clear()
                container.update(before)
            if old is not None:
                vars(layer)["weight"] = old
            object.__setattr__(layer, "__class__", cls)

    return swap_and_restore


def _make_copy(kind: str, model: nn.Sequential) -> Step:
    def copy_and_remove() -> None:
        plain = copy.deepcopy(model)
        for layer in plain:
            if kind == "hook":
                remove_spectral_norm(layer)
            else:
                remove_parametrizations(layer, "weight")

    return copy_and_remove


def _make_class_repair(model: nn.Sequential) -> Step:
    """Undo what removal in a copy does to the original: the two share their classes."""
    properties = [
        (type(layer), type(layer).__dict__["weight"])
        for layer in model
        if "weight" in type(layer).__dict__
    ]

    def repair() -> None:
        for cls, weight in properties:
            type.__setattr__(cls, "weight", weight)

    return repair


def fit_slope(xs: list[float], ys: list[float]) -> float:
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - x_mean) ** 2 for x in xs)


def _measure_memory(kind: str, layers: int, width: int) -> dict[str, object]:
    torch.set_num_threads(1)
    model = make_linear_stack(kind, layers, width)
    _make_freeze(model)()  # what is loaded on first use is not of interest
    gc.collect()
    before, method = _start_watching()
    with frozen_spectral_norm(model):
        extra = _find_peak(method) - before
        weights = sum(p.nbytes for p in model.parameters())
    return {"extra": extra, "weights": weights, "method": method}


def _start_watching() -> tuple[int, str]:
    """Return the resident bytes now, after resetting the peak where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _find_peak("ru_maxrss"), "ru_maxrss"
    return read_status("VmRSS"), "VmHWM"


def _find_peak(method: str) -> int:
    if method == "VmHWM":
        return read_status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    print(json.dumps(_measure_memory(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
