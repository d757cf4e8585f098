"""The errors and warnings that sn_export raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .divergence import Divergence
    from .parity import ParityReport
    from .report import ExportReport


class SnExportError(Exception):
    """Base of every error that sn_export raises on purpose."""


class FreezeError(SnExportError):
    """A tensor cannot be frozen; the model was left as it was.

    Attributes:
        tensor: qualified name of the tensor in the model, such as ``"body.0.weight"``.
        reason: why it cannot be frozen.
        remedy: what to do about it.
    """

    def __init__(self, tensor: str, reason: str, remedy: str) -> None:
        super().__init__(f"cannot freeze '{tensor}': {reason}. {remedy}")
        self.tensor = tensor
        self.reason = reason
        self.remedy = remedy


class SnExportWarning(UserWarning):
    """Base of every warning that sn_export gives."""


class FrozenWeightChangedWarning(SnExportWarning):
    """A frozen weight was edited or moved inside the block; the change was discarded."""


class ReparametrizationNotAppliedWarning(SnExportWarning):
    """The network carries a reparametrization where it never uses the computed weight."""


class SpectralNormNotAppliedWarning(ReparametrizationNotAppliedWarning):
    """The network carries spectral norm where it never uses the normalised weight."""


class SpectralNormNotRecognisedWarning(SnExportWarning):
    """A module looks like a handwritten spectral norm that nothing here can freeze."""


class ReparametrizationNotRecognisedWarning(SnExportWarning):
    """A module computes its weight itself; the file holds the result, the block changes nothing."""


class TracedDecisionWarning(SnExportWarning):
    """The forward decides by values; the file always does what was decided for the example."""


class OutputNotExportedWarning(SnExportWarning):
    """The model returns tensors within an object that no exporter looks into."""


class ExportError(SnExportError):
    """The model could not be exported, or the file not be run; nothing was published."""


class ParityError(SnExportError):
    """The outputs of the exported file differ from the model's; nothing was published.

    Attributes:
        report: the `sn_export.ParityReport` with every output's errors.
        export: the `sn_export.ExportReport` of the file that was not published; None where
            a file was only compared.
    """

    def __init__(
        self, message: str, report: ParityReport, export: ExportReport | None = None
    ) -> None:
        super().__init__(message)
        self.report = report
        self.export = export

    @property
    def divergence(self) -> Divergence | None:
        """The comparison module by module: ``report.divergence``."""
        return self.report.divergence
