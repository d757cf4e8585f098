"""The functions that users call in one process or on every rank: blocks, lists, plain weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ExportError
from ..freezing import (
    BUDGET,
    Block,
    Found,
    Only,
    ParametrizationInfo,
    Selection,
    Site,
    SpectralNormInfo,
    UnconvergedSigma,
    Walk,
    add_exact_sigma,
    compute_value,
    describe_site,
    exact_sigma_cost,
    make_norm_matrix,
    require_module,
    select_unconverged,
    warn_of_suspects,
)
from .fsdp import Unit, find_ranks
from .gathered_walk import find_gathered, find_sharded_units
from .planner import RankPlanner

M = TypeVar("M", bound=nn.Module)
Info = TypeVar("Info")


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


def find_spectral_norm(model: nn.Module) -> list[SpectralNormInfo]:
    """List the tensors that `frozen_spectral_norm` would freeze, in the order of the modules.

    For a model under `torch.distributed.fsdp.fully_shard` it is called on every rank.

    Args:
        model: any module. It is not changed; no power iteration is run.

    Returns:
        One `SpectralNormInfo` for each tensor.

    Raises:
        TypeError: if ``model`` is not a `torch.nn.Module`.
        FreezeError: if spectral norm sits where it cannot be read, as in a ScriptModule, or an
            adapter fails.

    Warns:
        SpectralNormNotRecognisedWarning: if a module looks like a handwritten spectral norm that
            is not known (`find_suspects`); it is not in the list.
    """
    infos = _describe(
        require_module(model), Selection("spectral_norm"), lambda site: site.describe()
    )
    return [cast(SpectralNormInfo, info) for info in infos]


def find_parametrizations(model: nn.Module, only: Only = None) -> list[ParametrizationInfo]:
    """List the tensors that `frozen_parametrizations` would freeze, in the order of the modules.

    For a model under `torch.distributed.fsdp.fully_shard` it is called on every rank.

    Args:
        model: any module. It is not changed; no power iteration is run.
        only: as for `frozen_parametrizations`.

    Returns:
        One `ParametrizationInfo` for each tensor.

    Raises:
        TypeError: if ``model`` is not a `torch.nn.Module`, or ``only`` holds no strings.
        ValueError: if a name in ``only`` fits nothing.
        FreezeError: if a tensor cannot be computed, or an adapter fails.

    Warns:
        SpectralNormNotRecognisedWarning: if a module looks like a handwritten spectral norm that
            is not known (`find_suspects`), and spectral norm is asked for; it is not in the list.
    """
    selection = Selection(only)
    return _describe(
        require_module(model), selection, lambda site: site.make_info(compute_value(site))
    )


class Description(NamedTuple):
    """The reparametrizations of a model.

    Attributes:
        frozen: the tensors that are frozen.
        unconverged: those whose stored sigma is far below the true one.
    """

    frozen: tuple[SpectralNormInfo | ParametrizationInfo, ...]
    unconverged: tuple[UnconvergedSigma, ...]


def describe_sharded(model: nn.Module, only: Only, sigma_exact: bool) -> Description:
    """List what would be frozen in a sharded model, without a warning; a collective call.

    Args:
        model: the model.
        only: as for `frozen_parametrizations`.
        sigma_exact: compute the largest singular values too, of the first matrices alone if all
            of them would take more than seconds.
    """
    unconverged: list[UnconvergedSigma] = []
    left = BUDGET

    def describe(site: Site) -> SpectralNormInfo | ParametrizationInfo:
        nonlocal left
        info, matrix = describe_site(site), make_norm_matrix(site)
        unconverged.extend(select_unconverged([info], matrix))
        if sigma_exact:
            (info,) = add_exact_sigma([info], matrix, left)
            left -= sum(exact_sigma_cost(tuple(one.shape)) for one in matrix.values())
        return info

    frozen = _describe(model, Selection(only), describe, warns=False)
    return Description(tuple(frozen), tuple(unconverged))


def _describe(
    model: nn.Module,
    selection: Selection,
    describe: Callable[[Site], Info],
    warns: bool = True,
) -> list[Info]:
    infos: dict[int, Info] = {}

    def take(site: Site, unit: Unit | None = None) -> None:
        infos[id(site)] = describe(site)

    def find(walk: Walk) -> list[Found]:
        return selection.find(model, (), walk)

    units = find_sharded_units(model)
    found = find_gathered(model, units, take, find) if units else selection.find(model)
    if warns and selection.includes_spectral_norm:
        warn_of_suspects(model, found, stacklevel=3)
    sites = [site for _, module_sites in found for site in module_sites]
    if not units:
        with torch.inference_mode(False), torch.no_grad():
            for site in sites:
                take(site)
    return [infos[id(site)] for site in sites]


def gather_plain_state_dict(model: nn.Module, only: Only = None) -> dict[str, Tensor]:
    """Return the state dict of the plain network on rank 0, to be saved or loaded elsewhere.

    ::

        state = gather_plain_state_dict(model)  # on every rank
        if dist.get_rank() == 0:
            torch.save(state, "plain.pt")

    Call it on every rank of a model under `torch.distributed.fsdp.fully_shard`. Tensors are
    gathered one after the other, so other ranks than the first hold at most two layers at a time.

    Args:
        model: any module, on any number of ranks. It is as before afterwards.
        only: which reparametrizations are left out, as for `frozen_parametrizations`.

    Returns:
        On rank 0 (and in a single process) every parameter and persistent buffer on the CPU, in
        memory of its own, under the names that the network has without the reparametrizations;
        an empty dict on the other ranks.

    Raises:
        TypeError, ValueError, FreezeError: as `frozen_parametrizations`.
    """
    return gather_state(model, only)[0]


def gather_state(model: nn.Module, only: Only) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the plain state dict and all buffers of the plain network, by name.

    Both are empty on other ranks than the first. A collective call.

    Args:
        model: as for `gather_plain_state_dict`.
        only: as for `gather_plain_state_dict`.
    """
    ranks = find_ranks(find_sharded_units(model).values()) or [0]
    is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == ranks[0]
    known: dict[int, Any] = {}  # by id, so that tied tensors stay one

    def whole(value: Any) -> Any:
        if id(value) not in known:
            tensor = value  # anything: a module chooses its extra state
            if hasattr(tensor, "full_tensor"):  # a DTensor; importing the class takes half a second
                tensor = tensor.full_tensor()
            if isinstance(tensor, Tensor) and is_first:
                tensor = tensor.detach().to("cpu", copy=True)
            known[id(value)] = tensor if is_first else None
        return known[id(value)]

    with frozen_parametrizations(model, only), torch.no_grad():
        # Both keep every tensor alive until the end, so that no id is used twice.
        state = model.state_dict(keep_vars=True)
        named = dict(model.named_buffers(remove_duplicate=False))
        gathered = {name: whole(value) for name, value in state.items()}
        buffers = {name: whole(buffer) for name, buffer in named.items()}
    return (gathered, buffers) if is_first else ({}, {})


def refuse_sharded(model: nn.Module) -> None:
    """Raise if ``model`` is under `fully_shard`, since no exporter takes shards. A local call.

    Raises:
        ExportError: if it is; the message says how such a model is exported.
        FreezeError: if it is under FullyShardedDataParallel.
    """
    if find_sharded_units(model):
        raise ExportError(
            f"{type(model).__name__} is under fully_shard, and this rank holds a piece of it: call "
            "export_onnx on every rank with model_factory=, a function without arguments that "
            "builds the network without fully_shard"
        )
