"""An ordinary script of Hugging Face's Trainer; it has never heard of compression.

It trains with one DeepSpeed config after the other, and then once more from the checkpoint in the middle.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

STEPS = 6


class Text(torch.utils.data.Dataset):
    def __len__(self):
        return 256

    def __getitem__(self, i):
        words = (torch.arange(16) * (1 + i % 3) + i) % 32
        return {"input_ids": words, "labels": words}


def train(config, output, bf16, resume=None):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=64, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    arguments = TrainingArguments(
        output_dir=output,
        deepspeed=config,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=1,
        learning_rate=1e-3,
        bf16=bf16,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Text())
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = [p.detach().double().sum().item() for p in trainer.model.parameters()]
    return {"losses": losses, "weights": weights, "rank": arguments.process_index}


def main(folder, *configs):
    found = {}
    for config in configs:
        output = f"{folder}/{config}.out"
        found[config] = train(config, output, "bf16" in config)
        found[f"{config} resumed"] = train(config, output, "bf16" in config, f"{output}/checkpoint-{STEPS // 2}")
    rank = found[configs[0]]["rank"]
    Path(f"{folder}/trainer{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*(a for a in sys.argv[1:] if not a.startswith("--local_rank")))
