"""The table of bytes on the page of DeepSpeed is what the plans of the models say; no job runs for it."""

from __future__ import annotations

from pathlib import Path

import torch

from compression_plugins.adapters.deepspeed.routes import as_host_fills, in_wire_dtype
from compression_plugins.advise.shapes import load
from compression_plugins.config import Config
from compression_plugins.engine.plan import TensorSpec, bucket_numel, make_plan, weights_row

PAGE = Path(__file__).parents[3] / "docs/deepspeed.md"
MODELS = {"gpt2": "GPT-2 (124 M)", "bert-large": "BERT-large (336 M)"}
PERSISTENT = 100_000  # stage3_param_persistence_threshold, as DeepSpeed has it by default
BF16 = 2  # bytes


def config(stage: int) -> Config:
    parameters = {"scheme": "qsgd", "bits": 4 if stage < 3 else 8}
    return Config.load({"scheme": "qsgd", "bits": 4, **({"parameters": parameters} if stage else {})})


def gradients(stage: int, specs: list[TensorSpec], ranks: int) -> float:
    """Bytes of a step and rank."""
    plan = in_wire_dtype(make_plan(config(stage), specs), torch.bfloat16)
    if stage:
        names = [spec.name for spec in reversed(specs)]
        plan = as_host_fills(plan, names, bucket_numel(config(stage), specs), sharded=True, dense=stage == 3)
    return sum(bucket.wire_bytes(ranks) for bucket in plan.buckets)


def weights(stage: int, specs: list[TensorSpec], ranks: int, coded: bool) -> float:
    """The same of the gather of weights: at stages 1 and 2 once; at 3 before forward and before backward, but once of
    those that stay on every rank.
    """
    total = 0.0
    for spec in specs if stage else ():
        persistent = stage == 3 and spec.numel <= PERSISTENT
        scheme = weights_row(config(stage), spec).scheme
        codes = coded and not scheme.host_dense and not persistent
        nbytes = scheme.codec.nbytes(spec.numel) if codes else BF16 * spec.numel
        total += nbytes * (2 if stage == 3 and not persistent else 1)
    return total * (ranks - 1) / ranks


def dense_gradients(stage: int, specs: list[TensorSpec], ranks: int) -> float:
    return (1 if stage == 3 else 2) * BF16 * sum(spec.numel for spec in specs) * (ranks - 1) / ranks


def table() -> str:
    lines = [
        "| model | ranks | ZeRO | dense: gradients + weights, MB | compressed, MB | fewer |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in MODELS.items():
        specs = [spec._replace(dtype="bfloat16") for spec in load(name).specs]
        for ranks in (2, 4):
            for stage, label in ((0, "0"), (2, "1, 2"), (3, "3")):
                dense = [dense_gradients(stage, specs, ranks), weights(stage, specs, ranks, coded=False)]
                sent = [gradients(stage, specs, ranks), weights(stage, specs, ranks, coded=True)]
                cells = [" + ".join(f"{x / 1e6:.0f}" for x in pair if x) for pair in (dense, sent)]
                ratio = f"{sum(dense) / sum(sent):.1f}x"
                lines.append(f"| {title} | {ranks} | {label} | {cells[0]} | {cells[1]} | {ratio} |")
    return "\n".join(lines)


def test_the_table_of_bytes_is_what_the_plans_say() -> None:
    assert table() in PAGE.read_text(), f"docs/deepspeed.md should hold\n{table()}"
