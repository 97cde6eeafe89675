"""What may be done with a gradient: keep it, save it, view it, lay it out, in any precision."""

from __future__ import annotations

import io
from typing import Any

import torch
from faults_base import STOCK, R, batch, case, chosen, distance, everything, gap, mean_over_ranks, net, train, wrap
from torch import Tensor, nn

from compression_plugins.adapters.horovod import Compression

# ---------------------------------------------------------------- kept gradients


@case("stock", "topk", "ef_signsgd", "signsgd", "powersgd", "exempt")
def gradients_are_tensors_of_their_own(scheme: str) -> dict[str, Any]:
    model = net()
    opt = wrap(model, chosen(scheme))
    train(model, opt, 1)
    kept = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in kept]
    saved, storages = [], []
    for p in model.parameters():
        file = io.BytesIO()
        torch.save(p.grad, file)
        saved.append(file.tell() - p.numel() * p.element_size())
        storages.append(p.grad.untyped_storage().nbytes() / (p.numel() * p.element_size()))
    train(model, opt, range(1, 4))
    held = [gap(old, copy) for old, copy in zip(kept, copies)]
    model.zero_grad(set_to_none=False)  # the user's own way: gradients are zeroed in place
    zeroed = [float(p.grad.abs().max()) for p in model.parameters()]
    return {"kept": max(held), "saved": max(saved), "storage": storages, "zeroed": max(zeroed)}


@case("stock", "topk", "exempt")
def gradients_are_averaged_in_place(scheme: str) -> dict[str, Any]:
    """What was taken of a gradient before `synchronize()` - the tensor, a view of it - holds the average afterwards."""
    model = net()
    opt = wrap(model, everything() if scheme == "topk" else chosen(scheme))
    found = {"same tensor": True, "view": 0.0}
    for step in range(3):
        opt.zero_grad()
        model(batch(step)).square().mean().backward()
        before = [p.grad for p in model.parameters()]
        views = [p.grad.view(-1) for p in model.parameters()]
        opt.synchronize()
        for p, old, view in zip(model.parameters(), before, views):
            found["same tensor"] &= p.grad is old
            found["view"] = max(found["view"], gap(view, p.grad.view(-1)))
        with opt.skip_synchronize():
            opt.step()
    return found


@case("stock", "topk", "exempt")
def gradients_may_lie_in_a_buffer_of_the_user(scheme: str) -> list[float]:
    """All gradients are views of one flat tensor, which the user zeroes and reads."""
    model, dense = net(), net()
    compression = everything() if scheme == "topk" else chosen(scheme)
    opt = wrap(model, compression)
    flat = torch.zeros(sum(p.numel() for p in model.parameters()))
    offset = 0
    for p in model.parameters():
        p.grad = flat[offset : offset + p.numel()].view(p.shape)
        offset += p.numel()
    worst = 0.0
    for step in range(3):
        flat.zero_()
        model(batch(step)).square().mean().backward()
        opt.step()
        now = torch.cat([p.grad.view(-1) for p in model.parameters()])
        worst = max(worst, gap(flat, now))
    train(dense, wrap(dense, STOCK), 3)
    return [worst, distance(model, dense)]


# ---------------------------------------------------------------- layout and precision


def images(compression: Any, fused: bool, layout: torch.memory_format = torch.channels_last) -> nn.Module:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).to(memory_format=layout)
    opt = wrap(model, compression, base=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused))
    for step in range(4):
        opt.zero_grad()
        x = batch(step, 4, 8 * 7 * 7).view(4, 8, 7, 7).to(memory_format=layout)
        model(x).square().mean().backward()
        opt.step()
    return model


@case("topk", "exempt", "powersgd")
def channels_last_weights_keep_their_layout(scheme: str) -> dict[str, Any]:
    """Distance to stock, which takes contiguous gradients only: there the same model is contiguous."""
    found: dict[str, Any] = {"strides": []}
    compression = {"topk": everything(), "exempt": chosen("exempt"), "powersgd": chosen("powersgd", rank=1)}[scheme]
    for fused in (False, True):
        ours = images(compression, fused)
        found["fused" if fused else "plain"] = distance(images(STOCK, fused, torch.contiguous_format), ours)
        found["strides"] += [p.grad.stride() == p.stride() for p in ours.parameters() if p.dim() == 4]
    return found


@case("stock")
def channels_last_of_stock(_: str) -> None:
    images(STOCK, False)


@case("stock", "exempt")
def fp64_gradients_survive(scheme: str) -> list[Any]:
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    c = torch.full((4, 4), 1e-50, dtype=torch.float64) * (1 + R)
    c[0], c[1] = 1e40 * (1 + R), 1 / 3 + R * 2.0**-40
    model = nn.ParameterDict({"p": p})
    opt = wrap(model, chosen(scheme))
    (p * c).sum().backward()
    opt.synchronize()
    return [[x.hex() for x in p.grad.double().view(-1).tolist()], str(p.grad.dtype)]


def bf16(compression: Any) -> tuple[Tensor, list[Any]]:
    torch.manual_seed(8)
    model = nn.Linear(16, 8).bfloat16()
    opt = wrap(model, compression)
    model(batch(0).bfloat16()).float().square().mean().backward()
    expected = mean_over_ranks(model.weight.grad).bfloat16()
    opt.synchronize()
    return expected, [model.weight.grad.tolist() == expected.tolist(), str(model.weight.grad.dtype)]


@case("exempt", "min_numel", "warm-up")
def bf16_gradients_are_averaged_and_rounded_once(scheme: str) -> list[Any]:
    keys = {"exempt": {"exempt": ["*"]}, "min_numel": {"min_numel": 10**6}, "warm-up": {"warmup_steps": 5}}[scheme]
    return bf16(Compression.topk(**keys))[1]


@case("stock")
def bf16_of_stock(_: str) -> list[Any]:
    return bf16(STOCK)[1]
