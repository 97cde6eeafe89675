"""Which parameters have a gradient: frozen, unfrozen, added, never called, on one rank only, exactly zero."""

from __future__ import annotations

from typing import Any

import torch
from faults_base import (
    REMEMBER,
    SIGNS,
    STOCK,
    R,
    batch,
    bits,
    case,
    changed,
    chosen,
    distance,
    everything,
    gap,
    identical,
    rate,
    wrap,
)
from torch import Tensor, nn

MOVING = (*REMEMBER, "signsgd", "ssdm", "cascading_ssdm")


# ---------------------------------------------------------------- frozen, never called, on one rank only


class Parts(nn.Module):
    """A trunk, and layers of which a step may call any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.trunk = nn.Linear(16, 24)
        self.a, self.b, self.never = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor, *layers: str) -> Tensor:
        x = self.trunk(x)
        for name in layers:
            x = x + getattr(self, name)(torch.tanh(x))
        return x


def parts(model: Parts, opt: Any, steps: range, *layers: str) -> None:
    for step in steps:
        opt.zero_grad()
        model(batch(step), *layers).square().mean().backward()
        opt.step()


@case("stock", *MOVING)
def a_layer_frozen_after_wrapping_stays(scheme: str) -> dict[str, float]:
    model = Parts()
    opt = wrap(model, chosen(scheme), lr=rate(scheme))
    parts(model, opt, range(3), "a", "b")
    model.b.requires_grad_(False)
    opt.zero_grad()
    before, trunk = bits(model.b), bits(model.trunk)
    parts(model, opt, range(3, 13), "a", "b")
    return {"frozen": changed(before, model.b), "trained": changed(trunk, model.trunk)}


@case("stock", *MOVING)
def a_layer_that_is_called_no_more_stays(scheme: str) -> dict[str, float]:
    """Its gradient is None on all ranks."""
    model = Parts()
    opt = wrap(model, chosen(scheme), lr=rate(scheme))
    parts(model, opt, range(3), "a", "b")
    before, trunk = bits(model.b), bits(model.trunk)
    parts(model, opt, range(3, 13), "a")
    return {"not called": changed(before, model.b), "trained": changed(trunk, model.trunk)}


@case("stock", *MOVING)
def a_layer_that_is_never_called_stays(scheme: str) -> dict[str, float]:
    model = Parts()
    opt = wrap(model, chosen(scheme), lr=rate(scheme))
    before, trunk = bits(model.never), bits(model.trunk)
    parts(model, opt, range(8), "a", "b")
    return {"never called": changed(before, model.never), "trained": changed(trunk, model.trunk)}


@case("stock", *MOVING)
def a_gradient_of_one_rank_moves_all(scheme: str) -> dict[str, Any]:
    model = Parts()
    opt = wrap(model, chosen(scheme), lr=rate(scheme))
    before = bits(model.b)
    parts(model, opt, range(8), "a", *("b" if R else ""))
    return {"moved": changed(before, model.b), "identical": identical(model)}


@case()
def gradients_of_one_rank_equal_stock() -> float:
    models = []
    for compression in (STOCK, everything()):
        model = Parts()
        parts(model, wrap(model, compression), range(8), *("a" if R else "b"))
        models.append(model)
    return distance(*models)


# ---------------------------------------------------------------- unfrozen later, added later


def unfrozen(compression: Any, way: str) -> list[Any]:
    """[the model's parameters, are the ranks' equal?] after a layer joined in the middle of training."""
    model = Parts()
    model.a.requires_grad_(False)
    kept = [p for p in model.parameters() if p.requires_grad or way != "added"]
    base = torch.optim.SGD(kept, lr=0.1)
    if way == "added":
        added = list(model.a.parameters())
        rest = nn.ModuleDict({"trunk": model.trunk, "b": model.b, "never": model.never})
        opt = wrap(rest, compression, base=base)
    else:
        opt = wrap(model, compression, base=base)
    parts(model, opt, range(3), "a", "b")
    model.a.requires_grad_(True)
    if way == "added":
        opt.add_param_group({"params": added, "lr": 0.05})
    before = bits(model.a)
    parts(model, opt, range(3, 6), "a", "b")
    return [model, changed(before, model.a), identical(model.a), identical(model.b)]


@case()
def what_joins_later_is_treated_as_by_stock() -> dict[str, Any]:
    found = {}
    for way in ("unfrozen", "added"):
        (stock, *facts), (ours, *same) = unfrozen(STOCK, way), unfrozen(everything(), way)
        found[way] = {"distance": distance(stock, ours), "stock": facts, "ours": same}
    return found


# ---------------------------------------------------------------- exact zeros


class Words(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.table = nn.Embedding(512, width, padding_idx=0)
        self.head, self.never = nn.Linear(width, 4), nn.Linear(width, width)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.table(rows))


def zeros_stay(scheme: str, width: int, steps: int) -> dict[str, list[float]]:
    """How far rows moved that no rank looked up, the row of the padding, a layer that none called, and all others."""
    found = {}
    for kind, lr in (("SGD", rate(scheme, 0.01)), ("Adam", 0.01)):
        model = Words(width)
        opt = wrap(model, chosen(scheme), base=getattr(torch.optim, kind)(model.parameters(), lr=lr))
        table, layer = model.table.weight.detach().clone(), bits(model.never)
        for step in range(steps):
            opt.zero_grad()
            rows = torch.randint(0, 100, (12,), generator=torch.Generator().manual_seed(1000 * R + step))
            model(rows).square().mean().backward()
            opt.step()
        now = model.table.weight.detach()
        never_used, padding, used = (gap(now[rows], table[rows]) for rows in (slice(100, None), 0, slice(1, 100)))
        found[kind] = [never_used, padding, changed(layer, model.never), used]
    return found


@case("stock", *SIGNS)
def exact_zeros_stay_zeros(scheme: str) -> dict[str, list[float]]:
    return zeros_stay(scheme, 64, steps=50)


@case("stock", *SIGNS)
def exact_zeros_stay_zeros_across_words(scheme: str) -> dict[str, list[float]]:
    """Rows of 50 elements do not end where words of 32 signs do."""
    return zeros_stay(scheme, 50, steps=20)
