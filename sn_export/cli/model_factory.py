"""Build the network of ``--model MODULE:FACTORY``, load a checkpoint into it, make its inputs."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import Loaded, load_checkpoint, read_checkpoint, read_npz
from ..errors import SnExportWarning, UsageError
from ..running import InputSet, find_entry
from ..text import describe_error, shorten_list
from .options import InputShape, ModelOptions, import_from_current_folder


def draw_example(shapes: Iterable[InputShape]) -> InputSet:
    """Return random inputs of the given shapes, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for one in shapes:
        try:
            value = _draw(one.shape, getattr(torch, one.dtype), generator)
        except RuntimeError as error:  # too little memory
            raise UsageError(f"--input {one.text}: torch cannot draw it: {error}") from error
        if one.name is None:
            args.append(value)
        else:
            kwargs[one.name] = value
    return InputSet(tuple(args), kwargs, "the example input")


def _draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, dtype=wide, generator=generator).to(dtype)
    # 0 and 1 are valid as indices and as flags; other values have to come from --input-file.
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


@dataclass(frozen=True)
class Inputs:
    """An example, and further inputs that are part of the proof."""

    example: InputSet
    own: tuple[InputSet, ...]

    def to(self, device: torch.device) -> Inputs:
        """Return the inputs on a device."""
        example, *own = (
            one.map(lambda tensor: tensor.to(device)) for one in (self.example, *self.own)
        )
        return Inputs(example, tuple(own))

    def make_dynamic_shapes(
        self, model: nn.Module, dims: Mapping[str, dict[int, str]]
    ) -> dict[str, dict[int, str] | None] | None:
        """Return ``--dynamic`` as `torch.export` takes it; None if nothing is dynamic.

        Example: ``{"x": {0: "batch"}}`` is ``{"x": {0: "batch"}, "mask": None}`` for the inputs x
        and mask.
        """
        if not dims:
            return None
        called = self.example.method or model.forward
        parameters = list(inspect.signature(called).parameters)
        names = [*parameters[: len(self.example.args)], *self.example.kwargs]
        for name in dims:
            if name not in names:
                raise UsageError(
                    f"--dynamic names the input '{name}'; the inputs are {', '.join(names)}"
                )
        return {name: dims.get(name) for name in names}


def gather(shapes: Sequence[InputShape], files: Sequence[Path]) -> Inputs:
    """Return the inputs of ``--input`` and ``--input-file``, of which at least one is given.

    Raises:
        UsageError: if a file is no .npz of numeric arrays.
    """
    own = tuple(_read_inputs(path) for path in files)
    return Inputs(draw_example(shapes), own) if shapes else Inputs(own[0], own[1:])


