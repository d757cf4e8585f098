"""Spectral norms as people write them by hand, each pattern once, with small layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from networks import seed_torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm


def l2normalize(v: Tensor, eps: float = 1e-12) -> Tensor:
    return v / (v.norm() + eps)


class Wrapper(nn.Module):
    """The wrapper of SAGAN code: parameters for u, v; iterates in every forward, eval too."""

    def __init__(self, module: nn.Module, name: str = "weight", power_iterations: int = 1) -> None:
        super().__init__()
        self.module = module
        self.name = name
        self.power_iterations = power_iterations
        if not self._made_params():
            self._make_params()

    def _update_u_v(self) -> None:
        u = getattr(self.module, self.name + "_u")
        v = getattr(self.module, self.name + "_v")
        w = getattr(self.module, self.name + "_bar")
        height = w.data.shape[0]
        for _ in range(self.power_iterations):
            v.data = l2normalize(torch.mv(torch.t(w.view(height, -1).data), u.data))
            u.data = l2normalize(torch.mv(w.view(height, -1).data, v.data))
        sigma = u.dot(w.view(height, -1).mv(v))
        setattr(self.module, self.name, w / sigma.expand_as(w))

    def _made_params(self) -> bool:
        return hasattr(self.module, self.name + "_u")

    def _make_params(self) -> None:
        w = getattr(self.module, self.name)
        height = w.data.shape[0]
        width = w.view(height, -1).data.shape[1]
        u = nn.Parameter(w.data.new(height).normal_(0, 1), requires_grad=False)
        v = nn.Parameter(w.data.new(width).normal_(0, 1), requires_grad=False)
        u.data, v.data = l2normalize(u.data), l2normalize(v.data)
        w_bar = nn.Parameter(w.data)
        del self.module._parameters[self.name]
        self.module.register_parameter(self.name + "_u", u)
        self.module.register_parameter(self.name + "_v", v)
        self.module.register_parameter(self.name + "_bar", w_bar)

    def forward(self, *args: Any) -> Any:
        self._update_u_v()
        return self.module.forward(*args)


class MaskedWrapper(Wrapper):
    """Does more to the weight than divide it."""

    def _update_u_v(self) -> None:
        super()._update_u_v()
        weight = getattr(self.module, self.name)
        mask = torch.arange(weight.numel()).remainder(3).ne(0).view_as(weight)
        setattr(self.module, self.name, weight * mask)


class CallingWrapper(Wrapper):
    """Calls the layer, so that hooks on it run, and takes one argument by name."""

    def forward(self, x: Tensor) -> Any:
        self._update_u_v()
        return self.module(x)


class BufferWrapper(nn.Module):
    """Buffers, ``weight_orig``, another name for the layer, no v, sigma kept, u of shape (1, n)."""

    def __init__(self, layer: nn.Module, iterations: int = 2) -> None:
        super().__init__()
        self.layer = layer
        self.n_power_iterations = iterations
        weight = cast(nn.Parameter, layer.weight)
        del layer._parameters["weight"]
        layer.register_parameter("weight_orig", nn.Parameter(weight.data))
        layer.register_buffer("weight_u", F.normalize(torch.randn(1, weight.shape[0]), dim=1))
        layer.register_buffer("weight_sigma", torch.ones(()))

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight, u = cast(Tensor, self.layer.weight_orig), cast(Tensor, self.layer.weight_u)
        matrix = weight.flatten(1)
        if self.training:
            with torch.no_grad():
                for _ in range(self.n_power_iterations):
                    v = F.normalize(u @ matrix, dim=1)
                    u.copy_(F.normalize(v @ matrix.t(), dim=1))
        v = F.normalize(u @ matrix.detach(), dim=1)
        sigma = (u @ matrix @ v.t()).squeeze()
        cast(Tensor, self.layer.weight_sigma).copy_(sigma.detach())
        self.layer.weight = weight / sigma
        return self.layer(input, *args, **kwargs)


class ActivatedWrapper(Wrapper):
    """Does more than to call the layer, so its forward has to stay."""

    def forward(self, x: Tensor) -> Any:
        self._update_u_v()
        return F.leaky_relu(self.module(x * 2), 0.1) + self.power_iterations


class OwnVectorsWrapper(nn.Module):
    """Keeps u, v itself, on the wrapper, and only iterates in train mode."""

    u: Tensor
    v: Tensor

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        weight = cast(nn.Parameter, module.weight)
        del module._parameters["weight"]
        module.register_parameter("weight_bar", nn.Parameter(weight.data))
        matrix = weight.data.flatten(1)
        self.register_buffer("u", l2normalize(torch.randn(matrix.shape[0])))
        self.register_buffer("v", l2normalize(torch.randn(matrix.shape[1])))

    def forward(self, x: Tensor) -> Any:
        matrix = cast(Tensor, self.module.weight_bar).flatten(1)
        if self.training:
            with torch.no_grad():
                self.v = l2normalize(matrix.t() @ self.u)
                self.u = l2normalize(matrix @ self.v)
        sigma = self.u @ matrix @ self.v
        self.module.weight = cast(Tensor, self.module.weight_bar) / sigma
        return self.module(x)


class OwnSigmaWrapper(OwnVectorsWrapper):
    """Keeps sigma beside its vectors."""

    sigma: Tensor

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.register_buffer("sigma", torch.ones(1))

    def forward(self, x: Tensor) -> Any:
        matrix = cast(Tensor, self.module.weight_bar).flatten(1)
        self.sigma.copy_((self.u @ matrix @ self.v).detach())
        return super().forward(x)


class OwnWeightWrapper(nn.Module):
    """Keeps u, v and the raw weight itself, as torchgan does: parameters, iterated in eval too."""

    def __init__(self, module: nn.Module, name: str = "weight", power_iterations: int = 1) -> None:
        super().__init__()
        self.module = module
        self.name = name
        self.power_iterations = power_iterations
        w = cast(nn.Parameter, getattr(module, name))
        matrix = w.data.flatten(1)
        self.u = nn.Parameter(l2normalize(torch.randn(matrix.shape[0])), requires_grad=False)
        self.v = nn.Parameter(l2normalize(torch.randn(matrix.shape[1])), requires_grad=False)
        self.w_bar = nn.Parameter(w.data)
        del module._parameters[name]

    def forward(self, *args: Any) -> Any:
        matrix = self.w_bar.flatten(1)
        for _ in range(self.power_iterations):
            self.v.data = l2normalize(torch.mv(matrix.t(), self.u))
            self.u.data = l2normalize(torch.mv(matrix, self.v))
        sigma = self.u.dot(matrix.mv(self.v))
        setattr(self.module, self.name, self.w_bar / sigma)
        return self.module.forward(*args)


# ------------------------------------------------------------------ set by a pre-hook


class OldHook:
    """The hook of PyTorch 0.4: no v, no switch for the iteration, which eval mode runs too."""

    def __init__(self, name: str = "weight", n_power_iterations: int = 1) -> None:
        self.name = name
        self.n_power_iterations = n_power_iterations
        self.calls = torch.zeros(1)

    def compute_weight(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        self.calls += 1
        weight, u = getattr(module, self.name + "_orig"), getattr(module, self.name + "_u")
        matrix = weight.reshape(weight.size(0), -1)
        with torch.no_grad():
            for _ in range(self.n_power_iterations):
                v = F.normalize(torch.matmul(matrix.t(), u), dim=0, eps=1e-12)
                u = F.normalize(torch.matmul(matrix, v), dim=0, eps=1e-12)
        return weight / torch.dot(u, torch.matmul(matrix, v)), u

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        weight, u = self.compute_weight(module)
        setattr(module, self.name, weight)
        setattr(module, self.name + "_u", u)


class KeywordsHook(OldHook):
    """Is given the arguments that the layer is called with by keyword, too."""

    def __call__(self, module: nn.Module, inputs: Any, keywords: Any = None) -> None:
        super().__call__(module, inputs)


def old_spectral_norm(module: nn.Module, hook: Callable[..., None] | None = None) -> nn.Module:
    """Apply `OldHook`, or another that does the same."""
    weight = cast(nn.Parameter, module._parameters.pop("weight"))
    module.register_parameter("weight_orig", weight)
    module.register_buffer("weight_u", F.normalize(torch.randn(weight.size(0)), dim=0))
    module.weight = weight.data
    module.register_forward_pre_hook(hook or OldHook(), with_kwargs=isinstance(hook, KeywordsHook))
    return module


def set_weight(module: nn.Module, inputs: Any, name: str = "weight") -> None:
    weight, u = getattr(module, f"{name}_orig"), getattr(module, f"{name}_u")
    matrix = weight.flatten(1)
    v = F.normalize(matrix.detach().t() @ u, dim=0)
    if module.training:
        u.copy_(F.normalize(matrix.detach() @ v, dim=0))
    setattr(module, name, weight / (u @ matrix @ v))


class SpectralNormConv:
    """As in i-ResNet: a bound on the norm of the convolution as an operator, of one input size."""

    coeff, name = 0.9, "weight"
    input_dim, output_dim = (1, 3, 5, 5), (1, 4, 5, 5)

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        weight: Tensor = getattr(module, self.name + "_orig")
        u: Tensor = getattr(module, self.name + "_u")
        v: Tensor = getattr(module, self.name + "_v")
        padding: Any = module.padding
        if do_power_iteration:
            with torch.no_grad():
                back = F.conv_transpose2d(u.view(self.output_dim), weight, padding=padding)
                v.copy_(F.normalize(back.flatten(), dim=0))
                out = F.conv2d(v.view(self.input_dim), weight, padding=padding)
                u.copy_(F.normalize(out.flatten(), dim=0))
        sigma = u.clone() @ F.conv2d(v.clone().view(self.input_dim), weight, padding=padding).view(
            -1
        )
        getattr(module, self.name + "_sigma").copy_(sigma.detach())
        factor = torch.max(torch.ones(1, dtype=sigma.dtype), sigma / self.coeff)
        return weight / (factor + 1e-5)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        assert inputs[0].shape[1:] == self.input_dim[1:], "Input dims don't match actual input"
        setattr(module, self.name, self.compute_weight(module, module.training))


class StateDictHook:
    """Writes down the version of a hook, as its copies of torch's code do."""

    def __init__(self, fn: SpectralNormConv) -> None:
        self.fn = fn

    def __call__(self, module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
        metadata["spectral_norm_conv"] = {self.fn.name + ".version": 1}


def operator_norm(module: nn.Module, hook: SpectralNormConv | None = None) -> nn.Module:
    """Apply `SpectralNormConv` as its ``apply`` does."""
    hook = hook or SpectralNormConv()
    weight = cast(nn.Parameter, module._parameters.pop("weight"))
    module.register_parameter("weight_orig", weight)
    module.weight = weight.data
    for name, size in (("weight_u", 100), ("weight_v", 75)):
        module.register_buffer(name, F.normalize(torch.randn(size), dim=0))
    module.register_buffer("weight_sigma", torch.ones(1))
    module.register_forward_pre_hook(hook)
    module._register_state_dict_hook(StateDictHook(hook))
    return module


# ------------------------------------------------------------------ normalised in forward


def power_iteration(
    matrix: Tensor, us: list[Tensor], update: bool, eps: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The one of BigGAN, several singular values by Gram-Schmidt."""
    all_us: list[Tensor] = []
    vs: list[Tensor] = []
    svs: list[Tensor] = []
    for i, u in enumerate(us):
        with torch.no_grad():
            v = torch.matmul(u, matrix)
            for done in vs:
                v = v - (v * done).sum() * done
            v = F.normalize(v, eps=eps)
            vs.append(v)
            u = torch.matmul(v, matrix.t())
            for done in all_us:
                u = u - (u * done).sum() * done
            u = F.normalize(u, eps=eps)
            all_us.append(u)
            if update:
                us[i][:] = u
        svs.append(torch.squeeze(torch.matmul(torch.matmul(v, matrix.t()), u.t())))
    return svs, all_us, vs


class SN:
    """The mixin of BigGAN."""

    training: bool
    weight: nn.Parameter
    register_buffer: Callable[..., None]

    def __init__(
        self, num_svs: int, num_itrs: int, num_outputs: int, transpose: bool = False
    ) -> None:
        self.num_itrs = num_itrs
        self.num_svs = num_svs
        self.transpose = transpose
        self.eps = 1e-12
        for i in range(num_svs):
            self.register_buffer("u%d" % i, torch.randn(1, num_outputs))  # noqa: UP031
            self.register_buffer("sv%d" % i, torch.ones(1))  # noqa: UP031

    @property
    def u(self) -> list[Tensor]:
        return [getattr(self, "u%d" % i) for i in range(self.num_svs)]  # noqa: UP031

    @property
    def sv(self) -> list[Tensor]:
        return [getattr(self, "sv%d" % i) for i in range(self.num_svs)]  # noqa: UP031

    def W_(self) -> Tensor:
        matrix = self.weight.view(self.weight.size(0), -1)
        if self.transpose:
            matrix = matrix.t()
        svs = self.u and []
        for _ in range(self.num_itrs):
            svs, _us, _vs = power_iteration(matrix, self.u, update=self.training, eps=self.eps)
        if self.training:
            with torch.no_grad():
                for i, sv in enumerate(svs):
                    self.sv[i][:] = sv
        return self.weight / svs[0]


class SNConv2d(nn.Conv2d, SN):
    def __init__(self, *args: Any, num_svs: int = 1, num_itrs: int = 1, **kwargs: Any) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        SN.__init__(self, num_svs, num_itrs, self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            x, self.W_(), self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class SNLinear(nn.Linear, SN):
    def __init__(self, *args: Any, num_svs: int = 1, num_itrs: int = 1, **kwargs: Any) -> None:
        nn.Linear.__init__(self, *args, **kwargs)
        SN.__init__(self, num_svs, num_itrs, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W_(), self.bias)


class SNEmbedding(nn.Embedding, SN):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        nn.Embedding.__init__(self, *args, **kwargs)
        SN.__init__(self, 1, 1, self.num_embeddings)

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.W_())


class SNConvTranspose2d(nn.ConvTranspose2d):
    """As in torch-mimicry, transposed: sn_u, sn_sigma, sn_weights()."""

    sn_u: Tensor
    sn_sigma: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("sn_u", torch.randn(1, self.out_channels))
        self.register_buffer("sn_sigma", torch.ones(1))

    def sn_weights(self) -> Tensor:
        matrix = self.weight.transpose(0, 1).flatten(1)
        with torch.no_grad():
            v = F.normalize(self.sn_u @ matrix)
            u = F.normalize(v @ matrix.t())
        sigma = torch.mm(torch.mm(u, matrix), v.t())
        if self.training:
            with torch.no_grad():
                self.sn_sigma[:] = sigma
                self.sn_u[:] = u
        return self.weight / sigma

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.sn_weights(), self.bias, self.stride, self.padding)


class PropertyLinear(nn.Linear):
    """As in ports of Chainer code: a property, and u written in eval mode too."""

    u: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("u", torch.randn(1, self.out_features))

    @property
    def W_bar(self) -> Tensor:
        sigma, u = max_singular_value(self.weight, self.u)
        self.u.copy_(u)
        return self.weight / sigma

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W_bar, self.bias)


def max_singular_value(matrix: Tensor, u: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """The helper of such ports, a function of the module."""
    with torch.no_grad():
        for _ in range(steps):
            v = F.normalize(u @ matrix)
            u = F.normalize(v @ matrix.t())
    return torch.sum(F.linear(u, matrix.t()) * v), u


class ArgumentConv1d(nn.Conv1d):
    """The method takes the weight; u and v are parameters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        matrix = self.weight.detach().flatten(1)
        self.left_vector = nn.Parameter(F.normalize(torch.randn(matrix.shape[0]), dim=0), False)
        self.right_vector = nn.Parameter(F.normalize(torch.randn(matrix.shape[1]), dim=0), False)

    def spectral_normalize(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        if self.training:
            self.right_vector.data = F.normalize(matrix.data.t() @ self.left_vector.data, dim=0)
            self.left_vector.data = F.normalize(matrix.data @ self.right_vector.data, dim=0)
        return weight / (self.left_vector @ matrix @ self.right_vector)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.spectral_normalize(self.weight), self.bias)


class InlineConv2d(nn.Conv2d):
    """All in forward, with a helper function of the module."""

    u: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("u", torch.randn(1, self.out_channels))

    def forward(self, input: Tensor) -> Tensor:
        sigma, u = max_singular_value(self.weight.flatten(1), self.u)
        if self.training:
            self.u.copy_(u)
        weight = self.weight / sigma
        return F.conv2d(
            input,
            weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )


class UpdatingDense(nn.Module):
    """No layer of torch: forward calls a method that updates u, v, then one for the weight."""

    weight_u: Tensor
    weight_v: Tensor
    sigma: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.randn(outputs))
        self.register_buffer("weight_u", l2normalize(torch.randn(outputs)))
        self.register_buffer("weight_v", l2normalize(torch.randn(inputs)))
        self.register_buffer("sigma", torch.tensor(1.0))

    def update(self) -> None:
        with torch.no_grad():
            self.weight_v = l2normalize(self.weight.t() @ self.weight_u)
            self.weight_u = l2normalize(self.weight @ self.weight_v)
            self.sigma.copy_(self.weight_u @ self.weight @ self.weight_v)

    def normalized_weight(self) -> Tensor:
        return self.weight / (self.weight_u @ self.weight @ self.weight_v)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.update()
        return x @ self.normalized_weight().t() + self.bias


class AlwaysUpdatingDense(UpdatingDense):
    """Iterates in eval mode too, before the weight is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        self.update()
        return x @ self.normalized_weight().t() + self.bias


class PropertyDense(UpdatingDense):
    """Iterates in eval mode too, before it reads the weight as a property."""

    @property
    def normed(self) -> Tensor:
        return self.normalized_weight()

    def forward(self, x: Tensor) -> Tensor:
        self.update()
        return x @ self.normed.t() + self.bias


class ReadingDense(UpdatingDense):
    """Reads a singular vector for something else too."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.update()
        return x @ self.normalized_weight().t() + self.bias + 0 * self.weight_u


class OptionalUpdateDense(UpdatingDense):
    """As residual flows have it: the method iterates unless it is told not to."""

    def normalized_weight(self, update: bool = True) -> Tensor:
        if update:
            self.update()
        return super().normalized_weight()

    def forward(self, x: Tensor) -> Tensor:
        flat = 2 * x.float().view(x.shape[0], -1)
        return flat @ self.normalized_weight(update=self.training).t() + self.bias


class OperatorConv2d(nn.Module):
    """The norm of the convolution as an operator: vectors of the sizes of an input and output."""

    u: Tensor
    v: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.randn(outputs))
        self.register_buffer("u", torch.randn(1, outputs, 5, 5))
        self.register_buffer("v", torch.randn(1, inputs, 5, 5))

    def compute_weight(self, update: bool = True) -> Tensor:
        with torch.no_grad():
            if update:
                v = F.conv_transpose2d(self.u, self.weight, padding=1)
                self.v.copy_(v / torch.linalg.vector_norm(v))
                u = F.conv2d(self.v, self.weight, padding=1)
                self.u.copy_(u / torch.linalg.vector_norm(u))
        return self.weight / (self.u * F.conv2d(self.v, self.weight, padding=1)).sum()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.compute_weight(update=self.training), self.bias, padding=1)


