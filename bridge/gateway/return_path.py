"""The way back to clients whose virtual IP is out of a network that this gateway is directly connected to.

The other hosts of that network ask for the address by ARP or neighbour discovery. charon's farp plugin answers for
CHILD_SAs that came up in an exchange, not for those of a session that was resumed; and no host that knows the address
asks again because the session moved. So the sidecar of the gateway that has the session announces the address, answers
for it, and stops when the session is gone from here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from bridge.charon.ike_sa import IkeSa
from bridge.ike.address import packed
from bridge.net.neighbour import Connected, Neighbour, connected_networks
from bridge.service.metrics import Metrics
from bridge.service.tasks import end, spawn

log = structlog.get_logger()

ANNOUNCE_AFTER: Final = (0.0, 1.0, 2.0)
"""seconds, each after the one before, after which an address is announced: one announcement may be lost"""
NETWORKS_SECONDS: Final = 1.0
"""that the list of the host's networks is used for; reading it takes longer than everything else here"""

_Range = tuple[str, bytes, bytes]
"""an interface, and the first and the last address of a network that it is in"""


class ReturnPath:
    """Announces the addresses of SAs that are up here. `enabled`: whether it does."""

    def __init__(
        self,
        *,
        enabled: bool,
        networks: Callable[[], list[Connected]] = connected_networks,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._enabled = enabled
        self._networks = networks
        self._clock = clock
        self._connected: list[_Range] = []
        self._read_at: float | None = None
        self._neighbours: dict[str, Neighbour] = {}
        self._announced: dict[str, tuple[str, set[bytes]]] = {}
        """by address: the interface, and the SAs (both SPIs) that have it"""
        self._of: dict[bytes, tuple[str, ...]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many addresses are announced."""
        return len(self._announced)

    def gauges(self, metrics: Metrics) -> None:
        """How many addresses are announced, for `status`."""
        text = "virtual IPs announced by ARP and neighbour discovery"
        metrics.gauge("addresses_announced", text, lambda: float(len(self)))

    async def close(self) -> None:
        """Answer no more."""
        await end(*self._tasks)
        for neighbour in self._neighbours.values():
            for sock in neighbour.sockets():
                asyncio.get_running_loop().remove_reader(sock)
            neighbour.close()
        self._neighbours.clear()
        self._announced.clear()

    def changed(self, sa: IkeSa) -> None:
        """An SA came up or changed."""
        spis = sa.id.spis
        if not self._enabled or not sa.up or self._of.get(spis, ()) == sa.remote_vips:
            return
        before, self._of[spis] = self._of.get(spis, ()), sa.remote_vips
        self._withdraw(spis, [address for address in before if address not in sa.remote_vips])
        for address in sa.remote_vips:
            if (interface := _interface(address, self._now())) is not None:
                self._take_up(spis, address, interface)

    def _now(self) -> list[_Range]:
        """The networks of this host."""
        now = self._clock()
        if self._read_at is None or now - self._read_at >= NETWORKS_SECONDS:
            self._read_at = now
            self._connected = [
                (name, network.network_address.packed, network.broadcast_address.packed)
                for name, network in self._networks()
            ]
        return self._connected

    def gone(self, sa: IkeSa) -> None:
        """An SA ended."""
        self._withdraw(sa.id.spis, self._of.pop(sa.id.spis, ()))

    def _withdraw(self, spis: bytes, addresses: Sequence[str]) -> None:
        for address in addresses:
            interface, holders = self._announced.get(address, ("", set()))
            holders.discard(spis)
            if interface and not holders:
                del self._announced[address]
                self._neighbours[interface].remove(address)

    def _take_up(self, spis: bytes, address: str, interface: str) -> None:
        neighbour = self._neighbours.get(interface)
        if neighbour is None:
            try:
                neighbour = Neighbour(interface)
            except (OSError, ValueError) as error:
                log.error("address-not-announced", address=address, interface=interface, reason=str(error))
                return
            self._neighbours[interface] = neighbour
            for sock in neighbour.sockets():
                asyncio.get_running_loop().add_reader(sock, self._answer, interface, neighbour, sock)
        self._announced.setdefault(address, (interface, set()))[1].add(spis)
        neighbour.add(address)
        task = spawn("announce", self._announce(address, interface, neighbour))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _announce(self, address: str, interface: str, neighbour: Neighbour) -> None:
        for seconds in ANNOUNCE_AFTER:
            await asyncio.sleep(seconds)
            if address not in self._announced:
                return
            try:
                neighbour.announce(address)
            except OSError as error:
                log.warning("address-not-announced", address=address, interface=interface, reason=str(error))
        log.info("address-announced", address=address, interface=interface)

    def _answer(self, interface: str, neighbour: Neighbour, sock: object) -> None:
        try:
            neighbour.answer(sock)  # type: ignore[arg-type]
        except OSError as error:
            log.debug("neighbour-request-not-answered", interface=interface, reason=str(error))


def _interface(address: str, networks: Sequence[_Range]) -> str | None:
    """The interface whose network an address is in."""
    octets = packed(address)
    size = len(octets)
    return next((name for name, first, last in networks if len(first) == size and first <= octets <= last), None)
