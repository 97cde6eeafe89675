"""What Horovod promises its users, with gradients compressed."""

from __future__ import annotations

import io

import horovod.torch as hvd
import torch
from checks import backward, check, distance, identical, net, optimizer, report, train, weights
from torch import nn

from compression_plugins import Compression
from compression_plugins.adapters.horovod.optimizer import load_state_dict, state_dict
from compression_plugins.schemes import registry

hvd.init()
torch.set_num_threads(1)
R = hvd.rank()
EXACT = {"ratio": 1, "min_numel": 1}  # top-k that keeps everything: the machinery of compression, the result of dense
DENSE = hvd.Compression.none


@check
def keeping_everything_equals_dense() -> dict[str, float]:
    found = {}
    for passes in (1, 3):
        for clip in (False, True):
            models = []
            for compression in (DENSE, Compression.topk(**EXACT)):
                model = net()
                opt = optimizer(model, compression, backward_passes_per_step=passes)
                for step in range(3):
                    opt.zero_grad()
                    for micro in range(passes):
                        backward(model, step, micro)
                    if clip:
                        opt.synchronize()
                        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                        with opt.skip_synchronize():
                            opt.step()
                    else:
                        opt.step()
                models.append(model)
            found[f"passes={passes} clip={clip}"] = distance(*models)
    return found


@check
def sum_equals_dense_mean() -> float:
    return distance(train(DENSE, op=hvd.Sum), train(Compression.topk(**EXACT), op=hvd.Sum))


@check
def gradients_that_are_zeroed_in_place_equal_dense() -> float:
    """They then lie in the bucket itself, where the next backward adds to them."""
    model = net()
    opt = optimizer(model, Compression.topk(**EXACT))
    for step in range(3):
        opt.zero_grad(set_to_none=False)
        backward(model, step)
        opt.step()
    return distance(train(DENSE), model)


@check
def groups_are_replaced_by_buckets() -> list[float]:
    dense = train(DENSE)
    found = [distance(dense, train(Compression.topk(**EXACT), groups=2))]
    model = net()
    opt = optimizer(model, Compression.topk(**EXACT), groups=[list(model.parameters())[:2]])
    for step in range(3):
        opt.zero_grad()
        backward(model, step)
        opt.step()
    return [*found, distance(dense, model)]


@check
def other_dtypes() -> dict[str, list]:
    found = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for compression in (Compression.topk(ratio=4), Compression.ef_signsgd(min_numel=1)):
            model = train(compression, dtype=dtype)
            name = f"{str(dtype).removeprefix('torch.')} {compression.config.scheme.name}"
            moved = distance(model, net(dtype)) > 0
            found[name] = [identical(model), moved, next(model.parameters()).grad.dtype == dtype]
    return found


@check
def half_precision_equals_dense_within_its_rounding() -> float:
    return distance(train(DENSE, dtype=torch.float16), train(Compression.topk(**EXACT), dtype=torch.float16))


@check
def every_scheme_keeps_replicas_identical() -> dict[str, list]:
    found = {}
    for name in registry.names():
        model = net()
        opt = optimizer(model, getattr(Compression, name)(min_numel=1) if name != "none" else DENSE)
        for step in range(4):
            opt.zero_grad()
            backward(model, step)
            opt.step()
        session = opt._compression_session
        sent = session.reducer.transport.sent / 4 if session else None
        found[name] = [identical(model), bool(weights(model).isfinite().all()), sent]
    found["dense"] = [True, True, 4.0 * weights(net()).numel()]
    return found


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.never = (nn.Linear(16, 8) for _ in range(4))

    def forward(self, x: torch.Tensor, way: int) -> torch.Tensor:
        return (self.a, self.b, self.c)[way](x)


def branches(compression: object, steps: int = 5) -> nn.Module:
    model = Branches()
    opt = optimizer(model, compression)
    for step in range(steps):
        opt.zero_grad(set_to_none=True) if compression is not DENSE else opt.zero_grad()
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * step + R))
        model(x, (R + step) % 3).square().sum().backward()
        opt.step()
    return model


@check
def missing_gradients_differ_by_rank() -> dict[str, object]:
    found: dict[str, object] = {"topk=dense": distance(branches(DENSE), branches(Compression.topk(**EXACT)))}
    for name in ("signsgd", "powersgd", "scalecom", "marsit", "double_quantization"):
        # A bucket for every tensor: ranks launch them in different orders, and some need several rounds.
        found[name] = identical(branches(getattr(Compression, name)(min_numel=1, bucket_mb=1e-4)))
    return found


def embeddings(compression: object, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(50, 8, sparse=True), "head": nn.Linear(8, 3)})
    opt = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
        **options,
    )
    for step in range(3):
        opt.zero_grad()
        rows = torch.randint(0, 50, (6,), generator=torch.Generator().manual_seed(10 * step + R))
        model["head"](model["table"](rows)).square().sum().backward()
        opt.step()
    return model


@check
def sparse_gradients() -> dict[str, object]:
    dense = embeddings(DENSE)
    return {
        "as dense": distance(dense, embeddings(Compression.topk(**EXACT), sparse_as_dense=True)),
        "as they are": distance(dense, embeddings(Compression.topk(**EXACT))),
        "compressed": identical(embeddings(Compression.topk(ratio=4, min_numel=1), sparse_as_dense=True)),
    }


@check
def two_optimizers_in_flight() -> float:
    models = [net(), net()]
    opts = [optimizer(model, Compression.topk(**EXACT)) for model in models]
    for step in range(3):
        for opt in opts:
            opt.zero_grad()
        for model in models:
            backward(model, step)
        for opt in opts:
            opt.step()
    dense = train(DENSE)
    return max(distance(dense, model) for model in models)


