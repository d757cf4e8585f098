"""What an export made, and the proof."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch.export import ExportedProgram
from torch.onnx import ONNXProgram

from .folding import FoldedInitializer
from .freezing import ParametrizationInfo, SpectralNormInfo
from .onnx_file import Exporter
from .parity import ParityReport
from .plain import plain

REPORT_SCHEMA = 1  # changes when a field changes its meaning or goes; new ones may come


@dataclass(frozen=True)
class Attempt:
    """An exporter that was tried and did not make the file.

    Attributes:
        exporter: ``"dynamo"`` or ``"torchscript"``.
        error: why its file is not the one that was published.
    """

    exporter: Exporter
    error: str


@dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` made, and the proof.

    Attributes:
        path: the ONNX file; where the proof failed, the one that was not written.
        exporter: the exporter that made it, ``"dynamo"`` or ``"torchscript"``.
        opset: version of the default opset in the file.
        parity: the comparison of the file with the unfrozen model.
        frozen: the tensors that were frozen, as they were found.
        versions: versions of sn_export and of the packages that made and ran the file.
        metadata: what was written to the file's ``metadata_props``.
        folded: initializers that replace arithmetic which depends on initializers alone: weights
            that modules compute in a way the block does not know.
        attempts: exporters that were tried besides, and why they did not make it.
        onnx_program: torch's ONNXProgram, for those who go on from there; None where the
            TorchScript exporter made the file. It is not part of the JSON. Past 512 MB of
            external data its frozen weights are mapped from that file, which stays on disk, even
            when deleted, until the program goes.
    """

    path: Path
    exporter: Exporter
    opset: int
    parity: ParityReport
    frozen: tuple[SpectralNormInfo | ParametrizationInfo, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    folded: tuple[FoldedInitializer, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    onnx_program: ONNXProgram | None = field(default=None, repr=False, compare=False)

    @property
    def exported_program(self) -> ExportedProgram | None:
        """Torch's ExportedProgram of the frozen network; None as for ``onnx_program``.

        It takes the tensors of the inputs in the order of the file. Tensors that were not frozen
        share their memory with the model: copy it before the model is trained on.
        """
        return self.onnx_program.exported_program if self.onnx_program is not None else None

    def to_json(self, indent: int | None = 2) -> str:
        """Return the report as JSON text; NaN and infinities become null and strings.

        ``sn_export/report.schema.json`` describes it; ``"schema"`` is the version of that.
        ``"path"`` is null where no file was published.
        """
        names = [entry.name for entry in dataclasses.fields(self) if entry.name != "onnx_program"]
        content = {"schema": REPORT_SCHEMA, **{name: getattr(self, name) for name in names}}
        if not self.parity.passed:
            content["path"] = None
        return json.dumps(plain(content), indent=indent, allow_nan=False)

    def save(self, path: str | os.PathLike[str], *, command: str = "") -> Path:
        """Write the report as ``.json``, ``.html`` or ``.md``; see `sn_export.reporting`."""
        from .reporting import save_report  # its templates take a moment to load

        return save_report(self, path, command=command)
