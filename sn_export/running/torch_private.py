"""torch's private names: what the package uses of torch that torch may move without notice.

Objects and functions are imported here and nowhere else. Attributes are read where they are
needed; `ATTRIBUTES` lists them by the class that has them. A test holds that torch has each of
these names, and that the package uses no other. Names within the files that `torch.save` writes are
part of a format, and stand in ``checkpoints/pickle_globals.py``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.dropout import _DropoutNd as Dropouts
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import (
    _OrthMaps as OrthogonalMaps,
    _Orthogonal as OrthogonalLink,
    _SpectralNorm as SpectralNormLink,
    _WeightNorm as WeightNormLink,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes as disable_dispatch_modes,
    _get_current_dispatch_mode_stack as dispatch_modes,
    _pop_mode as pop_dispatch_mode,
)

from .undo import undo_on_exit, undoing

__all__ = [
    "ATTRIBUTES",
    "SAFE_SOFTMAX",
    "Dropouts",
    "OrthogonalLink",
    "OrthogonalMaps",
    "SpectralNormLink",
    "TorchDispatchMode",
    "TorchScriptNode",
    "WeightNormLink",
    "call_without_subclasses",
    "disable_dispatch_modes",
    "dispatch_modes",
    "find_newest_torchscript_opset",
    "get_hooks_of_all_modules",
    "get_original",
    "get_parametrize_cache",
    "import_checkpoint_records",
    "pop_dispatch_mode",
    "pytree",
    "rebuild",
    "safe_captures",
    "set_version",
    "setting_weights_aside",
]

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "Module": (
        "_backward_hooks",
        "_buffers",
        "_compiled_call_impl",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_load_from_state_dict",
        "_load_state_dict_post_hooks",
        "_load_state_dict_pre_hooks",
        "_modules",
        "_non_persistent_buffers_set",
        "_parameters",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
    ),
    "state dict": ("_metadata",),
    "lazy module that never ran": ("_initialize_hook",),
    "RNNBase": ("_flat_weight_refs", "_flat_weights", "_flat_weights_names"),
    "SpectralNormLink": ("_reshape_weight_to_matrix", "_u", "_v"),
    "BasePruningMethod": ("_tensor_name",),
    "compiled module": ("_orig_mod",),
    "compiled method": ("_torchdynamo_orig_callable",),
    "Tensor": ("_version",),
    "sparse Tensor": ("_indices", "_values"),
    "OpOverload": ("_schema",),
    # A class under fully_shard lacks what its first forward adds, and what few settings add.
    "FSDPModule": ("_get_fsdp_state",),
    "FSDPState": ("_fsdp_param_groups", "_comm_ctx", "_is_root", "_state_ctx"),
    "FSDPStateContext": ("all_states", "iter_forward_root"),
    "FSDPCommContext, later": ("post_forward_order",),
    "FSDPParamGroup": (
        "_module_to_pre_save_state_dict_hook_handle",
        "_partial_reduce_output",
        "_post_forward_indices",
        "_to_sharded",
        "comm_ctx",
        "fsdp_params",
        "lazy_init",
        "mesh_info",
        "post_forward_mesh_info",
    ),
    "FSDPParam": (
        "_module_info",
        "_orig_param_uid",
        "_orig_size",
        "_post_load_hook_handle",
        "_setattr_on_modules",
        "_sharded_param_data",
        "all_gather_outputs",
        "fsdp_placement",
        "mesh_info",
        "padded_sharded_param_size",
        "reset_sharded_param",
        "sharded_param",
        "to_sharded_dtensor",
        "to_unsharded",
    ),
    "FSDPParam, later": ("_param_fqn", "_unsharded_param", "param_dtype"),
}

_ARGUMENT = 256  # elements at most in shapes, axes and the like, by whose values shapes differ
SAFE_SOFTMAX: Any = torch.ops.aten._safe_softmax.default  # of attention with a mask
TorchScriptNode: Any = torch._C.Node
call_without_subclasses: Any = torch._C._disabled_torch_function_impl
rebuild: Any = torch._utils  # has the functions that files of torch.save name


def get_parametrize_cache() -> dict[tuple[int, str], Tensor | None]:
    """Return the weights that ``parametrize.cached()`` keeps, by id of module and name.

    torch replaces the dictionary at its exit.
    """
    return parametrize._cache


def set_version(tensor: Tensor, version: int) -> None:
    """Set the counter of in-place writes to ``tensor``, which autograd checks."""
    setter: Any = torch._C._autograd._unsafe_set_version_counter
    if torch.__version__ >= "2.7":  # compared as versions
        setter((tensor,), (version,))
    else:  # it takes one tensor there
        setter(tensor, version)


def get_hooks_of_all_modules() -> list[dict[int, Any]]:
    """Return the dictionaries of hooks that run for every module."""
    names = vars(torch.nn.modules.module).items()
    return [
        value for name, value in names if name.startswith("_global_") and isinstance(value, dict)
    ]


def find_newest_torchscript_opset() -> int:
    """Return the newest opset that the TorchScript exporter writes."""
    newest: int = torch.onnx._constants.ONNX_MAX_OPSET
    return newest


def get_original(module: nn.Module) -> nn.Module | None:
    """Return the module behind one that `torch.compile` returned, None for any other.

    Importing torch's compiler takes longer than all else here, and without it nothing can have
    been compiled; so its class is looked for, not imported.
    """
    kind = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    if kind is None or not isinstance(module, kind):
        return None
    original: nn.Module | None = module._modules["_orig_mod"]
    return original


def import_checkpoint_records() -> tuple[Any, Any]:
    """Return two classes in the metadata of torch.distributed.checkpoint, which takes a moment.

    They are the place of a record in a file, and the enumeration of memory formats.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    return _StorageInfo, _MEM_FORMAT_ENCODING


