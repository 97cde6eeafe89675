"""An ordinary script of Lightning: a small LightningModule under `strategy="ddp"`."""

import argparse
import hashlib
import json
import logging
import os
import tempfile
import warnings

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=12, help="optimizer steps in all, those before --resume included")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--strategy", default="ddp", help="such as ddp_find_unused_parameters_true")
parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
parser.add_argument("--manual", action="store_true", help="manual optimization")
parser.add_argument("--clip", type=float, help="largest gradient norm")
parser.add_argument("--save", help="a folder; the last step's checkpoint is written to last.ckpt in it")
parser.add_argument("--resume", help="a checkpoint file")
args = parser.parse_args()


def digest(parameters):
    raw = [p.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for p in parameters]
    return hashlib.sha256(b"".join(raw)).hexdigest()


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = not args.manual
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.last = None

    def training_step(self, batch, index):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.last = float(loss.detach())
        if args.manual:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
lightning.seed_everything(args.seed, verbose=False)
draw = torch.Generator().manual_seed(1)
teacher = torch.randn(64, 10, generator=draw)
# Six batches a rank: step 6 ends an epoch, so a run resumed from it goes on with the data of a straight one.
inputs = torch.randn(6 * 16 * int(os.environ["WORLD_SIZE"]), 64, generator=draw)
loader = DataLoader(TensorDataset(inputs, (inputs @ teacher).argmax(1)), batch_size=16)
model = Classifier()
checkpoint = ModelCheckpoint(args.save, filename="last", every_n_train_steps=args.steps)
with tempfile.TemporaryDirectory() as scratch:
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy=args.strategy,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        max_steps=args.steps,
        accumulate_grad_batches=args.accumulate,
        precision=args.precision,
        gradient_clip_val=args.clip,
        logger=False,
        enable_checkpointing=bool(args.save),
        callbacks=[checkpoint] if args.save else [],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=scratch,
    )
    trainer.fit(model, loader, ckpt_path=args.resume)

digests = [None] * dist.get_world_size()
dist.all_gather_object(digests, digest(model.parameters()))
if trainer.is_global_zero:
    result = {"loss": model.last, "steps": trainer.global_step, "parameters": digests[0]}
    print(json.dumps({**result, "equal": len(set(digests)) == 1}), flush=True)
dist.barrier()  # gloo is done with the tensors above before the interpreter ends
dist.destroy_process_group()
