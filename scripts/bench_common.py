"""What the benchmarks share: a row, a fair pair of timings, the models."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

KINDS = ("hook", "parametrization")
Step = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One measured ratio (or exponent), and the aim it should not exceed, if there is one."""

    name: str
    measured: float | None  # None where there is nothing to compare with; detail says why
    aim: float | None
    unit: str
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """Whether the aim is met, at the three decimals shown; None without an aim."""
        if self.aim is None or self.measured is None:
            return None
        return round(self.measured, 3) <= self.aim

    def as_json(self) -> dict[str, Any]:
        """Return the row as it stands in the JSON report."""
        return {
            "name": self.name,
            "measured": self.measured,
            "aim": self.aim,
            "passed": self.passed,
            "unit": self.unit,
            "detail": self.detail,
        }


def measure_ratio(
    name: str,
    ours: Step,
    theirs: Step,
    *,
    repeats: int,
    aim: float | None = None,
    after: Step | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Row:
    """Time ``ours`` against ``theirs``, turn by turn, and take the median of the ratios.

    The two runs of a pair follow one another, in alternating order, so that a slow spell of
    the machine meets both. Garbage is collected before each run and not during it.

    Args:
        name: what the row is called.
        ours: the numerator.
        theirs: the denominator.
        repeats: number of pairs, after one that is thrown away.
        aim: what the ratio should not exceed.
        after: run after each step, outside of the timing.
        clock: what tells the time; `time.process_time` leaves out what other processes take.
    """
    pairs: list[tuple[float, float]] = []
    for repeat in range(repeats + 1):
        if repeat % 2:
            second = measure_seconds(theirs, after, clock)
            first = measure_seconds(ours, after, clock)
        else:
            first = measure_seconds(ours, after, clock)
            second = measure_seconds(theirs, after, clock)
        pairs.append((first, second))
    pairs = pairs[1:]
    ratios = [a / b for a, b in pairs]
    detail = {
        "min": min(ratios),
        "max": max(ratios),
        "pairs": len(ratios),
        "seconds": statistics.median(a for a, _ in pairs),
        "reference_seconds": statistics.median(b for _, b in pairs),
    }
    return Row(name, statistics.median(ratios), aim, "ratio", detail)


def measure_seconds(
    step: Step, after: Step | None = None, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return how long one run of ``step`` takes."""
    gc.collect()
    gc.disable()
    try:
        start = clock()
        step()
        taken = clock() - start
    finally:
        gc.enable()
    if after is not None:
        after()
    return taken


def apply_spectral_norm(kind: str, module: nn.Module) -> nn.Module:
    """Put spectral norm of one kind on ``module``; no change for the kind ``"plain"``."""
    if kind == "hook":
        return spectral_norm(module)
    if kind == "parametrization":
        return parametrizations.spectral_norm(module)
    return module


def make_linear_stack(kind: str, layers: int, width: int) -> nn.Sequential:
    """Return ``layers`` times Linear(width, width) in eval mode."""
    torch.manual_seed(0)
    stack = nn.Sequential(
        *(apply_spectral_norm(kind, nn.Linear(width, width, bias=False)) for _ in range(layers))
    )
    return stack.eval()


def make_critic(kind: str) -> nn.Sequential:
    """Return a DCGAN-like critic for 64 x 64 images, 2.8 M parameters, in eval mode."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 64), (64, 128), (128, 256), (256, 512)):
        conv = nn.Conv2d(inputs, outputs, kernel_size=4, stride=2, padding=1)
        layers += [apply_spectral_norm(kind, conv), nn.LeakyReLU(0.2)]
    layers += [nn.Flatten(), apply_spectral_norm(kind, nn.Linear(512 * 16, 1))]
    model = nn.Sequential(*layers)
    if kind != "plain":
        with torch.no_grad():
            model(torch.randn(4, 3, 64, 64))  # train mode: u and v come to belong to the weights
    return model.eval()
