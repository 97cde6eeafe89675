"""An ordinary script of the Hugging Face Trainer: a tiny transformer from its configuration, data in memory."""

import argparse
import hashlib
import json
import tempfile

import torch
import torch.distributed as dist
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model", choices=["gpt2", "bert"], default="gpt2")
parser.add_argument("--steps", type=int, default=8, help="optimizer steps in all, those before --resume included")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--no-find-unused", action="store_true", help="the Trainer's own default is find_unused_parameters")
parser.add_argument("--save", help="a folder; the last step's checkpoint is written to checkpoint-STEPS in it")
parser.add_argument("--resume", help="a checkpoint folder")
args = parser.parse_args()


class Tokens(torch.utils.data.Dataset):
    """Sequences that count upwards from a random start: learnable within a few steps."""

    def __len__(self):
        return 512

    def __getitem__(self, index):
        start = int(torch.randint(64, (), generator=torch.Generator().manual_seed(index)))
        ids = (start + torch.arange(16)) % 64
        return {"input_ids": ids, "labels": ids}


def digest(parameters):
    raw = [p.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for p in parameters]
    return hashlib.sha256(b"".join(raw)).hexdigest()


set_seed(args.seed)
if args.model == "gpt2":
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
else:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=16, **sizes, **no_dropout))

with tempfile.TemporaryDirectory() as scratch:
    training = TrainingArguments(
        output_dir=args.save or scratch,
        use_cpu=True,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        bf16=args.bf16,
        ddp_find_unused_parameters=False if args.no_find_unused else None,
        save_strategy="steps" if args.save else "no",
        save_steps=args.steps,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=args.seed,
    )
    trainer = Trainer(model=model, args=training, train_dataset=Tokens())
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=args.resume)

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
digests = [None] * dist.get_world_size()
dist.all_gather_object(digests, digest(model.parameters()))
if dist.get_rank() == 0:
    result = {"loss": losses[-1], "steps": trainer.state.global_step, "parameters": digests[0]}
    print(json.dumps({**result, "equal": len(set(digests)) == 1}), flush=True)
dist.barrier()  # gloo is done with the tensors above before the interpreter ends
dist.destroy_process_group()
