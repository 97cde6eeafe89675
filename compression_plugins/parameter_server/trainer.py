"""`AsyncTrainer`: train a torch module with a parameter-server method, in worker processes or deterministically."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..engine.saved import write
from ..errors import ConfigError
from . import checkpoint as files
from .options import Options
from .problem import Forward, Problem, flatten, unflatten
from .processes import Processes
from .records import Epoch
from .server import Server
from .service import Service
from .simulate import Simulation
from .worker import Worker

log = logging.getLogger("compression_plugins.parameter_server")


class AsyncTrainer:
    """Minimises the mean of `loss_fn(model(inputs), targets)` over a data set, plus l1 and l2 penalties.

        trainer = AsyncTrainer(model, nn.CrossEntropyLoss(), loader, method="asylpg", workers=4, lr=0.1, epochs=20)
        history = trainer.fit()          # `model` then holds the result

    Args:
        model: trained in place: the result is written into it by `fit`. Batch normalisation uses the statistics of a
            batch while training; running statistics are estimated anew from all data at the end. Layers in evaluation
            mode use and keep the ones they have.
        loss_fn: mean loss of a batch; None if `forward` is given.
        loader: DataLoader (batch size, data set and collate function are used) or map-style data set.
        method, workers, options: fields of `Options`.
        config: YAML or JSON file, or mapping, with options; keyword arguments win.
        forward: for batches that are not (inputs, targets): `forward(model, batch)` is the mean loss.
        checkpoint: file that is written after every epoch; if it exists, the run continues from it.
        progress: called with every `Epoch`; True prints a line to stderr, False nothing.
        delays: run in this process, deterministically, with these delays (see `Simulation`), instead of worker
            processes.
        device: where workers compute; "cuda" shares the visible GPUs out among them.

    With worker processes, model, data set, loss_fn and forward are sent to them by pickle when they start, so functions
    must be importable ones, and a script needs the usual `if __name__ == "__main__":`. A worker that dies is started
    again, `restarts` times at most, while the others go on.

    Attributes:
        server: of the last `fit`: `delays`, `traffic`, `seconds`, `arrivals`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor] | None,
        loader: Any,
        method: str | None = None,
        workers: int | None = None,
        *,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        forward: Forward | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool | Callable[[Epoch], None] = True,
        delays: Sequence[int] | None = None,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        overrides = {**options, **{k: v for k, v in (("method", method), ("workers", workers)) if v is not None}}
        defaults = {}
        if isinstance(loader, DataLoader) and loader.batch_size:
            defaults["batch_size"] = loader.batch_size
        self.options = with_defaults(Options.load(config, overrides), defaults, config, overrides)
        self.model, self.loader, self.forward, self.loss_fn = model, loader, forward, loss_fn
        self.problem = Problem(model, loss_fn, loader, forward, "cpu")
        self.checkpoint = Path(checkpoint) if checkpoint is not None else None
        if self.checkpoint is not None and not self.checkpoint.parent.is_dir():
            raise ConfigError(f"checkpoint {self.checkpoint}: the folder {self.checkpoint.parent} does not exist")
        self.delays, self.device = delays, device
        self._progress = _print_row if progress is True else progress or None
        self.server: Server | None = None
        if self.options.tau < self.options.workers - 1:
            log.warning(
                "tau = %d lets at most %d of %d workers compute at a time",
                self.options.tau, self.options.tau + 1, self.options.workers,
            )  # fmt: skip

    def fit(self) -> list[Epoch]:
        """Train; returns one row per epoch, all of them after a resume."""
        server = self._new_server()
        if self.delays is not None:
            workers = [Worker(rank, self.options, self.problem) for rank in range(self.options.workers)]
            Simulation(server, workers, self.delays).run()
        else:
            self._run_processes(server)
        return self._finish(server)

    def serve(self, address: tuple[str, int], token: bytes) -> list[Epoch]:
        """`fit` with workers that other hosts run: each makes the same trainer and runs `worker(rank)`."""
        server = self._new_server()
        service = Service(server, token, *address)
        log.info("listening on %s:%d", *service.address)
        service.run()
        return self._finish(server)

    def worker(self, rank: int) -> Worker:
        """For `client.run_worker`, on a host that runs one worker."""
        problem = Problem(self.model, self.loss_fn, self.loader, self.forward, self.device)
        return Worker(rank, self.options, problem)

    def _new_server(self) -> Server:
        save = self._save if self.checkpoint is not None else None
        server = Server(self.options, flatten_model(self.model), self.problem.samples, self._progress, save)
        if self.checkpoint is not None and self.checkpoint.exists():
            server.load_state_dict(files.load(self.checkpoint))
        self.server = server
        return server

    def _finish(self, server: Server) -> list[Epoch]:
        unflatten(server.state.snapshot, [p for p in self.model.parameters() if p.requires_grad])
        self.problem.estimate_batch_statistics(self.model, self.options.snapshot_batch, self.options.seed)
        return server.history

    def loss(self) -> float:
        """P at the present parameters of `model`, penalties included."""
        x = flatten_model(self.model)
        assert self.server is not None, "fit first"
        return self.problem.loss(x) + self.server.prox.value(x)

    def _save(self, server: Server) -> None:
        assert self.checkpoint is not None
        write(server.state_dict(), self.checkpoint)

    def _run_processes(self, server: Server) -> None:
        token = secrets.token_bytes(32)
        service = Service(server, token)
        data = self.loader.dataset if isinstance(self.loader, DataLoader) else self.loader
        collate = self.loader.collate_fn if isinstance(self.loader, DataLoader) else None
        common = (self.model, self.loss_fn, data, collate, self.forward, self.device, service.address, token)
        processes = Processes(self.options.workers, self.options.restarts, (self.options, *common))
        try:
            processes.start()
            service.run(tick=processes.check)
        finally:
            processes.stop()


def with_defaults(options: Options, defaults: Mapping[str, Any], config: Any, overrides: Mapping[str, Any]) -> Options:
    """`options`, with `defaults` for keys that neither `config` nor `overrides` has set."""
    missing = {key: value for key, value in defaults.items() if key not in options.model_fields_set}
    return Options.load(config, {**overrides, **missing}) if missing else options


def flatten_model(model: nn.Module) -> Tensor:
    """Parameters that require gradients, fp32 CPU [numel]."""
    return flatten([p for p in model.parameters() if p.requires_grad])


def _print_row(row: Epoch) -> None:
    print(
        f"epoch {row.epoch:4d}  update {row.step:7d}  loss {row.loss:.6f}  |grad| {row.gradient_norm:.2e}  "
        f"{row.bits / 8e6:9.3f} MB sent and received",
        file=sys.stderr,
    )
