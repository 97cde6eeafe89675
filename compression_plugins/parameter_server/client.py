"""A worker's side of the connection: plain blocking calls, and a new connection when the old one breaks."""

from __future__ import annotations

import logging
import socket
import time

import torch

from ..errors import CompressionError
from . import handshake, messages
from .connection import configure
from .messages import DOWN, HEADER, Kind, Message
from .worker import Worker

log = logging.getLogger("compression_plugins.parameter_server")
HANDSHAKE_S = 10.0
#: Times in a row that a server may hang up during the handshake: it does so at once where the token is another one, and
#: once in a while where it has to show out too many strangers.
_HANG_UPS = 3
_RETRY_S = 0.2


def run_worker(
    worker: Worker, address: tuple[str, int], token: bytes, reconnect_s: float = 30.0, silence_s: float = 3600.0
) -> str:
    """Serve until the server says stop; returns what it said.

    Args:
        reconnect_s: how long to try for a connection, at the start and after each loss.
        silence_s: how long the server may say nothing.

    Raises:
        AuthenticationError: wrong token, or no parameter server there.
        CompressionError: the server reported an error, or cannot be reached.
    """
    handshake.check_token(token)
    deadline, hang_ups = time.monotonic() + reconnect_s, 0
    while True:
        try:
            with socket.create_connection(address, timeout=HANDSHAKE_S) as sock:
                connection = _Connection(sock, worker, token)
                connection.prove_each_other()
                sock.settimeout(silence_s)
                try:
                    return connection.serve()
                finally:
                    deadline = time.monotonic() + reconnect_s
        except (OSError, _Closed) as error:
            hang_ups = hang_ups + 1 if isinstance(error, _HungUp) else 0
            if hang_ups == _HANG_UPS:
                raise handshake.AuthenticationError(f"{error}: most likely its token is another one") from None
            if time.monotonic() > deadline:
                where = f"{address[0]}:{address[1]}"
                raise CompressionError(f"worker {worker.rank} cannot reach the server at {where}: {error}") from None
            log.debug("worker %d: %s; connecting again", worker.rank, error)
            time.sleep(_RETRY_S)


class _Closed(Exception):
    """The server hung up without a word."""


class _HungUp(_Closed):
    """It did so instead of proving that it knows the token."""


class _Connection:
    def __init__(self, sock: socket.socket, worker: Worker, token: bytes) -> None:
        configure(sock)
        self._sock, self._worker, self._token = sock, worker, token

    def prove_each_other(self) -> None:
        problem, options = self._worker.problem, self._worker.options
        digest = options.digest(problem.numel, problem.samples)
        challenge = bytes(self._read(handshake.CHALLENGE_BYTES).numpy())
        answer, expected = handshake.hello(self._token, challenge, self._worker.rank, digest)
        self._sock.sendall(answer)
        try:
            proof = bytes(self._read(handshake.PROOF).numpy())
        except (_Closed, ConnectionError):
            raise _HungUp("the server hung up during the handshake") from None
        if not handshake.same(proof, expected):
            raise handshake.AuthenticationError("the server does not know the token")

    def serve(self) -> str:
        """Receive, handle, answer. What the first message is waited for is not counted: the run has not begun then."""
        message = self._receive()
        while message.kind is not Kind.STOP:
            answer = self._worker.handle(message)
            with self._worker.seconds.spent("waiting"):
                if answer is not None:
                    self._sock.sendall(answer.header())
                    self._sock.sendall(answer.payload.numpy().data)
                message = self._receive()
        text = messages.read_text(message)
        if message.bits:
            raise CompressionError(f"the parameter server stopped: {text}")
        return text

    def _receive(self) -> Message:
        problem, workers = self._worker.problem, self._worker.options.workers
        data = bytes(self._read(HEADER.size).numpy())
        header = messages.parse_header(data, DOWN, problem.numel, workers, problem.samples)
        return header.message(self._read(header.nbytes))

    def _read(self, nbytes: int) -> torch.Tensor:
        """Read exactly so many bytes from the socket: uint8 [nbytes]."""
        piece = torch.empty(nbytes, dtype=torch.uint8)
        view, have = piece.numpy().data, 0
        while have < nbytes:
            count = self._sock.recv_into(view[have:])
            if not count:
                raise _Closed("the server closed the connection")
            have += count
        return piece
