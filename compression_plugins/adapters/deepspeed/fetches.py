"""The gather of parameters under ZeRO 3: every fetch of a pass that trains carries codes.

No rank holds a parameter before it is fetched, so there is nothing that a difference could be to: the codes are of the
weights themselves, as in ZeRO++ (Wang et al., 2023, arXiv 2306.10209), and nothing is fed back. A weight decodes to the
same value on every rank, and to the same in forward and backward of one step: codes are drawn by parameter and step.

The slices that ranks own, and the optimizer's weights, stay exact. So are parameters that a script gathers
(`GatheredParameters`), evaluations, checkpoints and `save_16bit_model`; and those that DeepSpeed keeps on every rank
(`stage3_param_persistence_threshold`), which it gathers once per step.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from ... import triton_kernels as K
from ...codecs import Codec
from ...core.streams import Purpose, stream
from ...engine.plan import weights_row
from ...transports.base import Handle
from ..shared.forward import Notice
from .config import refuse
from .seams import before

if TYPE_CHECKING:
    from .session import DeepSpeedSession


def compressed_fetches(session: DeepSpeedSession) -> Fetches | None:
    """What `parameters` asks for under ZeRO 3, or None.

    Raises:
        UnsupportedError: it cannot be had where no rank holds the parameters.
    """
    config, zero = session.common.config, session.engine._config.zero_config
    scheme = config.parameters
    laws = [row.name for row in session.plan.rows if row.scheme.weight_law is not None]
    remote = getattr(zero.offload_param, "device", None)
    refuse((
        (
            laws or (scheme is not None and scheme.weight_law is not None),
            "weights quantized by the mu rule are gathered once per step, and ZeRO stage 3 gathers them in each pass",
            "set weights: false and parameters: {scheme: qsgd, bits: 8}, or zero_optimization.stage to 1 or 2",
        ),
        (
            scheme is not None and scheme.lossless,
            "parameters: patch changes what every rank holds, and under ZeRO stage 3 none holds anything",
            "choose a scheme with codes such as {scheme: qsgd, bits: 8}, or set zero_optimization.stage to 1 or 2",
        ),
        (
            scheme is not None and getattr(remote, "value", remote) == "nvme",
            "parameters are read from NVMe on a path of their own",
            "set offload_param.device to cpu, or remove parameters",
        ),
        (
            scheme is not None and zero.use_all_reduce_for_fetch_params,
            "stage3_use_all_reduce_for_fetch_params fetches by another collective",
            "remove it, or parameters",
        ),
    ))  # fmt: skip
    if scheme is None:
        return None
    assert scheme.codec is not None
    rows = [weights_row(config, spec) for spec in session.common.specs(session.common.parameters)]
    return Fetches(session, scheme.codec, {row.name for row in rows if not row.reason})


class Fetches:
    """The fetches of one engine.

    Args:
        names: of the parameters that may be coded.

    Attributes:
        coding: whether a pass that trains is running.
        shown: whether some parameter of the model may hold what codes decode to.
        sent: bytes of codes that this rank has sent.
    """

    def __init__(self, session: DeepSpeedSession, codec: Codec, names: set[str]) -> None:
        self.session, self.codec = session, codec
        self.coding, self.sent = True, 0
        self.shown = False
        self._names = names
        module = session.engine.module
        for p in module.parameters():
            p.all_gather_coalesced = self._wrapped(_stock(p))
        begin = Notice(lambda: self._switch(module.training and torch.is_grad_enabled()))
        module.register_forward_pre_hook(begin, prepend=True)  # before DeepSpeed fetches for it
        before(session.engine, "destroy", self._restore)

    def codes(self, parameter: Any) -> bool:
        """Whether a fetch of `parameter` in a pass that trains carries codes."""
        return not parameter.ds_persist and self.session.names.get(id(parameter), "") in self._names

    def fetch_bytes(self) -> tuple[float, float]:
        """Bytes that a rank sends when every parameter is fetched once, the mean over ranks; coded, and as they are."""
        size = self.session.size
        coded = dense = 0
        for p in self.session.engine.module.parameters():
            if not p.ds_persist:
                dense += p.ds_numel * p.element_size()
                own = sum(self._nbytes(p)) if self.codes(p) else p.ds_numel * p.element_size()
                coded += own
        return coded * (size - 1) / size, dense * (size - 1) / size

    def before_backward(self) -> None:
        """Backward computes with what the forward pass that trains computed with."""
        self._switch(True)

    def _switch(self, coding: bool) -> None:
        self.coding = coding
        if not coding and self.shown:
            self.session.engine.optimizer._partition_all_parameters()  # let the exact ones be fetched
            self.shown = False

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def all_gather_coalesced(params: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Any:
            mine = list(params)
            coded = [p for p in mine if self.codes(p)]
            trains = self.coding and self.session.engine.module.training and not self.session.reducer.warming
            if not (trains and coded):
                return original(mine, safe_mode=safe_mode, quantize=quantize)
            rest = [p for p in mine if not self.codes(p)]
            handles = [original(rest, safe_mode=safe_mode, quantize=quantize)] if rest else []
            return _All([*handles, self._fetch(coded)])

        all_gather_coalesced.stock = original  # type: ignore[attr-defined]
        return all_gather_coalesced

    def _restore(self) -> None:
        """The engine is no more; its parameters may get another one."""
        for p in self.session.engine.module.parameters():
            p.all_gather_coalesced = _stock(p)

    def _nbytes(self, parameter: Any) -> list[int]:
        """Length of each rank's code of its slice."""
        return [self.codec.nbytes(n) if n else 0 for n in _slices(parameter, self.session.size)]

    @torch.no_grad()
    def _fetch(self, params: list[Any]) -> _Fetch:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        params = sorted(params, key=lambda p: p.ds_id)  # as every rank does
        rank, reducer = self.session.rank, self.session.reducer
        lengths = [self._nbytes(p) for p in params]
        device = self.session.engine.device
        payload = torch.empty(sum(row[rank] for row in lengths), dtype=torch.uint8, device=device)
        start = 0
        for p, row in zip(params, lengths, strict=True):
            if p.ds_status != ZeroParamStatus.NOT_AVAILABLE:
                raise RuntimeError(p.ds_summary())
            p.ds_status = ZeroParamStatus.INFLIGHT
            numel = _slices(p, self.session.size)[rank]
            if numel:
                own = p.ds_tensor.narrow(0, 0, numel).to(device)
                name = zlib.crc32(self.session.names[id(p)].encode())
                key = K.Key(self.session.common.config.seed, name, reducer.step, rank, stream(Purpose.WEIGHTS))
                self.codec.encode(own.float(), key, out=payload[start : start + row[rank]])
            start += row[rank]
        of_ranks = [sum(row[owner] for row in lengths) for owner in range(self.session.size)]
        self.sent += len(payload) * (self.session.size - 1)
        dense = sum(p.ds_tensor.ds_numel * p.ds_tensor.element_size() for p in params)
        reducer.beside += dense * (self.session.size - 1)
        handle = reducer.transport.all_gather_uneven(payload, of_ranks)
        return _Fetch(self, params, lengths, of_ranks, handle)


