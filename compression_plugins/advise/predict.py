"""The time of a training step: one compute thread, one wire, and the order in which a host framework uses them.

Horovod: a hook a gradient, in the order in which backward completes them. The last gradient of a bucket encodes it and
starts its first operation; every later hook continues what the wire has finished; `synchronize()` drains the rest level
by level. Without compression tensors are all-reduced as they come; what waits while the wire is busy is fused.
DDP: gradients are copied into buckets of 25 MiB, the first of 1 MiB, as backward completes them; a full one is
all-reduced, or handed to the hook, which fills the scheme's buckets from it and starts what is complete.
DeepSpeed (stage 0): all of backward, then one buffer, reduced scheme by scheme; nothing overlaps.
Where ranks train by themselves (`every`): steps without communication, then one exchange of all buckets that nothing
hides; figures are means over the steps of a round.

The wire serves operations one after the other. On a CPU, what moves bytes takes time from what computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..config import Config
from ..engine.plan import Bucket, make_plan
from ..schemes.base import Scheme
from .compute import Compute
from .network import Network
from .simulate import Host, Job, Machine, Run
from .work import Work, sent_bytes

#: Copies of the gradient that DeepSpeed makes: into its buffer, the mean, back; and four more around a reducer.
_BUFFER_PASSES, _REDUCER_PASSES = 3, 4
#: Of DDP's first bucket, and of the others.
_DDP_FIRST_BYTES, _DDP_BYTES = 1 << 20, 25 << 20
#: Copies of the weights that an exchange of local updates makes: the drift, into buckets and back, the outer step.
_EXCHANGE_PASSES = 5


@dataclass(frozen=True)
class Step:
    """A predicted step of one rank; seconds and bytes are means over steps.

    Attributes:
        step_s: all of it.
        usual_s: a step of the kind that is most frequent.
        compute_s: without any communication.
        codec_s: scheme code and copies on the compute thread.
        wire_s: the wire is in use.
        exposed_s: step_s - compute_s.
        sent_bytes: by one rank.
    """

    step_s: float
    usual_s: float
    compute_s: float
    codec_s: float
    wire_s: float
    exposed_s: float
    sent_bytes: float


#: Kinds of steps of one bucket; see `Profile.works`.
WorksOf = Callable[[Bucket], Sequence[Work]]


def step(
    config: Config | None,
    compute: Compute,
    network: Network,
    works_of: WorksOf,
    host: Host = "horovod",
    machine: Machine | None = None,
    model_side: Callable[[Scheme, int], float] | None = None,
) -> Step:
    """Predict the step with `config`, or with the host's own dense all-reduce for None and `scheme: none`.

    Args:
        works_of: what a rank does for a bucket.
        model_side: seconds per step for weights of so many elements, of a scheme that also quantizes these.
    """
    machine = machine or Machine()
    if config is None or (config.scheme.host_dense and not config.rules and not config.direction.formed):
        return _dense(compute, network, host, machine)
    plan = make_plan(config, compute.specs)
    buckets = _parts(plan.buckets) if host == "deepspeed" else list(plan.buckets)
    kinds = [works_of(bucket) for bucket in buckets]
    extra = 0.0
    if model_side is not None:
        for scheme in dict.fromkeys(row.scheme for row in plan.rows):
            extra += model_side(scheme, sum(row.numel for row in plan.rows if row.scheme == scheme))
    shares = max(([work.share for work in works] for works in kinds), key=len)
    means, usual = [0.0] * 4, (0.0, -1.0)
    for i, share in enumerate(shares):
        works = [works[min(i, len(works) - 1)] for works in kinds]
        run = Run(network, host, machine)
        if config.every > 1:
            values = _round(run, compute, works, network.size, config.every)
        else:
            _HOSTS[host](run, compute, buckets, works)
            run.code(extra)
            values = (run.now, run.codec_s, run.wire.busy_s, sum(work.sent(network.size) for work in works))
        means = [mean + share * value for mean, value in zip(means, values)]
        usual = max(usual, (share, values[0]))
    step_s, codec_s, wire_s, sent = means
    return Step(step_s, usual[1], compute.step_s, codec_s, wire_s, step_s - compute.step_s, sent)


def _dense(compute: Compute, network: Network, host: Host, machine: Machine) -> Step:
    run = Run(network, host, machine)
    sizes = [spec.numel * _itemsize(spec.dtype) for spec in compute.specs]
    if host == "horovod":
        transfers = []
        for i in _backward(run, compute):
            transfers.append(run.post("all_reduce", sizes[i]))
        run.finish_backward(compute.backward_s)
        for transfer in transfers:
            run.wait(transfer)
    elif host == "ddp":
        transfers = []
        for full in _ddp_buckets(run, compute):
            transfers.append(run.post("all_reduce", sum(sizes[i] for i in full)))
        run.finish_backward(compute.backward_s)
        for transfer in transfers:
            run.wait(transfer)
        run.code(2 * sum(sizes) / machine.copy_rate)
    else:
        run.compute(compute.forward_s + compute.backward_s)
        run.code(_BUFFER_PASSES * 2 * sum(sizes) / machine.copy_rate)
        run.wait(run.post("all_reduce", sum(sizes)))
    run.compute(compute.update_s)
    sent = sent_bytes("all_reduce", sum(sizes), network.size)
    exposed = run.now - compute.step_s
    return Step(run.now, run.now, compute.step_s, run.codec_s, run.wire.busy_s, exposed, sent)


def _ddp_buckets(run: Run, compute: Compute) -> Iterator[list[int]]:
    """Runs forward, then yields the tensors of each of DDP's buckets when backward and the copy into it are done."""
    bucket: list[int] = []
    held, limit, left = 0, _DDP_FIRST_BYTES, len(compute.specs)
    for i in _backward(run, compute):
        spec = compute.specs[i]
        nbytes = spec.numel * _itemsize(spec.dtype)
        run.code(2 * nbytes / run.machine.copy_rate)
        bucket.append(i)
        held, left = held + nbytes, left - 1
        if held >= limit or not left:
            yield bucket
            bucket, held, limit = [], 0, _DDP_BYTES


