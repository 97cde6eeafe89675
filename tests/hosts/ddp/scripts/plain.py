"""An ordinary DistributedDataParallel training script, as the tutorials write it; each option is a thing users do."""

import argparse
import contextlib
import hashlib
import json

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=12, help="optimizer steps in all, those before --resume included")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--optimizer", choices=["sgd", "adam"], default="sgd")
parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step, all but the last under no_sync")
parser.add_argument("--find-unused", action="store_true", help="a branch that some ranks, or all, skip in some steps")
parser.add_argument("--static-graph", action="store_true", help="beside --find-unused the branch is never used")
parser.add_argument("--gradient-as-bucket-view", action="store_true")
parser.add_argument("--bucket-cap-mb", type=float, help="a fraction makes several buckets of this small model")
parser.add_argument("--buffers", action="store_true", help="BatchNorm")
parser.add_argument("--autocast", choices=["bf16"])
parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND")
parser.add_argument("--join", action="store_true", help="rank r has r more batches than rank 0")
parser.add_argument("--fp64", action="store_true")
parser.add_argument("--channels-last", action="store_true", help="a convolution, parameters and inputs channels-last")
parser.add_argument("--save", help="where rank 0 puts model, optimizer and step")
parser.add_argument("--resume", help="a file of --save")
args = parser.parse_args()
if args.static_graph and args.accumulate > 1:
    parser.error("torch asserts when the first backward of a static graph is under no_sync")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        if args.channels_last:
            self.stem = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 128))
        else:
            self.stem = nn.Linear(64, 128)
        self.norm = nn.BatchNorm1d(128) if args.buffers else nn.Identity()
        self.body = nn.Sequential(nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        if args.find_unused:
            self.branch = nn.Linear(128, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x, branch):
        x = self.body(self.norm(self.stem(x)))
        if branch:
            x = x + self.branch(x)
        return self.head(x)


def batch(step, micro):
    """The same draw for the same seed, rank and step, so that a resumed run goes on with the data of a straight one."""
    draw = torch.Generator().manual_seed(((args.seed * 64 + dist.get_rank()) * 10_000 + step) * 16 + micro)
    x = torch.randn(32, 64, generator=draw)
    teacher = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
    y = (x @ teacher).argmax(1)
    if args.channels_last:
        x = x.reshape(32, 4, 4, 4).to(memory_format=torch.channels_last)
    return (x.double() if args.fp64 else x), y


def uses_branch(step):
    """In turn: rank 0 alone, every rank but 0, nobody, everybody."""
    if not args.find_unused or args.static_graph:
        return False
    return [dist.get_rank() == 0, dist.get_rank() != 0, False, True][step % 4]


def digest(parameters):
    raw = [p.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for p in parameters]
    return hashlib.sha256(b"".join(raw)).hexdigest()


dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(args.seed + dist.get_rank())  # ranks start apart: the constructor gives all of them rank 0's weights
model = Net()
if args.fp64:
    model = model.double()
if args.channels_last:
    model = model.to(memory_format=torch.channels_last)
ddp = DistributedDataParallel(
    model,
    bucket_cap_mb=args.bucket_cap_mb,
    find_unused_parameters=args.find_unused and not args.static_graph,
    static_graph=args.static_graph,
    gradient_as_bucket_view=args.gradient_as_bucket_view,
)
forward = torch.compile(ddp, backend=args.compile) if args.compile else ddp
if args.optimizer == "adam":
    optimizer = torch.optim.Adam(ddp.parameters(), lr=1e-3)
else:
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)

start = 0
if args.resume:
    state = torch.load(args.resume, map_location="cpu")
    ddp.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    start = state["step"]

losses = []
steps = args.steps + (dist.get_rank() if args.join else 0)
with ddp.join() if args.join else contextlib.nullcontext():
    for step in range(start, steps):
        optimizer.zero_grad()
        for micro in range(args.accumulate):
            x, y = batch(step, micro)
            last = micro == args.accumulate - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.autocast == "bf16"):
                    loss = nn.functional.cross_entropy(forward(x, uses_branch(step)), y) / args.accumulate
                loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()) * args.accumulate)

if args.save and dist.get_rank() == 0:
    torch.save({"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}, args.save)
digests = [None] * dist.get_world_size()
dist.all_gather_object(digests, digest(ddp.parameters()))
if dist.get_rank() == 0:
    equal = len(set(digests)) == 1
    print(json.dumps({"loss": losses[-1], "steps": steps, "parameters": digests[0], "equal": equal}), flush=True)
dist.barrier()  # gloo is done with the tensors above before the interpreter ends
dist.destroy_process_group()
