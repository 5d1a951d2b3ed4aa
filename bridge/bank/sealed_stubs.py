"""Stubs and marks as octets in a bank, sealed for the place where they are. No I/O."""

from __future__ import annotations

from collections.abc import Callable

from bridge.bank.content_report import ContentReport
from bridge.stub.codec import decode, encode, pack_index, unpack_index
from bridge.stub.keyring import Keyring, SealError
from bridge.stub.stub import Index, Stub, StubError


class SealedStubs:
    """What does not open is reported. `wall` gives Unix seconds."""

    def __init__(self, keyring: Keyring, report: ContentReport, wall: Callable[[], float]) -> None:
        self._keyring = keyring
        self._report = report
        self._wall = wall

    def seal(self, stub: Stub, place: bytes) -> bytes:
        """A stub for the key `place`. Raises StubError for one that cannot be encoded."""
        return self._keyring.seal(encode(stub), place)

    def seal_mark(self, old: Index, new: Index) -> bytes:
        """The mark that the session of `old` went on as `new`."""
        return self._keyring.seal(pack_index(new), old.moved.encode())

    def sealed_again(self, index: Index, sealed: bytes | None) -> bytes | None:
        """The same stub sealed with the key that seals now; None where it is already, or does not open."""
        if sealed is None or self._keyring.is_current(sealed):
            return None
        place = index.key.encode()
        try:
            return self._keyring.seal(self._keyring.open(sealed, place), place)
        except SealError as error:
            self._report.stub(index, str(error))
            return None

    def open(self, index: Index, sealed: object) -> Stub | None:
        """The stub in octets from the bank; None where there are none, where they do not open, or where it expired."""
        if not isinstance(sealed, bytes):
            return None
        try:
            stub = decode(self._keyring.open(sealed, index.key.encode()))
            if stub.index != index:
                raise StubError(f"it is the stub of {stub.index}")
        except (SealError, StubError) as error:
            self._report.stub(index, str(error))
            return None
        # an expiry that someone took from the key is still in the stub
        return stub if stub.expires > self._wall() else None

    def open_mark(self, index: Index, sealed: object) -> Index | None:
        if not isinstance(sealed, bytes):
            return None
        try:
            return unpack_index(self._keyring.open(sealed, index.moved.encode()))
        except (SealError, ValueError) as error:
            self._report.stub(index, f"the mark of its move: {error}")
            return None