def _ddp(run: Run, compute: Compute, buckets: Sequence[Bucket], works: Sequence[Work]) -> None:
    place = {segment.name: i for i, bucket in enumerate(buckets) for segment in bucket.segments}
    missing = [len(bucket.segments) for bucket in buckets]
    jobs: list[Job] = []
    for full in _ddp_buckets(run, compute):
        for i in full:
            at = place[compute.specs[i].name]
            run.code(2 * 4 * compute.specs[i].numel / run.machine.copy_rate)
            missing[at] -= 1
            if not missing[at]:
                jobs.append(Job(run, works[at]))
        for job in jobs:
            job.poll()
    run.finish_backward(compute.backward_s)
    _drain(jobs)
    run.code(2 * 2 * 4 * compute.numel / run.machine.copy_rate)  # into DDP's buckets, and from there
    run.compute(compute.update_s)


def _horovod(run: Run, compute: Compute, buckets: Sequence[Bucket], works: Sequence[Work]) -> None:
    place = {segment.name: i for i, bucket in enumerate(buckets) for segment in bucket.segments}
    missing = [len(bucket.segments) for bucket in buckets]
    jobs: list[Job] = []
    for i in _backward(run, compute):
        spec = compute.specs[i]
        at = place[spec.name]
        if len(buckets[at].segments) > 1:
            run.code(2 * 4 * spec.numel / run.machine.copy_rate)
        missing[at] -= 1
        if not missing[at]:
            jobs.append(Job(run, works[at]))
        for job in jobs:
            job.poll()
    run.finish_backward(compute.backward_s)
    _drain(jobs)
    run.compute(compute.update_s)


def _deepspeed(run: Run, compute: Compute, buckets: Sequence[Bucket], works: Sequence[Work]) -> None:
    run.compute(compute.forward_s + compute.backward_s)
    run.code((_BUFFER_PASSES + _REDUCER_PASSES) * 2 * 4 * compute.numel / run.machine.copy_rate)
    _drain([Job(run, work) for work in works])
    run.compute(compute.update_s)


_HOSTS: dict[Host, Callable[[Run, Compute, Sequence[Bucket], Sequence[Work]], None]] = {
    "horovod": _horovod,
    "ddp": _ddp,
    "deepspeed": _deepspeed,
}


def _round(
    run: Run, compute: Compute, works: Sequence[Work], size: int, every: int
) -> tuple[float, float, float, float]:
    """Seconds, of codecs and of the wire, and bytes: the mean step of a round of `every`."""
    run.code(_EXCHANGE_PASSES * 2 * 4 * compute.numel / run.machine.copy_rate)
    _drain([Job(run, work) for work in works])
    sent = sum(work.sent(size) for work in works)
    return compute.step_s + run.now / every, run.codec_s / every, run.wire.busy_s / every, sent / every


def _drain(jobs: list[Job]) -> None:
    """As `Reducer.drain`: level by level."""
    jobs = [job for job in jobs if not job.done]
    while jobs:
        level = min(job.phase for job in jobs)
        for job in jobs:
            if job.phase == level:
                job.advance()
        jobs = [job for job in jobs if not job.done]


def _backward(run: Run, compute: Compute) -> Iterator[int]:
    """Runs forward, then yields gradients as backward completes them."""
    run.compute(compute.forward_s)
    for i in sorted(range(len(compute.specs)), key=lambda i: (compute.ready_s[i], -i)):
        run.compute(compute.ready_s[i] - run.backward_s)
        run.backward_s = compute.ready_s[i]
        yield i


def _parts(buckets: Sequence[Bucket]) -> list[Bucket]:
    """DeepSpeed reduces one buffer: all tensors of a scheme together."""
    groups: dict[tuple[Scheme, str], list[Bucket]] = {}
    for bucket in buckets:
        groups.setdefault((bucket.scheme, bucket.device), []).append(bucket)
    return [
        replace(members[0], segments=tuple(segment for bucket in members for segment in bucket.segments))
        for members in groups.values()
    ]


def _itemsize(dtype: str) -> int:
    return {"float64": 8, "float16": 2, "bfloat16": 2}.get(dtype, 4)
