"""When a file and its model differ, the first module to differ is named, and nobody is blamed.

It reaches inside for the strictness of a comparison: no two runtimes differ by so much on demand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from export_models import EXPORTERS, Head, NotANumber, assert_as_before, contents_of, file_of, rows
from fingerprint import fingerprint
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.spectral_norm import spectral_norm as hooked_spectral_norm

from sn_export import ParityError, check_parity, export_onnx
from sn_export.exporting import attempts as exporting
from sn_export.proving import ProofSettings, parity
from sn_export.proving.module_errors import ModuleCall, Strictness, compare_nearest
from sn_export.proving.parity import locate_divergence
from sn_export.running import as_input_sets, preserved, run_reference


class Block(nn.Module):
    """A residual block with a parameter of its own after the last module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.conv = spectral_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.shift = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        y: Tensor = self.conv(self.act(self.norm(x)))
        return x + y + self.shift


class Net(nn.Module):
    """Nested containers, a module used twice, a fused batch norm, one that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            hooked_spectral_norm(nn.Conv2d(1, 4, 3, bias=False)), nn.BatchNorm2d(4), nn.ReLU()
        )
        self.blocks = nn.ModuleList([Block(), Block()])
        self.act = nn.ReLU()
        self.head = nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(64, 3))
        assert isinstance(self.stem[1], nn.BatchNorm2d)
        self.stem[1].running_mean = torch.randn(4)
        with torch.no_grad():  # exporters keep equal initializers once
            for name, parameter in self.named_parameters():
                if "norm" in name or name == "blocks.1.shift":
                    parameter.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and scores."""
        y: Tensor = self.act(self.stem(x) - 0.5)
        for block in self.blocks:
            y = block(y)
        y = self.act(y)
        return y, self.head(y)


def _image(seed: int = 3) -> Tensor:
    return torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def _alter(path: Path, name: str, by: float = 0.25) -> None:
    """Add to one initializer of a file."""
    file = onnx.load(path)
    entry = next(i for i in file.graph.initializer if i.name == name)
    array = numpy_helper.to_array(entry).copy()
    array += by
    entry.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(file, path)


@pytest.fixture(scope="module", params=EXPORTERS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, bytes]:
    """A network and the bytes of its file."""
    torch.manual_seed(2)
    model = Net()
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    export_onnx(model, _image(), path, exporter=request.param)
    return model, path.read_bytes()


Exported = tuple[nn.Module, bytes]


@pytest.mark.parametrize(
    ("altered", "module", "kind"),
    [
        ("blocks.0.conv.weight", "blocks.0.conv", "Conv2d"),
        ("blocks.1.conv.bias", "blocks.1.conv", "Conv2d"),
        ("blocks.0.norm.weight", "blocks.0.norm", "LayerNorm"),
        ("blocks.0.shift", "blocks.0", "Block"),
        ("blocks.1.shift", "blocks.1", "Block"),
        ("head.2.bias", "head.2", "Linear"),
    ],
)
def test_altered_initializer(
    tmp_path: Path, exported: Exported, altered: str, module: str, kind: str
) -> None:
    """The module of an initializer altered deep inside is the first one marked."""
    model, content = exported
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    _alter(path, altered)
    report = check_parity(model, path, [_image(), _image(8)])
    assert not report.passed
    assert report.first_divergent == module
    divergence = report.divergence
    assert divergence is not None
    bad = next(entry for entry in report.modules if not entry.passed)
    assert (bad.module, bad.type) == (module, kind)
    assert f"the first module to differ is '{module}' ({kind}), max_abs" in divergence.reason
    assert str(report).endswith(divergence.reason)
    assert "what it is given" not in divergence.reason
    assert divergence.is_deterministic
    assert divergence.sample == next(o for o in report.outputs if not o.passed).worst_sample


