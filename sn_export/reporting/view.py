"""What is shown of a report, whatever it was read from."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class HistogramView:
    """Counts of absolute errors between ``edges``, those without error, and those not finite."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    zeros: int = 0
    not_finite: int = 0


@dataclass(frozen=True)
class OutputView:
    """One output of the file; None where the report does not say."""

    name: str
    dtype: str
    shape: str
    passed: bool
    reason: str
    max_abs: float
    max_rel: float
    mean_abs: float
    median_abs: float | None
    p999_abs: float | None
    fraction_outside: float | None
    worst_index: str
    worst_expected: float | None
    worst_got: float | None
    worst_sample: str
    rtol: float
    atol: float
    samples: int
    histogram: HistogramView | None


@dataclass(frozen=True)
class FrozenView:
    """One frozen tensor; ``sigma_exact`` is None where it was not computed."""

    name: str
    kind: str
    shape: str
    dtype: str
    sigma: float
    sigma_exact: float | None
    is_applied: bool

    @property
    def deviation(self) -> float | None:
        """How far sigma as stored is from the true one, relative to it."""
        exact = self.sigma_exact
        if exact is None or not math.isfinite(exact) or not exact or not math.isfinite(self.sigma):
            return None
        return self.sigma / exact - 1


@dataclass(frozen=True)
class ModuleView:
    """One call of a module, compared on its own."""

    name: str
    type: str
    max_abs: float
    max_rel: float
    passed: bool
    is_first: bool


@dataclass(frozen=True)
class ReportView:
    """All that a page shows.

    Attributes:
        passed: whether every output is reproduced.
        verdict: that in words.
        details: sentences that say more: reasons, where the two part.
        path: the file as the report names it; empty where none was written.
        facts: pairs of a name and a text about the export.
        outputs: the outputs in the order of the file.
        frozen: the frozen tensors in the order of the modules.
        modules: the modules in network order; empty where they were not compared.
        files: name, size in bytes and sha256 of each file.
        versions: pairs of a package and its version.
        metadata: pairs of what the ONNX file says about itself.
        command: the command line; empty where there was none.
    """

    passed: bool
    verdict: str
    details: tuple[str, ...]
    path: str
    facts: tuple[tuple[str, str], ...]
    outputs: tuple[OutputView, ...]
    frozen: tuple[FrozenView, ...] = ()
    modules: tuple[ModuleView, ...] = ()
    files: tuple[tuple[str, int, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    metadata: tuple[tuple[str, str], ...] = ()
    command: str = ""
