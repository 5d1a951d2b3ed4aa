"""A NAT or stateful filter in front of the client lets another gateway's announcement in: the client sends each other
gateway of its session's VPN a NAT-keepalive now and then (RFC 3948 section 2.3: one octet 0xFF), from the port of its
SA. A NAT that maps the port for each gateway separately does not let it in: DPD decides then.

Whether there is such a filter is not tried out: a packet that one gateway sends unasked gets through a filter too that
still remembers a packet to it, from before a failover, and an announcement later would not. A keepalive too many costs
one octet, one too few the clients' traffic until DPD. So they are left out only where nothing can be in the way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final

import structlog

from bridge.charon.ike_sa import Condition, IkeSa
from bridge.config import Keepalive
from bridge.net.interface import Sender
from bridge.net.route import through_router

log = structlog.get_logger()

KEEPALIVE_SECONDS: Final = 20.0
"""what NATs keep a mapping for is 30 s and more"""
LOOK_SECONDS: Final = 1.0
"""between two looks at which sessions there are"""
KEEPALIVE: Final = b"\xff"


class NatKeepalive:
    """`run` is a task. `sas` gives the sessions' SAs, `targets` the addresses that a session may go to.
    `through_router`: whether packets from one address to another one go to a router."""

    def __init__(
        self,
        sender: Sender,
        policy: Keepalive,
        sas: Callable[[], Sequence[IkeSa]],
        targets: Callable[[IkeSa], Collection[str] | None],
        *,
        through_router: Callable[[str, str], bool] = through_router,
    ) -> None:
        self._sender = sender
        self._policy = policy
        self._sas = sas
        self._targets = targets
        self._through_router = through_router
        self._logged = ""

    async def run(self) -> None:
        """Until it is cancelled."""
        due: dict[bytes, float] = {}
        while self._policy != "off":
            now, before, due = time.monotonic(), due, {}
            for sa in self._sas():
                if sa.up:
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
            if self._policy == "auto" and not self._may_be_filtered(sa, target):
                continue
            try:
                self._sender.send(local.address, local.port, target, remote.port, KEEPALIVE, False)
            except OSError as error:
                if self._logged != str(error):
                    log.info("keepalive-not-sent", gateway=target, reason=error.strerror)
                self._logged = str(error)

    def _may_be_filtered(self, sa: IkeSa, target: str) -> bool:
        """Whether something in front of the client may let in only what was sent to before: a NAT, a stateful filter of
        a router, or, as IPv6 networks have by default (RFC 6092), one on the way to the same network."""
        assert sa.local is not None
        local = sa.local.address
        return sa.has(Condition.NAT_HERE) or ":" in local or self._through_router(local, target)
