"""An ordinary script of Accelerate: prepare, accumulate, backward, save_state."""

import argparse
import hashlib
import json

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=12, help="optimizer steps in all, those before --resume included")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
parser.add_argument("--clip", type=float, help="largest gradient norm")
parser.add_argument("--save", help="a folder for save_state")
parser.add_argument("--resume", help="a folder of --save")
args = parser.parse_args()


def digest(parameters):
    raw = [p.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for p in parameters]
    return hashlib.sha256(b"".join(raw)).hexdigest()


class Progress:
    """The step, as an object that save_state keeps and load_state restores."""

    step = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.accumulate, mixed_precision=args.mixed_precision)
set_seed(args.seed)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
draw = torch.Generator().manual_seed(1)
teacher = torch.randn(64, 10, generator=draw)
inputs = torch.randn(2048, 64, generator=draw)
loader = DataLoader(TensorDataset(inputs, (inputs @ teacher).argmax(1)), batch_size=16)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.9)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
progress = Progress()
accelerator.register_for_checkpointing(progress)
if args.resume:
    accelerator.load_state(args.resume)

loss = None
batches = accelerator.skip_first_batches(loader, progress.step * args.accumulate)
while progress.step < args.steps:
    for x, y in batches:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if args.clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            progress.step += 1
            if progress.step == args.steps:
                break
    batches = loader

if args.save:
    accelerator.save_state(args.save)
digests = gather_object([digest(accelerator.unwrap_model(model).parameters())])
if accelerator.is_main_process:
    result = {"loss": float(loss.detach()), "steps": progress.step, "parameters": digests[0]}
    print(json.dumps({**result, "equal": len(set(digests)) == 1}), flush=True)
accelerator.wait_for_everyone()  # gloo is done with the tensors above before the interpreter ends
accelerator.end_training()
