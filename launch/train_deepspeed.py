"""An ordinary DeepSpeed training script. It knows nothing of compression: that is a block of the config file.

deepspeed --num_accelerators 2 --module launch.train_deepspeed --deepspeed_config ds_config.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F

from launch.lab.measure import ComputeOnly, Recorder
from launch.task import batches, correct, load_digits, perceptron


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the data")
    parser.add_argument("--width", type=int, default=2048, help="units of the two hidden layers")
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--momentum", type=float, default=0.5)
    parser.add_argument("--evaluate-every", type=int, default=10, help="steps")
    parser.add_argument("--record", type=Path, default=Path("out/train_deepspeed"), help="folder of the measurements")
    parser.add_argument("--interface", default="lo", help="network interface whose bytes are counted")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    return deepspeed.add_config_arguments(parser).parse_args()


def main() -> None:
    args = arguments()
    # DeepSpeed's shared-memory collective is compiled at the first start and serves only ranks of one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train, test = load_digits()
    model = perceptron(args.width)
    twin = ComputeOnly(model, args.lr, args.momentum)

    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    engine, *_ = deepspeed.initialize(args=args, model=model, optimizer=optimizer, lr_scheduler=schedule)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    recorder = Recorder(args.record, rank, ranks, args.interface)
    data = batches(train, engine.train_micro_batch_size_per_gpu(), rank, ranks, args.seed)
    for step, (images, labels) in zip(range(1, args.steps + 1), data, strict=False):
        with recorder.step(step):
            loss = F.cross_entropy(engine(images), labels)
            engine.backward(loss)
            engine.step()

        if step % args.evaluate_every == 0 or step == args.steps:
            recorder.compute(twin.seconds(lambda net: F.cross_entropy(net(images), labels)))  # noqa: B023
            hits = correct(engine.module, test, rank, ranks)
            dist.all_reduce(hits)
            recorder.evaluation(step, hits.item() / len(test.labels), loss.item())
            dist.barrier()
    recorder.close()
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
