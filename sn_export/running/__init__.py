"""Call a model in eval mode, as often as needed, and leave it as it was."""

from .draws import DRAWS, draws_note, require_draws
from .dynamic_shapes import DynamicDim, dynamic_axes, dynamic_dims, flat_shapes
from .input_set import (
    InputSet,
    as_input_sets,
    as_kwargs,
    is_random,
    random_like,
    random_sets,
    require_seen,
)
from .nested import make_distinct, output_names, paths_of_tensors, tensor_leaves
from .preservation import (
    Guarded,
    Preserved,
    preserved,
    preserved_globals,
    restore_container,
    without_trace,
)
from .reference import (
    RandomReferences,
    Reference,
    initialise_lazy,
    left_out_note,
    near_like,
    no_fused_attention,
    random_references,
    run_reference,
    run_usable,
)
from .tensor_memory import are_large, as_real_pairs, dense_parts, is_dense, is_large, same_bits
from .undo import ClosedOnExit, undo_on_exit, undoing
from .wrapped_models import find_entry, unwrap_model

__all__ = [
    "DRAWS",
    "ClosedOnExit",
    "DynamicDim",
    "Guarded",
    "InputSet",
    "Preserved",
    "RandomReferences",
    "Reference",
    "are_large",
    "as_input_sets",
    "as_kwargs",
    "as_real_pairs",
    "dense_parts",
    "draws_note",
    "dynamic_axes",
    "dynamic_dims",
    "find_entry",
    "flat_shapes",
    "initialise_lazy",
    "is_dense",
    "is_large",
    "is_random",
    "left_out_note",
    "make_distinct",
    "near_like",
    "no_fused_attention",
    "output_names",
    "paths_of_tensors",
    "preserved",
    "preserved_globals",
    "random_like",
    "random_references",
    "random_sets",
    "require_draws",
    "require_seen",
    "restore_container",
    "run_reference",
    "run_usable",
    "same_bits",
    "tensor_leaves",
    "undo_on_exit",
    "undoing",
    "unwrap_model",
    "without_trace",
]
