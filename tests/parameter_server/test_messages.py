"""The wire format: exact sizes, round trips, and the refusal of everything else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression_plugins import triton_kernels as K
from compression_plugins.parameter_server import messages, quantizer
from compression_plugins.parameter_server.messages import DOWN, EXACT, HEADER, UP, Kind, Message, MessageError

KEY = K.Key(0, 0, 0, 0)


def receive(message: Message, numel: int, parts: int = 4, samples: int = 100) -> Message:
    accept = UP if message.kind in UP else DOWN
    header = messages.parse_header(message.header(), accept, numel, parts, samples)
    assert header.nbytes == message.payload.numel() and len(message.header()) == HEADER.size == 24
    return header.message(message.payload)


def words(bits: int) -> int:
    return 32 * math.ceil(bits / 32)


@pytest.mark.parametrize("numel", [1, 7, 33, 1000])
@pytest.mark.parametrize("bits", range(2, 17))
def test_quantized_vectors_cost_the_bits_of_the_paper_in_whole_words(bits: int, numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    scale = float(x.abs().max())
    down = messages.quantized(Kind.MODEL, x, bits, KEY, scale, 9)
    up = messages.quantized(Kind.GRADIENT, x, bits, KEY, scale, 9)
    assert down.bits_counted == words(bits * numel) + 32 + 8
    assert up.bits_counted == words(bits * numel) + 32
    got = receive(down, numel)
    assert (got.step, got.bits) == (9, bits)
    assert torch.equal(messages.vector(got, numel), quantizer.decode(up.payload, numel, bits))


def test_exact_vectors_survive_bit_for_bit() -> None:
    x = torch.tensor([0.1, -0.0, 1e-40, 3e38])
    for kind in (Kind.SNAPSHOT, Kind.TOTAL, Kind.MODEL, Kind.GRADIENT):
        message = messages.exact(kind, x, 2, count=100 if kind is Kind.TOTAL else 0)
        assert message.bits_counted == 32 * 4
        assert messages.vector(receive(message, 4), 4).view(torch.int32).tolist() == x.view(torch.int32).tolist()


def test_a_model_that_is_the_snapshot_and_a_zero_gradient_have_no_payload() -> None:
    for kind in (Kind.MODEL, Kind.GRADIENT):
        message = messages.nothing(kind, 3)
        assert message.nbytes == HEADER.size
        assert messages.vector(receive(message, 50), 50).abs().sum() == 0


@settings(max_examples=60, deadline=None)
@given(
    numel=st.sampled_from([1, 2, 31, 64, 1000, 70_000, 200_000]),
    density=st.sampled_from([0.0, 0.001, 0.03, 0.5, 1.0]),
    seed=st.integers(0, 100),
)
def test_sparse_vectors_round_trip_in_the_smaller_of_two_forms(numel: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(numel, generator=generator) < density
    signs = (keep * (torch.rand(numel, generator=generator).round() * 2 - 1)).to(torch.int32)
    message = messages.sparse(signs, 0.37, 5)
    count, width = int(keep.sum()), max(0, numel - 1).bit_length()
    low, high = min(width, 16), max(0, width - 16)
    indices = words(count * low) + words(count * high) + words(count) + 64
    bitmap = words(numel) + words(count) + 64
    assert message.count == count
    assert message.bits_counted == min(indices, bitmap)
    assert message.kind is (Kind.INDICES if indices <= bitmap else Kind.BITMAP)
    assert torch.equal(messages.vector(receive(message, numel), numel), signs * torch.tensor(0.37))


def header(kind: int, bits: int = 0, count: int = 0, nbytes: int = 0, version: int = messages.VERSION) -> bytes:
    return HEADER.pack(version, kind, bits, count, 0, 0.0, nbytes)


@pytest.mark.parametrize(
    ("data", "words_of_refusal"),
    [
        (header(Kind.GRADIENT, 8, nbytes=2**32 - 1), "announces 4,294,967,295 bytes"),
        (header(Kind.GRADIENT, 8, nbytes=0), "announces 0 bytes"),
        (header(Kind.GRADIENT, 1, nbytes=4), "of 1 bits"),
        (header(Kind.GRADIENT, 17), "of 17 bits"),
        (header(Kind.GRADIENT, 8, count=1, nbytes=104), "count of 1"),
        (header(Kind.INDICES, count=101, nbytes=4), "count of 101, at most 100"),
        (header(Kind.TOTAL, count=51, nbytes=400), "count of 51, at most 50"),
        (header(Kind.TOTAL, EXACT, nbytes=400), "of 32 bits"),
        (header(Kind.SNAPSHOT, nbytes=400), "kind 1 where"),
        (header(99), "kind 99 where"),
        (header(Kind.GRADIENT, 8, nbytes=104, version=2), "wire version 2"),
        (b"\x80\x04\x95" + bytes(21), "wire version 128"),  # a pickle
    ],
)
def test_a_header_that_does_not_fit_the_problem_is_refused(data: bytes, words_of_refusal: str) -> None:
    with pytest.raises(MessageError, match=words_of_refusal):
        messages.parse_header(data, UP, numel=100, parts=4, samples=50)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(min_size=24, max_size=24), accept=st.sampled_from([UP, DOWN]))
def test_no_header_makes_the_receiver_take_more_than_the_model_is_worth(data: bytes, accept: frozenset[Kind]) -> None:
    try:
        found = messages.parse_header(bytes([messages.VERSION]) + data[1:], accept, 100, 4, 50)
    except MessageError:
        return
    assert found.nbytes <= max(4 * 100 + 4, messages.MAX_TEXT)


def test_sparse_payloads_that_contradict_themselves_are_refused() -> None:
    signs = torch.zeros(1000, dtype=torch.int32)
    signs[[3, 7]] = 1
    good = messages.sparse(signs, 1.0, 0)
    assert good.kind is Kind.INDICES
    for values in ([7, 3], [3, 3], [3, 1001]):
        where = K.pack_bits(torch.tensor(values, dtype=torch.int32), 10)
        payload = torch.cat((good.payload[:4], where, good.payload[8:]))
        with pytest.raises(MessageError, match="do not increase"):
            messages.vector(replace(good, payload=payload), 1000)
    full = messages.sparse(torch.ones(64, dtype=torch.int32), 1.0, 0)
    assert full.kind is Kind.BITMAP
    with pytest.raises(MessageError, match="do not increase"):
        messages.vector(replace(full, count=63), 64)
    with pytest.raises(MessageError, match="magnitude nan"):
        nan = torch.tensor([math.nan]).view(torch.uint8)
        messages.vector(replace(full, payload=torch.cat((nan, full.payload[4:]))), 64)


def test_values_that_are_not_finite_are_refused() -> None:
    for told in (messages.exact(Kind.GRADIENT, torch.tensor([1.0, math.inf]), 0), messages.not_finite(0)):
        with pytest.raises(quantizer.Diverged, match="the run diverged; lower lr"):
            messages.vector(receive(told, 2), 2)


def test_lists_and_text_round_trip() -> None:
    assert messages.read_numbers(receive(messages.numbers(Kind.SHARD, [0, 3], 1), 5), 4) == [0, 3]
    for bad in ([0, 4], [1, 1], [-1]):
        with pytest.raises(MessageError, match="names parts"):
            messages.read_numbers(messages.numbers(Kind.SUM, bad, 1), 4)
    for text in ("", "the run is complete", "é" * 700):
        got = receive(messages.stop(text, error=True), 5)
        assert messages.read_text(got).rstrip("�") == text.encode()[: messages.MAX_TEXT].decode(errors="ignore")
