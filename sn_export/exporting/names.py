"""The interface of a file: what its inputs and outputs are called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ..running import InputSet, make_distinct, output_names

_TENSORS = "tensors among the arguments of the example"


def name_inputs(
    model: nn.Module, example: InputSet, chosen: Sequence[str] | None
) -> dict[str, str]:
    """Return the names in the file by the name in the forward's signature, in its order.

    For ``forward(x, pair)`` and ``chosen=["image"]``: ``{"x": "image", "pair_0": "pair_0",
    "pair_1": "pair_1"}``.

    Args:
        model: its parameters and buffers keep their names.
        example: the example input, bound.
        chosen: names that the user wants, for the first inputs or all.

    Raises:
        TypeError: if ``chosen`` is no sequence of text.
        ValueError: if it has more names than there are tensors, or one twice.
    """
    signature = [name for name, _ in example.named_tensors()]
    wanted = _require_names("input_names", chosen, signature, _TENSORS)
    rest = make_distinct(signature[len(wanted) :], {*wanted, *_state_names(model)})
    return dict(zip(signature, [*wanted, *rest], strict=True))


def name_outputs(
    model: nn.Module,
    paths: Iterable[Sequence[str]],
    chosen: Sequence[str] | None,
    inputs: Sequence[str],
) -> list[str]:
    """Return the names of the outputs: those chosen, the rest from the structure of the result.

    Args:
        model: its parameters keep their names.
        paths: where the tensors stand in what the forward returned for the example.
        chosen: names that the user wants, for the first outputs or all.
        inputs: the names of the file's inputs, which stay.

    Raises:
        TypeError: if ``chosen`` is no sequence of text.
        ValueError: if it has more names than there are tensors, or one twice or of an input.
    """
    found = output_names(tuple(path) for path in paths)
    wanted = _require_names("output_names", chosen, found, "tensors in the model's output")
    both = next((name for name in wanted if name in inputs), None)
    if both is not None:
        raise ValueError(f"output_names has '{both}', which is the name of an input")
    taken = {*wanted, *inputs, *_state_names(model)}
    rest = found[len(wanted) :]
    free = make_distinct([f"output_{name}" if name in taken else name for name in rest], taken)
    return [*wanted, *free]


def _require_names(
    option: str, chosen: Sequence[str] | None, found: Sequence[str], what: str
) -> list[str]:
    if chosen is None:
        return []
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        raise TypeError(f"{option} must be a sequence of names, got {chosen!r}")
    names = list(chosen)
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"{option} must be a sequence of names, got {names!r}")
    if len(names) > len(found):
        raise ValueError(
            f"{option} has {len(names)} names, and there are {len(found)} {what}: "
            f"{', '.join(found)}"
        )
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{option} has '{twice}' twice")
    return names


def _state_names(model: nn.Module) -> set[str]:
    return {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
