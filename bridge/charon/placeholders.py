"""Placeholders: IKE_SAs that keep addresses of charon's HA pools from being given out.

An HA pool (charon.plugins.ha.pools) reserves the address of each SA that was installed over the HA channel, PASSIVE
ones too, and gives out the address n of the pool only while segment n mod count is active; at charon's start no segment
is. So a session that is at another gateway is stood for by an SA that is never activated: random keys, no peer, its
virtual IP. charon spends 13 KB on each.

They lie in the *keeping* segment, which is activated once, before there is any placeholder in it, and never again:
SegmentChooser leaves it alone. Until then they lie in the *waiting* segment, which is not active yet either. So at no
moment is an address that a placeholder keeps to be had:

    put in the waiting segment -> keeping segment activated -> moved there -> all other segments activated
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Final, NamedTuple

from bridge.charon.conf_parser import Settings
from bridge.charon.ha_channel import ChannelError, HaChannel
from bridge.charon.ha_commands import (
    add_message,
    address_message,
    delete_message,
    segment_message,
    update_message,
    vips_message,
)
from bridge.charon.ha_message import IkeId, MessageType
from bridge.charon.ha_segments import keeping_address, keeping_segment, waiting_address
from bridge.charon.install import Install
from bridge.charon.vici_types import SaInfo
from bridge.ike.address import Pool
from bridge.ike.transforms import Suite
from bridge.stub.types import Endpoint, Identity

STRONGSWAN_CONF: Final = Path("/etc/strongswan.conf")
SMALLEST, LARGEST = 3, 24
"""host bits of an HA pool: charon takes no smaller one, and makes a larger one smaller"""
NO_ADDRESS: Final = "198.19.255.255"
"""an address of RFC 2544 that is in no pool, put in the place of one that is not to be released"""
FQDN: Final = 2
PEER: Final = Identity(FQDN, b"address-in-use-at-another-gateway")
"""what an operator sees in `swanctl --list-sas`"""
SELF: Final = Identity(FQDN, b"placeholder")
SUITE: Final = Suite(encr=12, encr_len=128, integ=12, prf=5, group=31)
NOWHERE: Final = Endpoint("127.0.0.1", 0)


class HaPool(NamedTuple):
    """An address pool of the ha plugin's."""

    name: str
    text: str
    """as configured"""
    first: str
    """address that it gives out"""
    last: str

    @property
    def range(self) -> Pool:
        """To compare it with other pools."""
        return Pool(self.name, self.first, int(ip_address(self.last)) - int(ip_address(self.first)) + 1)

    def has(self, address: str) -> bool:
        if (":" in address) != (":" in self.first):
            return False
        return int(ip_address(self.first)) <= int(ip_address(address)) <= int(ip_address(self.last))


def ha_pools(path: Path = STRONGSWAN_CONF) -> list[HaPool]:
    """The pools that charon's ha plugin has, as it reads them from strongswan.conf. Does file I/O."""
    found: dict[str, HaPool] = {}
    for name, text in Settings(path).leaves():
        section, _, rest = name.partition(".plugins.ha.pools.")
        if not rest or section not in ("charon", "charon-systemd") or "/" not in text:
            continue
        try:
            network = ip_network(text.strip(), strict=False)
        except ValueError:
            continue
        base = type(network.network_address)(text.strip().split("/")[0])
        bits = min(network.max_prefixlen - network.prefixlen, LARGEST)
        if bits >= SMALLEST:
            # charon gives out neither the first nor the last one
            found[rest] = HaPool(rest, text.strip(), str(base + 1), str(base + (1 << bits) - 2))
    return list(found.values())