class Idle(nn.Module):
    """Modules that do nothing, after an operator that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.same = nn.Dropout(), nn.Identity()
        self.first, self.last = nn.Linear(4, 4), spectral_norm(nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Return two numbers for each row."""
        y: Tensor = self.last(self.same(self.drop(F.relu(self.first(x)))))
        return y


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_modules_that_do_nothing_are_not_in_doubt(tmp_path: Path, exporter: Any) -> None:
    """Dropout and identity before the altered module hand on what they are given."""
    model, path = Idle().eval(), tmp_path / "net.onnx"
    export_onnx(model, rows(4), path, exporter=exporter)
    _alter(path, "last.bias")
    report = check_parity(model, path, [rows(4)])
    assert report.first_divergent == "last"
    assert report.divergence is not None
    assert "nothing can be told" not in report.divergence.reason


class Encoder(nn.Module):
    """Has methods, and children by key, but is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.ModuleDict(
            {"head": spectral_norm(nn.Linear(4, 4)), "act": nn.Tanh(), "q": nn.Linear(4, 4)}
        )

    def encode(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        y: Tensor = self.by["q"](self.by["act"](self.by["head"](x)))
        return y


class Uncalled(nn.Module):
    """Modules below others that are not called; one has the name of another elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.head = hooked_spectral_norm(nn.Linear(4, 4))
        self.encoders = nn.ModuleList([Encoder(), Encoder()])
        self.alone = Encoder()

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        x = self.head(x)
        for encoder in (*self.encoders, self.alone):
            assert isinstance(encoder, Encoder)
            x = x + encoder.encode(x)
        return x


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_altered_below_what_is_not_called(tmp_path: Path, exporter: Any) -> None:
    """A module reached by key or method, past parents that are not called, is named as well."""
    torch.manual_seed(0)
    model, path = Uncalled(), tmp_path / "net.onnx"
    x = rows(4)
    export_onnx(model, x, path, exporter=exporter)
    content = path.read_bytes()
    names = [entry.name for entry in onnx.load(path).graph.initializer]
    altered = [name for name in names if name.endswith(".bias")]
    assert len(altered) == 7
    for name in altered:
        path.write_bytes(content)
        _alter(path, name)
        assert check_parity(model, path, [x]).first_divergent == name.removesuffix(".bias")


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_cause_between_modules(tmp_path: Path, exporter: str) -> None:
    """Where a module is given other values already, the forward around it is named as the cause."""

    class Inner(Head):
        def prepare(self) -> None:
            self.shift = nn.Parameter(torch.tensor([1.0, -1.0, 0.5]))
            self.tail = nn.ModuleList([nn.Linear(3, 2)])

        def forward(self, x: Tensor) -> Any:
            return self.tail[0](self.layer(x).tanh() + self.shift)

    model, path = nn.Sequential(nn.ReLU(), Inner()), tmp_path / "net.onnx"
    export_onnx(model, rows(), path, exporter=exporter)
    content = path.read_bytes()
    _alter(path, "1.shift")
    report = check_parity(model, path, rows())
    assert report.first_divergent == "1.tail.0"
    assert str(report).endswith(
        "; what it is given differs already, so the cause lies before it, in the forward of '1' "
        "(Inner)"
    )
    path.write_bytes(content)
    _alter(path, "1.tail.0.bias")
    assert "what it is given" not in str(check_parity(model, path, rows()))


def test_altered_weight_of_a_fused_module(tmp_path: Path, exported: Exported) -> None:
    """Where a batch norm was fused into its convolution, the marked one or the reason says so."""
    model, content = exported
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    first = next(n for n in onnx.load(path).graph.node if n.op_type == "Conv")
    _alter(path, first.input[1])
    report = check_parity(model, path, _image())
    assert report.divergence is not None
    if report.first_divergent == "stem.0":
        assert report.divergence.reason.endswith(" on input")
    else:  # the fused node counts for the batch norm
        assert report.first_divergent == "stem.1"
        assert report.divergence.reason.endswith(
            "; nothing can be told of 'stem.0' before it, for want of a value in the file"
        )


