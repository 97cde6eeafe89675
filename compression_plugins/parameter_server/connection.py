"""Bytes of one peer over a non-blocking socket, on the server's side."""

from __future__ import annotations

import socket
import time
from collections import deque

import torch

from . import handshake
from .messages import HEADER, Header, Message

#: A peer whose machine vanished is noticed after about a minute, without a byte of ours in flight.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


def configure(sock: socket.socket) -> None:
    """Small messages at once; notice peers that vanish."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Lost(Exception):
    """This connection is of no more use; the text says why."""


class Connection:
    """Bytes of one peer: what it has sent of the piece that comes next, and what waits to be sent to it."""

    def __init__(self, sock: socket.socket, host: str, port: int) -> None:
        self.sock, self.host, self.since = sock, host, time.monotonic()
        self.address = f"{host}:{port}"
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
            raise Lost(f"connection lost: {error.strerror}") from None
        if not count:
            raise Lost("connection closed")
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
            raise Lost(f"connection lost: {error.strerror}") from None
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