class RawNameLinear(nn.Module):
    """``weight`` is a property over ``weight_orig``; in the plain layer it is the parameter."""

    u: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight_orig = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.randn(outputs))
        self.register_buffer("u", torch.randn(1, outputs))

    @property
    def weight(self) -> Tensor:
        sigma, u = max_singular_value(self.weight_orig, self.u, 2)
        if self.training:
            self.u.copy_(u)
        return self.weight_orig / sigma

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class ExactLinear(nn.Linear):
    """No vectors at all: the largest singular value, anew in each forward."""

    def normalized(self) -> Tensor:
        return self.weight / torch.linalg.matrix_norm(self.weight, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalized(), self.bias)


# ------------------------------------------------------------------ normalised by a child


class Normaliser(nn.Module):
    """A helper with the vectors, which is given the weight."""

    u: Tensor

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("u", torch.randn(rows))

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(matrix.t() @ self.u, dim=0)
            if self.training:
                self.u.copy_(F.normalize(matrix @ v, dim=0))
        return weight / torch.linalg.vector_norm(matrix @ v)


class HelpedConv2d(nn.Conv2d):
    """Takes no input but one that fits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_normalization = Normaliser(self.out_channels)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[1] != self.in_channels:
            raise ValueError(f"{self.in_channels} channels are wanted, got {input.shape[1]}")
        weight = self.weight_normalization(self.weight)
        return self._conv_forward(input, weight, self.bias)


class TorchHelpedConv2d(nn.Conv2d):
    """Calls torch's own parametrization by hand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sn = _SpectralNorm(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.sn(self.weight), self.bias)


