"""What must hold around a DDP step, whatever a script does; a function for each law, in one process group."""

import contextlib
import copy
import functools
import gc
import io
import json
import os
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import compression_plugins.ddp as compression
from compression_plugins.adapters.ddp import find

SIGNS = {"scheme": "ef_signsgd", "block": 32, "min_numel": 0, "bucket_mb": 0.01}
LEADERS = {"scheme": "scalecom", "ratio": 8, "min_numel": 0, "bucket_mb": 0.01}
RANK = SIZE = 0


class Net(nn.Module):
    """A branch that may be left out; convolutions keep their memory format."""

    def __init__(self, image=False):
        super().__init__()
        self.stem = nn.Conv2d(4, 16, 2) if image else nn.Linear(16, 48)
        self.branch = nn.Linear(48, 48)
        self.head = nn.Linear(144 if image else 48, 8)

    def forward(self, x, branch=False):
        x = torch.tanh(self.stem(x).flatten(1))
        return self.head(x + self.branch(x) if branch else x)


def seeded(make, *shape):
    torch.manual_seed(7)
    return make(*shape)


def draw(step, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * step + dist.get_rank()))


class Books:
    """Sums in fp64 what each rank's gradients were, and what the parameters have moved by, at learning rate 1."""

    def __init__(self, ddp):
        self.named = dict(ddp.module.named_parameters())
        self.begin = {name: p.detach().double().clone() for name, p in self.named.items()}
        self.kept = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.named.items()}
        self.open = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.named.items()}
        for name, p in self.named.items():
            p.register_hook(functools.partial(self._note, name))

    def _note(self, name, gradient):
        self.open[name] += gradient

    def close(self, applied=True, scale=1.0):
        for name, total in self.open.items():
            self.kept[name] += total / scale * applied
            total.zero_()

    def missing(self, ddp):
        """Per parameter: what was computed, less what was applied and what the ranks' memories hold, on average."""
        memory = compression.state_dict(ddp)["vectors"].get("residual", {})
        worst = 0.0
        for name, p in self.named.items():
            total = self.kept[name]
            residual = torch.zeros(p.numel(), dtype=torch.float64)
            for start, piece in memory.get(name, {}).items():
                residual[start : start + piece.numel()] += piece.double()
            owed = torch.stack([total.flatten(), residual])
            dist.all_reduce(owed)
            moved = (self.begin[name] - p.detach().double()).flatten()
            worst = max(worst, float((owed[0] / SIZE - owed[1] / SIZE - moved).abs().max()))
        return worst


def train(
    config, steps=9, image=False, branch=None, micro=1, sync=False, drop=None, join=False, scaler=None, **options
):
    """SGD at learning rate 1 on `steps` steps; returns what has got lost on the way, by `Books`."""
    model = seeded(Net, image)
    if image:
        model = model.to(memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model, **options)
    if config is not None:
        compression.compress(ddp, config)
    books, optimizer = Books(ddp), torch.optim.SGD(ddp.parameters(), lr=1.0)
    scale = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) if scaler else None
    own = steps + (3 * RANK if join else 0)
    norms = []
    with ddp.join() if join else contextlib.nullcontext():
        for step in range(own):
            throw = drop is not None and step % 3 == 1
            optimizer.zero_grad(set_to_none=drop != "zeros")
            for part in range(micro):
                x = draw(step * 10 + part, 8, 4, 4, 4) if image else draw(step * 10 + part, 8, 16)
                used = branch is not None and branch[step % len(branch)] in ("all", RANK)
                quiet = part < micro - 1 and not sync
                with ddp.no_sync() if quiet else contextlib.nullcontext():
                    loss = ddp(x, used).square().mean()
                    if scale is not None:
                        loss = scale.scale(loss * (float("inf") if step == 4 else 1.0))
                    loss.backward()
            norms.append(float(ddp.module.head.weight.grad.norm()))
            factor = 1.0 if scale is None else scale.get_scale()
            if throw:
                optimizer.zero_grad(set_to_none=drop != "zeros")
            elif scale is not None:
                scale.step(optimizer)
                scale.update()
            else:
                optimizer.step()
            if scale is not None and step == 4:
                [total.zero_() for total in books.open.values()]
            books.close(not throw, factor)
    if config is None:
        return {"digest": digest(ddp)}
    state = compression.state_dict(ddp)
    return {"missing": books.missing(ddp), "step": state["step"], "norm": norms[-1], "digest": digest(ddp)}


def digest(module):
    return float(sum((p.detach().double() * (i + 1)).sum() for i, p in enumerate(module.parameters())))