@contextmanager
def safe_captures() -> Iterator[None]:
    """Let dynamo fail where torch.export does, and where its next step would end the process.

    torch 2.6 would trace the forward then, which takes the side of an ``if`` that the example
    takes, without a word. Where a forward reads ``weight.data``, a strict capture keeps a fake
    tensor as a constant, and decomposing that reads memory which is not there.
    """
    from torch.onnx._internal.exporter import _capture_strategies as known

    before = known.CAPTURE_STRATEGIES
    known.CAPTURE_STRATEGIES = tuple(
        _refuse_fakes(strategy)
        for strategy in before
        if strategy.__name__.startswith("TorchExport")
    )
    try:
        yield
    finally:
        known.CAPTURE_STRATEGIES = before


def _refuse_fakes(strategy: type) -> type:
    class Checked(strategy):  # type: ignore[misc]
        def _capture(self, *args: Any, **kwargs: Any) -> torch.export.ExportedProgram:
            program: torch.export.ExportedProgram = super()._capture(*args, **kwargs)
            if any(isinstance(constant, FakeTensor) for constant in program.constants.values()):
                raise RuntimeError("there is a fake tensor in the exported program")
            return program

    Checked.__name__ = strategy.__name__  # which torch's report of an export shows
    return Checked


@undoing
def setting_weights_aside() -> Iterator[dict[str, Tensor]]:
    """Let the TorchScript exporter of this thread write empty tensors in the place of weights.

    The weights are in the dictionary, by name. torch would copy them to infer shapes, twice, into a
    message, into a second one, parse it, and copy them into the file; and no message holds 2 GB.
    """
    weights: dict[str, Tensor] = {}
    torch_c: Any = torch._C
    thread = threading.get_ident()
    write, infer = torch_c.Graph._export_onnx, torch_c._jit_pass_onnx_graph_shape_type_inference

    def write_bare(graph: Any, initializers: Mapping[str, Tensor], *options: Any) -> Any:
        if threading.get_ident() == thread:
            weights.update(initializers)
            initializers = {name: weight.new_empty(0) for name, weight in weights.items()}
        return write(graph, initializers, *options)

    def infer_bare(graph: Any, initializers: Mapping[str, Any], *options: Any) -> None:
        if threading.get_ident() == thread:
            initializers = {
                name: entry
                for name, entry in initializers.items()
                if not isinstance(entry, Tensor)  # packed weights of quantised layers
                or entry.numel() <= _ARGUMENT
            }
        infer(graph, initializers, *options)

    def undo() -> None:
        torch_c.Graph._export_onnx = write
        torch_c._jit_pass_onnx_graph_shape_type_inference = infer

    with undo_on_exit(undo):
        torch_c.Graph._export_onnx = write_bare
        torch_c._jit_pass_onnx_graph_shape_type_inference = infer_bare
        yield weights