class HelpedDense(nn.Module):
    """No layer of torch, and a method that asks the helper."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.randn(outputs))
        self.normalise = Normaliser(outputs)

    def effective_weight(self) -> Tensor:
        return cast(Tensor, self.normalise(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.effective_weight().t() + self.bias


# ------------------------------------------------------------------ overridden


class PaddedConv2d(SNConv2d):
    """Hands on another input to the forward that it overrides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class ScaledLinear(SNLinear):
    """Bounds the norm by another constant, in what both bases of `SNLinear` define."""

    def W_(self) -> Tensor:
        return 0.9 * super().W_()


class ScaledProperty(PropertyLinear):
    @property
    def W_bar(self) -> Tensor:
        return 0.9 * super().W_bar


class NamedBaseConv1d(ArgumentConv1d):
    """Names the class that it goes on in."""

    def forward(self, x: Tensor) -> Tensor:
        return ArgumentConv1d.forward(self, 2 * x)


class ActivatedCalling(CallingWrapper):
    def _update_u_v(self) -> None:
        super()._update_u_v()

    def forward(self, x: Tensor) -> Any:
        return F.leaky_relu(super().forward(x), 0.1)


class CountingHook(OldHook):
    count = 0

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        super().__call__(module, inputs)
        self.count += 1


