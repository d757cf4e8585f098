"""What the caller changes inside a block: its own survives, edits to frozen weights do not."""

from __future__ import annotations

import warnings

import pytest
import torch
from fingerprint import Fingerprint, assert_unchanged, contents, fingerprint, same_bits
from networks import KINDS, SoftSpectralNorm, images, net
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.nn.utils.spectral_norm import SpectralNorm

from sn_export import FrozenWeightChangedWarning, frozen_spectral_norm

each_kind = pytest.mark.parametrize("kind", KINDS)
EDITED = (
    "the frozen 'head.weight' was changed inside the block; the change is discarded. "
    "Change the model outside the block instead"
)
MOVED = (
    "the model was moved to another dtype or device while 'conv.weight', 'head.weight' were "
    "frozen; it is back as it was. Move it before entering the block, or move a copy made "
    "inside it"
)


def unchanged_but(before: Fingerprint, model: nn.Module, *words: str) -> list[str]:
    """The differences in which none of the words occurs."""
    differences = before.differences(fingerprint(model))
    assert differences, "the change itself must be visible"
    return [d for d in differences if not any(word in d for word in words)]


@each_kind
def test_hook_registered_inside_survives(kind: str) -> None:
    """A hook registered on a frozen module inside runs after the block, after the others."""
    model = net(kind)
    calls: list[str] = []
    with frozen_spectral_norm(model):
        pre = model.head.register_forward_pre_hook(lambda m, x: calls.append("pre"))
        post = model.head.register_forward_hook(lambda m, x, y: calls.append("post"))
    assert next(reversed(model.head._forward_pre_hooks)) == pre.id
    model(images())
    assert calls == ["pre", "post"]
    pre.remove()
    post.remove()
    model(images())
    assert calls == ["pre", "post"]


@each_kind
def test_attributes_set_inside_survive(kind: str) -> None:
    """Attributes, buffers and parameters added to a frozen module inside stay."""
    model = net(kind)
    names = list(model.state_dict())
    extra = nn.Parameter(torch.ones(2))
    with frozen_spectral_norm(model):
        model.head.note = "kept"
        model.head.register_buffer("seen", torch.zeros(1))
        model.head.register_parameter("gain", extra)
        model.head.add_module("child", nn.Identity())
    assert model.head.note == "kept"
    assert model.head.gain is extra
    assert isinstance(model.head.child, nn.Identity)
    assert set(model.state_dict()) == {*names, "head.seen", "head.gain"}
    assert list(model.head._parameters)[-1] == "gain"
    with frozen_spectral_norm(model):
        del model.head.note, model.head.seen, model.head.gain, model.head.child
    assert list(model.state_dict()) == names
    assert not hasattr(model.head, "note")


@each_kind
def test_attributes_stay_in_order(kind: str) -> None:
    """What a hook has set comes back before what is set inside, and where it was among others."""
    model = KINDS[kind](nn.Linear(3, 3))
    before = list(vars(model))
    with frozen_spectral_norm(model):
        model.extra = 1  # type: ignore[assignment]
    assert list(vars(model)) == [*before, "extra"]
    with frozen_spectral_norm(model):
        model.extra = 2  # type: ignore[assignment]
        del model.out_features
    before.remove("out_features")
    assert list(vars(model)) == [*before, "extra"]
    assert vars(model)["extra"] == 2


@each_kind
def test_replaced_bias_survives(kind: str) -> None:
    """A bias that is replaced inside, or taken away, is still so after the block, in its place."""
    model = net(kind)
    order = [name for name, _ in model.named_parameters()]
    bias = nn.Parameter(torch.ones(2))
    with frozen_spectral_norm(model):
        model.head.bias = bias
        model.conv.bias = None
    assert model.head.bias is bias
    assert model.conv.bias is None
    order.remove("conv.bias")
    assert [name for name, _ in model.named_parameters()] == order


@each_kind
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_mode_set_inside_survives(kind: str, mode: bool) -> None:
    """train() or eval() inside lasts, also in the parametrizations that were out of sight."""
    model = net(kind).train(not mode)
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        model.train(mode)
    assert all(module.training is mode for module in model.modules())
    assert unchanged_but(before, model, "training") == []


@each_kind
def test_mode_of_its_own_in_a_chain_is_left_alone(kind: str) -> None:
    """Modules whose mode differs from their parent's keep it where the parent's did not change."""
    model = net(kind)
    modules = list(model.modules())
    for index, module in enumerate(modules):
        module.training = index % 2 == 0
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        model(images())
    differences = before.differences(fingerprint(model))
    assert [d for d in differences if "training" in d] == []


