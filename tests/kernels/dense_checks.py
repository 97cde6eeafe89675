"""Laws of stats, sign, uniform, pack and cast: tests/kernels runs them on the CPU, tests/gpu on CUDA.

Payloads are held to formulas written out here. A scale that is a sum may differ from ours by one fp32 ulp; codes and
residuals are then computed from the scales that the implementation wrote, and must agree bit for bit.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from compression_plugins.triton_kernels import layout, philox

from .sparse_checks import FAST, INPUTS, KEY, assert_same_bits, device_of, fast, reference, vector

__all__ = ["FAST", "INPUTS", "KEY", "assert_same_bits", "device_of", "fast", "reference", "vector"]

LENGTHS = (0, 1, 7, 8, 31, 33, 63, 64, 65, 4999)
MEMORIES = {"none": None, "plain": (1.0, 1.0, 1.0), "damped": (0.3, 0.9, 0.7)}  # (alpha, decay, sent)
HUGE = {torch.float32: 3.4e38, torch.bfloat16: 3.3e38, torch.float16: 65504.0}
TINY = {torch.float32: 1e-43, torch.bfloat16: 1e-40, torch.float16: 6e-8}


def special(numel: int, block: int, dtype=torch.float32, stride: int = 1) -> torch.Tensor:
    """Gaussian, but with blocks of zeros, huge and tiny numbers, and with NaN and Inf, as far as the length allows."""
    x = vector(numel, torch.float32, stride).to(dtype)
    rows = [x[start : start + block] for start in range(0, numel, block)]
    fills = (None, 0.0, HUGE[dtype], TINY[dtype], -HUGE[dtype], -0.0)
    for row, value in zip(rows, fills, strict=False):
        if value is not None:
            row.fill_(value)
    for row, value in zip(rows[6:], (float("nan"), float("inf"), -float("inf"), HUGE[dtype]), strict=False):
        row[len(row) // 2] = value
    return x


def compensated(x: torch.Tensor, residual: torch.Tensor | None, memory) -> torch.Tensor:
    p = x.float()
    return p if residual is None else p + memory[0] * residual


def per_element(values: torch.Tensor, numel: int, block: int) -> torch.Tensor:
    return values.repeat_interleave(block)[:numel]


def blocks_of(p: torch.Tensor, block: int) -> list[torch.Tensor]:
    return [p[start : start + block] for start in range(0, p.numel(), block)]


def assert_within_one_ulp(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(actual.isnan(), expected.isnan())
    actual, expected = (torch.where(v.isnan(), 0.0, v).view(torch.int32).long() for v in (actual, expected))
    assert (actual - expected).abs().max() <= 1 if actual.numel() else True


def encode(family: str, implementation: str, x, *settings, residual=None, memory=None):
    """``(payload, residual after the call)`` on the CPU, with ``out=`` given and the input checked to be unchanged."""
    device, r = device_of(implementation), None
    named = {}
    if residual is not None:
        r = residual.to(device, copy=True)
        named = {"residual": r, **dict(zip(("alpha", "decay", "sent"), memory, strict=True))}
    function = getattr(fast(implementation, family), f"{family}_encode")
    before = x.clone()
    payload = function(x.to(device), *settings, **named)
    assert_same_bits(x.float(), before.float())
    target = torch.full_like(payload, 0xAA)
    if residual is not None:
        named["residual"] = residual.to(device, copy=True)
    assert function(x.to(device), *settings, out=target, **named) is target
    assert torch.equal(target, payload), "out= and a new payload differ: some byte is not written"
    return payload.cpu(), None if r is None else r.cpu()


def assert_remembered(x, residual, after, q, keep, memory) -> None:
    """``after = decay * residual + x - sent * q``, or the old residual where ``keep``."""
    if residual is not None:
        _, decay, sent = memory
        assert_same_bits(after, torch.where(keep, residual, (decay * residual + x.float()) - sent * q))


def fields(codes: np.ndarray, numel: int, bits: int) -> np.ndarray:
    """Unsigned codes of ``bits`` bits, LSB first -> int64 [numel]."""
    each = np.unpackbits(codes, bitorder="little")[: numel * bits].reshape(numel, bits)
    return (each.astype(np.int64) << np.arange(bits)).sum(1)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Values of e4m3 codes by the definition of the format, fp32."""
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    magnitude[(codes & 0x7F) == 0x7F] = np.nan
    return np.copysign(magnitude, np.where(codes & 0x80, -1.0, 1.0)).astype(np.float32)


