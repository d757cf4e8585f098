"""Contents of reports, as JSON holds them, for the tests of what is shown."""

from __future__ import annotations

from typing import Any

EDGES = [float(f"1e{decade}") for decade in range(-18, 7)]
NASTY = "</title><script>document.title='owned'</script>|`a`\n<img src=x onerror=alert(1)>&amp;"
LONG = "encoder.stages.1.blocks.3.residual.projection.convolution_with_a_long_name"


def output(name: str = "features", passed: bool = True, **entries: Any) -> dict[str, Any]:
    """Return the content of one output."""
    counts = [0] * 24
    counts[8:13] = [12, 130, 900, 241, 3]
    reason = "49 of 3136 elements are outside atol 0.00031 + rtol 0.0001 on random input 2"
    return {
        "name": name,
        "shape": [4, 16, 7, 7],
        "dtype": "float32",
        "max_abs": 5.96e-7 if passed else 0.0213,
        "max_rel": 2.28e-6 if passed else 1.4,
        "mean_abs": 4.1e-8,
        "worst_index": [1, 7, 3, 2],
        "worst_sample": "random input 2",
        "samples": 6,
        "rtol": 1e-4,
        "atol": 3.1e-4,
        "passed": passed,
        "is_comparable": True,
        "reason": "" if passed else reason,
        "median_abs": 2.9e-8,
        "p999_abs": 4.7e-7,
        "quantiles_are_exact": True,
        "fraction_outside": 0.0 if passed else 49 / 3136,
        "worst_expected": 0.0152,
        "worst_got": 0.015200596,
        "histogram": {"edges": EDGES, "counts": counts, "zeros": 411, "not_finite": 0},
        "verdict": "every element is within atol 0.00031 + rtol 0.0001 of the model"
        if passed
        else reason,
        "rounding": None,
        "pictures": [],
        **entries,
    }


def module(name: str, passed: bool = True, **entries: Any) -> dict[str, Any]:
    """Return the content of one call of a module."""
    error = 3e-8 if passed else 0.02
    return {
        "module": name,
        "type": "Conv2d",
        "max_abs": error,
        "max_rel": error,
        "passed": passed,
        "call": 0,
        "shape": [2, 4, 8, 8],
        "dtype": "float32",
        "value": f"/{name}/Conv",
        **entries,
    }


def frozen(name: str, **entries: Any) -> dict[str, Any]:
    """Return the content of one frozen tensor."""
    return {
        "module": name,
        "tensor": "weight",
        "kind": "parametrization",
        "shape": [64, 32, 3, 3],
        "dtype": "float32",
        "dim": 0,
        "eps": 1e-12,
        "n_power_iterations": 1,
        "sigma": 1.25,
        "is_applied": True,
        "sigma_exact": 1.2625,
        **entries,
    }


def content(passed: bool = True, name: str = LONG, **entries: Any) -> dict[str, Any]:
    """Return the content of a report in which untrusted names are ``name``."""
    modules = [module("stem"), module(name, passed), module("head", passed)]
    divergence = {
        "reason": f"the first module to differ is '{name}' (Conv2d), max_abs 0.02",
        "unmatched": [],
        "is_deterministic": True,
        "sample": "random input 2",
    }
    return {
        "schema": 1,
        "path": "critic.onnx" if passed else None,
        "exporter": "dynamo",
        "opset": 20,
        "parity": {
            "outputs": [output(name, passed), output("logits")],
            "samples": 6,
            "providers": ["CPUExecutionProvider"],
            "passed": passed,
            "modules": modules,
            "first_divergent": None if passed else name,
            "divergence": None if passed else divergence,
            "proof_dtype": None,
            "notes": [],
        },
        "frozen": [frozen(name), frozen("head", sigma_exact=None)],
        "versions": {"sn-export": "0.1.0", "torch": "2.13.0+cpu", "onnxruntime": "1.32.0"},
        "files": {"critic.onnx": {"bytes": 1234567, "sha256": "9f86d081" * 8}},
        "metadata": {"source": name},
        "target": "critic.onnx",
        "model": "Critic",
        "inputs": [
            {"name": name, "dtype": "float32", "shape": ["batch", 3, 64, 64]},
            {"name": "noise", "dtype": "int64", "shape": []},
        ],
        "folded": [],
        "attempts": [],
        "command": f"sn-export onnx critic.pt --model {name}",
        **entries,
    }
