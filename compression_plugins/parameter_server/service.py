"""The server's event loop: one thread, non-blocking TCP sockets of the standard library.

Why not torch.distributed point-to-point: a gloo group is a full mesh of ranks that is wired once. Survivors of a dead
peer can go on (`recv` from any source does), but no process can enter the group afterwards, so a worker that died could
not come back and a server that was restarted would lose all workers; and both the rendezvous and the pairs admit
whoever reaches their ports. What travels is short messages of varying length in host memory, for which TCP is as fast.

It binds loopback unless told otherwise, admits whoever knows the token (`handshake`), reads no size that it has not
computed itself (`messages.parse_header`), bounds the time and number of connections that have not proved themselves
(`door`), and drops a worker that sends anything else than what it was asked for. A worker that was dropped, or whose
connection broke, may come back `returns` times in a run.
"""

from __future__ import annotations

import logging
import selectors
import time
from collections import Counter
from collections.abc import Callable

from ..errors import CompressionError
from . import handshake, messages
from .connection import Connection, Lost
from .door import Door
from .messages import UP, Kind, MessageError
from .server import Server

log = logging.getLogger("compression_plugins.parameter_server")

_TICK_S = 0.1
_GOODBYE_S = 5.0


class Service:
    """Runs a `Server` for workers that connect over TCP.

    Args:
        server: begun by `run`, once all workers are there or `start_s` has passed.
        token: shared secret, 16 bytes or more.
        host: address to bind; loopback unless workers run on other machines.
        port: 0 takes a free one; see `address`.

    Attributes:
        began: `time.monotonic()` when the first snapshot was asked for, or None.
    """

    def __init__(
        self,
        server: Server,
        token: bytes,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.server, self._token = server, handshake.check_token(token)
        self._options = server.options
        self._digest = self._options.digest(server.numel, server.samples)
        self._selector = selectors.DefaultSelector()
        self._door = Door(host, port, self._options.workers, self._selector, self._close)
        self.address = self._door.address
        self._workers: dict[int, Connection] = {}
        self._admissions: Counter[int] = Counter()  # by rank, of the whole run: to connect again renews nothing
        self._lost_for: dict[int, str] = {}
        self.began: float | None = None
        self._blocking_since: dict[int, float] = {}
        self._summing_since: dict[int, float] = {}
        self._sample_s = 0.0  # what the last gradient sum took a sample
        self._alone_since: float | None = None

    def run(self, tick: Callable[[], None] | None = None) -> Server:
        """Until the server is done; raises `CompressionError` if it cannot go on.

        Args:
            tick: called at least ten times a second, for example to look after worker processes; it may raise.
        """
        started = time.monotonic()
        try:
            while self.server.phase != "done":
                self._poll()
                if tick:
                    tick()
                if self.server.phase == "waiting":
                    self._begin_when_ready(started)
                self._drop_who_is_late()
                self._flush()
        except BaseException as error:  # an interrupt too: workers should not wait for a server that is gone
            self.server.outbox.clear()
            self.server.finish(str(error) or type(error).__name__, error=True)
            raise
        finally:
            self._goodbye()
        return self.server

    # --- one turn of the loop ---

    def _poll(self) -> None:
        for key, events in self._selector.select(_TICK_S):
            if key.data is None:
                self._door.accept()
                continue
            connection: Connection = key.data
            if connection.sock.fileno() < 0:
                continue  # closed meanwhile, in this very turn
            try:
                if events & selectors.EVENT_WRITE:
                    self._write(connection)
                if events & selectors.EVENT_READ:
                    self._read(connection)
            except (Lost, MessageError, handshake.AuthenticationError) as error:
                self._close(connection, str(error))

    def _read(self, connection: Connection) -> None:
        data = connection.read()
        if data is None or connection.closing:
            return
        if connection.rank is None:
            self._admit(connection, data)
        elif connection.header is None:
            server = self.server
            header = messages.parse_header(data, UP, server.numel, self._options.workers, server.samples)
            connection.next_piece(header)
            if not header.nbytes:
                self._deliver(connection)
        else:
            self._deliver(connection)

    def _admit(self, connection: Connection, data: bytes) -> None:
        found, proof = handshake.answer(self._token, connection.challenge, data)
        connection.queue(proof)
        refusal = None
        if found.digest != self._digest:
            refusal = "this worker runs with other options, another model or other data than the server"
        elif found.rank >= self._options.workers:
            refusal = f"rank {found.rank} where there are {self._options.workers} workers"
        elif self._admissions[found.rank] > self._options.returns:
            refusal = (
                f"worker {found.rank} has come back {self._options.returns} times (returns) and is not taken in again; "
                f"it was lost last for this reason: {self._lost_for.get(found.rank, 'unknown')}"
            )
        if refusal:
            log.warning("refused %s: %s", connection.name, refusal)
            connection.send(messages.stop(refusal, error=True))
            connection.closing = True
        else:
            old = self._workers.get(found.rank)
            if old is not None:
                self._replace(old)
            self._door.admitted(connection)
            self._admissions[found.rank] += 1
            connection.rank = found.rank
            connection.next_piece(None)
            self._workers[found.rank] = connection
            self.server.join(found.rank)
        self._watch(connection)

    def _replace(self, old: Connection) -> None:
        """Tell who is still there to stop: two of one rank would otherwise take each other's place for ever."""
        old.send(messages.stop(f"another worker of rank {old.rank} has connected", error=True))
        try:
            old.write()
        except Lost:
            pass
        self._close(old, "connected again")

    def _deliver(self, connection: Connection) -> None:
        assert connection.header is not None and connection.rank is not None
        message = connection.header.message(connection.piece)
        connection.next_piece(None)
        self._blocking_since.pop(connection.rank, None)
        self.server.receive(connection.rank, message)
        if message.kind is Kind.TOTAL:
            now = time.monotonic()
            self._sample_s = (now - self._summing_since.get(connection.rank, now)) / message.count
            self._summing_since[connection.rank] = now

    def _write(self, connection: Connection) -> None:
        if connection.write():
            if connection.closing:
                raise Lost("refused")
            self._selector.modify(connection.sock, selectors.EVENT_READ, connection)

    def _watch(self, connection: Connection) -> None:
        self._selector.modify(connection.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)

    def _flush(self) -> None:
        """Queue what the server wants to say, and send at once what the sockets take."""
        while self.server.outbox:  # a connection that breaks here makes the server say more
            touched = {}
            while self.server.outbox:
                rank, message = self.server.outbox.popleft()
                if rank in self._workers:
                    if message.kind is Kind.SNAPSHOT:
                        self._summing_since[rank] = time.monotonic()
                    self._workers[rank].send(message)
                    touched[rank] = self._workers[rank]
            for connection in touched.values():
                try:
                    if not connection.write():
                        self._watch(connection)
                except Lost as error:
                    self._close(connection, str(error))

    def _close(self, connection: Connection, reason: str) -> None:
        if connection.sock.fileno() < 0:
            return
        self._selector.unregister(connection.sock)
        connection.sock.close()
        self._door.admitted(connection)
        rank = connection.rank
        if rank is None:
            log.warning("connection from %s refused: %s", connection.address, reason)
        elif self._workers.get(rank) is connection:
            del self._workers[rank]
            self._lost_for[rank] = reason
            self._blocking_since.pop(rank, None)
            self.server.leave(rank, reason)

    # --- time ---

    def _begin_when_ready(self, started: float) -> None:
        waited = time.monotonic() - started
        if len(self._workers) == self._options.workers or (self._workers and waited > self._options.start_s):
            if len(self._workers) < self._options.workers:
                log.warning("starting with %d of %d workers", len(self._workers), self._options.workers)
            self.began = time.monotonic()
            self.server.begin()
        elif waited > self._options.start_s:
            raise CompressionError(
                f"no worker connected to {self.address} within start_s = {self._options.start_s:g} s"
            )

    def _drop_who_is_late(self) -> None:
        now = time.monotonic()
        self._door.look_after(now)
        blockers = set(self.server.blockers())
        self._blocking_since = {rank: self._blocking_since.get(rank, now) for rank in blockers}
        for rank, since in list(self._blocking_since.items()):
            # Who has taken over a lost worker's part sums a second one while the others wait: that is not being late.
            if now - since > self._options.patience_s + self.server.samples_asked(rank) * self._sample_s:
                self._close(self._workers[rank], f"others waited {now - since:.1f} s for it (patience_s)")
        if self.server.phase == "waiting" or self._workers:
            self._alone_since = None
        else:
            self._alone_since = self._alone_since or now
            if now - self._alone_since > self._options.start_s:
                raise CompressionError(
                    f"all workers are gone and none came back within start_s = {self._options.start_s:g} s"
                )

    def _goodbye(self) -> None:
        """Give the last messages a moment to leave, then close everything."""
        self._flush()
        deadline = time.monotonic() + _GOODBYE_S
        for connection in self._workers.values():
            connection.finish(deadline)
        for connection in self._workers.values():
            connection.sock.close()
        self._door.shut()
        self._selector.close()
