"""Who holds the exact weights, where a scheme computes with quantized ones: the model, outside forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from faults_base import STOCK, batch, bits, case, compressor, gap, loss_of, train, wrap
from torch import Tensor, nn

#: Coarse enough to be seen from the second step on.
_KEYS = {"bits": 4, "mu": 10.0, "snapshot_steps": 100}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))


def trained(compression: Any) -> tuple[nn.Module, Any]:
    """A model three steps from its snapshot, whose learning rate is now zero."""
    model = net()
    opt = wrap(model, compression)
    train(model, opt, 3)
    for group in opt.param_groups:
        group["lr"] = 0.0
    return model, opt


def by_scheme(scheme: str) -> Any:
    return STOCK if scheme == "stock" else compressor(scheme, **_KEYS)


def zero_row(weight: Tensor) -> None:
    weight[3] = 0


def one_value(weight: Tensor) -> None:
    weight[3, 5] = 0.125


def mask(weight: Tensor) -> None:
    weight.mul_(torch.arange(weight.numel()).view_as(weight) % 3 != 0)


def clamp(weight: Tensor) -> None:
    weight.clamp_(-0.03, 0.03)


def load(weight: Tensor) -> None:
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)))


@case("stock", "double_quantization")
def an_edit_after_the_step_stays(scheme: str) -> dict[str, float]:
    """Largest difference in any of three more steps at a learning rate of zero."""
    found = {}
    for edit in (zero_row, one_value, mask, clamp, load):
        model, opt = trained(by_scheme(scheme))
        weight = model[2].weight
        with torch.no_grad():
            edit(weight)
        expected, worst = weight.detach().clone(), 0.0
        for step in range(3):
            train(model, opt, [step])
            worst = max(worst, gap(weight, expected))
        found[edit.__name__] = worst
    return found


@case("stock", "double_quantization")
def a_pruned_weight_stays_pruned(scheme: str) -> list[float]:
    """One mask on the weights, then the same on every gradient, while the other weights train."""
    model = net()
    opt = wrap(model, by_scheme(scheme))
    train(model, opt, 3)
    weight, worst = model[2].weight, 0.0
    kept = torch.arange(weight.numel()).view_as(weight) % 4 != 1
    with torch.no_grad():
        weight.mul_(kept)
    start = weight.detach().clone()
    for step in range(3, 7):
        opt.zero_grad()
        loss_of(model, step).backward()
        opt.synchronize()
        weight.grad.mul_(kept)
        with opt.skip_synchronize():
            opt.step()
        worst = max(worst, float(weight.detach()[~kept].abs().max()))
    return [worst, float((weight.detach() - start)[kept].abs().max())]


def exact_at_every_moment(model: nn.Module, opt: Any, expected: list[Tensor]) -> float:
    worst = 0.0

    def look() -> None:
        nonlocal worst
        worst = max(worst, max(gap(a, b) for a, b in zip(expected, model.state_dict().values())))

    for step in range(4):
        opt.zero_grad()
        look()
        loss_of(model, step).backward()
        look()
        opt.synchronize()
        look()
        with opt.skip_synchronize():
            opt.step()
        look()
    return worst


@case("stock", "double_quantization")
def state_dict_has_the_exact_weights(scheme: str) -> dict[str, float]:
    """At every moment outside forward and backward; a learning rate of zero, so that they cannot change."""
    found = {}
    for start in ("from the start", "after three steps"):
        if start == "from the start":
            model = net()
            opt = wrap(model, by_scheme(scheme), lr=0.0)
            expected = bits(model)
        else:
            model, opt = trained(by_scheme(scheme))
            expected = [v.clone() for v in model.state_dict().values()]
        found[start] = exact_at_every_moment(model, opt, expected)
        # Values on a grid of 4 bits would be few.
        found[f"{start}: distinct"] = len(model.state_dict()["2.weight"].unique()) / model[2].weight.numel()
    return found


@case("stock", "double_quantization")
def evaluation_computes_with_the_exact_weights(scheme: str) -> dict[str, float]:
    """The weights are known, for the user has set them and the learning rate is zero."""
    model, opt = trained(by_scheme(scheme))
    exact, x = net(), batch(77)
    with torch.no_grad():
        for p, q in zip(model.parameters(), exact.parameters()):
            q.copy_(p + 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(9)))
            p.copy_(q)
        expected = exact(x)
    found = {"no_grad": 0.0, "eval": 0.0}
    for step in range(3):
        train(model, opt, [step])
        with torch.no_grad():
            found["no_grad"] = max(found["no_grad"], gap(model(x), expected))
        model.eval()
        with torch.inference_mode():
            found["eval"] = max(found["eval"], gap(model(x), expected))
        model.train()
    return found


@case("stock", "double_quantization")
def training_computes_with_quantized_weights(scheme: str) -> float:
    """The forward pass of the fourth step, and the same with the weights that the user sees before it."""
    model = net()
    opt = wrap(model, by_scheme(scheme))
    train(model, opt, 3)
    exact, x = net(), batch(77)
    exact.load_state_dict(model.state_dict())
    opt.zero_grad()
    output = model(x)
    output.sum().backward()
    opt.step()
    return gap(output, exact(x))


@case("stock", "double_quantization")
def evaluation_at_the_start_equals_stock(scheme: str) -> float:
    """At a learning rate of zero the exact weights are the initial ones."""
    model, expected, worst = net(), net(), 0.0
    opt = wrap(model, by_scheme(scheme), lr=0.0)
    for step in range(3):
        train(model, opt, [step])
        with torch.no_grad():
            worst = max(worst, gap(model(batch(5)), expected(batch(5))))
    return worst
