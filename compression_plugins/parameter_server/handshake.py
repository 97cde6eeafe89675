"""Who may connect: both sides prove that they know the token, by HMAC-SHA256 of fresh nonces, before any frame.

    server -> worker   magic, 32-byte nonce
    worker -> server   magic, rank, digest of (options, model size, data size), 32-byte nonce, proof
    server -> worker   proof; then a STOP with the reason if rank or digest do not fit

The token never travels. Frames after the handshake are not encrypted and carry no proof of their own: the protection
is against strangers who can reach the port, not against someone who can rewrite traffic. Across machines use a network
that is yours.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from typing import NamedTuple

from ..errors import CompressionError
from .messages import VERSION

MAGIC = b"CPPS" + bytes([VERSION, 0, 0, 0])
NONCE = PROOF = 32
CHALLENGE_BYTES = len(MAGIC) + NONCE
_HELLO = struct.Struct(f"<8sI32s{NONCE}s")
HELLO_BYTES = _HELLO.size + PROOF
MIN_TOKEN = 16


class AuthenticationError(CompressionError):
    """The other side does not know the token, or does not speak this protocol."""


class Hello(NamedTuple):
    rank: int
    digest: bytes
    nonce: bytes


def check_token(token: bytes) -> bytes:
    """Refuse tokens that could be guessed."""
    if len(token) < MIN_TOKEN:
        raise CompressionError(
            f"the token has {len(token)} bytes; use {MIN_TOKEN} or more, for example from `openssl rand -hex 32`"
        )
    return token


def challenge() -> bytes:
    """What the server says first; its nonce is the tail."""
    return MAGIC + secrets.token_bytes(NONCE)


def hello(token: bytes, received: bytes, rank: int, digest: bytes) -> tuple[bytes, bytes]:
    """(the worker's answer to a challenge, the proof that it expects back)."""
    if received[: len(MAGIC)] != MAGIC:
        raise AuthenticationError("this is no parameter server of the same version")
    theirs, mine = received[len(MAGIC) :], secrets.token_bytes(NONCE)
    body = _HELLO.pack(MAGIC, rank, digest, mine)
    return body + _proof(token, b"worker", theirs, body), _proof(token, b"server", mine, theirs)


def answer(token: bytes, sent: bytes, received: bytes) -> tuple[Hello, bytes]:
    """The server's check of a worker's answer -> (who it is, the server's proof); raises `AuthenticationError`."""
    body, proof = received[: _HELLO.size], received[_HELLO.size :]
    nonce = sent[len(MAGIC) :]
    if not same(proof, _proof(token, b"worker", nonce, body)):
        raise AuthenticationError("wrong token")
    magic, rank, digest, theirs = _HELLO.unpack(body)
    if magic != MAGIC:
        raise AuthenticationError("another version of the protocol")
    return Hello(rank, digest, theirs), _proof(token, b"server", theirs, nonce)


def same(proof: bytes, expected: bytes) -> bool:
    """Whether two proofs are equal, compared in a time that does not depend on where they differ."""
    return hmac.compare_digest(proof, expected)


def _proof(token: bytes, role: bytes, nonce: bytes, body: bytes) -> bytes:
    return hmac.digest(token, role + nonce + body, "sha256")
