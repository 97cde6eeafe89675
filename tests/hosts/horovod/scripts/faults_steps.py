"""What a script does between `backward()` and `step()`: steps that do not happen, or twice; loss scaling."""

from __future__ import annotations

from typing import Any

import torch
from faults_base import (
    REMEMBER,
    STOCK,
    Compression,
    R,
    batch,
    bits,
    case,
    changed,
    chosen,
    compressor,
    distance,
    everything,
    gap,
    identical,
    loss_of,
    net,
    train,
    wrap,
)
from torch import Tensor, nn

from compression_plugins.schemes import registry

SCHEMES = [name for name in registry.names() if name != "none"]


# ---------------------------------------------------------------- a step that does not happen


def throw_away(model: nn.Module, opt: Any, step: int) -> None:
    """How users of Horovod drop a gradient: `zero_grad()` refuses while operations are in flight."""
    loss_of(model, step).backward()
    opt.synchronize()
    opt.zero_grad()


def nothing(model: nn.Module, opt: Any, steps: int = 20) -> None:
    """Steps whose gradients are zero."""
    for step in range(steps):
        opt.zero_grad()
        (0.0 * model(batch(step)).sum()).backward()
        opt.step()


@case("stock", *REMEMBER)
def thrown_away_gradients_never_arrive(scheme: str) -> float:
    model = net()
    opt = wrap(model, chosen(scheme))
    before = bits(model)
    for step in range(3):
        throw_away(model, opt, step)
    nothing(model, opt)
    return changed(before, model)


@case("stock", *REMEMBER)
def a_thrown_away_step_leaves_the_trajectory(scheme: str) -> float:
    """The same steps with and without one that is thrown away in their midst."""
    models = []
    for throws in (False, True):
        model = net()
        opt = wrap(model, chosen(scheme))
        train(model, opt, range(4))
        if throws:
            opt.zero_grad()
            throw_away(model, opt, 99)
        train(model, opt, range(4, 12))
        models.append(model)
    return distance(*models)


@case("stock", *REMEMBER)
def a_generator_never_moves_by_the_loss_of_its_critic(scheme: str) -> dict[str, float]:
    torch.manual_seed(1)
    generator, critic = nn.Linear(16, 24), nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 1))
    compression = chosen(scheme)
    opt_g, opt_d = wrap(generator, compression, tag="g."), wrap(critic, compression, tag="d.")
    before_g, before_d = bits(generator), bits(critic)
    for step in range(20):
        critic(generator(batch(step))).mean().backward()  # no detach(): gradients in the generator, too
        opt_d.step()
        opt_d.zero_grad()
        opt_g.synchronize()
        opt_g.zero_grad()
        (0.0 * critic(generator(batch(step))).mean()).backward()
        opt_g.step()
        opt_g.zero_grad()
        opt_d.synchronize()
        opt_d.zero_grad()
    return {"generator": changed(before_g, generator), "critic": changed(before_d, critic)}


@case()
def what_is_applied_and_remembered_is_what_came_in() -> dict[str, float]:
    """A linear loss, whose gradients do not depend on the weights; top-k then hands out the rest in `ratio` steps."""
    found = {}
    for way in ("plain", "thrown away", "synchronized twice"):
        ends = []
        for compression in (STOCK, compressor("topk")):
            torch.manual_seed(2)
            model = nn.Linear(32, 16, bias=False)
            opt = wrap(model, compression)
            for step in range(6):
                opt.zero_grad()
                (model.weight * batch(step, 16, 32)).sum().backward()
                if way == "synchronized twice":
                    opt.synchronize()
                if way == "thrown away" and step % 2:
                    opt.synchronize()
                    opt.zero_grad()
                    continue
                opt.step()
            for _ in range(10):
                opt.zero_grad()
                (1e-12 * model.weight).sum().backward()  # a gradient of zeros would be none at all
                opt.step()
            ends.append(model)
        found[way] = distance(*ends)
    return found


# ---------------------------------------------------------------- synchronize() twice in a step


def clipped(model: nn.Module, opt: Any, steps: int, skip: bool, bound: float = 1e9) -> list[list[Tensor]]:
    """`synchronize()`, clip, `step()`; with `skip` as Horovod documents it, without as many scripts have it."""
    path = []
    for step in range(steps):
        opt.zero_grad()
        loss_of(model, step).backward()
        opt.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), bound)
        if skip:
            with opt.skip_synchronize():
                opt.step()
        else:
            opt.step()
        path.append(bits(model))
    return path


def farthest(a: list[list[Tensor]], b: list[list[Tensor]]) -> float:
    return max(gap(x, y) for step in zip(a, b) for x, y in zip(*step))


@case()
def momentum_before_compression_is_taken_once() -> list[float]:
    dense = net()
    opt = wrap(dense, STOCK, base=torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9))
    expected, gaps = clipped(dense, opt, 8, False), []
    for keys in ({"scheme": "marsit", "flush_steps": 1, "min_numel": 0}, {"scheme": "none"}):
        model = net()
        ours = Compression.load({**keys, "direction": {"kind": "momentum", "momentum": 0.9}})
        opt = wrap(model, ours, tag=keys["scheme"])
        gaps.append(farthest(expected, clipped(model, opt, 8, False)))
    return gaps


