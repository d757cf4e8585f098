"""Train with Lightning Fabric, and export on the way: DDP, or FSDP2 by its ModelParallelStrategy.

torchrun --standalone --nproc-per-node 2 with_fabric.py critic.onnx [--sharded]
"""

import sys

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import spectral_norm

from sn_export import export_onnx, frozen_spectral_norm


def build() -> nn.Sequential:
    return nn.Sequential(
        spectral_norm(nn.Linear(8, 64)), nn.ReLU(), spectral_norm(nn.Linear(64, 1))
    )


def shard(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh["data_parallel"])
    return model


strategy = ModelParallelStrategy(shard) if "--sharded" in sys.argv else "ddp"
accelerator = "gpu" if torch.cuda.is_available() else "cpu"
fabric = Fabric(accelerator=accelerator, devices=2, strategy=strategy)
fabric.launch()
torch.manual_seed(0)
critic = fabric.setup_module(build())
optimizer = fabric.setup_optimizers(torch.optim.Adam(critic.parameters()))
for step in range(4):
    optimizer.zero_grad()
    fabric.backward(critic(torch.randn(16, 8, device=fabric.device)).mean())
    optimizer.step()
    if step == 1:  # on every rank
        network, example = critic.module, torch.randn(4, 8, device=fabric.device)
        report = export_onnx(network, (example,), sys.argv[1], model_factory=build)
        with frozen_spectral_norm(network), torch.no_grad():
            frozen = network.eval()(example)
        assert torch.equal(frozen, network(example).detach())
        network.train()
        fabric.print(report)
fabric.barrier()
