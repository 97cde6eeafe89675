"""The model of a step on cases that a pencil can follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from compression_plugins.advise.compute import Compute, from_shapes
from compression_plugins.advise.measure import in_job
from compression_plugins.advise.network import Given, Line, Measured
from compression_plugins.advise.predict import Step, step
from compression_plugins.advise.shapes import load
from compression_plugins.advise.simulate import Machine
from compression_plugins.advise.work import Operation, Work
from compression_plugins.config import Config
from compression_plugins.engine.plan import Bucket, TensorSpec
from compression_plugins.errors import ConfigError

NO_COPIES = Machine(copy_rate=1e30)
SCALECOM = Config.load("scalecom")
MEGA = 1 << 20


def net(alpha_s: float, beta_s: float, cpu: float = 0.0, gap_s: float = 1e9) -> Measured:
    """Two ranks; an all-reduce of a tensor sends as many bytes as it has."""
    lines = dict.fromkeys(("all_reduce", "broadcast", "all_gather", "all_to_all"), Line(alpha_s, beta_s, gap_s))
    return Measured(2, lines, cpu)


def job(*ready: float, forward: float = 1.0, backward: float = 2.0, update: float = 0.5) -> Compute:
    """A matrix of 4 MiB for each entry; registered in the opposite order."""
    specs = tuple(TensorSpec(f"w{i}", (1024, 1024), "float32") for i in range(len(ready)))
    return Compute(specs, forward, tuple(ready), backward, update, "")


def fixed(*operations: Operation, after: float = 0.0) -> Callable[[Bucket], Sequence[Work]]:
    return lambda bucket: [Work(operations, after)]


BYTES = 4 * MEGA
SECOND = 1 / BYTES  # a second for a tensor


def test_without_overlap_a_step_is_the_sum_of_its_parts() -> None:
    one = step(None, job(2.0), net(0.25, 4 * SECOND), fixed())
    assert one.step_s == pytest.approx(1 + 2 + 4.25 + 0.5)
    assert (one.exposed_s, one.wire_s) == (pytest.approx(4.25), pytest.approx(4.25))
    assert one.sent_bytes == BYTES


def test_an_early_gradient_travels_during_backward() -> None:
    one = step(None, job(2.0, 0.5), net(0.0, 1.25 * SECOND), fixed())
    # from 1.5 to 2.75, hidden; the other from 3.0 to 4.25
    assert one.step_s == pytest.approx(4.25 + 0.5)
    assert one.exposed_s == pytest.approx(1.25)


def test_what_waits_for_the_wire_is_fused() -> None:
    # 1.5 to 4.5 the first; the two others, ready at 2 and 3, share one latency: 4.5 to 4.5 + 1 + 2 x 2
    one = step(None, job(2.0, 1.0, 0.5), net(1.0, 2 * SECOND), fixed(), machine=NO_COPIES)
    assert one.step_s == pytest.approx(9.5 + 0.5)


def test_deepspeed_overlaps_nothing() -> None:
    early = step(None, job(0.1, 0.1), net(0.0, 1 * SECOND), fixed(), "deepspeed", NO_COPIES)
    assert early.step_s == pytest.approx(3 + 2 + 0.5)


def test_ddp_sends_its_first_bucket_early_and_the_rest_when_it_is_full_or_backward_is_over() -> None:
    # the first tensor fills a bucket of 1 MiB: from 1.5 to 2.5; the two others wait for each other: from 3 to 5
    one = step(None, job(2.0, 1.0, 0.5), net(0.0, 1 * SECOND), fixed(), "ddp", NO_COPIES)
    assert one.step_s == pytest.approx(5 + 0.5)
    many = step(None, job(2.0, *[0.5] * 8), net(0.0, 0.1 * SECOND), fixed(), "ddp", NO_COPIES)
    # one, then seven of the eight that are ready at 0.5 (28 MiB): 1.5 to 2.3; the last at the end: 3 to 3.1
    assert many.step_s == pytest.approx(3.1 + 0.5)


def test_a_scheme_under_ddp_gets_gradients_when_ddp_has_filled_a_bucket() -> None:
    config = Config.load("scalecom", {"bucket_mb": 4})  # a bucket a tensor
    works = fixed(Operation(0.0, "broadcast", 0))
    first = step(config, job(2.0, 0.5), net(1.0, 0.0), works, "ddp", NO_COPIES)
    assert first.step_s == pytest.approx(3 + 1 + 0.5)  # one from 1.5 to 2.5, the other from 3 to 4
    held = step(config, job(2.0, 1.0, 0.5), net(1.0, 0.0), works, "ddp", NO_COPIES)
    sooner = step(config, job(2.0, 1.0, 0.5), net(1.0, 0.0), works, "horovod", NO_COPIES)
    assert held.step_s == pytest.approx(3 + 2 + 0.5) and sooner.step_s < held.step_s


@pytest.mark.parametrize(
    "variables, host",
    [
        ({"HOROVOD_RANK": "0"}, "horovod"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "TORCHELASTIC_RUN_ID": "none"}, "ddp"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "deepspeed"),
        ({"RANK": "0"}, None),
    ],
)
def test_a_launcher_is_known_by_its_variables(variables, host, monkeypatch) -> None:
    for name in ("HOROVOD_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert in_job() == host


def test_a_compressed_bucket_encodes_sends_and_decodes() -> None:
    works = fixed(Operation(0.1, "broadcast", 0), Operation(0.2, "all_reduce", BYTES), after=0.3)
    one = step(SCALECOM, job(2.0), net(0.5, 1 * SECOND), works, machine=NO_COPIES)
    assert one.step_s == pytest.approx(1 + 2 + 0.1 + 0.5 + 0.2 + 1.5 + 0.3 + 0.5)
    assert one.codec_s == pytest.approx(0.6) and one.wire_s == pytest.approx(2.0)


def test_a_later_hook_continues_what_the_wire_has_finished() -> None:
    config = Config.load("scalecom", {"bucket_mb": 4})  # a bucket a tensor
    works = fixed(Operation(0.0, "broadcast", 0), Operation(0.0, "all_reduce", 0))
    early = step(config, job(2.0, 1.0, 0.1), net(0.5, 0.0), works, machine=NO_COPIES)
    # First bucket: 1.1 to 1.6, its second operation at the hook of 2.0, to 2.5; the second one: 2.5 to 3.0 and 3.5 ...
    alone = step(config, job(2.0, 2.0, 0.1), net(0.5, 0.0), works, machine=NO_COPIES)
    assert early.step_s < alone.step_s


def test_a_latency_that_others_may_share_is_paid_once_by_horovod() -> None:
    config = Config.load("scalecom", {"bucket_mb": 4})
    works = fixed(Operation(0.0, "broadcast", 0))
    shared = step(config, job(2.0, 2.0, 2.0), net(0.5, 0.0, gap_s=0.0), works, machine=NO_COPIES)
    apart = step(config, job(2.0, 2.0, 2.0), net(0.5, 0.0), works, machine=NO_COPIES)
    assert shared.step_s == pytest.approx(3.5 + 1.0)  # the first goes alone, the others together
    assert apart.step_s == pytest.approx(3.5 + 1.5)


def test_communication_takes_its_cpu_time_from_a_single_core() -> None:
    cpu = 0.5 * SECOND  # half of the time of the wire
    free = step(None, job(2.0, 0.0), net(0.0, 1 * SECOND, cpu), fixed(), machine=Machine(1e30, steal=0.0))
    taken = step(None, job(2.0, 0.0), net(0.0, 1 * SECOND, cpu), fixed(), machine=Machine(1e30, steal=1.0))
    assert free.step_s == pytest.approx(1 + 2 + 1 + 0.5)
    assert taken.step_s == pytest.approx(free.step_s + 0.5)  # one second at half speed
    elsewhere = step(None, job(2.0, 0.0), net(0.0, 1 * SECOND, cpu), fixed(), machine=Machine(1e30, 1.0, False))
    assert elsewhere.step_s == pytest.approx(free.step_s)


def test_to_start_an_operation_takes_the_thread_a_moment() -> None:
    alone = step(None, job(2.0, 1.0), net(0.25, 0.0), fixed(), machine=NO_COPIES)
    posting = step(None, job(2.0, 1.0), replace(net(0.25, 0.0), post_s=0.1), fixed(), machine=NO_COPIES)
    assert alone.step_s == pytest.approx(3.25 + 0.5)
    assert posting.step_s == pytest.approx(
        3.2 + 0.15 + 0.5
    )  # two starts; what is measured from start to end is the same


def test_two_kinds_of_steps_count_by_their_shares() -> None:
    def works(bucket: Bucket) -> list[Work]:
        usual, flush = (Operation(0.0, "all_reduce", nbytes) for nbytes in (BYTES, 10 * BYTES))
        return [Work((usual,), 0.0, 0.75), Work((flush,), 0.0, 0.25)]

    one = step(Config.load("marsit"), job(2.0), net(0.0, SECOND), works, machine=NO_COPIES)
    assert one.usual_s == pytest.approx(3.5 + 1)
    assert one.step_s == pytest.approx(3.5 + 0.75 * 1 + 0.25 * 10)
    assert one.sent_bytes == pytest.approx(BYTES * (0.75 + 2.5))


def test_a_step_is_never_slower_on_a_faster_network() -> None:
    compute = from_shapes(load("resnet50"), compute_ms=100)

    def works(bucket: Bucket) -> list[Work]:
        operations = (Operation(1e-4, "all_to_all", bucket.numel / 2), Operation(2e-4, "all_gather", bucket.numel / 16))
        return [Work(operations, 3e-4)]

    for config in (None, Config.load("qsgd")):
        for host in ("horovod", "deepspeed"):
            times = [step(config, compute, Given(8, 10.0**e, 2e-5), works, host).step_s for e in range(7, 13)]  # type: ignore[arg-type]
            assert times == sorted(times, reverse=True)
            assert times[-1] >= compute.step_s


def test_no_ranks_wait_for_nothing_on_an_infinite_network() -> None:
    compute = job(2.0, 1.0)
    one: Step = step(None, compute, Given(2, 1e30, 0.0), fixed(), machine=NO_COPIES)
    assert one.step_s == pytest.approx(compute.step_s)


def test_gradients_are_ready_in_reverse_order_and_a_tied_head_only_at_the_end() -> None:
    compute = from_shapes(load("gpt2"), tflops=100, batch=8)
    assert compute.backward_s == pytest.approx(2 * compute.forward_s)
    assert list(compute.ready_s) == sorted(compute.ready_s, reverse=True)
    assert compute.ready_s[0] == pytest.approx(compute.backward_s)
    assert compute.ready_s[-1] > 0.1 * compute.backward_s  # after the head's products
    assert compute.step_s == pytest.approx(8 * 874.9449216e9 / 100e12)


def test_the_time_of_a_file_of_shapes_has_to_be_given() -> None:
    known = replace(load("mlp"), flops=None)
    with pytest.raises(ConfigError, match="--compute-ms"):
        from_shapes(known, tflops=1, batch=1)
    assert from_shapes(known, compute_ms=30).step_s == pytest.approx(0.03)
