"""The server's door: the listening socket, and connections that have not proved yet that they know the token.

Strangers must not keep workers out. Whoever says nothing is shown out after `STRANGER_S`; where too many wait, the one
that has waited longest at the most crowded address makes room for the newcomer, which a worker, who answers at once,
hardly ever is. Where the process has no file descriptor left, the door is closed for a moment: the kernel would
otherwise report the same connection again and again.
"""

from __future__ import annotations

import errno
import logging
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable

from ..errors import CompressionError
from .connection import Connection, configure

log = logging.getLogger("compression_plugins.parameter_server")

#: Seconds that a stranger may take to prove that it knows the token.
STRANGER_S = 3.0
#: Connections of one address, and beyond the number of workers of all, that may be at the door at a time.
SPARE = 16
_CLOSED_S = 0.5
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Door:
    """Accepts connections and keeps them until they are admitted.

    Args:
        host, port: address to bind; port 0 takes a free one.
        workers: that may come at the same time.
        selector: where the sockets are registered; the key's data is the `Connection`, None for the listener.
        close: closes a connection for good, with a reason.

    Raises:
        CompressionError: the address cannot be bound.
    """

    def __init__(
        self,
        host: str,
        port: int,
        workers: int,
        selector: selectors.BaseSelector,
        close: Callable[[Connection, str], None],
    ) -> None:
        try:
            self._listener = socket.create_server((host, port), family=_family(host, port), backlog=128)
        except OSError as error:
            raise CompressionError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._limit, self._selector, self._close = workers + SPARE, selector, close
        self._closed_until: float | None = None
        self.strangers: dict[Connection, None] = {}  # in order of their coming
        selector.register(self._listener, selectors.EVENT_READ)

    def accept(self) -> None:
        """Let in whoever comes next, as a stranger."""
        try:
            sock, address = self._listener.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._close_for_a_moment(error)
            return
        connection = Connection(sock, address[0], address[1])
        if len(self.strangers) >= self._limit:
            self._make_room()
        sock.setblocking(False)
        configure(sock)
        self.strangers[connection] = None
        self._selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)

    def look_after(self, now: float) -> None:
        """Show out who took too long, and open the door again."""
        for connection in [c for c in self.strangers if now - c.since > STRANGER_S]:
            self._close(connection, "no proof of the token in time")
        if self._closed_until is not None and now > self._closed_until:
            self._closed_until = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    def admitted(self, connection: Connection) -> None:
        """It is no stranger any more, or it is gone."""
        self.strangers.pop(connection, None)

    def shut(self) -> None:
        """Close the listener and whoever stands at the door."""
        for connection in self.strangers:
            connection.sock.close()
        self._listener.close()

    def _make_room(self) -> None:
        crowd = Counter(connection.host for connection in self.strangers).most_common(1)[0][0]
        oldest = next(connection for connection in self.strangers if connection.host == crowd)
        self._close(oldest, f"{len(self.strangers)} connections without a proof of the token; it waited longest")

    def _close_for_a_moment(self, error: OSError) -> None:
        log.warning("no connection can be accepted for a moment: %s", error.strerror)
        self._selector.unregister(self._listener)
        self._closed_until = time.monotonic() + _CLOSED_S
        if self.strangers:
            self._make_room()


def _family(host: str, port: int) -> socket.AddressFamily:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
