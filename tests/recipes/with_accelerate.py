"""Train with Accelerate, and export on the way: DDP, or FSDP2 where the launcher asks for it.

torchrun --standalone --nproc-per-node 2 with_accelerate.py critic.onnx
"""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from sn_export import export_onnx, frozen_spectral_norm


def build() -> nn.Sequential:
    return nn.Sequential(
        spectral_norm(nn.Linear(8, 64)), nn.ReLU(), spectral_norm(nn.Linear(64, 1))
    )


def train(accelerator: Accelerator, path: str) -> None:
    torch.manual_seed(0)
    critic = build()
    optimizer = torch.optim.Adam(critic.parameters())
    critic, optimizer = accelerator.prepare(critic, optimizer)
    for step in range(4):
        optimizer.zero_grad()
        accelerator.backward(critic(torch.randn(16, 8, device=accelerator.device)).mean())
        optimizer.step()
        if step == 1:  # on every rank
            network = accelerator.unwrap_model(critic)
            example = torch.randn(4, 8, device=accelerator.device)
            report = export_onnx(network, (example,), path, model_factory=build)
            with frozen_spectral_norm(network), torch.no_grad():
                frozen = network.eval()(example)
            assert torch.equal(frozen, network(example).detach())
            network.train()
            accelerator.print(report)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    train(Accelerator(cpu=not torch.cuda.is_available()), sys.argv[1])