@each_kind
def test_gradients_and_statistics_gathered_inside_survive(kind: str) -> None:
    """Backward passes and batch statistics inside reach what is not under spectral norm."""
    model = net(kind)
    with frozen_spectral_norm(model):
        model(images()).sum().backward()
        assert model.head.weight.grad is None
    assert model.head.bias.grad is not None
    assert model.norm.num_batches_tracked is not None
    assert int(model.norm.num_batches_tracked) == 1
    raw = [p for n, p in model.named_parameters() if "weight" in n and "norm." not in n]
    assert raw
    assert all(p.grad is None for p in raw)


def test_module_added_inside_survives() -> None:
    """A child appended to a container inside the block is there after it."""
    model = nn.Sequential(KINDS["parametrization"](nn.Linear(2, 2)))
    with frozen_spectral_norm(model):
        model.append(nn.ReLU())
        model[0] = model[0]
    assert [type(m).__name__ for m in model] == ["ParametrizedLinear", "ReLU"]


def edit_in_place(weight: nn.Parameter, head: nn.Linear) -> None:
    with torch.no_grad():
        weight.add_(1)


def edit_data(weight: nn.Parameter, head: nn.Linear) -> None:
    weight.data[0, 0] = 5


def edit_swapped_data(weight: nn.Parameter, head: nn.Linear) -> None:
    weight.data = torch.zeros_like(weight)


def edit_replaced(weight: nn.Parameter, head: nn.Linear) -> None:
    head.weight = nn.Parameter(torch.zeros_like(weight))


def edit_deleted(weight: nn.Parameter, head: nn.Linear) -> None:
    del head.weight


def edit_as_attribute(weight: nn.Parameter, head: nn.Linear) -> None:
    del head.weight
    head.weight = torch.zeros(2, 12)  # type: ignore[assignment]


def edit_as_buffer(weight: nn.Parameter, head: nn.Linear) -> None:
    del head.weight
    head.register_buffer("weight", torch.zeros(2, 12))


def edit_loaded(weight: nn.Parameter, head: nn.Linear) -> None:
    head.load_state_dict({"weight": torch.zeros(2, 12), "bias": torch.ones(2)})


def edit_assigned(weight: nn.Parameter, head: nn.Linear) -> None:
    head.load_state_dict({"weight": torch.zeros(2, 12), "bias": torch.ones(2)}, assign=True)


def edit_reset(weight: nn.Parameter, head: nn.Linear) -> None:
    head.reset_parameters()


EDITS = [
    edit_in_place,
    edit_data,
    edit_swapped_data,
    edit_replaced,
    edit_deleted,
    edit_as_attribute,
    edit_as_buffer,
    edit_loaded,
    edit_assigned,
    edit_reset,
]


@each_kind
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edits_of_a_frozen_weight_are_discarded_with_a_warning(kind: str, edit: object) -> None:
    """However a frozen weight is changed, it is as it was after the block, and one is told."""
    assert callable(edit)
    model = net(kind)
    before = fingerprint(model)
    with (
        pytest.warns(FrozenWeightChangedWarning) as caught,
        frozen_spectral_norm(model),
    ):
        edit(model.head.weight, model.head)
    assert [str(warning.message) for warning in caught] == [EDITED]
    assert caught[0].filename == __file__
    words = ["head bias", "head _parameters['bias']", "parameters: ", "state bytes", "rng torch"]
    bias_kept = edit in (edit_loaded, edit_assigned, edit_reset)
    if bias_kept:
        assert unchanged_but(before, model, *words) == []
    else:
        assert_unchanged(before, model)


@each_kind
def test_edit_of_the_weight_never_reaches_the_original(kind: str) -> None:
    """The frozen weight has memory of its own: zeroing it zeroes nothing else."""
    model = net(kind)
    copies = {name: contents(t) for name, t in model.state_dict().items()}
    with pytest.warns(FrozenWeightChangedWarning), frozen_spectral_norm(model):
        model.conv.weight.data.zero_()
        model.head.weight.data.zero_()
    assert {name: contents(t) for name, t in model.state_dict().items()} == copies


def test_hook_that_lends_its_own_memory_is_copied() -> None:
    """A subclass that returns a view of the raw weight does not give us the raw memory."""

    class Lending(SpectralNorm):
        def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
            weight = super().compute_weight(module, do_power_iteration)
            raw: Tensor = module.weight_orig  # type: ignore[assignment]
            return raw.view_as(raw) if raw.numel() else weight

    model = nn.utils.spectral_norm(nn.Linear(3, 3))
    for hook in model._forward_pre_hooks.values():
        hook.__class__ = Lending
    before = fingerprint(model)
    with pytest.warns(FrozenWeightChangedWarning), frozen_spectral_norm(model):
        model.weight.data.zero_()
    assert_unchanged(before, model)


