"""The server's event loop: one thread, non-blocking TCP sockets of the standard library.

Why not torch.distributed point-to-point: a gloo group is a full mesh of ranks that is wired once. Survivors of a dead
peer can go on (`recv` from any source does), but no process can enter the group afterwards, so a worker that died could
not come back and a server that was restarted would lose all workers; and both the rendezvous and the pairs admit
whoever reaches their ports. What travels is short messages of varying length in host memory, for which TCP is as fast.

It binds loopback unless told otherwise, admits whoever knows the token (`handshake`), reads no size that it has not
computed itself (`messages.parse_header`), bounds the time and number of connections that have not proved themselves,
and drops a worker that sends anything else than what it was asked for.
"""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable

import torch

from ..errors import CompressionError
from . import handshake, messages
from .messages import HEADER, UP, Header, Kind, Message, MessageError
from .server import Server

log = logging.getLogger("compression_plugins.parameter_server")

HANDSHAKE_S = 10.0
#: A peer whose machine vanished is noticed after about a minute, without a byte of ours in flight.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
_TICK_S = 0.1
_GOODBYE_S = 5.0


def configure(sock: socket.socket) -> None:
    """Small messages at once; notice peers that vanish."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Lost(Exception):
    """This connection is of no more use; the text says why."""


class _Connection:
    """Bytes of one peer: what it has sent of the piece that comes next, and what waits to be sent to it."""

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.sock, self.address, self.since = sock, address, time.monotonic()
        self.challenge = handshake.challenge()
        self.rank: int | None = None
        self.header: Header | None = None
        self.closing = False  # once all is sent
        self._unsent: deque[memoryview] = deque([memoryview(self.challenge)])
        self._expect(handshake.HELLO_BYTES)

    @property
    def name(self) -> str:
        return self.address if self.rank is None else f"worker {self.rank} ({self.address})"

    def _expect(self, nbytes: int) -> None:
        self.piece = torch.empty(nbytes, dtype=torch.uint8)
        self._view, self._have = self.piece.numpy().data, 0

    def read(self) -> bytes | None:
        """More of the piece that is due; its bytes once whole (empty for a payload, which stays in `piece`)."""
        try:
            count = self.sock.recv_into(self._view[self._have :])
        except BlockingIOError:
            return None
        except OSError as error:
            raise _Lost(f"connection lost: {error.strerror}") from None
        if not count:
            raise _Lost("connection closed")
        self._have += count
        if self._have < len(self._view):
            return None
        return b"" if self.header else bytes(self._view)

    def next_piece(self, header: Header | None) -> None:
        self.header = header
        self._expect(header.nbytes if header else HEADER.size)

    def queue(self, *pieces: bytes | memoryview) -> None:
        self._unsent.extend(memoryview(piece) for piece in pieces if len(piece))

    def send(self, message: Message) -> None:
        self.queue(message.header(), message.payload.numpy().data)

    def write(self) -> bool:
        """Send what the socket takes; True when nothing is left."""
        try:
            while self._unsent:
                first = self._unsent[0]
                count = self.sock.send(first)
                if count < len(first):
                    self._unsent[0] = first[count:]
                    return False
                self._unsent.popleft()
        except BlockingIOError:
            return False
        except OSError as error:
            raise _Lost(f"connection lost: {error.strerror}") from None
        return True

    def finish(self, deadline: float) -> None:
        """Send the rest, then read until the peer hangs up: closing on unread bytes would destroy what was sent."""
        try:
            while (left := deadline - time.monotonic()) > 0:
                self.sock.settimeout(left)
                if self._unsent:
                    self.sock.sendall(self._unsent.popleft())
                    if not self._unsent:
                        self.sock.shutdown(socket.SHUT_WR)
                elif not self.sock.recv(1 << 16):
                    return
        except OSError:
            pass


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
        try:
            self._listener = socket.create_server((host, port), family=_family(host, port), backlog=128)
        except OSError as error:
            raise CompressionError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._strangers: set[_Connection] = set()
        self._workers: dict[int, _Connection] = {}
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
            if key.fileobj is self._listener:
                self._accept()
                continue
            connection: _Connection = key.data
            try:
                if events & selectors.EVENT_WRITE:
                    self._write(connection)
                if events & selectors.EVENT_READ:
                    self._read(connection)
            except (_Lost, MessageError, handshake.AuthenticationError) as error:
                self._close(connection, str(error))

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except OSError:
            return
        if len(self._strangers) >= self._options.workers + 16:
            sock.close()
            return
        sock.setblocking(False)
        configure(sock)
        connection = _Connection(sock, f"{address[0]}:{address[1]}")
        self._strangers.add(connection)
        self._selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)

    def _read(self, connection: _Connection) -> None:
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

    def _admit(self, connection: _Connection, data: bytes) -> None:
        found, proof = handshake.answer(self._token, connection.challenge, data)
        self._strangers.discard(connection)
        connection.queue(proof)
        refusal = None
        if found.digest != self._digest:
            refusal = "this worker runs with other options, another model or other data than the server"
        elif found.rank >= self._options.workers:
            refusal = f"rank {found.rank} where there are {self._options.workers} workers"
        if refusal:
            log.warning("refused %s: %s", connection.name, refusal)
            connection.send(messages.stop(refusal, error=True))
            connection.closing = True
        else:
            old = self._workers.get(found.rank)
            if old is not None:
                self._replace(old)
            connection.rank = found.rank
            connection.next_piece(None)
            self._workers[found.rank] = connection
            self.server.join(found.rank)
        self._watch(connection)

    def _replace(self, old: _Connection) -> None:
        """Tell who is still there to stop: two of one rank would otherwise take each other's place for ever."""
        old.send(messages.stop(f"another worker of rank {old.rank} has connected", error=True))
        try:
            old.write()
        except _Lost:
            pass
        self._close(old, "connected again")

    def _deliver(self, connection: _Connection) -> None:
        assert connection.header is not None and connection.rank is not None
        message = connection.header.message(connection.piece)
        connection.next_piece(None)
        self._blocking_since.pop(connection.rank, None)
        self.server.receive(connection.rank, message)
        if message.kind is Kind.TOTAL:
            now = time.monotonic()
            self._sample_s = (now - self._summing_since.get(connection.rank, now)) / message.count
            self._summing_since[connection.rank] = now

    def _write(self, connection: _Connection) -> None:
        if connection.write():
            if connection.closing:
                raise _Lost("refused")
            self._selector.modify(connection.sock, selectors.EVENT_READ, connection)

    def _watch(self, connection: _Connection) -> None:
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
                except _Lost as error:
                    self._close(connection, str(error))

    def _close(self, connection: _Connection, reason: str) -> None:
        if connection.sock.fileno() < 0:
            return
        self._selector.unregister(connection.sock)
        connection.sock.close()
        self._strangers.discard(connection)
        rank = connection.rank
        if rank is None:
            log.warning("connection from %s refused: %s", connection.address, reason)
        elif self._workers.get(rank) is connection:
            del self._workers[rank]
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
        for connection in [c for c in self._strangers if now - c.since > HANDSHAKE_S]:
            self._close(connection, "no proof of the token in time")
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
        for connection in [*self._workers.values(), *self._strangers]:
            connection.sock.close()
        self._listener.close()
        self._selector.close()


def _family(host: str, port: int) -> socket.AddressFamily:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
