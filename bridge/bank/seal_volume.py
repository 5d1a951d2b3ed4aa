"""How many stubs the gateways have sealed with each key, together and across restarts.

AES-GCM with random nonces is good for 2^32 seals under one key (NIST SP 800-38D section 8.3): at 100 changes of stubs a
second for more than a year, with 100,000 busy clients for weeks. Rotation is asked for long before.

Each gateway posts its own counts in the bank. Anyone with write access to the bank can change them: too much asks for a
rotation that is not needed, and what this gateway has counted itself since its start is never less for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec
import structlog

from bridge.bank.interface import StubBank
from bridge.stub import bank_keys
from bridge.stub.keyring import Keyring

log = structlog.get_logger()

SEALS_MAX: Final = 2**32
"""with one key, by all gateways"""
SEALS_ASK: Final = SEALS_MAX // 4
"""from which on a new key is asked for"""
POST_SECONDS: Final = 60.0
"""between two times that the counts are posted"""
POST_TTL: Final = 400 * 86_400.0
"""seconds: longer than keys are used"""
OCTETS_MAX: Final = 10_000
"""of what a gateway posts; more is not read"""


class SealVolume:
    """Counts for `address`, this gateway's in the index; without one its counts are not posted."""

    def __init__(self, bank: StubBank, keyring: Keyring, address: str | None) -> None:
        self.total = 0
        """seals with the key that seals now, by all gateways as far as is known"""
        self._bank = bank
        self._keyring = keyring
        self._address = address
        self._before: dict[str, int] | None = None
        self._asked: bytes | None = None

    async def update(self, gateways: Iterable[str]) -> None:
        """Post this gateway's counts, and add up those of all `gateways`. Raises BankUnavailable."""
        if self._before is None:
            posted = await self._posted(self._address) if self._address is not None else {}
            # what was sealed since is in the keyring
            self._before = posted
        since = {key_id.hex(): count for key_id, count in self._keyring.seals.items()}
        mine = {name: self._before.get(name, 0) + since.get(name, 0) for name in {*self._before, *since}}
        sealing = self._keyring.sealing
        total = mine.get(sealing.hex(), 0)
        for name in gateways:
            if name != self._address:
                total += (await self._posted(name)).get(sealing.hex(), 0)
        self.total = total
        if total >= SEALS_ASK and self._asked != sealing:
            self._asked = sealing
            log.error(
                "key-sealed-much",
                key=sealing.hex(),
                seals=total,
                limit=SEALS_MAX,
                fix="make a new key: ike-sa-sync keygen FILE --add, and copy the file to all gateways",
            )
        if self._address is not None:
            text = msgspec.json.encode(mine).decode()
            await self._bank.post(bank_keys.SEALS_KIND, self._address, text, POST_TTL)

    async def _posted(self, gateway: str) -> dict[str, int]:
        return decode(await self._bank.posted(bank_keys.SEALS_KIND, gateway))


def decode(posted: bytes | None) -> dict[str, int]:
    """Seals by the key's id in hex; none where it is not what a gateway writes."""
    if posted is None or len(posted) > OCTETS_MAX:
        return {}
    try:
        counts = msgspec.json.decode(posted, type=dict[str, int])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}
    return {name: min(max(count, 0), SEALS_MAX) for name, count in counts.items()}
