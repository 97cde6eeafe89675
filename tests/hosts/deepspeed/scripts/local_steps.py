"""Ranks that train by themselves under DeepSpeed, stage 0; leaves a report of each rank in the folder that is given."""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))
import local_steps as laws

from compression_plugins.deepspeed import finish

FOLDER = Path(sys.argv[1])
deepspeed.init_distributed("gloo")
torch.set_num_threads(1)


def settings(block, accumulate=1, **options):
    return {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": accumulate,
        "communication_compression": block,
        "gradient_clipping": 0.0,
        **options,
    }


class Host:
    saves = 0

    def __init__(self, block, accumulate=1, **options):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        network = laws.network()
        self.model, *_ = deepspeed.initialize(
            model=network,
            optimizer=torch.optim.Adam(network.parameters(), lr=laws.LR),
            config=settings(block, accumulate, **options),
        )

    def mean(self, x):
        x = x.detach().clone()
        dist.all_reduce(x)
        return x / self.size

    def train(self, loss, accumulate=1, clip=0.0):
        for micro in range(accumulate):
            self.model.backward(loss(micro))
            self.model.step()

    def norm(self, own):
        return self.mean(own.view(1))[0]  # DeepSpeed's clipping takes the mean of the ranks' norms

    def optimizer_state(self):
        return self.model.optimizer.state

    def sent(self):
        return self.model.communication_compression.reducer.transport.sent

    def finish(self):
        finish(self.model)

    def save(self):
        """DeepSpeed saves the optimizer of rank 0 only; each rank's own moments are kept beside it."""
        tag = f"save{Host.saves}"
        self.model.save_checkpoint(str(FOLDER / "checkpoints"), tag=tag)
        own = {p: {k: torch.clone(v) for k, v in s.items()} for p, s in self.model.optimizer.state.items()}
        return tag, [own[p] for p in self.model.module.parameters()]

    def restore(self, saved):
        tag, moments = saved
        self.model.load_checkpoint(str(FOLDER / "checkpoints"), tag=tag)
        for p, moment in zip(self.model.module.parameters(), moments):
            self.model.optimizer.state[p] = moment


def refused(**options):
    try:
        Host({"scheme": "ef_signsgd", "every": 2}, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


report = {
    "exact": laws.exact(Host),
    "accumulated": laws.exact(Host, accumulate=3),
    "clipped": laws.exact(lambda *a: Host(*a, gradient_clipping=0.05), clip=0.05),
    "compressed": laws.compressed(Host),
    "moments": laws.moments(Host),
    "partly": laws.partly(Host, pickles=False),
    "resumed": laws.resumed(Host),
    "stage 1": refused(zero_optimization={"stage": 1}),
    "bf16": refused(bf16={"enabled": True}),
}
torch.save(report, FOLDER / f"report{dist.get_rank()}.pt")
dist.barrier()
