"""What one rank does: recorded operations against the schemes' own account of their bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from compression_plugins.advise.record import Trace, Work, record
from compression_plugins.advise.work import Codecs, Profile
from compression_plugins.core.call import Segment
from compression_plugins.engine.plan import Bucket
from compression_plugins.schemes import registry
from compression_plugins.schemes.base import Scheme

SEGMENTS = (Segment("a", 0, 96 * 70, (96, 70), 70), Segment("b", 0, 5000, (50, 100), 100))
ROWS = 96 + 50
NUMEL = sum(segment.numel for segment in SEGMENTS)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", registry.names())
def test_recorded_bytes_are_those_that_wire_bits_states(name: str, size: int) -> None:
    scheme = registry.get(name)()
    trace = record(scheme, SEGMENTS, size, 0, "cpu", 0)
    seldom = 1 / getattr(scheme, "flush_steps", math.inf)
    mean = (1 - seldom) * trace.other.sent(size) + seldom * trace.first.sent(size)
    late = 5e-3 if name == "marsit" else 1e-9  # now and then a scale for each tensor, beside two kinds of steps
    assert mean == pytest.approx(Bucket(scheme, tuple(SEGMENTS)).wire_bytes(size), rel=late)


@pytest.mark.parametrize(("name", "size"), [("powersgd", 2), ("marsit", 4), ("bf16", 24), ("topk", 24)])
def test_a_profile_sends_what_wire_bits_states_for_any_bucket_and_number_of_ranks(name: str, size: int) -> None:
    profile = Profile(registry.get(name)(), largest=1 << 16, steps=1)
    bucket = Bucket(profile.scheme, (Segment("w", 0, 300 * 500, (300, 500)), *SEGMENTS))
    works = profile.works(bucket, size)
    assert sum(work.share for work in works) == pytest.approx(1)
    mean = sum(work.share * work.sent(size) for work in works)
    assert mean == pytest.approx(bucket.wire_bytes(size))


def test_flushes_are_as_frequent_as_the_bytes_say() -> None:
    profile = Profile(registry.get("marsit")(flush_steps=20), largest=1 << 16, steps=1)
    usual, flush = profile.works(Bucket(profile.scheme, SEGMENTS), 4)
    assert (usual.share, flush.share) == (pytest.approx(0.95, rel=1e-2), pytest.approx(0.05, rel=1e-2))
    assert flush.operations[1].nbytes > 20 * usual.operations[1].nbytes, "behind the marks of zeros"


@pytest.mark.parametrize(("name", "parameters"), [("bf16", {}), ("cascading_ssdm", {}), ("marsit", {"form": "torus"})])
def test_beyond_direct_ranks_operations_are_those_of_a_run_at_the_true_number(name: str, parameters: dict) -> None:
    scheme, size = registry.get(name)(**parameters), 24
    numel = 24 * 512 * 4
    segments = [Segment("w", 0, numel, (24 * 4, 512), 512)]
    true = record(scheme, segments, size, 0, "cpu", 0).other
    found = Profile(scheme, largest=1 << 16, steps=1).works(Bucket(scheme, tuple(segments)), size)[0]
    assert [(op.kind, op.repeat) for op in found.operations] == [(op.kind, op.repeat) for op in true.operations]
    assert [op.nbytes for op in found.operations] == pytest.approx(
        [op.nbytes for op in true.operations], rel=0.02, abs=2
    )


def test_thousands_of_ranks_need_neither_their_memory_nor_their_time() -> None:
    scheme = registry.get("ef_signsgd")(stages=1)
    [work] = Profile(scheme, largest=1 << 20, steps=1).works(Bucket(scheme, SEGMENTS), 4096)
    marks, signs = work.operations
    assert marks.kind == signs.kind == "all_gather"
    assert (marks.nbytes, signs.nbytes) == (4 * -(-ROWS // 32), scheme.codec.nbytes(NUMEL))


def test_the_decoder_of_an_all_gather_grows_with_the_ranks_and_the_encoder_does_not(monkeypatch: Any) -> None:
    """On a device that takes 2 ns to encode a value and 1 ns to decode one, and 10 us for a call."""

    def timed(scheme: Scheme, segments: Any, size: int, *rest: Any) -> Trace:
        numel = sum(segment.numel for segment in segments)
        return Trace(
            *(
                Work((work.operations[0]._replace(code_s=1e-5 + 2e-9 * numel),), 1e-5 + 1e-9 * numel * size)
                for work in record(scheme, segments, size, *rest)
            )
        )

    monkeypatch.setattr("compression_plugins.advise.work.record", timed)
    profile = Profile(registry.get("ef_signsgd")(stages=1), largest=1 << 20, steps=0)
    bucket = Bucket(profile.scheme, (Segment("w", 0, 1 << 22, (2048, 2048)),))
    few, many = (profile.works(bucket, size)[0] for size in (16, 1024))
    assert many.after_s == pytest.approx(64 * few.after_s, rel=0.02)
    assert many.operations[0].code_s == pytest.approx(few.operations[0].code_s)
    assert few.operations[0].code_s == pytest.approx(1e-5 + 2e-9 * (1 << 22))


def test_only_a_scheme_with_a_model_side_spends_time_on_weights() -> None:
    codecs = Codecs(largest=1 << 16)
    assert codecs.model_side(registry.get("qsgd")(), 1000) == 0
    assert codecs.model_side(registry.get("double_quantization")(weights=False), 1000) == 0
    assert codecs.model_side(registry.get("double_quantization")(), 1000) > 0