def test_modules_of_a_file_that_passes(tmp_path: Path, exported: Exported) -> None:
    """On demand every module is compared, in the order in which they finish, and passes."""
    model, content = exported
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    assert check_parity(model, path, _image()).modules == ()
    report = check_parity(model, path, _image(), per_module=True)
    assert report.passed
    assert all(entry.passed for entry in report.modules)
    assert report.first_divergent is None
    assert report.divergence is not None
    assert report.divergence.reason.startswith("every module with a value in the file agrees on")
    paths = [entry.module for entry in report.modules]
    wanted = [
        "stem.2",
        "stem",
        *[f"blocks.{i}{name}" for i in (0, 1) for name in (".norm", ".act", ".conv", "")],
        "head.1",
        "head.2",
        "head",
        "",
    ]
    assert [path for path in paths if path in wanted] == wanted
    assert [entry.call for entry in report.modules if entry.module == "act"] == [0, 1]
    assert "head.0" in report.divergence.unmatched  # dropout does nothing
    types = {entry.module: entry.type for entry in report.modules}
    assert (types["blocks.0.conv"], types["blocks.0"], types[""]) == ("Conv2d", "Block", "Net")
    shapes = {entry.module: (entry.shape, entry.dtype) for entry in report.modules}
    assert shapes["head.2"] == ((2, 3), "float32")


def test_no_trace_is_left(tmp_path: Path, exported: Exported) -> None:
    """A comparison module by module leaves the model as it was, hooks and modes included."""
    model, content = exported
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    _alter(path, "head.2.bias")
    model.train()
    before = fingerprint(model)
    random = torch.get_rng_state()
    check_parity(model, path, _image())
    assert_as_before(before, model)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    assert contents_of(tmp_path).keys() == {"net.onnx"}


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_export_that_does_not_prove(
    tmp_path: Path, exporter: str, external: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ParityError names the module whose initializer went wrong on the way to the file."""
    real = exporting.write_onnx

    def altering(*args: Any) -> Any:
        made, path = real(*args), args[4]
        file = ir.load(path)
        value = file.graph.initializers["blocks.1.conv.weight"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * 1.5, name=value.name)
        ir.save(file, path, external_data=path.name + ".data" if external else None)
        return made

    monkeypatch.setattr(exporting, "write_onnx", altering)
    model = Net()
    before = fingerprint(model)
    with pytest.raises(ParityError) as caught:
        export_onnx(
            model, _image(), tmp_path / "net.onnx", exporter=exporter, external_data=external
        )
    assert caught.value.divergence is caught.value.report.divergence
    assert caught.value.divergence is not None
    assert caught.value.divergence.first == "blocks.1.conv"
    assert "the first module to differ is 'blocks.1.conv' (Conv2d)" in str(caught.value)
    assert contents_of(tmp_path) == {}
    assert_as_before(before, model)


class Repeated(nn.Module):
    """Calls its layer at first on zeros, as a flow that makes a sample part by part; then twice
    on the same values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(2, 3)
        for _ in range(3):
            y = self.layer(y) * x
        return y + self.layer(x) + self.layer(x.flip(0).flip(0))


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_call_that_was_folded_does_not_differ(tmp_path: Path, exporter: str) -> None:
    """A call that depends on no input has no value in the file, and is held against no other's."""
    path = tmp_path / "net.onnx"
    report = export_onnx(Repeated(), (rows(3),), path, exporter=exporter, per_module=True)
    compared = [(entry.module, entry.call, entry.passed) for entry in report.parity.modules]
    assert compared == [*(("layer", call, True) for call in range(1, 5)), ("", 0, True)]
    assert report.parity.divergence is not None
    assert report.parity.divergence.unmatched == ("layer",)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_per_module_option_of_an_export(tmp_path: Path, exporter: str) -> None:
    """``per_module=True`` fills the modules of an export that passes."""
    report = export_onnx(Net(), _image(), tmp_path / "net.onnx", exporter=exporter, per_module=True)
    assert {"stem.2", "blocks.1.conv", "head.2"} <= {e.module for e in report.parity.modules}
    assert all(entry.passed for entry in report.parity.modules)


class Noise(nn.Module):
    """Draws random numbers, also in eval mode."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with noise."""
        return self.draw(x)


_DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: x + torch.rand(2, 3),
    "randn_like": lambda x: x + torch.randn_like(x),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
}


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("draw", _DRAWS.values(), ids=_DRAWS)
def test_nondeterministic_model(
    tmp_path: Path, exporter: str, draw: Callable[[Tensor], Tensor]
) -> None:
    """A model that draws random numbers is told so, with the module; the export is not blamed."""
    model = nn.Sequential(Head(), Noise(draw), Head())
    before = fingerprint(model)
    random = torch.get_rng_state()
    with pytest.raises(ParityError, match="the model is not deterministic") as caught:
        export_onnx(model, rows(), tmp_path / "net.onnx", exporter=exporter)
    divergence = caught.value.divergence
    assert divergence is not None
    assert not divergence.is_deterministic
    assert divergence.first == "1"
    assert divergence.reason.startswith(
        "the model is not deterministic: it gives different outputs for the same input, first in "
        "'1' (Noise). No export can reproduce that"
    )
    assert "the first module to differ" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), random)
    assert_as_before(before, model)
    assert contents_of(tmp_path) == {}


