"""Layers that divide their weight by sigma inside forward, as BigGAN's SNConv2d does.

::

    class SNConv2d(nn.Conv2d, SN):  # weight; buffers u0, sv0
        def W_(self): ...           # returns weight / sigma
        def forward(self, x):
            return F.conv2d(x, self.W_(), self.bias, ...)

Names vary. What counts is a matrix of the module's own, state that fits its singular vectors, and
a method or property that forward uses and that gives the matrix times a number. Where there is
none, a subclass of one of torch's layers is run on a probe, and the weight that it hands to torch's
function is taken (`Probe`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...running import undo_on_exit, undoing
from ..edits import Edits
from ..introspection.candidates import (
    Candidate,
    find_matrices,
    fits_weight,
    is_named_as_vector,
    iter_small_state,
    make_plain_name,
    mentions_norm,
    mentions_sigma,
)
from ..introspection.sandbox import AbsorbingArgument, Probe, compute_in_sandbox, make_placeholders
from ..introspection.source_code import Code, Member, count_reads, is_mentioned
from .handwritten import Answer, HandwrittenSite, Override, make_frozen_class


class MixinSite(HandwrittenSite):
    """A weight that the module's own forward normalises."""

    __slots__ = ("kept", "overrides")
    kind = "mixin"

    def __init__(
        self,
        path: str,
        module: nn.Module,
        tensor: str,
        answer: Answer,
        overrides: tuple[Override, ...],
        kept: tuple[str, ...] = (),
    ) -> None:
        super().__init__(path, module, tensor, answer, module)
        self.overrides = overrides
        self.kept = kept  # state that other code of the class still reads

    def plan(self, edits: Edits, frozen: Tensor) -> None:
        """Exchange the weight, take away the vectors, and let the methods return the weight."""
        module = self.module
        names = (*self.answer.state, self.answer.raw)
        kept = {n: t.detach().clone() for n, t in iter_small_state(module) if n in self.kept}
        for container in (module._parameters, module._buffers):
            edits.remove(container, [n for n in names if n != self.tensor])
        edits.edit(module.__dict__).update(kept)
        edits.set_class(module, make_frozen_class(edits.get_planned_class(module), self.overrides))
        parameters = edits.edit(module._parameters)
        if self.tensor in parameters:
            parameters[self.tensor] = frozen
        else:
            self.register(edits, frozen)


def find_mixins(path: str, module: nn.Module, code: Code) -> list[MixinSite]:
    """Return the sites of the weights that ``module``, with a class of ``code``, normalises."""
    sites = []
    for raw, weight in find_matrices(module).items():
        state = _find_vectors(module, weight)
        site = _make_site(path, module, code, raw, weight, state)
        if site is not None:
            sites.append(site)
    return sites


def _make_site(
    path: str, module: nn.Module, code: Code, raw: str, weight: Tensor, vectors: Collection[str]
) -> MixinSite | None:
    if not _is_normalised(code.mentions(code.forward), raw, vectors):
        return None
    if not mentions_norm(code.names) and not any(map(is_named_as_vector, vectors)):
        return None  # a mask, a scale: nothing that a power iteration would write
    candidate = Candidate(raw, raw, weight, tuple(vectors))
    probe = Probe.of(module)
    used = None if probe is None else probe.compute_weight(raw)
    for member in code.iter_used(code.forward):
        names = code.mentions(member)
        if member.required > 1 or not _is_normalised(names, raw, vectors, member):
            continue
        value = _observe(module, member, candidate)
        if value is None and (used is not None or not member.has_options):
            value = candidate.confirm(lambda m=member: _call(module, m, raw), [module])  # type: ignore[misc]
        if value is None or (used is not None and not _is_same(used.value, value)):
            continue  # forward uses another one
        site = _make_method_site(path, module, code, raw, vectors, member, value)
        if site is not None:
            return site
    if used is None or not used.is_all or not candidate.accepts(used.value):
        return None
    # The forward does what that of torch's layer does, with the weight that it computes inline.
    state = _find_state(module, code.mentions(code.forward), raw, vectors)
    answer = Answer(raw, used.value, state)
    return MixinSite(path, module, raw, answer, (Override("forward", "base"),))


def _make_method_site(
    path: str,
    module: nn.Module,
    code: Code,
    raw: str,
    vectors: Collection[str],
    member: Member,
    value: Tensor,
) -> MixinSite | None:
    """Plan that ``member`` returns the frozen weight, if nothing else reads the raw one."""
    tensor = _choose_plain_name(module, code, member, raw)
    # The methods beside it that forward calls to bring the vectors up to date.
    called = code.find_updates(vectors, {member.name})
    updates = [other for other in called if _returns_nothing(module, other.name)]
    serving = code.mentions(member).union(*(code.mentions(m) for m in updates))
    state = _find_state(module, serving, raw, vectors)
    cut = {member.name, *(m.name for m in updates)}
    rest = code.mentions(code.forward, cut)
    if raw in rest and not (member.required and _is_handed_over(module, code, member, raw)):
        return None
    how = "property" if member.is_property else "argument" if member.required else "method"
    overrides = (
        Override(member.name, how, tensor),  # type: ignore[arg-type]
        *(Override(m.name, "nothing") for m in updates),
    )
    kept = tuple(name for name in state if is_mentioned(name, rest))
    return MixinSite(path, module, tensor, Answer(raw, value, state), overrides, kept)