def _read_inputs(path: Path) -> InputSet:
    try:
        arrays = read_npz(path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    positional = [f"arr_{i}" for i in range(len(arrays))]
    if list(arrays) == positional:
        return InputSet(tuple(arrays.values()), {}, f"'{path.name}'")
    return InputSet((), arrays, f"'{path.name}'")


def prepare_model(
    options: ModelOptions, checkpoint: Path, factory: str, show: Callable[[str], None]
) -> tuple[nn.Module, Inputs, Loaded]:
    """Return the module to call, with the checkpoint loaded, its inputs, and notes of the loading.

    Args:
        options: how to read the checkpoint, and which module and method to call.
        checkpoint: the file or folder.
        factory: ``MODULE:FACTORY``.
        show: shows the user each step.
    """
    device = _require_device(options.device)
    inputs = gather(options.shapes, options.input_files).to(device)
    show(f"reading {checkpoint}")
    content = read_checkpoint(checkpoint, **options.select_keywords(read_checkpoint))
    show(f"building {factory}")
    built, network = build_model(factory, options.model_kwargs, options.network)
    model = _find_module("--submodule", built, options.submodule)
    try:
        method = find_entry(model, options.method)[1]
    except (TypeError, ValueError) as error:
        raise UsageError(f"--{error}") from error
    show("loading the checkpoint into the model")
    loaded = load_checkpoint(network, content, **options.select_keywords(load_checkpoint))
    for text in loaded.warnings:
        warnings.warn(text, SnExportWarning, stacklevel=2)
    built.to(device)
    return model, replace(inputs, example=inputs.example.bind(model, method)), loaded


def _require_device(text: str) -> torch.device:
    """Return the device of ``--device``, if torch can make tensors with values on it.

    Raises:
        UsageError: if torch knows no such device, or has none.
    """
    try:
        device = torch.empty(0, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {text}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise UsageError("--device meta: tensors there have no values")
    return device


def _find_module(option: str, model: Any, path: str | None) -> nn.Module:
    """Return the module at ``path`` below ``model``, which an option names; ``model`` for None."""
    found = model
    for name in path.split(".") if path is not None else ():
        found = getattr(found, name, None)
    if isinstance(found, nn.Module):
        return found
    raise UsageError(
        f"{option} {path}: there is no such module in {type(model).__name__}; it has "
        f"{shorten_list(_list_paths(model)) or 'none'}"
    )


def _list_paths(made: Any) -> list[str]:
    """Return the paths of the modules in a module, or in the attributes of another object."""
    if isinstance(made, nn.Module):
        return [name for name, _ in made.named_modules() if name]
    attributes = getattr(made, "__dict__", {})
    return [name for name, value in attributes.items() if isinstance(value, nn.Module)]


def build_model(
    text: str, kwargs: dict[str, Any], attribute: str | None = None
) -> tuple[nn.Module, nn.Module]:
    """Return the network that ``pkg.nets:critic`` makes, and the one in it that is loaded.

    Args:
        text: ``MODULE:FACTORY``; the current folder is importable.
        kwargs: arguments of the factory.
        attribute: path of the network that a checkpoint is for; None for the whole. With it the
            factory may make an object of any class: then both are the network at that path.

    Raises:
        UsageError: if there is no such module, factory or attribute, or the factory raises or
            returns no module.
    """
    module_name, _, factory_name = text.partition(":")
    module = _import(module_name)
    factory: Any = module
    for part in factory_name.split("."):
        if not hasattr(factory, part):
            raise UsageError(
                f"module '{module_name}' has no '{factory_name}'; it has "
                f"{', '.join(_list_factories(module)) or 'no class and no function of its own'}"
            )
        factory = getattr(factory, part)
    made = factory if isinstance(factory, nn.Module) else _call_factory(text, factory, kwargs)
    if attribute is None and not isinstance(made, nn.Module):
        paths = _list_paths(made)
        raise UsageError(
            f"{text} made {type(made).__name__}, not a torch.nn.Module"
            + (f"; --network takes one of its modules: {shorten_list(paths)}" if paths else "")
        )
    network = _find_module("--network", made, attribute)
    return made if isinstance(made, nn.Module) else network, network


def _call_factory(text: str, factory: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    try:
        return factory(**kwargs)
    except (Exception, SystemExit) as error:
        call = f"{text}({', '.join(f'{name}={value!r}' for name, value in kwargs.items())})"
        raise UsageError(f"{call} raised {describe_error(error)}") from error


def _import(name: str) -> ModuleType:
    import_from_current_folder()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in [*accumulate(name.split("."), "{}.{}".format)]:  # a, a.b, a.b.c
            raise UsageError(f"importing '{name}' raised {error}") from error
        there = ", ".join(_list_modules(Path.cwd())) or "none"
        raise UsageError(
            f"there is no module '{error.name}'; modules in the current folder: {there}"
        ) from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"importing '{name}' raised {describe_error(error)}") from error


def _list_modules(folder: Path) -> list[str]:
    files = {path.stem for path in folder.glob("*.py") if path.stem.isidentifier()}
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    return sorted(files | packages)


def _list_factories(module: ModuleType) -> list[str]:
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    )
