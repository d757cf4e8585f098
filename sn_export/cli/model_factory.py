"""``MODULE:FACTORY``: import the code of a network, call it, and load a checkpoint into it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..checkpoints import Loaded, load_checkpoint, read_checkpoint
from ..errors import UsageError
from .inputs import Inputs, gather
from .options import import_from_current_folder
from .request import ModelOptions


def prepare_model(
    options: ModelOptions, checkpoint: Path, factory: str, show: Callable[[str], None]
) -> tuple[nn.Module, Inputs, Loaded]:
    """Return the network with the checkpoint in it, the inputs, and how it went in.

    Args:
        options: how to read the checkpoint and call the network.
        checkpoint: the file or folder.
        factory: ``MODULE:FACTORY``.
        show: is told each step.
    """
    inputs = gather(options.shapes, options.input_files)
    show(f"reading {checkpoint}")
    content = read_checkpoint(checkpoint, **options.keywords_of(read_checkpoint))
    show(f"building {factory}")
    model = build_model(factory, options.model_kwargs)
    show("loading the checkpoint into the model")
    loaded = load_checkpoint(model, content, **options.keywords_of(load_checkpoint))
    return model, inputs, loaded


def build_model(text: str, kwargs: dict[str, Any]) -> nn.Module:
    """Return the network that ``pkg.nets:critic`` makes; the current folder is importable.

    Raises:
        UsageError: if there is no such module or factory, or it raises or returns no module.
    """
    module_name, _, factory_name = text.partition(":")
    module = _import(module_name)
    factory: Any = module
    for part in factory_name.split("."):
        if not hasattr(factory, part):
            raise UsageError(
                f"module '{module_name}' has no '{factory_name}'; it has "
                f"{', '.join(_factories(module)) or 'no class and no function of its own'}"
            )
        factory = getattr(factory, part)
    if isinstance(factory, nn.Module):
        return factory
    call = f"{text}({', '.join(f'{name}={value!r}' for name, value in kwargs.items())})"
    try:
        model = factory(**kwargs)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{call} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{call} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def _import(name: str) -> ModuleType:
    import_from_current_folder()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        parents = {name[: i if i >= 0 else None] for i in _dots(name)}
        if error.name not in parents:
            raise UsageError(f"importing '{name}' raised {error}") from error
        there = ", ".join(_modules(Path.cwd())) or "none"
        raise UsageError(
            f"there is no module '{error.name}'; modules in the current folder: {there}"
        ) from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"importing '{name}' raised {type(error).__name__}: {error}") from error


def _dots(name: str) -> list[int]:
    return [i for i, letter in enumerate(name) if letter == "."] + [-1]


def _modules(folder: Path) -> list[str]:
    files = {path.stem for path in folder.glob("*.py") if path.stem.isidentifier()}
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    return sorted(files | packages)


def _factories(module: ModuleType) -> list[str]:
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    )
