"""Train a network with spectral norm under fully_shard, and export it on the way.

torchrun --standalone --nproc-per-node 2 sharded.py critic.onnx plain.pt  # one machine
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29500 ... # a cluster, unchanged
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import spectral_norm

from sn_export import export_onnx, frozen_spectral_norm, gather_plain_state_dict


def build() -> nn.Sequential:
    return nn.Sequential(
        spectral_norm(nn.Linear(8, 64)), nn.ReLU(), spectral_norm(nn.Linear(64, 1))
    )


dist.init_process_group()
torch.manual_seed(0)
critic = build()
for layer in (critic[0], critic[2], critic):
    fully_shard(layer)
optimizer = torch.optim.Adam(critic.parameters())

for step in range(4):
    optimizer.zero_grad()
    critic(torch.randn(16, 8)).mean().backward()
    optimizer.step()
    if step == 1:  # in the middle of the training, on every rank
        report = export_onnx(critic, (torch.randn(4, 8),), sys.argv[1], model_factory=build)
        with frozen_spectral_norm(critic), torch.no_grad():
            scores = critic.eval()(torch.ones(1, 8))
        critic.train()
        state = gather_plain_state_dict(critic)
        if dist.get_rank() == 0:
            print(report)
            plain = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))
            plain.load_state_dict(state)
            assert torch.equal(plain(torch.ones(1, 8)), scores)
            torch.save(state, sys.argv[2])
end = dist.barrier(async_op=True)  # kept: gloo's thread must not free it while Python ends
end.wait()  # no rank leaves while another still talks to it
dist.destroy_process_group()
