"""An ordinary Horovod training script. It knows nothing of compression: that is chosen on the command line.

horovodrun -np 2 python -m launch.train
horovodrun --compression scalecom -np 2 python -m launch.train
"""

from __future__ import annotations

import argparse
from pathlib import Path

import horovod.torch as hvd
import torch
import torch.nn.functional as F

from launch.lab.measure import ComputeOnly, Recorder
from launch.task import batches, correct, load_digits, perceptron


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the data")
    parser.add_argument("--batch", type=int, default=32, help="images per rank and step")
    parser.add_argument("--width", type=int, default=2048, help="units of the two hidden layers")
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--momentum", type=float, default=0.5)
    parser.add_argument("--evaluate-every", type=int, default=10, help="steps")
    parser.add_argument("--record", type=Path, default=Path("out/train"), help="folder of the measurements")
    parser.add_argument("--interface", default="lo", help="network interface whose bytes are counted")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train, test = load_digits()
    model = perceptron(args.width)
    twin = ComputeOnly(model, args.lr, args.momentum)

    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    recorder = Recorder(args.record, hvd.rank(), hvd.size(), args.interface)
    data = batches(train, args.batch, hvd.rank(), hvd.size(), args.seed)
    for step, (images, labels) in zip(range(1, args.steps + 1), data, strict=False):
        with recorder.step(step) as watch:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            with watch("synchronize"):
                optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
        schedule.step()

        if step % args.evaluate_every == 0 or step == args.steps:
            recorder.compute(twin.seconds(lambda net: F.cross_entropy(net(images), labels)))  # noqa: B023
            hits = hvd.allreduce(correct(model, test, hvd.rank(), hvd.size()), name="hits", op=hvd.Sum)
            recorder.evaluation(step, hits.item() / len(test.labels), loss.item())
            hvd.barrier()
    recorder.close()
    hvd.shutdown()


if __name__ == "__main__":
    main()
