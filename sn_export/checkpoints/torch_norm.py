"""Torch's own spectral norm on tensors without a model: whatever it computes is the truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook

from ..errors import CheckpointError
from .stored_norms import StoredNorm

_ALIGNMENT = 64  # of torch's CPU allocator


class TorchNorm:
    """The tensors of one site, to ask torch about.

    Attributes:
        site: where they are from.
        weight: the raw weight.
        u: the left vector.
        v: the right vector; None where it must be solved for, as torch does on loading.
        normalised: the weight that a checkpoint from before v holds beside them.
    """

    def __init__(self, site: StoredNorm, tensors: Mapping[str, Any]) -> None:
        self.site = site
        self.weight: Tensor = _aligned(tensors[site.weight])
        self.u: Tensor = _aligned(tensors[site.u])
        self.v: Tensor | None = _aligned(tensors[site.v]) if site.v is not None else None
        self.normalised: Tensor | None = (
            _aligned(tensors[site.normalised]) if site.normalised is not None else None
        )

    def matrix(self, dim: int) -> Tensor:
        """Return the weight as torch reshapes it for ``dim``."""
        return SpectralNorm(dim=dim).reshape_weight_to_matrix(self.weight)

    def value(self, dim: int) -> Tensor:
        """Return the weight that an eval-mode forward uses.

        Raises:
            CheckpointError: if torch cannot compute it.
        """
        try:
            with torch.no_grad():
                if self.site.kind == "hook":
                    return self._hook_value(dim)
                return self._parametrization_value(dim)
        except RuntimeError as error:
            raise CheckpointError(
                f"torch cannot normalise '{self.site.name}': {str(error).splitlines()[0]}"
            ) from error

    def right_vector(self, dim: int) -> Tensor:
        """Return v; where the checkpoint has none, the one that torch solves for on loading."""
        if self.v is not None and self.normalised is None:
            return self.v
        state = {"weight_orig": self.weight, "weight_u": self.u, "weight": self.normalised}
        if self.v is not None:
            state["weight_v"] = self.v
        pre_hook = SpectralNormLoadStateDictPreHook(SpectralNorm("weight", dim=dim))
        pre_hook(state, "", {}, True, [], [], [])
        v = state["weight_v"]
        assert v is not None  # the hook has just stored it
        return v

    def _hook_value(self, dim: int) -> Tensor:
        module = nn.Module()
        module.weight_orig = self.weight
        module.weight_u, module.weight_v = self.u, self.right_vector(dim)
        norm = SpectralNorm("weight", dim=dim)
        return norm.compute_weight(module, do_power_iteration=False)

    def _parametrization_value(self, dim: int) -> Tensor:
        # On the meta device its constructor computes nothing and draws no random number.
        norm = _SpectralNorm(self.weight.to("meta"), dim=dim).eval()
        norm._buffers.update(_u=self.u, _v=self.v)
        value: Tensor = norm(self.weight)
        return value


def _aligned(tensor: Tensor) -> Tensor:
    """Return ``tensor`` where torch would allocate it.

    Values in a file can lie at any address, and there torch's products take another path,
    whose last bits differ from those of the network.
    """
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
