"""An ordinary script of Accelerate, with low-rank adapters on frozen layers; it has never heard of compression."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch import nn


class Adapted(nn.Module):
    """A frozen layer plus a trained product of two thin ones, as LoRA has it (Hu et al., 2021, arXiv 2106.09685)."""

    def __init__(self, width: int, rank: int = 8) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def main(folder: str) -> None:
    PartialState(cpu=True)  # Accelerate sees no ranks otherwise on a machine without accelerators
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(64), nn.ReLU(), Adapted(64), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :8].argmax(1)), batch_size=16)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def run() -> list[float]:
        losses = []
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs.to(next(model.parameters()).dtype)).float(), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    def weights() -> list[float]:
        return [p.detach().double().sum().item() for p in model.parameters()]

    first = run()
    accelerator.save_state(f"{folder}/state")
    second, end = run(), weights()
    accelerator.load_state(f"{folder}/state")
    again, end_again = run(), weights()
    found = {"first": first, "second": second, "again": again, "weights": end, "weights again": end_again}
    Path(f"{folder}/accelerated{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
