"""All ranks of a job in this process: N reducers that average real gradients, without a host and without a network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..config import Config
from ..engine.plan import Bucket
from ..engine.reducer import Reducer
from ..transports.local import LocalWorld, drive


class Ranks:
    """One reducer a rank, in `reducers`."""

    def __init__(self, config: Config, size: int) -> None:
        self.reducers = [Reducer(config, transport) for transport in LocalWorld(size).transports]

    def average(self, buckets: Sequence[Bucket], gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The means that rank 0 gets of `gradients[rank][bucket]`, flat fp32, which are overwritten."""
        jobs = [
            [reducer.start(bucket, flat) for bucket, flat in zip(buckets, flats)]
            for reducer, flats in zip(self.reducers, gradients)
        ]
        drive([job for each in jobs for job in each])
        return [job.result() for job in jobs[0]]

    def end_step(self) -> None:
        """Call once after each step, as with a `Reducer`."""
        for reducer in self.reducers:
            reducer.end_step()

    @property
    def sent(self) -> list[float]:
        """Bytes of payload that each rank has sent."""
        return [reducer.transport.sent for reducer in self.reducers]