class _Fetch:
    """Parameters in flight, with the interface of DeepSpeed's handles."""

    def __init__(
        self, fetches: Fetches, params: list[Any], lengths: list[list[int]], of_ranks: list[int], handle: Handle
    ) -> None:
        self._fetches, self._params, self._lengths = fetches, params, lengths
        self._of_ranks, self._handle = of_ranks, handle
        self._done = False

    @torch.no_grad()
    def wait(self, handle_dependency: bool = True) -> None:
        """Block until the codes are there; the parameters are what they decode to."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if self._done:
            return
        fetches = self._fetches
        with fetches.session.reducer.engine.seconds.spent("exposed"):
            messages = self._handle.wait().split(self._of_ranks)
        starts = [0] * len(messages)
        for p, row in zip(self._params, self._lengths, strict=True):
            whole = torch.empty(p.ds_numel, dtype=torch.float32, device=messages[0].device)
            parts = whole.split(_slices(p, len(messages)))
            for owner, part in enumerate(parts):
                code = messages[owner][starts[owner] : starts[owner] + row[owner]]
                starts[owner] += row[owner]
                if part.numel():
                    fetches.codec.decode(code, part.numel(), out=part)
            p.data = whole.view(p.ds_shape).to(p.ds_tensor.dtype)
            p.ds_status = ZeroParamStatus.AVAILABLE
        self._done = fetches.shown = True


class _All:
    """Several handles as one."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def wait(self, handle_dependency: bool = True) -> None:
        for handle in self._handles:
            handle.wait(handle_dependency=handle_dependency)


def _stock(parameter: Any) -> Callable[..., Any]:
    """DeepSpeed's own way to fetch."""
    method = parameter.all_gather_coalesced
    return getattr(method, "stock", method)


def _slices(parameter: Any, size: int) -> list[int]:
    """Elements that each rank owns; DeepSpeed pads the last ones."""
    chunk = parameter.ds_tensor.ds_numel
    return [max(0, min(chunk, parameter.ds_numel - rank * chunk)) for rank in range(size)]
