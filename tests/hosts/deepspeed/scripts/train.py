"""An ordinary DeepSpeed training script; it has never heard of compression."""

import argparse

import deepspeed
import torch


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--local_rank", type=int, default=-1)
    arguments = deepspeed.add_config_arguments(parser).parse_args()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
    target = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) / 8
    draw = torch.Generator().manual_seed(2 + engine.global_rank)
    for _ in range(arguments.steps):
        x = torch.randn(32, 64, generator=draw)
        loss = torch.nn.functional.mse_loss(engine(x), x @ target)
        engine.backward(loss)
        engine.step()
    print(f"RESULT rank={engine.global_rank} loss={loss.item():.4f} lr={engine.get_lr()[0]}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