@dataclass(frozen=True)
class Case:
    """A module with handwritten spectral norm, and the plain one in its place."""

    build: Callable[[], nn.Module]
    plain: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    tensor: str = "weight"  # in the layer
    layer: str = ""  # path of the layer that the weight belongs to
    kind: str = "mixin"

    def make(self, seed: int = 0) -> nn.Module:
        seed_torch(seed)
        return self.build()

    def x(self) -> Tensor:
        state = torch.get_rng_state()
        seed_torch(7)
        x = self.inputs()
        torch.set_rng_state(state)
        return x

    def run(self, model: nn.Module) -> Tensor:
        output = model(self.x())
        return cast(Tensor, output[0] if isinstance(output, tuple) else output)

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.tensor}".lstrip(".")


def _image() -> Tensor:
    return torch.randn(2, 3, 5, 5)


def _row() -> Tensor:
    return torch.randn(2, 3)


def _wrapped(
    wrapper: Callable[[nn.Module], nn.Module],
    build: Callable[[], nn.Module],
    inputs: Callable[[], Tensor],
    layer: str = "module",
    tensor: str = "weight",
) -> Case:
    return Case(lambda: wrapper(build()), build, inputs, tensor, layer, "wrapper")


def _conv() -> nn.Module:
    return nn.Conv2d(3, 4, 3, padding=1)


