"""A worker: answers messages of the server. It knows neither sockets nor time, so the simulation runs it as it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import messages
from .algorithms import get
from .messages import Kind, Message, MessageError
from .options import Options
from .problem import Problem
from .quantizer import Diverged
from .records import Seconds


class Worker:
    """State: the snapshot x~, exact to the bit, and the parts of the data to draw from.

    Args:
        rank: 0 .. options.workers - 1.

    Attributes:
        seconds: where its time goes.
    """

    def __init__(self, rank: int, options: Options, problem: Problem) -> None:
        self.rank, self.options, self.problem = rank, options, problem
        self.algorithm = get(options.method)
        self.snapshot: Tensor | None = None
        self.pool = np.empty(0, np.int64)
        self.seconds = Seconds()

    def handle(self, message: Message) -> Message | None:
        """The answer, or None for messages that want none."""
        if message.kind is Kind.SNAPSHOT:
            with self.seconds.spent("coding"):
                self.snapshot = messages.vector(message, self.problem.numel)
        elif message.kind is Kind.SHARD:
            self.pool = self._samples(message)
        elif message.kind is Kind.SUM:
            return self._total(message)
        elif message.kind is Kind.MODEL:
            return self._difference(message)
        return None

    def _total(self, message: Message) -> Message:
        samples = self._samples(message)
        with self.seconds.spent("computing"):
            loss, gradient = self.problem.total(
                self._known(), samples, self.options.snapshot_batch, (self.options.seed ^ message.step) & 0xFFFFFFFF
            )
        with self.seconds.spent("coding"):
            return messages.exact(Kind.TOTAL, gradient, message.step, len(samples), loss)

    def _difference(self, message: Message) -> Message:
        """zeta = up(grad f_a(x^) - grad f_a(x~)), both on the same batch and the same random function."""
        snapshot, ticket = self._known(), message.step
        if message.bits == 0:
            alpha = torch.zeros_like(snapshot)  # x^ is x~
        else:
            with self.seconds.spent("coding"):
                x = messages.vector(message, self.problem.numel)
            with self.seconds.spent("computing"):
                batch = draw(self.options, self.rank, ticket, self.pool)
                seed = (self.options.seed * 0x9E3779B1 + ticket) & 0xFFFFFFFF
                alpha = self.problem.gradient(x, batch, seed)[1]
                alpha.sub_(self.problem.gradient(snapshot, batch, seed)[1])
        with self.seconds.spent("coding"):
            chosen = self.options
            try:
                return self.algorithm.send_gradient(alpha, chosen.bits, chosen.budget, chosen.seed, ticket, self.rank)
            except Diverged:  # the server ends the run, for all
                return messages.not_finite(ticket)

    def _known(self) -> Tensor:
        if self.snapshot is None:
            raise MessageError("the server asked for a gradient before it sent a snapshot")
        return self.snapshot

    def _samples(self, message: Message) -> np.ndarray:
        return shard(messages.read_numbers(message, self.options.workers), self.options.workers, self.problem.samples)


def shard(parts: Sequence[int], of: int, samples: int) -> np.ndarray:
    """Indices (int64) of the samples in `parts`: part p holds every `of`-th sample from p on."""
    return np.concatenate([np.empty(0, np.int64), *(np.arange(part, samples, of, dtype=np.int64) for part in parts)])


def draw(options: Options, rank: int, ticket: int, pool: np.ndarray) -> np.ndarray:
    """The mini-batch of a ticket: `batch_size` samples of `pool`, with replacement, from (seed, rank, ticket) alone."""
    if not len(pool):
        raise MessageError("this worker has no samples: there are more workers than samples")
    generator = np.random.Generator(np.random.Philox(key=[options.seed, rank], counter=[0, 0, 0, ticket]))
    return pool[generator.integers(0, len(pool), options.batch_size)]
