"""The settings of a proof, which travel together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..results import ProofDtype, Tolerance
from .float32 import PROOF_DTYPES
from .session import DEFAULT_PROVIDERS, require_providers
from .tolerances import require_tolerances, tolerance_of


@dataclass(frozen=True)
class ProofSettings:
    """How a file is run and held against the model.

    Attributes:
        rtol: relative tolerance, for all outputs or for each; None for the dtype's default.
        atol: absolute tolerance in units of the output, likewise.
        providers: onnxruntime execution providers, in order of preference.
        proof_dtype: dtype of the copy that is run in the place of the file.
        input_names: what the file calls its inputs, by their names in the forward's signature;
            the same names where None.
    """

    rtol: Tolerance = None
    atol: Tolerance = None
    providers: Sequence[str] = DEFAULT_PROVIDERS
    proof_dtype: ProofDtype | None = None
    input_names: Mapping[str, str] | None = None

    def checked(self, outputs: Sequence[str] | None = None) -> ProofSettings:
        """Return the settings with tolerances in numbers of Python, if they can be used.

        Args:
            outputs: the names of the file's outputs, where they are known already.

        Raises:
            TypeError: for a tolerance by a key that is neither a name nor a position, or
                providers that are no sequence.
            ValueError: for a tolerance that is negative or that names no output, an unknown
                provider, or a dtype in which no proof can be made.
        """
        rtol, atol = require_tolerances(self.rtol, self.atol, outputs)
        require_providers(self.providers)
        if self.proof_dtype not in PROOF_DTYPES:
            raise ValueError(f"proof_dtype must be None or 'float32', got {self.proof_dtype!r}")
        return replace(self, rtol=rtol, atol=atol)

    def tolerances_of(self, position: int, name: str) -> tuple[float | None, float | None]:
        """Return rtol and atol of one output, None where the default for its dtype applies."""
        return (tolerance_of(self.rtol, position, name), tolerance_of(self.atol, position, name))
