"""An ordinary Horovod training script, as its author wrote it before this package existed."""

import argparse
import hashlib
import json

import horovod.torch as hvd
import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--save", help="where rank 0 puts the trained weights")
parser.add_argument("--compression", help="this script's own flag, none of the launcher's business")
parser.add_argument("--fp16", action="store_true", help="Horovod's own compression")
args = parser.parse_args()

hvd.init()
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
optimizer = hvd.DistributedOptimizer(
    optimizer,
    named_parameters=model.named_parameters(),
    compression=hvd.Compression.fp16 if args.fp16 else hvd.Compression.none,
)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)

teacher = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
data = torch.Generator().manual_seed(100 + hvd.rank())
losses = []
for _ in range(args.steps):
    x = torch.randn(32, 64, generator=data)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), (x @ teacher).argmax(1))
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))

if args.save and hvd.rank() == 0:
    torch.save(model.state_dict(), args.save)
weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
result = {
    "rank": hvd.rank(),
    "size": hvd.size(),
    "compressor": getattr(optimizer._compression, "__name__", type(optimizer._compression).__name__),
    "first": losses[0],
    "last": sum(losses[-5:]) / 5,
    "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
    "own_flag": args.compression,
}
print("RESULT " + json.dumps(result), flush=True)