def resume(config):
    """Six steps, then six; against twelve in one go. The state goes through a file, and through a list of all ranks."""

    def run(ddp, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            ddp(draw(step, 8, 16)).square().mean().backward()
            optimizer.step()

    def build():
        ddp = DistributedDataParallel(seeded(Net), find_unused_parameters=True)
        compression.compress(ddp, config)
        return ddp, torch.optim.Adam(ddp.parameters(), lr=1e-2)

    straight, optimizer = build()
    run(straight, optimizer, range(12))
    first, optimizer = build()
    run(first, optimizer, range(6))
    buffer = io.BytesIO()
    torch.save([first.module.state_dict(), optimizer.state_dict(), compression.state_dict(first.module)], buffer)
    digests = []
    for gathered in (False, True):
        model, adam, memory = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        second, optimizer = build()
        second.module.load_state_dict(model)
        optimizer.load_state_dict(adam)
        if gathered:
            texts = [None] * SIZE
            dist.all_gather_object(texts, memory)
            memory = texts
        compression.load_state_dict(second, memory)
        run(second, optimizer, range(6, 12))
        digests.append(digest(second))
    refused = ""
    try:
        compression.load_state_dict(second, texts[(RANK + 1) % SIZE])
    except ValueError as error:
        refused = str(error)
    return {"straight": digest(straight), "resumed": digests, "refused": refused}


def two_models():
    """A generator and a discriminator, one backward through both, an optimizer each."""
    g = DistributedDataParallel(seeded(nn.Linear, 16, 32), bucket_cap_mb=0.001)
    d = DistributedDataParallel(seeded(Net), bucket_cap_mb=0.001)
    compression.compress(g, LEADERS)
    compression.compress(d, "powersgd", min_numel=0, bucket_mb=0.01)
    mine, theirs = torch.optim.Adam(g.parameters()), torch.optim.Adam(d.parameters())
    for step in range(5):
        theirs.zero_grad()
        both = torch.cat([draw(step, 8, 16), g(draw(step, 8, 16)).detach()[:, :16]])
        d(both, True).mul(torch.tensor([1.0, -1.0]).repeat_interleave(8)[:, None]).mean().backward()
        theirs.step()
        mine.zero_grad()
        d(g(draw(step, 8, 16))[:, :16], True).mean().backward()
        mine.step()
    digests = [None] * SIZE
    dist.all_gather_object(digests, digest(g) + digest(d))
    steps = compression.state_dict(g)["step"], compression.state_dict(d)["step"]
    return {"equal": len(set(digests)) == 1, "steps": list(steps)}


def two_optimizers():
    """Two over one model: the first to step ends the step."""
    ddp = DistributedDataParallel(seeded(Net), find_unused_parameters=True)
    compression.compress(ddp, SIGNS)
    books = Books(ddp)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (ddp.module.stem, ddp.module.head)]
    for step in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        ddp(draw(step, 8, 16)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        books.close()
    return {"missing": books.missing(ddp), "step": compression.state_dict(ddp)["step"]}


def quantized_weights():
    """Inside forward the weights are quantized, and nowhere else; two DDP forwards and no_sync draw the same."""
    ddp = DistributedDataParallel(seeded(nn.Sequential, nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8)))
    compression.compress(ddp, "double_quantization", mu=1e4, min_numel=0, snapshot_steps=3)
    weight, optimizer, inside = ddp.module[0].weight, torch.optim.SGD(ddp.parameters(), lr=0.1), []
    ddp.module[0].register_forward_hook(lambda *_: inside.append(weight.detach().clone()))
    found = {"inside": [], "outside": True, "same": True, "saved": True}
    for step in range(5):
        optimizer.zero_grad()
        exact = weight.detach().clone()
        with ddp.no_sync():
            ddp(draw(step, 8, 16)).square().mean().backward()
        found["outside"] &= torch.equal(weight.detach(), exact)
        loss = ddp(draw(step, 8, 16)).square().mean()
        found["same"] &= torch.equal(inside[-1], inside[-2])
        found["inside"].append(inside[-1].unique().numel())
        loss.backward()
        found["outside"] &= torch.equal(weight.detach(), exact)
        optimizer.step()
        exact = weight.detach().clone()
        ddp(draw(step, 8, 16))  # no backward follows
        found["saved"] &= torch.equal(ddp.state_dict()["module.0.weight"], exact)
    with torch.no_grad():
        ddp(draw(0, 8, 16))
    found["evaluation"] = torch.equal(inside[-1], exact)
    return found


def sparse():
    """A sparse embedding travels as DDP does it, beside what is compressed."""

    def run(compressed):
        net = seeded(lambda: nn.Sequential(nn.Embedding(50, 16, sparse=True), nn.Linear(16, 40), nn.Linear(40, 4)))
        ddp = DistributedDataParallel(net)
        if compressed:
            compression.compress(ddp, "topk", exempt=["*"])
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            ddp(torch.arange(5) * (RANK + 1) + step).square().mean().backward()
            assert net[0].weight.grad.is_sparse
            optimizer.step()
        return digest(ddp)

    return {"stock": run(False), "compressed": run(True)}