class PicksAFrame(nn.Module):
    """Gives a layer a frame that it picks at random, as discriminators of videos do."""

    def __init__(self) -> None:
        super().__init__()
        self.acts = nn.ModuleList([nn.Tanh()])
        self.layer = spectral_norm(nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        frame = int(torch.randint(0, x.shape[1], (1,)))
        out: Tensor = self.layer(self.acts[0](x[:, frame]))
        return out


@pytest.mark.parametrize("within", [False, True])
def test_what_is_given_at_random(tmp_path: Path, within: bool) -> None:
    """Not the first layer that differs is named, where it is given other values, but its caller."""
    model = nn.Sequential(PicksAFrame()) if within else PicksAFrame()
    x = torch.randn(2, 1000, 6)
    with pytest.raises(ParityError) as caught:
        export_onnx(model, (x,), tmp_path / "net.onnx", exporter="torchscript", samples=0)
    divergence = caught.value.divergence
    assert divergence is not None and not divergence.is_deterministic
    assert divergence.first == ("0" if within else "")
    whose = "'0' (PicksAFrame)" if within else "the model itself (PicksAFrame)"
    assert f"first in the forward of {whose}." in divergence.reason


def test_nan_is_not_taken_for_chance(tmp_path: Path) -> None:
    """A model that answers NaN every time is deterministic, and the layer is named."""
    with pytest.raises(ParityError) as caught:
        export_onnx(nn.Sequential(Head(), NotANumber()), rows(), tmp_path / "net.onnx")
    divergence = caught.value.divergence
    assert divergence is not None
    assert divergence.is_deterministic
    assert divergence.first == "1.layer"
    assert (
        "the model itself gives NaN on the example input, first in '1.layer'" in divergence.reason
    )


def test_file_from_elsewhere(tmp_path: Path) -> None:
    """Where no value of the file names a module, it is said that nothing can be told."""
    node = helper.make_node("Identity", ["x"], ["y"])
    report = check_parity(Head(), file_of(tmp_path / "one.onnx", [node]), rows())
    assert not report.passed
    assert report.first_divergent is None
    assert report.divergence is not None
    assert report.divergence.reason == (
        "cannot tell where: no value of the file could be matched with a module"
    )
    assert report.divergence.unmatched == ("layer",)
    assert [entry.module for entry in report.modules] == [""]


@pytest.mark.parametrize("text", ["[", "3", "['', 5, 'x']", "__import__('os')", "['a.b.c', 'x']"])
def test_hostile_metadata(tmp_path: Path, text: str) -> None:
    """Scopes that are no list of modules of the model are passed over, and never run."""
    node = helper.make_node("Identity", ["x"], ["y"], name="/layer.layer/../x")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text)
    report = check_parity(Head(), file_of(tmp_path / "one.onnx", [node]), rows())
    assert report.divergence is not None
    assert report.divergence.reason.startswith("cannot tell where")