@check
def communication_overlaps_backward() -> list[int]:
    """Buckets in flight, or done, when backward returns; nothing in the first step, which compares notes."""
    model = net()
    opt = optimizer(model, Compression.topk(ratio=4, bucket_mb=1e-3))
    found = []
    for step in range(2):
        opt.zero_grad()
        backward(model, step)
        open_ = opt._compression_session._fillings
        found.append(sum(filling.work is not None for filling in open_._fillings) if open_ else 0)
        opt.step()
    return [*found, len(opt._compression_session._fillings._fillings)]


@check
def loading_optimizer_state_drops_what_is_in_flight() -> bool:
    model = net()
    opt = optimizer(model, Compression.topk(ratio=4))
    for step in range(3):
        opt.zero_grad()
        backward(model, step)
        if step == 1:
            opt.load_state_dict(opt.state_dict())  # before step(): the gradients of this step are lost on all ranks
            hvd.barrier()
            continue
        opt.step()
    hvd.broadcast_optimizer_state(opt, root_rank=0)
    return identical(model)


@check
def resumed_memory_continues_bit_for_bit() -> list[bool]:
    def run(steps: range, model: nn.Module, opt: object) -> None:
        for step in steps:
            opt.zero_grad()
            backward(model, step)
            opt.step()

    found = []
    for name in ("scalecom", "powersgd", "marsit", "double_quantization"):
        compression = getattr(Compression, name)
        straight = net()
        opt = optimizer(straight, compression(min_numel=1))
        run(range(3), straight, opt)
        file = io.BytesIO()
        torch.save([straight.state_dict(), opt.state_dict(), state_dict(opt)], file)
        run(range(3, 6), straight, opt)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = net()
        opt = optimizer(resumed, compression(min_numel=1))
        resumed.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        load_state_dict(opt, saved[2])
        run(range(3, 6), resumed, opt)
        found.append(bool((weights(straight) == weights(resumed)).all()))
    return found


@check
def states_of_different_steps_are_refused() -> None:
    model = net()
    opt = optimizer(model, Compression.topk(ratio=4))
    backward(model, 0)
    opt.step()
    saved = state_dict(opt)
    other = optimizer(net(), Compression.topk(ratio=4))
    if R == 1:
        load_state_dict(other, saved)
    other.step()


@check
def a_nan_reaches_every_rank_and_the_next_step_is_healthy() -> dict[str, list[bool]]:
    found = {}
    for name in ("topk", "scalecom", "qsgd", "ef_signsgd", "powersgd", "bf16"):
        model = net()
        opt = optimizer(model, getattr(Compression, name)(min_numel=1), lr=0.0)
        seen = []
        for step in range(3):
            opt.zero_grad()
            backward(model, step, factor=float("nan") if (step, R) == (1, 1) else 1.0)
            opt.synchronize()
            gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
            seen.append(bool(gradient.isfinite().all()))
        found[name] = seen
    return found


@check
def quantized_weights_compute_but_the_optimizer_keeps_exact_ones() -> list[bool]:
    model = net()
    opt = optimizer(model, Compression.double_quantization(min_numel=1, mu=10.0))
    weight, seen = model[2].weight, []

    def coarse(*_: object) -> None:
        seen.append(len(weight.detach().unique()) < weight.numel() // 2)

    model[2].register_forward_pre_hook(coarse)
    for step in range(4):
        opt.zero_grad()
        backward(model, step)
        opt.step()
    coarse()
    return [*seen, identical(model)]


@check
def compressor_is_a_horovod_compressor() -> list[bool]:
    from horovod.torch.compression import Compressor

    return [
        isinstance(Compression.scalecom(ratio=100), Compressor),
        Compression.none is hvd.Compression.none,
        "powersgd" in dir(Compression),
        identical(train(Compression.scalecom)),  # the class itself: the scheme with its defaults
    ]


@check
def plain_allreduce_is_refused() -> None:
    hvd.allreduce(torch.ones(4), compression=Compression.topk())


@check
def adasum_is_refused() -> None:
    optimizer(net(), Compression.topk(), op=hvd.Adasum)


@check
def minimum_is_refused() -> None:
    optimizer(net(), Compression.topk(), op=hvd.Min)


@check
def predivide_is_refused() -> None:
    optimizer(net(), Compression.topk(), gradient_predivide_factor=2.0)


@check
def complex_parameters_are_refused() -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    hvd.DistributedOptimizer(torch.optim.SGD([p], 0.1), named_parameters=[("c", p)], compression=Compression.topk())


@check
def a_rule_without_a_match_is_refused() -> None:
    model = net()
    opt = optimizer(model, Compression.load({"scheme": "topk", "rules": [{"match": "embed*", "scheme": "qsgd"}]}))
    backward(model, 0)
    opt.step()


@check
def configurations_that_differ_are_named() -> None:
    model = net()
    opt = optimizer(model, Compression.topk(ratio=10 if R == 0 else 20))
    backward(model, 0)
    opt.step()


@check
def tensors_that_differ_are_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4 + R), nn.Linear(4 + R, 4))
    opt = optimizer(model, Compression.topk())
    backward(model, 0)
    opt.step()


@check
def join_is_refused_unless_all_is_sums() -> str:
    model = net()
    opt = optimizer(model, Compression.topk(ratio=4))
    backward(model, 0)
    opt.step()
    try:
        hvd.join()
    except ValueError as error:
        return str(error)
    return "joined"


report()