def _prehooked(make: Callable[[], Callable[..., None]]) -> Case:
    return Case(lambda: old_spectral_norm(_conv(), make()), _conv, _image, kind="prehook")


def _recurrent(module: nn.Module) -> nn.Module:
    return Wrapper(module, "weight_hh_l0")


CASES: dict[str, Case] = {
    "wrapper-conv": _wrapped(Wrapper, _conv, _image),
    "wrapper-linear": _wrapped(Wrapper, lambda: nn.Linear(3, 4), _row),
    "wrapper-no-bias": _wrapped(Wrapper, lambda: nn.Linear(3, 1, bias=False), _row),
    "wrapper-transposed": _wrapped(Wrapper, lambda: nn.ConvTranspose2d(3, 4, 2), _image),
    "wrapper-many-steps": _wrapped(lambda m: Wrapper(m, power_iterations=5), _conv, _image),
    "wrapper-calling": _wrapped(CallingWrapper, _conv, _image),
    "wrapper-buffers": _wrapped(BufferWrapper, _conv, _image, "layer"),
    "wrapper-activated": _wrapped(ActivatedWrapper, _conv, _image),
    "wrapper-masked": _wrapped(MaskedWrapper, _conv, _image),
    "wrapper-own-vectors": _wrapped(OwnVectorsWrapper, _conv, _image),
    "wrapper-own-sigma": _wrapped(OwnSigmaWrapper, _conv, _image),
    "wrapper-own-weight": _wrapped(OwnWeightWrapper, _conv, _image),
    "wrapper-own-weight-linear": _wrapped(
        OwnWeightWrapper, lambda: nn.Linear(3, 1, bias=False), _row
    ),
    "wrapper-lstm": _wrapped(
        _recurrent,
        lambda: nn.LSTM(3, 4),
        lambda: torch.randn(5, 2, 3),
        tensor="weight_hh_l0",
    ),
    "wrapper-overridden": _wrapped(ActivatedCalling, _conv, _image),
    "prehook": _prehooked(OldHook),
    "prehook-keywords": _prehooked(KeywordsHook),
    "prehook-function": _prehooked(lambda: set_weight),
    "prehook-overridden": _prehooked(CountingHook),
    "prehook-operator": Case(lambda: operator_norm(_conv()), _conv, _image, kind="prehook"),
    "biggan-conv": Case(lambda: SNConv2d(3, 4, 3, padding=1), _conv, _image),
    "biggan-linear": Case(lambda: SNLinear(3, 4), lambda: nn.Linear(3, 4), _row),
    "biggan-one-output": Case(lambda: SNLinear(3, 1), lambda: nn.Linear(3, 1), _row),
    "biggan-many": Case(
        lambda: SNConv2d(3, 4, 3, num_svs=3, num_itrs=2, stride=2, bias=False),
        lambda: nn.Conv2d(3, 4, 3, bias=False),
        _image,
    ),
    "biggan-embedding": Case(
        lambda: SNEmbedding(5, 3), lambda: nn.Embedding(5, 3), lambda: torch.arange(4)
    ),
    "mimicry-transposed": Case(
        lambda: SNConvTranspose2d(3, 4, 2), lambda: nn.ConvTranspose2d(3, 4, 2), _image
    ),
    "property": Case(lambda: PropertyLinear(3, 4), lambda: nn.Linear(3, 4), _row),
    "argument": Case(
        lambda: ArgumentConv1d(3, 4, 2),
        lambda: nn.Conv1d(3, 4, 2),
        lambda: torch.randn(2, 3, 5),
    ),
    "inline": Case(lambda: InlineConv2d(3, 4, 3, padding=1), _conv, _image),
    "updating": Case(lambda: UpdatingDense(3, 4), lambda: nn.Linear(3, 4), _row),
    "updating-always": Case(lambda: AlwaysUpdatingDense(3, 4), lambda: nn.Linear(3, 4), _row),
    "updating-property": Case(lambda: PropertyDense(3, 4), lambda: nn.Linear(3, 4), _row),
    "updating-reading": Case(lambda: ReadingDense(3, 4), lambda: nn.Linear(3, 4), _row),
    "updating-optional": Case(lambda: OptionalUpdateDense(3, 4), lambda: nn.Linear(3, 4), _row),
    "operator": Case(lambda: OperatorConv2d(3, 4), _conv, _image),
    "raw-name": Case(lambda: RawNameLinear(3, 4), lambda: nn.Linear(3, 4), _row),
    "exact": Case(lambda: ExactLinear(3, 4), lambda: nn.Linear(3, 4), _row),
    "helped": Case(lambda: HelpedConv2d(3, 4, 3, padding=1), _conv, _image),
    "helped-torch": Case(lambda: TorchHelpedConv2d(3, 4, 3, padding=1), _conv, _image),
    "helped-dense": Case(lambda: HelpedDense(3, 4), lambda: nn.Linear(3, 4), _row),
    "padded": Case(lambda: PaddedConv2d(3, 4, 3), _conv, _image),
    "scaled": Case(lambda: ScaledLinear(3, 4), lambda: nn.Linear(3, 4), _row),
    "scaled-property": Case(lambda: ScaledProperty(3, 4), lambda: nn.Linear(3, 4), _row),
    "named-base": Case(
        lambda: NamedBaseConv1d(3, 4, 2),
        lambda: nn.Conv1d(3, 4, 2),
        lambda: torch.randn(2, 3, 5),
    ),
}