def test_model_that_runs_only_once(tmp_path: Path) -> None:
    """A model that fails when it is run again keeps its report, without modules."""

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answers: Iterator[Tensor] = iter([torch.zeros(2, 3)])

        def forward(self, x: Tensor) -> Tensor:
            return next(self.answers)

    node = helper.make_node("Identity", ["x"], ["y"])
    report = check_parity(Once(), file_of(tmp_path / "one.onnx", [node]), rows())
    assert not report.passed
    assert report.modules == ()
    assert report.divergence is not None
    assert report.divergence.reason.startswith("cannot tell where: run again, the model fails")


def test_difference_that_optimisations_make(tmp_path: Path) -> None:
    """Where the file agrees once it runs without optimisations, these are named, no module."""
    model, path = Head(), tmp_path / "net.onnx"
    report = export_onnx(model, rows(), path, exporter="torchscript").parity
    failed = dataclasses.replace(report.outputs[0], passed=False, worst_sample="input")
    report = dataclasses.replace(report, outputs=(failed,))
    with preserved(model) as state:
        references = [run_reference(model, state, one) for one in as_input_sets(model, rows())]
        found = locate_divergence(report, model, state, path, references, ProofSettings())
    assert found.first_divergent is None
    assert found.divergence is not None
    assert found.divergence.reason.startswith(
        "without onnxruntime's graph optimisations the outputs agree on input"
    )


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_output_that_nothing_reads(tmp_path: Path, exporter: str) -> None:
    """A module whose other outputs the network drops is compared by those it keeps."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4)
            self.head = spectral_norm(nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Any:
            _, (hidden, _) = self.lstm(x)
            return self.head(hidden)

    model, path = Last(), tmp_path / "net.onnx"
    x = torch.randn(5, 2, 3)
    report = export_onnx(model, x, path, exporter=exporter, per_module=True)
    assert [entry.module for entry in report.parity.modules] == ["lstm", "head", ""]
    assert all(entry.passed for entry in report.parity.modules)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_outputs_in_the_wrong_order(tmp_path: Path, exporter: str) -> None:
    """Two outputs of one shape that changed places are no module's fault, and do not pass."""

    class Two(Head):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y: Tensor = self.layer(x)
            return y, y.abs() + 1.0

    model, path = Two(), tmp_path / "net.onnx"
    export_onnx(model, rows(), path, exporter=exporter)
    file = onnx.load(path)
    first, second = (
        onnx.ValueInfoProto.FromString(o.SerializeToString()) for o in file.graph.output
    )
    file.graph.output[0].CopyFrom(second)
    file.graph.output[1].CopyFrom(first)
    onnx.save(file, path)
    report = check_parity(model, path, rows())
    assert report.first_divergent == ""
    assert report.divergence is not None
    assert "the difference arises in the forward of the model itself (Two)" in (
        report.divergence.reason
    )


def test_nearest_value_of_large_ones() -> None:
    """Values that agree in all samples but one element are told apart by that element."""
    wanted = torch.randn(30_000)
    other = wanted.clone()
    other[10_001] += 1.0
    noisy = wanted + 1e-6
    call = ModuleCall("m", "M", 0, [wanted])
    strictness = Strictness()
    for names in (["other", "noisy"], ["noisy", "other"]):
        values = {name: {"other": other, "noisy": noisy}[name] for name in names}
        found = compare_nearest(call, names, values, strictness)
        assert found is not None
        assert (found.value, found.passed) == ("noisy", True)
    found = compare_nearest(call, ["other"], {"other": other}, strictness)
    assert found is not None
    assert (found.max_abs, found.passed) == (pytest.approx(1.0, abs=1e-6), False)
    assert compare_nearest(call, ["none"], {}, strictness) is None
    assert compare_nearest(call, ["short"], {"short": wanted[:5]}, strictness) is None


