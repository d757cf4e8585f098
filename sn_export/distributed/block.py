"""The with-blocks and lists as users call them: in one process, or on every rank of several."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TypeVar

from torch import nn

from ..freezing import Block, Only, Selection, require_module
from .planner import RankPlanner

M = TypeVar("M", bound=nn.Module)


def frozen_spectral_norm(model: M) -> AbstractContextManager[M]:
    """Freeze every spectral norm of ``model`` for the length of a with-block.

    ::

        with frozen_spectral_norm(model) as plain:  # the same object
            torch.onnx.export(plain, args, "model.onnx")

    Inside, each tensor under `torch.nn.utils.spectral_norm` (hooks and subclasses),
    `torch.nn.utils.parametrizations.spectral_norm` (anywhere in a chain), or a handwritten
    spectral norm (wrappers that set the weight of a layer, layers that normalise it in forward,
    and what `register_spectral_norm` has made known) is a plain
    `torch.nn.Parameter` without grad that holds, bit for bit, the weight an eval-mode
    forward would use now; the classes and the state dict are those of the network without
    spectral norm. No power iteration is run, no random number drawn, no mode changed, and
    nothing but the weights under spectral norm is copied.

    Afterwards, also after an exception, the model is what it was: the same parameters,
    buffers, hooks, classes and containers, in the same order. What else was changed inside
    stays: hooks, attributes, train/eval mode. Blocks nest; the inner one finds nothing to do.
    A block that ends before a later one on the same modules is undone when that one ends.

    A model under `torch.distributed.fsdp.fully_shard` is entered on every rank: a unit at a time is
    gathered, and each rank keeps its shard of the frozen weights, as a DTensor of the placement
    of the raw one. What fails on one rank is raised on all. Leaving takes no collective call.

    Args:
        model: any module; it may itself carry spectral norm.

    Returns:
        A context manager that yields ``model``; it can be entered again, and be a decorator.

    Raises:
        TypeError: if ``model`` is not a `torch.nn.Module`.
        FreezeError: on entering, if a tensor cannot be frozen (on the meta device, not
            initialised, in a ScriptModule, held by another thread's block, under
            FullyShardedDataParallel); nothing has changed then.

    Warns:
        SpectralNormNotAppliedWarning: on entering, if a hook is never run by the network, so
            that the weight in use is not normalised; it is frozen as it is in use.
        SpectralNormNotRecognisedWarning: on entering, if a module looks like a handwritten
            spectral norm that cannot be frozen; it is left as it is (`find_suspects`).
        FrozenWeightChangedWarning: on leaving, if a frozen weight was edited, or the model
            was moved to another dtype or device. Such changes are discarded.
    """
    return Block(require_module(model), RankPlanner(Selection("spectral_norm")))


def frozen_parametrizations(model: M, only: Only = None) -> AbstractContextManager[M]:
    """Freeze everything of ``model`` that computes a weight, for the length of a with-block.

    ::

        with frozen_parametrizations(model) as plain:  # the same object
            torch.onnx.export(plain, args, "model.onnx")

        with frozen_parametrizations(model, only=("orthogonal", "decoder")):
            ...

    `frozen_spectral_norm` is its case ``only="spectral_norm"``, and what is promised there holds
    here for each kind: inside, each tensor is a plain `torch.nn.Parameter` (a buffer, if it was
    one) with the bits that an eval-mode forward would use now, and afterwards the model is
    what it was. The kinds:

    - ``"spectral_norm"``: of any implementation, alone or in a chain with others;
    - ``"orthogonal"``: `torch.nn.utils.parametrizations.orthogonal`, alone or in a chain;
    - ``"weight_norm"``: `torch.nn.utils.weight_norm` and its parametrization;
    - ``"parametrization"``: any other `torch.nn.utils.parametrize.register_parametrization`;
    - ``"pruning"``: the masks of `torch.nn.utils.prune`.

    A parametrization that draws random numbers in eval mode is frozen at one draw, which the
    global generators do not notice. Inside `torch.nn.utils.parametrize.cached` the cached
    tensor counts, since a forward would use that.

    Args:
        model: any module; it may itself be parametrized.
        only: a kind, the qualified name of a tensor or of a module (which takes in everything
            below it), or several of these; None for everything.

    Returns:
        A context manager that yields ``model``; it can be entered again, and be a decorator.

    Raises:
        TypeError: if ``model`` is not a `torch.nn.Module`, or ``only`` holds no strings.
        ValueError: on entering, if a name in ``only`` fits nothing.
        FreezeError: on entering, if a tensor cannot be frozen; also if one hook computes from
            the tensor of another, which it then uses one forward late. Nothing has changed then.

    Warns:
        SpectralNormNotAppliedWarning, ReparametrizationNotAppliedWarning: on entering, if a hook
            is never run by the network; the tensor is frozen as it is in use.
        SpectralNormNotRecognisedWarning: as `frozen_spectral_norm`, if that kind is asked for.
        FrozenWeightChangedWarning: on leaving, as `frozen_spectral_norm`.
    """
    return Block(require_module(model), RankPlanner(Selection(only)))
