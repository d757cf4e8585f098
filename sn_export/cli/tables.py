"""What was found and proved, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from ..freezing import ParametrizationInfo, SpectralNormInfo
from ..results import Divergence, ParityReport
from ..text import join_lines
from .console import number, print_line, table

_BEFORE, _AFTER = 5, 3  # modules shown around the first one to differ


def show_frozen(frozen: Sequence[SpectralNormInfo | ParametrizationInfo]) -> None:
    """Print the tensors that were frozen."""
    if not frozen:
        print("no spectral norm in the model")
        return
    table(
        "frozen",
        ["tensor", "kind", "shape", "dtype", "dim", "sigma"],
        [
            [
                info.name,
                info.kind,
                "x".join(map(str, info.shape)),
                info.dtype,
                *_of_norm(info),
            ]
            for info in frozen
        ],
    )


def _of_norm(info: SpectralNormInfo | ParametrizationInfo) -> tuple[str, str]:
    if not isinstance(info, SpectralNormInfo):
        return "", ""  # another reparametrization, which has no sigma
    return str(info.dim), number(info.sigma)


def show_parity(parity: ParityReport, with_modules: bool = False) -> None:
    """Print the comparison of each output, and of the modules where it fails or they are wanted."""
    table(
        f"parity with onnxruntime over {parity.samples} input sets",
        ["output", "shape", "dtype", "max abs", "max rel", "mean abs", "result"],
        [
            [
                output.name,
                "x".join(map(str, output.shape)),
                output.dtype,
                number(output.max_abs),
                number(output.max_rel),
                number(output.mean_abs),
                "equal" if output.passed else "NOT EQUAL",
            ]
            for output in parity.outputs
        ],
    )
    for output in parity.outputs:
        if output.reason:
            print_line(join_lines(f"{output.name}: {output.reason}"))
    if parity.divergence is not None and (with_modules or not parity.passed):
        _show_modules(parity.divergence, with_modules)


def _show_modules(divergence: Divergence, is_all: bool) -> None:
    """Print all modules, or those around the first one to differ; the report has them all."""
    modules = divergence.modules
    bad = next((i for i, entry in enumerate(modules) if not entry.passed), len(modules))
    if divergence.first or is_all:
        table(
            "modules in network order",
            ["module", "type", "max abs", "result"],
            [
                [
                    entry.module or "(the model itself)",
                    entry.type,
                    number(entry.max_abs),
                    "equal" if entry.passed else "NOT EQUAL" + (", first" if i == bad else ""),
                ]
                for i, entry in enumerate(modules)
                if is_all or bad - _BEFORE <= i <= bad + _AFTER
            ],
        )
    print_line(join_lines(divergence.reason))