class RawReader(nn.Module):
    """Reads a raw weight by `parameters()`, as U-GAT-IT's discriminator does."""

    def __init__(self) -> None:
        super().__init__()
        self.score = hooked_spectral_norm(nn.Linear(4, 1, bias=False))
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores, and the features weighted by what should be the weight."""
        x = self.body(x)
        return self.score(x), x * next(iter(self.score.parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_reads_the_raw_weight(tmp_path: Path, training: bool) -> None:
    """No exporter is blamed: the model itself differs once frozen, and is as before afterwards."""
    model = RawReader().train(training)
    model(rows(4))
    before = fingerprint(model)
    with pytest.raises(ParityError, match="read the module's 'weight' instead") as caught:
        export_onnx(model, rows(4), tmp_path / "net.onnx")
    assert caught.value.divergence is not None
    assert "the model's own outputs differ as well" in caught.value.divergence.reason
    assert caught.value.export is not None
    assert caught.value.export.parity.divergence == caught.value.divergence
    assert_as_before(before, model)
    assert list(tmp_path.iterdir()) == []


class Inner(nn.Module):
    """Returns what a function makes of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Around(nn.Module):
    """Brings the output of `Inner` back to dense real numbers."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.inner = Inner(function)
        self.back = back
        self.layer = spectral_norm(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.back(self.inner(x)))
        return out


_NOT_DENSE: dict[str, tuple[Any, ...]] = {
    "sparse": (lambda x: x.to_sparse(), lambda x: x.to_dense(), []),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: x.dequantize(),
        [],
    ),
    "complex": (lambda x: torch.fft.fft(x).conj(), lambda x: x.real, ["inner"]),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("kind", _NOT_DENSE)
def test_modules_that_return_no_dense_tensor(tmp_path: Path, kind: str) -> None:
    """A module whose output no file can hold is left out; complex numbers are compared as pairs."""
    function, back, compared = _NOT_DENSE[kind]
    model, plain = Around(function, back), Around(lambda x: x, lambda x: x)
    if kind == "complex":
        export_onnx(model, rows(), tmp_path / "net.onnx", exporter="dynamo")
        report = check_parity(model, tmp_path / "net.onnx", rows(), per_module=True)
        assert report.passed
    else:  # no exporter takes sparse tensors
        plain.load_state_dict(model.state_dict())
        export_onnx(plain, rows(), tmp_path / "net.onnx", exporter="dynamo")
        report = check_parity(model, tmp_path / "net.onnx", rows(), per_module=True, atol=0.1)
        assert report.divergence is not None and report.divergence.unmatched == ("inner",)
    assert [entry.module for entry in report.modules] == [*compared, "layer", ""]
    assert all(entry.passed for entry in report.modules)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_fused_attention_is_blamed(tmp_path: Path) -> None:
    """Where only torch's fused attention makes zeros at padding, that is what is said."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    spectral_norm(layer.linear1)
    model = nn.TransformerEncoder(layer, 1)
    mask = torch.tensor([[False, False, True], [False] * 3])
    before = fingerprint(model)
    with pytest.raises(ParityError, match="without torch's fused attention") as caught:
        export_onnx(
            model,
            torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)),
            tmp_path / "net.onnx",
            exporter="torchscript",
            kwargs={"src_key_padding_mask": mask},
            samples=0,
        )
    assert "set_fastpath_enabled(False)" in str(caught.value)
    assert_as_before(before, model)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_comparison_of_modules_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever error it ends with, the proof has failed and says so."""

    def failing(*args: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(parity, "locate", failing)
    with pytest.raises(ParityError, match="cannot tell where: RuntimeError: no such luck"):
        export_onnx(NotANumber(), rows(), tmp_path / "net.onnx", exporter="torchscript")