def kept():
    """Gradients that a script keeps are its own; a copy does not carry the session away; what is deleted is freed."""
    found = {}
    for view in (False, True):
        ddp = DistributedDataParallel(seeded(Net), find_unused_parameters=True, gradient_as_bucket_view=view)
        compression.compress(ddp, SIGNS)
        optimizer, earlier = torch.optim.SGD(ddp.parameters(), lr=0.1), []
        for step in range(4):
            optimizer.zero_grad(set_to_none=True)
            ddp(draw(step, 8, 16)).square().mean().backward()
            earlier.append((ddp.module.head.weight.grad, ddp.module.head.weight.grad.clone()))
            optimizer.step()
        found[f"kept {view}"] = all(torch.equal(a, b) for a, b in earlier) or view  # a view is a view, in DDP too
        found[f"unused {view}"] = ddp.module.branch.weight.grad is None
    said = io.StringIO()
    twin = copy.deepcopy(ddp)
    with contextlib.redirect_stderr(said):
        twin(draw(0, 8, 16)).square().mean().backward()
    gone = weakref.ref(ddp), weakref.ref(find(ddp).session)
    ddp(draw(0, 8, 16))  # a forward pass that no backward pass follows
    del ddp, optimizer
    gc.collect()
    found["freed"] = gone[0]() is None and gone[1]() is None
    return {**found, "copied": "is a copy of a compressed model" in said.getvalue()}


def refusals():
    """What is refused says why, and leaves the model as it was."""
    said = {}

    def attempt(name, act):
        try:
            act()
        except ValueError as error:
            said[name] = str(error)

    def wrap(**options):
        return DistributedDataParallel(seeded(Net), **options)

    os.environ.pop("COMPRESSION_PLUGINS_CONFIG")
    attempt("not ddp", lambda: compression.compress(nn.Linear(2, 2), "topk"))
    attempt("skip", lambda: compression.compress(wrap(skip_all_reduce_unused_params=True), "topk"))
    attempt("unknown", lambda: compression.compress(wrap(), "topk", ration=3))
    taken = wrap()
    taken.register_comm_hook(None, lambda state, bucket: dist.all_reduce(bucket.buffer(), async_op=True).get_future())
    attempt("taken", lambda: compression.compress(taken, "topk"))
    builtin = wrap()
    builtin._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    attempt("built in", lambda: compression.compress(builtin, "topk"))
    twice = wrap()
    compression.compress(twice, "topk")
    attempt("twice", lambda: compression.compress(twice, "topk"))
    attempt("nothing", lambda: compression.state_dict(wrap()))
    frozen = wrap(find_unused_parameters=True)
    frozen.module.branch.requires_grad_(False)
    compression.compress(frozen, "topk", min_numel=0)
    for step in range(2):
        frozen(draw(step, 8, 16)).square().mean().backward()
    said["frozen"] = str(frozen.module.branch.weight.grad is None)
    divided = wrap(find_unused_parameters=True)
    compression.compress(divided, "topk")
    with divided.join(divide_by_initial_world_size=False, enable=True):
        pass
    attempt("divided", lambda: divided(draw(0, 8, 16)))
    return said


def directions(kind, scaler):
    """The largest gap between plain SGD behind a direction and the stock optimizer behind DDP's own average, while the
    loss scale changes.
    """
    make = {"momentum": functools.partial(torch.optim.SGD, momentum=0.9), "frozen_adam": torch.optim.Adam}[kind]
    ours, stock = (DistributedDataParallel(seeded(Net)) for _ in range(2))
    compression.compress(ours, {"scheme": "none", "direction": kind, "warmup_steps": 20})
    models = [(ours, torch.optim.SGD(ours.parameters(), lr=0.01)), (stock, make(stock.parameters(), lr=0.01))]
    for ddp, optimizer in models:
        scale = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=scaler)
        for step in range(8):
            optimizer.zero_grad()
            loss = ddp(draw(step, 8, 16), True).square().mean()
            scale.scale(loss * (float("inf") if scaler and step == 4 else 1.0)).backward()
            scale.step(optimizer)
            scale.update()
        del scale
        gc.collect()
    gaps = [float((a - b).abs().max()) for a, b in zip(ours.parameters(), stock.parameters())]
    return {"gap": max(gaps), "step": compression.state_dict(ours)["step"]}


def second_moments():
    """An optimizer that would do the direction's work again is refused before it changes anything."""
    ddp = DistributedDataParallel(seeded(Net))
    compression.compress(ddp, {"scheme": "ef_signsgd", "direction": "momentum"})
    optimizer, before = torch.optim.Adam(ddp.parameters()), digest(ddp)
    ddp(draw(0, 8, 16), True).square().mean().backward()
    try:
        optimizer.step()
        said = ""
    except ValueError as error:
        said = str(error)
    return {"said": said, "kept": digest(ddp) == before}


def main():
    global RANK, SIZE
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    RANK, SIZE = dist.get_rank(), dist.get_world_size()
    report = {}
    for name, (law, options) in json.loads((folder / "cases.json").read_text()).items():
        try:
            report[name] = globals()[law](**options)
        except BaseException:
            print(f"in {name}", file=sys.stderr, flush=True)
            raise
    torch.save(report, folder / f"report{RANK}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
