"""What people call the parts of a spectral norm that they write by hand: the one list of words.

State dicts, folded graphs and the code of modules are told by these names. It needs no torch.
"""

from __future__ import annotations

import re
from functools import lru_cache

# Of the raw weight: `weight_bar` of SAGAN code, `weight_orig` of torch's hook.
RAW_SUFFIXES = ("_bar", "_orig", "_raw", "_org", "_original", "_parameter", "_param")

# State beside a raw weight that keeps its plain name: BigGAN's mixin, torch-mimicry.
STATE_BESIDE = (("u0", "sv0"), ("sn_u", "sn_sigma"))

# Attributes with the number of power iterations of a forward in train mode.
ITERATIONS = ("power_iterations", "n_power_iterations", "num_iters", "num_itrs", "n_iter", "Ip")

_VECTOR = re.compile(r"(^|_)(u|v|us|vs|u_?hat|v_?hat|u_?vec|v_?vec|left|right|singular\w*)_?\d*$")
# A vector of one element fits any critic's last layer, so there the name has to say it.
_TELLING = re.compile(r"(^|_)(u|v|us|vs|sn|sv|svs|left|right|singular|spectral|sigma)(\d*$|_)")
# SN, but not SNN, which are spiking networks; "Spectral" alone is a Fourier layer.
_CLASS = re.compile(r"[Ss]pectral_?[Nn]orm|(^|_)SN(?=[A-MO-Z_0-9]|$)|^sn_|[a-z]SN$")
# Layers of the literature that bound their norm without vectors: SLL, AOL and their kin.
_BOUNDED = re.compile(r"[Ll]ipschitz|(^|_)(SLL|AOL|CPL|BCOP)(?=[A-Z_0-9]|$)")
# In code that computes a largest singular value, and in code that normalises vectors, as each
# power iteration does.
_SIGMA = re.compile(
    r"_*(\w+_)?(svd\w*|singular\w*|spectral_(?!norm$)\w+|sigmas?|lipschitz\w*|power_it\w*|lobpcg|eigval\w*|"
    r"matrix_norm|gram|l2_?normali[sz]e)(_\w*)?"
)
_NORMS = frozenset({"normalize", "normalise", "norm", "vector_norm", "rsqrt"})


def plain_name(raw: str) -> str:
    """Return the name of a weight behind that of its raw tensor.

    ::

        plain_name("weight_bar")  # "weight"
        plain_name("weight")  # "weight"
    """
    return next((raw.removesuffix(s) for s in RAW_SUFFIXES if raw.endswith(s)), raw) or raw


def is_named_as_vector(name: str) -> bool:
    """Whether ``name`` is what people call singular vectors: ``u``, ``weight_v``, ``sn_u0``."""
    return bool(_VECTOR.search(name))


def is_named_as_state(name: str) -> bool:
    """Whether ``name`` is what people call singular vectors, values or sigma: ``sv0``, ``sn_u``."""
    return bool(_TELLING.search(name))


def is_named_as_norm(class_name: str) -> bool:
    """Whether a class is called a spectral norm: ``SNConv2d``, ``MySpectralNorm``."""
    return bool(_CLASS.search(class_name))


def is_named_as_bounded(class_name: str) -> bool:
    """Whether a class is called after a bound of its norm: ``LipschitzLinear``, ``AOLConv2d``."""
    return bool(_BOUNDED.search(class_name))


@lru_cache(4096)
def mentions_sigma(names: frozenset[str]) -> bool:
    """Whether code that uses ``names`` computes a largest singular value, as it says."""
    return any(map(_SIGMA.fullmatch, names))


def mentions_norm(names: frozenset[str]) -> bool:
    """Whether code that uses ``names`` normalises something, a largest singular value included."""
    return not _NORMS.isdisjoint(names) or mentions_sigma(names)