def test_hook_that_returns_an_expanded_weight_is_made_dense() -> None:
    """A subclass whose value is not dense in memory is frozen at that value all the same."""

    class Expanding(SpectralNorm):
        def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
            return super().compute_weight(module, do_power_iteration)[:1].expand(64, 64)

    model = nn.utils.spectral_norm(nn.Linear(64, 64))
    for hook in model._forward_pre_hooks.values():
        hook.__class__ = Expanding
    model.eval()(torch.zeros(1, 64))
    expected = model.weight.detach().clone()
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        assert same_bits(model.weight, expected)
    assert_unchanged(before, model)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_model_moved_inside_is_back_as_it_was(kind: str, dtype: torch.dtype) -> None:
    """A model that is moved to another dtype inside comes back bit for bit, with a warning."""
    model = net(kind)
    model(images()).sum().backward()
    before = fingerprint(model)
    with (
        pytest.warns(FrozenWeightChangedWarning) as caught,
        frozen_spectral_norm(model),
    ):
        model.to(dtype)
        assert model.norm.weight.dtype is dtype
    assert [str(warning.message) for warning in caught] == [MOVED]
    assert_unchanged(before, model)


@each_kind
def test_recurrent_model_moved_inside_is_back_as_it_was(kind: str) -> None:
    """The flat weights of a recurrent module come back from another dtype as well."""
    model = nn.LSTM(3, 2)
    KINDS[kind](model, "weight_hh_l0")
    before = fingerprint(model)
    with pytest.warns(FrozenWeightChangedWarning, match="moved"), frozen_spectral_norm(model):
        model.double()
        model(torch.ones(2, 1, 3, dtype=torch.float64))
    assert_unchanged(before, model)


def test_no_warning_in_normal_use() -> None:
    """Reading, running, copying, saving and changing modes are no edits of a frozen weight."""
    for kind in KINDS:
        model = net(kind)
        with warnings.catch_warnings(), frozen_spectral_norm(model):
            warnings.simplefilter("error")
            model.eval()(images())
            model.train()(images()).sum().backward()
            model.zero_grad()
            model.state_dict()
            model.to("cpu").float()
            model.requires_grad_(False).requires_grad_(True)
            model.head.weight.numpy(force=True)
            model.head.extra_repr()


def test_soft_normalisation_logs_nothing_while_freezing() -> None:
    """A subclass that writes to a buffer in every forward pass does not do so for a block."""
    model = KINDS["subclass"](nn.Linear(3, 3))
    hook = next(iter(model._forward_pre_hooks.values()))
    assert type(hook) is SoftSpectralNorm
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        assert not any(name.startswith("weight_") for name in model.state_dict())
    assert float(model.weight_sigma) == 1.0
    assert_unchanged(before, model)


def test_hook_exchanged_inside_runs_after_spectral_norm() -> None:
    """A hook registered in the place of one removed inside still runs after spectral norm's."""
    linear = nn.Linear(3, 3)
    earlier = linear.register_forward_pre_hook(lambda module, inputs: None)
    spectral_norm(linear)
    own = next(reversed(linear._forward_pre_hooks))
    with frozen_spectral_norm(linear):
        earlier.remove()
        later = linear.register_forward_pre_hook(lambda module, inputs: None)
    assert list(linear._forward_pre_hooks) == [own, later.id]


@pytest.mark.parametrize("part", range(16))
def test_write_to_any_part_of_a_large_weight_is_noticed(part: int) -> None:
    """Past 4 KiB samples are compared: whatever covers a fifteenth of a weight is seen."""
    model = spectral_norm(nn.Linear(300, 200, bias=False)).eval()
    length = model.weight_orig.numel() // 15 + 64
    start = (model.weight_orig.numel() - length) * part // 15
    with pytest.warns(FrozenWeightChangedWarning, match="weight"), frozen_spectral_norm(model):
        model.weight.data.view(-1)[start : start + length] += 1


@pytest.mark.parametrize("end", [0, -1])
def test_write_to_either_end_of_a_large_weight_is_noticed(end: int) -> None:
    """The first element and the last are in the samples."""
    model = spectral_norm(nn.Linear(300, 200, bias=False)).eval()
    with pytest.warns(FrozenWeightChangedWarning, match="weight"), frozen_spectral_norm(model):
        model.weight.data.view(-1)[end] += 1
