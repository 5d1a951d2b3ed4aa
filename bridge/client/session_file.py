"""The file in which a client keeps its sessions, keys included, so that they survive a crash of its host.

A header line, then a MessagePack array of [stub, sealed stub or nil, Unix seconds until when that is good]. The stub is
the client's own view of its IKE_SA (bridge.stub.codec), in the clear: a process that can read the file can take the
session over.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from bridge.stub.codec import decode, encode
from bridge.stub.stub import Stub, StubError

HEADER = b"ike-sa-sync: sessions of a client, format 1\n"
MAX_OCTETS = 1 << 20


class SessionFileError(Exception):
    """A file that cannot be read, written, or trusted; the text names the cause. Never holds a key."""


class Session(NamedTuple):
    """One IKE_SA as the client sees it, and the stub that it holds for the gateways, good until `until`."""

    stub: Stub
    sealed: bytes | None
    until: float


_Row = tuple[bytes, bytes | None, Annotated[float, Meta(ge=0)]]
_decoder = msgspec.msgpack.Decoder(list[_Row])


def load(path: Path) -> list[Session]:
    """The sessions in the file, none if there is no file.

    Raises SessionFileError if it is another user's, open to others, or holds anything else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SessionFileError(f"{path} cannot be read: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise SessionFileError(f"{path} is not a file of this user's: remove it")
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            mode = stat.S_IMODE(status.st_mode)
            raise SessionFileError(f"{path} is open to other users (mode {mode:04o}): remove it, its keys may be known")
        octets = file.read(MAX_OCTETS)
    if not octets.startswith(HEADER):
        raise SessionFileError(f"{path} holds something else than the sessions of a client: remove it")
    try:
        rows = _decoder.decode(octets[len(HEADER) :])
        return [Session(decode(stub), sealed, until) for stub, sealed, until in rows]
    except (msgspec.MsgspecError, StubError) as error:
        raise SessionFileError(f"{path} is damaged ({error}): remove it") from None


def pack(sessions: Sequence[Session]) -> bytes:
    """What `write` writes. Raises StubError for an IKE_SA that the encoding cannot hold."""
    rows = [(encode(session.stub), session.sealed, session.until) for session in sessions]
    return HEADER + msgspec.msgpack.encode(rows)


def write(path: Path, octets: bytes) -> None:
    """Replace the file in one step, not readable by other users at any time; on disk when this returns.

    Raises SessionFileError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # mkstemp: mode 0600 from the first moment, and a name that no other process made
        descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(octets)
                file.flush()
                os.fsync(descriptor)
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise SessionFileError(f"{path} cannot be written: {error.strerror}") from None
