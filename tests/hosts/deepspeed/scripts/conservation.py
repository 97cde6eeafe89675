"""What was applied plus what is remembered equals what came in, although the parameters in a bucket change every step.

Writes, for every case, the largest violation relative to the largest accumulated gradient.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import torch

FOLDER = Path(sys.argv[1])
LEARNING_RATE, STEPS, ACCUMULATION = 0.05, 12, 2


class Net(torch.nn.Module):
    """Which layers take part depends on the step, so ZeRO fills its buckets differently every time; or, where all do,
    their order: ZeRO 3 steps a layer that took no part by its last gradient, with or without compression.
    """

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.a, self.b, self.c, self.out = (torch.nn.Linear(40, 40) for _ in range(4))

    def forward(self, x: torch.Tensor, k: int) -> torch.Tensor:
        if self.whole:
            layers = [self.a, self.b, self.c]
            for i in range(3):
                x = layers[(i + k) % 3](x)
            return (self.out(x) ** 2).mean()
        h = self.a(x) if k % 3 != 1 else self.c(x)
        h = self.b(h) if k % 2 else self.c(h)
        return (self.out(h) ** 2).mean()


def flat(tensors) -> torch.Tensor:
    tensors = list(tensors)
    with deepspeed.zero.GatheredParameters(tensors):  # of ZeRO 3; elsewhere it does nothing
        return torch.cat([t.detach().view(-1).clone() for t in tensors])


def violation(stage: int, block: dict) -> float:
    torch.manual_seed(0)
    net, reference = Net(stage == 3), Net(stage == 3)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": ACCUMULATION,
        "optimizer": {"type": "SGD", "params": {"lr": LEARNING_RATE}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 4000},
        "steps_per_print": 1000,
        "communication_compression": block,
    }
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)
    start = flat(net.parameters()).clone()
    came_in = torch.zeros_like(start)
    for k in range(STEPS):
        with deepspeed.zero.GatheredParameters(list(net.parameters())), torch.no_grad():
            for mine, theirs in zip(reference.parameters(), net.parameters(), strict=True):
                mine.copy_(theirs)
        reference.zero_grad(set_to_none=False)
        for micro in range(ACCUMULATION):
            seed = 1000 * dist.get_rank() + ACCUMULATION * k + micro
            x = torch.randn(4, 40, generator=torch.Generator().manual_seed(seed))
            (reference(x, k) / ACCUMULATION).backward()
            engine.backward(engine(x, k))
            engine.step()
        zeros = [torch.zeros_like(p) if p.grad is None else p.grad for p in reference.parameters()]
        mine = flat(zeros).clone()
        torch.distributed.all_reduce(mine)
        came_in += mine / dist.get_world_size()
    applied = (start - flat(net.parameters())) / LEARNING_RATE
    remembered = {n: torch.zeros(p.numel()) for n, p in reference.named_parameters()}
    for name, pieces in engine.communication_compression.state_dict()["vectors"]["residual"].items():
        for offset, piece in pieces.items():
            remembered[name][offset : offset + piece.numel()] = piece
    owed = flat(remembered.values())
    assert owed.abs().max() > 0, "nothing was held back, so the test would prove nothing"
    torch.distributed.all_reduce(owed)
    owed /= dist.get_world_size()
    engine.destroy()
    return float((applied + owed - came_in).abs().max() / came_in.abs().max())


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    cases = json.loads((FOLDER / "cases.json").read_text())
    found = {name: violation(**case) for name, case in cases.items()}
    if dist.get_rank() == 0:
        (FOLDER / "violations.json").write_text(json.dumps(found))
    dist.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