def decoded(family: str, payload: torch.Tensor, numel: int, *settings) -> torch.Tensor:
    """What a payload says, from its layout alone, in NumPy; ``settings`` are those of the decoder after numel."""
    data, block = payload.numpy(), settings[-1]
    if settings[0] in ("bf16", "fp16"):
        if settings[0] == "fp16":
            return torch.from_numpy(data.view(np.float16)[:numel].astype(np.float32))
        return torch.from_numpy((data.view(np.uint16)[:numel].astype(np.uint32) << 16).view(np.float32))
    count = -(-numel // block)
    scales = np.repeat(data[: 4 * count].view(np.float32), block)[:numel]
    bits = {"sign": 1, "cast": 8}.get(family, settings[0])
    codes = fields(data[4 * count :], numel, bits)
    if family == "sign":
        return torch.from_numpy(np.where(codes == 1, scales, -scales))
    if family == "cast":
        return torch.from_numpy(e4m3(codes) * scales)
    codes = np.where(codes >> (bits - 1), codes - 2**bits, codes).astype(np.float32)
    return torch.from_numpy(codes * (scales / np.float32(2 ** (bits - 1) - 1)))


def check_decode(family: str, implementation: str, payload: torch.Tensor, *settings) -> None:
    """decode and its weighted and accumulating forms give what the layout says."""
    device, numel = device_of(implementation), settings[0]
    decode = getattr(fast(implementation, family), f"{family}_decode")
    q = decoded(family, payload, *settings)
    assert_same_bits(decode(payload.to(device), *settings), q)
    start, weighted = vector(numel, seed=9), torch.tensor(0.3) * q
    for accumulate in (False, True):
        mine = start.to(device, copy=True)
        assert decode(payload.to(device), *settings, out=mine, weight=0.3, accumulate=accumulate) is mine
        assert_same_bits(mine, start + weighted if accumulate else weighted)


def check_sign(implementation, numel, block, memory=None, dtype=torch.float32, stride=1) -> None:
    x = special(numel, block, dtype, stride)
    residual = None if memory is None else vector(numel, seed=1)
    payload, after = encode("sign", implementation, x, block, residual=residual, memory=memory)
    p = compensated(x, residual, memory)
    assert payload.numel() == 4 * -(-numel // block) + 4 * -(-numel // 32)
    scales, words = layout.split(payload, layout.blocks(numel, block))
    mean = torch.tensor([float(row.double().abs().mean()) for row in blocks_of(p, block)], dtype=torch.float64)
    assert_within_one_ulp(scales, torch.where(mean.isfinite(), mean, torch.nan).float())
    assert_same_bits(words, reference("pack").pack_bits((p >= 0).int(), 1).view(torch.int32))
    q = decoded("sign", payload, numel, block)
    assert_remembered(x, residual, after, q, per_element(scales.isnan(), numel, block), memory)
    check_decode("sign", implementation, payload, numel, block)


def check_uniform(
    implementation, numel, bits, block, scale, rounding, memory=None, dtype=torch.float32, stride=1
) -> None:
    x = special(numel, block, dtype, stride)
    residual = None if memory is None else vector(numel, seed=1)
    settings = bits, block, KEY, scale, rounding
    payload, after = encode("uniform", implementation, x, *settings, residual=residual, memory=memory)
    p = compensated(x, residual, memory)
    assert payload.numel() == 4 * -(-numel // block) + 4 * -(-numel * bits // 32)
    scales, words = layout.split(payload, layout.blocks(numel, block))
    levels = torch.tensor(2.0 ** (bits - 1) - 1)
    norm = torch.linalg.vector_norm
    wide = [norm(row.double(), float("inf") if scale == "absmax" else 2) for row in blocks_of(p, block)]
    norms = torch.tensor([float(v) for v in wide], dtype=torch.float64)
    norms = torch.where(norms.isfinite(), norms.clamp(max=layout.SCALE_MAX), torch.nan).float()
    norms = torch.where((levels / norms).isinf(), 0.0, norms)
    assert_same_bits(scales, norms) if scale == "absmax" else assert_within_one_ulp(scales, norms)
    given = per_element(scales, numel, block)
    u = philox.uniform(KEY, numel) if rounding == "stochastic" else 0.5
    codes = torch.where(given > 0, torch.floor(p * (levels / given) + u).clamp(-levels, levels), 0.0)
    packed = reference("pack").pack_bits(codes.int() & (2**bits - 1), bits)
    assert_same_bits(words, packed.view(torch.int32))
    q = codes * (given / levels)
    assert_remembered(x, residual, after, q, given.isnan(), memory)
    check_decode("uniform", implementation, payload, numel, bits, block)


def check_cast(implementation, numel, kind, block, memory=None, dtype=torch.float32, stride=1) -> None:
    x = special(numel, block, dtype, stride)
    residual = None if memory is None else vector(numel, seed=1)
    payload, after = encode("cast", implementation, x, kind, block, residual=residual, memory=memory)
    p = compensated(x, residual, memory)
    if kind == "fp8":
        assert payload.numel() == 4 * -(-numel // block) + 4 * -(-numel // 4)
        scales, words = layout.split(payload, layout.blocks(numel, block))
        top = torch.tensor([float(row.abs().max()) for row in blocks_of(p, block)])
        inverse = torch.full_like(top, 448.0) / top
        live = top.isfinite() & ~inverse.isinf()
        wanted = torch.where(live, top / torch.full_like(top, 448.0), torch.where(top.isfinite(), 0.0, torch.nan))
        assert_same_bits(scales, wanted)
        scaled = torch.where(per_element(live, numel, block), p * per_element(inverse, numel, block), 0.0)
        codes = scaled.to(torch.float8_e4m3fn)
        q = codes.float() * per_element(scales, numel, block)
        keep = per_element(scales.isnan(), numel, block)
        codes = codes.view(torch.uint8)
    else:
        half = p.to({"bf16": torch.bfloat16, "fp16": torch.float16}[kind])
        assert payload.numel() == 4 * -(-numel // 2)
        words, q, keep = payload, half.float(), ~half.isfinite()
        nan = 0x7FC0 if kind == "bf16" else 0x7E00
        codes = torch.where(p.isnan(), nan, half.view(torch.int16)).view(torch.uint8)
    sent = words.view(-1).view(torch.uint8)
    assert torch.equal(sent[: codes.numel()], codes)
    assert not sent[codes.numel() :].any(), "padding is not zero"
    assert_remembered(x, residual, after, q, keep, memory)
    check_decode("cast", implementation, payload, numel, kind, block)


def settings_of(family: str, block: int) -> tuple[tuple, tuple]:
    """``(settings of encode, settings of decode)`` of a codec whose scales have no order of summation."""
    if family == "uniform":
        return (4, block, KEY, "absmax", "stochastic"), (4, block)
    if family == "cast":
        return ("fp8", block), ("fp8", block)
    return (block,), (block,)


def check_reduce(family, implementation, numel, block, ranks, kind=None) -> None:
    """Fused decode, average, encode equals decoding in rank order, averaging and encoding one after the other."""
    encoding, decoding = settings_of(family, block)
    if kind is not None:
        encoding = decoding = (kind, block)
    make = getattr(reference(family), f"{family}_encode")
    payloads = [make(vector(numel, seed=rank) * (rank + 1), *encoding) for rank in range(ranks)]
    total = functools.reduce(torch.add, (decoded(family, payload, numel, *decoding) for payload in payloads))
    average = total / torch.full_like(total, ranks)
    wanted, _ = encode(family, implementation, average, *encoding)
    device = device_of(implementation)
    reduce = getattr(fast(implementation, family), f"{family}_reduce")
    assert_same_bits(reduce(torch.stack(payloads).to(device), numel, *encoding), wanted)
    if family == "uniform":
        mean = fast(implementation, family).uniform_average(torch.stack(payloads).to(device), numel, *decoding)
        assert_same_bits(mean, average)


def check_vote(implementation, numel, ranks) -> None:
    generator = torch.Generator().manual_seed(ranks)
    ballots = torch.randint(0, 256, (ranks, 4 * -(-numel // 32)), generator=generator, dtype=torch.uint8)
    votes = sum(reference("pack").unpack_bits(row.clone(), numel, 1) for row in ballots)
    result = fast(implementation, "sign").sign_vote(ballots.to(device_of(implementation)), numel)
    assert_same_bits(result, reference("pack").pack_bits((2 * votes >= ranks).int(), 1))


def check_draw(implementation, numel, dtype=torch.float32, stride=1, spoil=False) -> None:
    """The scale is the norm of the whole vector; given it, every bit is the one of the formula."""
    x = vector(numel, dtype, stride)
    if spoil and numel:
        x[numel // 2] = float("inf")
    module, device = fast(implementation, "sign"), device_of(implementation)
    payload = module.sign_draw(x.to(device), KEY)
    target = torch.full_like(payload, 0xAA)
    assert module.sign_draw(x.to(device), KEY, out=target) is target
    assert torch.equal(target, payload), "out= and a new payload differ: some byte is not written"
    assert payload.numel() == (4 + 4 * -(-numel // 32) if numel else 0)
    scale, words = layout.split(payload.cpu(), min(numel, 1))
    norm = torch.linalg.vector_norm(x.double())
    assert_within_one_ulp(scale, torch.where(norm.isfinite(), norm, torch.nan).float().expand(scale.shape))
    thresholds = philox.signed32(KEY, numel).to(torch.float32) * 2.0**-31 * scale
    assert_same_bits(words, reference("pack").pack_bits((x.float() >= thresholds).int(), 1).view(torch.int32))


def check_stats(implementation, numel, alpha=None, dtype=torch.float32, stride=1) -> None:
    x = vector(numel, dtype, stride)
    residual = None if alpha is None else vector(numel, seed=1)
    p = compensated(x, residual, (alpha,)).double().abs()
    device = device_of(implementation)
    given = () if alpha is None else (residual.to(device), alpha)
    result = fast(implementation, "stats").stats(x.to(device), *given).cpu()
    assert result.dtype == torch.float32
    expected = torch.stack((p.max(), p.sum(), p.square().sum())) if numel else torch.zeros(3)
    assert_within_one_ulp(result, expected.float())
    assert result[0] == expected[0]


def check_pack(implementation, numel, width) -> None:
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(0, 2**width, (numel,), generator=generator, dtype=torch.int32)
    device, module = device_of(implementation), fast(implementation, "pack")
    packed = module.pack_bits(codes.to(device), width)
    assert packed.numel() == 4 * -(-numel * width // 32)
    value = sum(int(code) << (i * width) for i, code in enumerate(codes))
    assert bytes(packed.tolist()) == value.to_bytes(packed.numel(), "little")
    assert_same_bits(module.unpack_bits(packed, numel, width), codes)


def check_round(implementation: str, numel: int, bits: int) -> None:
    """Rounding in place to a given scale is what decoding one whole block with that scale gives."""
    x, block = vector(numel), 32 * max(1, -(-numel // 32))
    payload = reference("uniform").uniform_encode(x, bits, block, KEY)
    wanted = reference("uniform").uniform_decode(payload, numel, bits, block)
    ours = x.to(device_of(implementation))
    scale = float(x.abs().max()) if numel else 0.0
    other = fast(implementation, "uniform").uniform_round(ours, bits, scale, KEY)
    assert_same_bits(other.cpu(), wanted)
    fast(implementation, "uniform").uniform_round(ours, bits, scale, KEY, out=ours)
    assert_same_bits(ours.cpu(), wanted)
