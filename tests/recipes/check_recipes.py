"""Run the recipes for several ranks with the packages that they are for, and print a table.

Run by ``scripts/test --recipes``. Each trains on two ranks of this machine, exports in the middle,
holds that outputs inside the block are those outside, and trains on. Ends with 1 if one fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).parent
RECIPES = {
    ("accelerate", "DDP"): ("with_accelerate.py",),
    ("accelerate", "FSDP2"): ("check_recipes.py", "--accelerate-fsdp2"),
    ("lightning-fabric", "DDP"): ("with_fabric.py",),
    ("lightning-fabric", "FSDP2, ModelParallelStrategy"): ("with_fabric.py", "--sharded"),
}


def main() -> int:
    """Print the table."""
    if "--accelerate-fsdp2" in sys.argv:
        shard_with_accelerate(sys.argv[1])
        return 0
    print("| package | way | result |\n| --- | --- | --- |")
    failed = 0
    for (package, way), (script, *options) in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "critic.onnx"
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            done = subprocess.run(
                [sys.executable, *launcher, str(HERE / script), str(path), *options],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            is_right = done.returncode == 0 and path.exists() and "proved" in done.stdout
        if not is_right:
            failed += 1
            print(done.stderr[-3000:], file=sys.stderr)
        result = "proved, exact in the block, trains on" if is_right else "FAILED"
        print(f"| {package} {version(package)} | {way} | {result} |", flush=True)
    print(f"\ntorch {torch.__version__}; failed: {failed}")
    return bool(failed)


def shard_with_accelerate(path: str) -> None:
    """Run the recipe under Accelerate's FSDP2, which Accelerate itself chooses on GPUs alone."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType
    from with_accelerate import train

    accelerator = Accelerator(cpu=True)
    accelerator.state.__dict__["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["ParametrizedLinear"],
        cpu_ram_efficient_loading=False,
    )
    train(accelerator, path)


if __name__ == "__main__":
    sys.exit(main())
