"""What an older torch cannot do: tests of it must fail there, and with the error that is named.

`conftest.py` marks them on a torch before ``since``: one that passes, or fails in another way, is a
failure. Nothing is skipped, and no version of torch is asked for anywhere else. An older
onnxruntime, which Python 3.10 has, stands here too, and the lowest safetensors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version

import pytest
from packaging.version import Version


@dataclass(frozen=True)
class Lack:
    """Something that torch, or another package, has since a version.

    Attributes:
        since: the first version that has it.
        what: what an older one lacks.
        error: how a test fails there, as a regular expression.
        tests: regular expressions of whole tests, by file and name as pytest prints them.
    """

    since: str
    what: str
    error: str
    tests: tuple[str, ...]
    package: str = "torch"

    @property
    def installed(self) -> str:
        """The version of the package that is installed."""
        return version(self.package)

    def explains(self, error: BaseException) -> bool:
        """Whether a test failed with it, or while it was handled."""
        now: BaseException | None = error
        while now is not None:
            if re.search(self.error, str(now)):
                return True
            now = now.__cause__ or now.__context__
        return False

    def mark(self) -> pytest.MarkDecorator:
        """Return the mark of a test that must fail."""
        return pytest.mark.xfail(
            raises=pytest.RaisesExc(check=self.explains),
            reason=f"{self.package} {self.installed}, before {self.since}: {self.what}",
            strict=True,
        )


def _refused(since: str, what: str, *tests: str) -> Lack:
    """Return what dynamo does not take before ``since``, as the package's own error says it."""
    error = rf"use torch {re.escape(since)} or newer: dynamo of \S+ does not take {re.escape(what)}"
    return Lack(since, f"{what}, by dynamo", error, tests)