@case()
def a_frozen_variance_begins_as_adam() -> float:
    models = [net(), net()]
    adam = wrap(models[0], STOCK, base=torch.optim.Adam(models[0].parameters(), lr=0.01))
    signs = wrap(models[1], compressor("ef_signsgd", direction="frozen_adam", warmup_steps=8), lr=0.01, tag="ours")
    return farthest(clipped(models[0], adam, 8, False), clipped(models[1], signs, 8, False))


@case()
def an_optimizer_with_moments_of_its_own_is_refused() -> list[str]:
    model = net()
    try:
        wrap(model, compressor("topk", direction="adam"), base=torch.optim.Adam(model.parameters()))
    except ValueError as error:
        return [str(error)]
    return []


@case(*SCHEMES)
def a_second_synchronize_changes_nothing(scheme: str) -> float:
    """The same scheme, with and without `skip_synchronize()`; stock gives the same both ways."""
    paths = []
    for skip in (True, False):
        model = net()
        paths.append(clipped(model, wrap(model, compressor(scheme)), 6, skip, bound=0.05))
    return farthest(*paths)


@case()
def clipping_between_two_synchronizations_equals_stock() -> dict[str, float]:
    found = {}
    for skip in (True, False):
        models = [net(), net()]
        paths = [clipped(m, wrap(m, c), 6, skip, bound=0.05) for m, c in zip(models, (STOCK, everything()))]
        found[f"skip_synchronize={skip}"] = farthest(*paths)
    return found


@case()
def what_a_rank_adds_between_two_synchronizations_is_averaged() -> list[Any]:
    """Stock averages again: ranks that add something of their own stay replicas."""
    models = []
    for compression in (STOCK, everything()):
        model = net()
        opt = wrap(model, compression)
        for step in range(4):
            opt.zero_grad()
            loss_of(model, step).backward()
            opt.synchronize()
            for p in model.parameters():
                p.grad.add_(0.01 * (R + 1))
            opt.step()
        models.append(model)
    return [distance(*models), *map(identical, models)]


def warm_up_path(compression: Any, way: str) -> list[list[Tensor]]:
    model = net()
    opt = wrap(model, compression)
    if way != "step":
        return clipped(model, opt, 13, skip=False)
    path = []
    for step in range(13):
        train(model, opt, [step])
        path.append(bits(model))
    return path


#: What stock does, for every way to synchronize.
_dense: dict[str, list[list[Tensor]]] = {}


@case(*SCHEMES)
def warm_up_counts_optimizer_steps(scheme: str) -> dict[str, list[float]]:
    """Distance to stock in the ten steps of warm-up, and after them."""
    found = {}
    for way in ("step", "synchronize, step"):
        if way not in _dense:
            _dense[way] = warm_up_path(STOCK, way)
        dense = _dense[way]
        ours = warm_up_path(compressor(scheme, warmup_steps=10), way)
        found[way] = [farthest(dense[:10], ours[:10]), farthest(dense[10:], ours[10:])]
    return found


# ---------------------------------------------------------------- loss scaling


def scaled(compression: Any, scaler: Any, bad: tuple[int, ...], steps: int = 16) -> tuple[nn.Module, list[float]]:
    """Horovod's documented pattern; in the `bad` steps the loss of one rank is infinite, and the step is skipped."""
    model = net()
    opt = wrap(model, compression)
    scales = []
    for step in range(steps):
        if scaler is None and step in bad:
            continue
        opt.zero_grad()
        loss = loss_of(model, step) * (float("inf") if step in bad and R == 1 else 1.0)
        if scaler is None:
            loss.backward()
            opt.step()
            continue
        scaler.scale(loss).backward()
        opt.synchronize()
        scaler.unscale_(opt)
        with opt.skip_synchronize():
            scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
    return model, scales


@case("stock", "topk", "ef_signsgd", "scalecom")
def a_loss_scaler_changes_nothing(scheme: str) -> dict[str, Any]:
    """Scales are powers of two, so the trajectory is the same to rounding."""
    found: dict[str, Any] = {}
    for name, bad in (("growth", ()), ("back-off", (4, 5, 10))):
        compression = chosen(scheme)
        plain, _ = scaled(compression, None, bad)
        scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, growth_interval=2)
        model, scales = scaled(compression, scaler, bad)
        start = net()
        moved = distance(plain, start)
        found[name] = [distance(plain, model) / moved, min(scales), max(scales), moved]
    return found


# ---------------------------------------------------------------- a scale that is taken at one moment


class LowRank(nn.Module):
    """x W + x A B. With B = 0, as usual, A has no gradient before B has moved."""

    def __init__(self, b: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.register_buffer("w", torch.randn(16, 12) / 4)
        self.a = nn.Parameter(torch.randn(16, 4) / 4)
        self.b = nn.Parameter(torch.randn(4, 12) * b / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + x @ self.a @ self.b


def movements(scheme: str, b: float) -> list[float]:
    """The length of every step of A."""
    model = LowRank(b)
    opt = wrap(model, chosen(scheme))
    target = torch.randn(16, 12, generator=torch.Generator().manual_seed(4))
    found = []
    for step in range(150):
        before = model.a.detach().clone()
        opt.zero_grad()
        x = batch(step, 32)
        (model(x) - x @ target).square().mean().backward()
        opt.step()
        found.append(float((model.a.detach() - before).norm()))
    return found


@case("stock", "marsit")
def a_scale_comes_when_a_gradient_does(scheme: str) -> dict[str, list[float]]:
    return {"late": movements(scheme, 0.0), "always": movements(scheme, 1.0)}