def _find_vectors(module: nn.Module, weight: Tensor) -> tuple[str, ...]:
    # The vectors of a convolution as an operator have the sizes of its input and output.
    return tuple(
        name
        for name, tensor in iter_small_state(module)
        if fits_weight(name, tensor, weight) or (is_named_as_vector(name) and tensor is not weight)
    )


def _is_normalised(
    names: frozenset[str], raw: str, vectors: Collection[str], member: Member | None = None
) -> bool:
    """Whether code that uses ``names`` reads the weight and something to divide it by."""
    reads = is_mentioned(raw, names) or (member is not None and member.required == 1)
    return reads and (any(is_mentioned(v, names) for v in vectors) or mentions_sigma(names))


def _find_state(
    module: nn.Module, names: Collection[str], raw: str, vectors: Collection[str]
) -> tuple[str, ...]:
    """Name the buffers and parameters that only serve to compute the weight."""
    stored = {*module._parameters, *module._buffers} - {raw}
    return tuple(
        name
        for name, tensor in iter_small_state(module)
        if name in stored and (name in vectors or tensor.numel() == 1) and is_mentioned(name, names)
    )


def _observe(module: nn.Module, member: Member, candidate: Candidate) -> Tensor | None:
    """Return what ``member`` gives a forward, which may hand it options or change state before."""
    if isinstance(inspect.getattr_static(type(module), member.name), cached_property):
        return None  # forward uses what is cached, if anything is
    values: list[Any] = []

    def run() -> Tensor | None:
        with contextlib.suppress(Exception), _collect_returns(module, member, values):
            module.forward(
                *make_placeholders(module, AbsorbingArgument)
            )  # it ends where it needs an input
        return _copy_weight_in(values[:1], module, candidate.raw)

    first = candidate.confirm(run, [module])
    return first if all(_is_equal(first, value) for value in values) else None


@undoing
def _collect_returns(module: nn.Module, member: Member, values: list[Any]) -> Iterator[None]:
    """Collect what ``member`` returns; to be used on copies, inside `compute_in_sandbox`."""

    def collect(value: Any) -> Any:
        values.append(value)
        return value

    if not member.is_property:
        original = getattr(module, member.name)
        module.__dict__[member.name] = lambda *args, **kwargs: collect(original(*args, **kwargs))
        yield
        return
    cls = type(module)
    entry: property = inspect.getattr_static(cls, member.name)
    listening = make_frozen_class(cls, ())
    setattr(listening, member.name, property(lambda self: collect(entry.__get__(self))))
    with undo_on_exit(lambda: object.__setattr__(module, "__class__", cls)):
        object.__setattr__(module, "__class__", listening)
        yield


def _call(module: nn.Module, member: Member, raw: str) -> Tensor | None:
    value = getattr(module, member.name)
    if not member.is_property:
        value = value(module._parameters[raw]) if member.required else value()
    return _copy_weight_in([value], module, raw)


def _copy_weight_in(values: list[Any], module: nn.Module, raw: str) -> Tensor | None:
    """Return a copy; call it inside `compute_in_sandbox`, as a caller may be in inference mode."""
    shape = module._parameters[raw].shape  # type: ignore[union-attr]
    tensors = [v for v in values if isinstance(v, Tensor) and v.shape == shape]
    return tensors[0].clone() if tensors else None


def _is_equal(first: Tensor | None, value: Any) -> bool:
    return first is not None and isinstance(value, Tensor) and _is_same(first, value)


def _is_same(left: Tensor, right: Tensor) -> bool:
    return left.is_meta or (left.dtype == right.dtype and torch.equal(left, right))


def _returns_nothing(module: nn.Module, method: str) -> bool:
    try:
        return compute_in_sandbox(lambda: getattr(module, method)(), [module]) is None
    except Exception:
        return False


def _is_handed_over(module: nn.Module, code: Code, member: Member, raw: str) -> bool:
    """Whether forward reads the raw weight only as the argument of ``member``."""
    others = code.mentions(code.forward, {member.name}) - code.forward.own
    cls = type(module)
    reads, calls = (count_reads(cls, "forward", name) for name in (raw, member.name))
    return raw not in others and reads == calls


def _choose_plain_name(module: nn.Module, code: Code, member: Member, raw: str) -> str:
    """Return the name of the weight in a network without spectral norm."""
    plain = make_plain_name(raw)
    if member.is_property and member.name in (plain, raw.lstrip("_"), raw.removeprefix("raw_")):
        return member.name  # read as self.weight, as in the plain layer
    is_free = plain not in code.members and not hasattr(module, plain)
    return plain if is_free else raw
