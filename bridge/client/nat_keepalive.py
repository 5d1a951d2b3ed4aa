"""A NAT or stateful filter in front of the client lets another gateway's announcement in: the client sends each other
gateway of its session's VPN a NAT-keepalive now and then (RFC 3948 section 2.3: one octet 0xFF), from the port of its
SA. A NAT that maps the port for each gateway separately does not let it in: DPD decides then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

import structlog

from bridge.charon.ike_sa import Condition, IkeSa
from bridge.config import Keepalive
from bridge.net.interface import Sender

log = structlog.get_logger()

KEEPALIVE_SECONDS: Final = 20.0
"""what NATs keep a mapping for is 30 s and more"""
LOOK_SECONDS: Final = 1.0
"""between two looks at which sessions there are"""
KEEPALIVE: Final = b"\xff"


class NatKeepalive:
    """`run` is a task. `sas` gives the sessions' SAs, `targets` the addresses that a session may go to."""

    def __init__(
        self,
        sender: Sender,
        policy: Keepalive,
        sas: Callable[[], Sequence[IkeSa]],
        targets: Callable[[IkeSa], Collection[str] | None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sender = sender
        self._policy = policy
        self._sas = sas
        self._targets = targets
        self._clock = clock
        self._logged = ""

    async def run(self) -> None:
        """Until it is cancelled."""
        due: dict[bytes, float] = {}
        while self._policy != "off":
            now, before, due = self._clock(), due, {}
            for sa in self._sas():
                if sa.up and (self._policy == "always" or _filtered(sa)):
                    due[sa.id.spis] = before.get(sa.id.spis, now)
                    if now >= due[sa.id.spis]:
                        due[sa.id.spis] = now + KEEPALIVE_SECONDS
                        self.send(sa)
            await asyncio.sleep(LOOK_SECONDS)

    def send(self, sa: IkeSa) -> None:
        """To each other gateway of the session, of the SA's address family."""
        if sa.local is None or sa.remote is None:
            return
        local, remote = sa.local, sa.remote
        for target in sorted(self._targets(sa) or ()):
            if target == remote.address or (":" in target) != (":" in local.address):
                continue
            try:
                self._sender.send(local.address, local.port, target, remote.port, KEEPALIVE, False)
            except OSError as error:
                if self._logged != str(error):
                    log.info("keepalive-not-sent", gateway=target, reason=error.strerror)
                self._logged = str(error)


def _filtered(sa: IkeSa) -> bool:
    """Whether something in front of the client lets in only what was sent to before: a NAT, or, as routers of IPv6
    networks do by default (RFC 6092), a stateful filter."""
    return sa.has(Condition.NAT_HERE) or (sa.local is not None and ":" in sa.local.address)