class Placeholders:
    """Those of one charon, by the address that each keeps. `count` segments; messages go to `channel`."""

    def __init__(self, channel: HaChannel, count: int) -> None:
        self.spis: set[bytes] = set()
        """of all of them: no SAs to anything else here"""
        self.opened = False
        """whether the keeping segment is active"""
        self.inactive = set(range(1, count + 1))
        """segments whose addresses charon does not give out yet"""
        self._channel = channel
        self._count = count
        self._keeping = keeping_segment(count)
        self._by_address: dict[str, IkeId] = {}
        self._put_at: dict[bytes, float] = {}
        self._listed: dict[bytes, tuple[IkeId, tuple[str, ...]]] = {}

    def __len__(self) -> int:
        return len(self._by_address)

    def __contains__(self, address: str) -> bool:
        return address in self._by_address

    @property
    def addresses(self) -> set[str]:
        """What they keep."""
        return set(self._by_address)

    def reset(self) -> None:
        """charon was restarted: it has none, and gives out no address."""
        self.opened = False
        self.inactive = set(range(1, self._count + 1))
        self.spis.clear()
        self._by_address.clear()
        self._put_at.clear()

    # what charon lists

    def claims(self, info: SaInfo) -> bool:
        """Whether an SA that VICI lists is a placeholder; it is noted for `listed`."""
        if info.remote.address not in (keeping_address(self._count), waiting_address(self._count)):
            return False
        self._listed[info.spis] = (IkeId.of(info.spi_i, info.spi_r, info.initiator), info.remote_vips)
        self.spis.add(info.spis)
        return True

    def listed(self, since: float) -> None:
        """That was all of a list that was asked for at `since` (monotonic seconds): those that it lacks are gone,
        others were put by a sidecar before this one."""
        for address, ike_id in list(self._by_address.items()):
            if ike_id.spis not in self._listed and self._put_at.get(ike_id.spis, 0.0) < since:
                self._forget(address, ike_id)
        for ike_id, vips in self._listed.values():
            for address in vips:
                self._by_address.setdefault(address, ike_id)
        self._listed = {}

    def _forget(self, address: str, ike_id: IkeId) -> None:
        """A placeholder is gone. Another may keep the address by now, where charon was slow to take a message."""
        if self._by_address.get(address) == ike_id:
            del self._by_address[address]
        self.spis.discard(ike_id.spis)
        self._put_at.pop(ike_id.spis, None)

    # commands to charon; all raise ChannelError

    async def put(self, wanted: Mapping[str, str], now: float) -> None:
        """Keep addresses, each given with the name of a connection that has its pool."""
        where = keeping_address(self._count) if self.opened else waiting_address(self._count)
        installs = []
        for address, connection in wanted.items():
            if address not in self._by_address:
                install = _install(address, connection, where)
                self._by_address[address] = install.id
                self.spis.add(install.id.spis)
                self._put_at[install.id.spis] = now
                installs.append(install)
        await self._channel.send(self._installs(installs, where))
        await self._channel.drained()

    def _installs(self, installs: Sequence[Install], where: str) -> Iterator[bytes]:
        for install in installs:
            yield add_message(self._version, install, where)
            yield update_message(self._version, install, where)

    async def open(self) -> None:
        """Activate the keeping segment, and move all there; then `activate` may follow."""
        await self._channel.send([segment_message(self._version, MessageType.SEGMENT_DROP, self._keeping)])
        await self._channel.drained()
        there = Endpoint(keeping_address(self._count), 0)
        await self._channel.send(
            address_message(self._version, ike_id, there) for ike_id in list(self._by_address.values())
        )
        await self._channel.drained()
        self.opened = True
        self.inactive.discard(self._keeping)

    async def activate(self, segments: Iterable[int]) -> None:
        """Have charon give out the addresses of these segments, but those that are kept."""
        chosen = sorted(self.inactive.intersection(segments) - {self._keeping})
        await self._channel.send(segment_message(self._version, MessageType.SEGMENT_DROP, each) for each in chosen)
        await self._channel.drained()
        self.inactive.difference_update(chosen)

    async def reserve_again(self, addresses: Iterable[str]) -> None:
        """Keep addresses that an SA beside the placeholder has released."""
        held = [(self._by_address[address], address) for address in addresses if address in self._by_address]
        await self._channel.send(vips_message(self._version, ike_id, (address,)) for ike_id, address in held)

    async def release(self, addresses: Iterable[str]) -> None:
        """Have charon give these addresses out again."""
        gone = self._kept(addresses)
        await self._channel.send(delete_message(self._version, ike_id) for ike_id in gone.values())
        for address, ike_id in gone.items():
            self._forget(address, ike_id)

    async def hand_over(self, addresses: Iterable[str]) -> None:
        """Keep these addresses no more; an SA here has them, and they stay reserved for it."""
        gone = self._kept(addresses)
        await self._channel.send(
            message
            for ike_id in gone.values()
            for message in (
                vips_message(self._version, ike_id, (NO_ADDRESS,)),
                delete_message(self._version, ike_id),
            )
        )
        for address, ike_id in gone.items():
            self._forget(address, ike_id)

    def _kept(self, addresses: Iterable[str]) -> dict[str, IkeId]:
        return {address: self._by_address[address] for address in addresses if address in self._by_address}

    @property
    def _version(self) -> int:
        version = self._channel.version
        if version is None:
            raise ChannelError("charon is not there, or its release is not known")
        return version


def _install(address: str, connection: str, where: str) -> Install:
    return Install(
        id=IkeId.of(os.urandom(8), os.urandom(8), False),
        suite=SUITE,
        sk_d_old=os.urandom(32),
        nonce_i=os.urandom(32),
        nonce_r=os.urandom(32),
        local_id=SELF,
        remote_id=PEER,
        eap_id=None,
        local=NOWHERE,
        remote=Endpoint(where, 0),
        connection=connection,
        conditions=(0,),
        extensions=(0,),
        local_vips=(),
        remote_vips=(address,),
    )
