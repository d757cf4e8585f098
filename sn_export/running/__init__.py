"""Call a model in eval mode, as often as needed, and leave it as it was."""

from .draws import DRAWS as DRAWS, describe_draws as describe_draws, require_draws as require_draws
from .dynamic_shapes import (
    DynamicDim as DynamicDim,
    Place as Place,
    find_dynamic_dims as find_dynamic_dims,
    flatten_shapes as flatten_shapes,
    make_dynamic_axes as make_dynamic_axes,
)
from .input_set import (
    InputSet as InputSet,
    as_input_sets as as_input_sets,
    as_kwargs as as_kwargs,
    require_seen as require_seen,
)
from .nested import (
    find_tensors as find_tensors,
    list_tensors as list_tensors,
    make_distinct as make_distinct,
    make_output_names as make_output_names,
)
from .preservation import (
    Guarded as Guarded,
    Preserved as Preserved,
    preserved as preserved,
    preserved_globals as preserved_globals,
    restore_container as restore_container,
    run_without_trace as run_without_trace,
)
from .random_inputs import (
    RandomReferences as RandomReferences,
    describe_left_out as describe_left_out,
    draw_near_like as draw_near_like,
    draw_random_like as draw_random_like,
    draw_random_sets as draw_random_sets,
    draw_references as draw_references,
    is_random as is_random,
    run_usable as run_usable,
)
from .reference import (
    Reference as Reference,
    find_entry as find_entry,
    initialise_lazy as initialise_lazy,
    name_type as name_type,
    no_fused_attention as no_fused_attention,
    run_reference as run_reference,
    unwrap_model as unwrap_model,
)
from .tensor_memory import (
    are_large as are_large,
    as_real_pairs as as_real_pairs,
    find_written as find_written,
    have_same_bits as have_same_bits,
    is_dense as is_dense,
    is_large as is_large,
    list_dense_parts as list_dense_parts,
)
from .torch_private import (
    ATTRIBUTES as ATTRIBUTES,
    Dropouts as Dropouts,
    OrthogonalLink as OrthogonalLink,
    OrthogonalMaps as OrthogonalMaps,
    SpectralNormLink as SpectralNormLink,
    TorchDispatchMode as TorchDispatchMode,
    TorchScriptNode as TorchScriptNode,
    WeightNormLink as WeightNormLink,
    call_without_subclasses as call_without_subclasses,
    find_newest_torchscript_opset as find_newest_torchscript_opset,
    get_parametrize_cache as get_parametrize_cache,
    import_checkpoint_records as import_checkpoint_records,
    pytree as pytree,
    rebuild as rebuild,
    safe_captures as safe_captures,
    setting_weights_aside as setting_weights_aside,
)
from .undo import ClosedOnExit as ClosedOnExit, undo_on_exit as undo_on_exit, undoing as undoing