SHARDS = Lack(
    since="2.13",
    what="the names by which shards of fully_shard are reached",
    # On 2.6 fully_shard itself does not run without CUDA.
    error=r"FSDPState\._fsdp_param_groups|'Stream' object has no attribute 'record_event'",
    tests=(
        r"running/test_torch_private\.py::test_torch_has_not_moved_a_name_of_shards",
        r"distributed/test_ranks\.py::test_recipe",
    ),
)
LACKS = (
    SHARDS,
    Lack(
        since="2.13",
        what="spectral norm of layers that are tensor parallel",
        error=r"Operator aten\.(mv|clamp_min)\.default does not have a sharding strategy",
        tests=(r"distributed/test_ranks\.py::test_ranks\[tensor-parallel-2\]",),
    ),
    _refused(
        "2.9",
        "BatchNorm",
        r"exporting/test_entry_points\.py::test_lazy_modules\[dynamo\]",
        r"exporting/test_folding\.py::test_plain_networks_are_not_touched\[dynamo-batch norm\]",
        r"exporting/test_golden\.py::test_graph_is_as_written_down\[generator-dynamo\]",
        r"exporting/test_restores\.py::test_forward_that_writes\[dynamo-AlwaysTraining\]",
        r"proving/test_divergence\.py::test_altered_initializer\[dynamo-.*",
        r"proving/test_divergence\.py::test_altered_weight_of_a_fused_module\[dynamo\]",
        r"proving/test_divergence\.py::test_export_that_does_not_prove\[dynamo-.*",
        r"proving/test_divergence\.py::test_modules_of_a_file_that_passes\[dynamo\]",
        r"proving/test_divergence\.py::test_no_trace_is_left\[dynamo\]",
        r"proving/test_divergence\.py::test_per_module_option_of_an_export\[dynamo\]",
        r"proving/test_pieces\.py::test_networks\[generator-dynamo\]",
        r"proving/test_verdicts\.py::test_fresh_networks_are_proved\[generator-dynamo\]",
    ),
    _refused(
        "2.9",
        "None among the outputs",
        r"exporting/test_calls\.py::test_names_of_outputs\[dynamo-None among them\]",
    ),
    _refused(
        "2.9",
        "a forward that copies into a tensor that it makes",
        r"exporting/test_networks\.py::test_encoder_graph_is_the_plain_one\[\w+-dynamo\]",
    ),
    _refused(
        "2.9",
        "a forward that writes a parameter",
        r"exporting/test_folding\.py::test_graph_is_that_of_the_plain_network"
        r"\[dynamo-IteratingConv-\w+\]",
        r"exporting/test_folding\.py::test_proof_stands_for_the_published_file\[dynamo\]",
        r"exporting/test_folding\.py::test_model_is_as_before\[dynamo-IteratingConv-\w+\]",
    ),
    Lack(
        since="2.9",
        what="a forward that computes with a dynamic size, by dynamo",
        error=r"the file made by the torchscript exporter does not reproduce the model",
        tests=(r"exporting/test_dynamic_shapes\.py::test_size_baked_in_by_tracing_is_found",),
    ),
    Lack(
        since="2.9",
        what="the operators that dynamo folds a normalisation from",
        error=r"'MatMul'\} <= .* and 25 == 16",
        tests=(
            r"exporting/test_folding\.py::test_report_and_warning_say_what_was_folded\[dynamo\]",
        ),
    ),
    Lack(
        since="2.9",
        what="the graphs that dynamo makes since, of opset 20",
        error=r"exported now",
        tests=(
            r"exporting/test_golden\.py::test_graph_is_as_written_down"
            r"\[(attention|projection|recurrent|residual)-dynamo\]",
        ),
    ),
    Lack(
        since="2.9",
        what="a refusal by torch.export of a named dimension that another one fixes",
        error=r"is declared dynamic \(b\), and the exporter has fixed it at 2",
        tests=(r"exporting/test_auto\.py::test_dimension_that_another_fixes_is_named\[\d-\w-b\]",),
    ),
    Lack(
        since="2.9",
        what="files of opset 17 by dynamo where an operator is another one since",
        error=r"opset 17 was asked for and the exporter wrote 18, in which Reduce\w+, .* differ",
        tests=(r"exporting/test_opsets\.py::test_the_oldest_opset_of_dynamo_splits_and_reduces",),
    ),
    Lack(
        since="2.9",
        what="the opset by which TorchScript writes these graphs",
        error=r"exported now",
        tests=(r"exporting/test_golden\.py::test_graph_is_as_written_down\[\w+-torchscript\]",),
    ),
    Lack(
        since="2.9",
        what="weight norm that TorchScript leaves for others to fold",
        error=r"DID NOT WARN.*ReparametrizationNotRecognisedWarning.*\n Emitted warnings: \[\]",
        tests=(
            r"exporting/test_folding\.py::test_a_known_reparametrization_is_left_on_request"
            r"\[weight_norm1-torchscript\]",
        ),
    ),
    Lack(
        since="2.9",
        what="bfloat16 by TorchScript, which needs opset 22",
        error=r"Type 'tensor\(bfloat16\)' of input parameter \(input\) of operator \(Conv\)",
        tests=(r"exporting/test_dtypes\.py::test_missing_kernel_is_named\[torchscript-dtype0\]",),
    ),
    Lack(
        since="2.9",
        what="BatchNorm by dynamo, which auto tries and tells",
        error=r"the dynamo exporter cannot export Critic: AttributeError: 'tuple'",
        tests=(
            r"cli/test_commands\.py::test_onnx_proves_and_writes",
            r"cli/test_commands\.py::test_onnx_parity_failure",
        ),
    ),
    Lack(
        since="2.9",
        what="BatchNorm by dynamo, without this package",
        error=r"'tuple' object has no attribute 'dtype'",
        tests=(r"exporting/test_spill\.py::test_the_file_is_the_same\[generator-dynamo\]",),
    ),
    Lack(
        since="2.9",
        what="a shape that dynamo knows as it exports",
        error=r"Extra items in the left set:\s+'Concat'\s*\Z",
        tests=(
            r"freezing/test_handwritten_models\.py::test_exported_graph_is_the_plain_one"
            r"\[dynamo\]",
        ),
    ),
    Lack(
        since="2.9",
        what="a writer of safetensors by ranks",
        error=r"HuggingFaceStorageWriter",
        tests=(r"checkpoints/test_readme_table\.py::test_row\[safetensors of several ranks .*",),
    ),
    Lack(
        since="2.7",
        what="Dim.AUTO with bounds",
        error=r"'_DimHint' object is not callable",
        tests=(r"exporting/test_dynamic_shapes\.py::test_notation\[\w+-bounded auto\]",),
    ),
    _refused(
        "2.13",
        "a forward that adds to its attributes or lists",
        r"exporting/test_entry_points\.py::test_method_that_calls_the_module\[dynamo\]",
        r"exporting/test_restores\.py::test_forward_that_writes\[dynamo-Replacing\]",
    ),
    Lack(
        since="0.8",
        what="float8_e4m3fnuz and float8_e5m2fnuz",
        error=r"assert (19|20) > 20",
        tests=(
            r"checkpoints/test_convert\.py::test_the_writer_makes_the_bytes_of_safetensors_own",
        ),
        package="safetensors",
    ),
    Lack(
        since="1.28",
        what="the inverse of a one-sided DFT",
        # The first up to 1.24, the other in 1.25 and 1.26.
        error=r"is_onesided and inverse attributes cannot be enabled|while running Mul node",
        tests=(r"proving/test_complex\.py::test_inverse_stft",),
        package="onnxruntime",
    ),
)


# Asked once: the version of a package is read from the disk.
_LACKED = [lack for lack in LACKS if Version(lack.installed) < Version(lack.since)]


def lacks_of(test: str) -> list[Lack]:
    """Return what the installed packages lack of what a test needs."""
    return [lack for lack in _LACKED if any(re.fullmatch(pattern, test) for pattern in lack.tests)]
