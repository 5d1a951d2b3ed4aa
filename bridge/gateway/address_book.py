"""The sessions that have a virtual IP, by the bank: hints of its index, each confirmed by the sealed stub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bridge.bank.interface import StubBank
from bridge.stub.stub import Index, Stub


class Holder(NamedTuple):
    """A session that has a virtual IP."""

    address: str
    stub: Stub


class AddressBook:
    """Asks `bank`."""

    def __init__(self, bank: StubBank) -> None:
        self._bank = bank

    async def holders(self, ranges: Sequence[tuple[str, str]]) -> list[Holder]:
        """The sessions with an address in one of these ranges, each given by its first and its last address. Hints that
        were wrong are taken away. Raises BankUnavailable."""
        entries = await self._bank.addresses(ranges)
        if not entries:
            return []
        indexes = list(dict.fromkeys(entry.of for entry in entries))
        stubs = dict(zip(indexes, await self._bank.get(indexes), strict=True))
        found: list[Holder] = []
        wrong = []
        for entry in entries:
            stub = stubs[entry.of]
            if stub is not None and entry.address in stub.remote_vips:
                found.append(Holder(entry.address, stub))
            else:
                wrong.append(entry)
        if wrong:
            await self._bank.forget_addresses(wrong)
        return found

    async def not_over(self, indexes: Sequence[Index]) -> set[Index]:
        """Those of them whose session is not known to have ended. Raises BankUnavailable."""
        ended = await self._bank.ended(indexes) if indexes else []
        return {index for index, over in zip(indexes, ended, strict=True) if not over}
