"""After a restart: what charon says about IKE_SAs that the sidecar is still to recall from the bank. No I/O.

The HA channel's messages may be read, in order, before the bank was asked for the SAs they are about. What they say of
CHILD_SAs is kept until then; and an SA that was rekeyed meanwhile has the keys of the new one reported, but not its
CHILD_SAs, which charon moves without a message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from bridge.charon.ha_message import Attr, HaMessage, IkeId, MessageType
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import ChildInfo, SaInfo
from bridge.stub.types import ChildSa

EARLY_MAX: Final = 20_000
"""messages about CHILD_SAs kept"""


class SaRecovery:
    """Over once `end` was called: what comes then is about SAs that are known."""

    def __init__(self) -> None:
        self._going_on = True
        self._early: dict[bytes, list[tuple[float, HaMessage]]] = {}
        """by the SPIs of their IKE_SA, with when they came"""
        self._kept = 0
        self._heirs: dict[bytes, tuple[IkeId, IkeSa]] = {}
        """by the SPIs of an SA that is not known: what it was rekeyed to"""

    def end(self) -> None:
        """All that charon had when the sidecar came is known, or will be reported."""
        self._going_on = False
        self._early.clear()
        self._heirs.clear()

    def keep(self, message: HaMessage, now: float) -> None:
        """A CHILD_ADD or CHILD_DELETE of an SA that is not known."""
        if self._going_on and self._kept < EARLY_MAX:
            self._early.setdefault(message.first(Attr.IKE_ID).spis, []).append((now, message))
            self._kept += 1

    def rekeyed(self, old: IkeId, sa: IkeSa) -> None:
        """`sa` came of an SA that is not known."""
        if self._going_on:
            self._heirs[old.spis] = (old, sa)

    def rekeyed_again(self, old: IkeSa, sa: IkeSa) -> None:
        """What `old` had to inherit is for `sa`."""
        self._heirs |= {spis: (first, sa) for spis, (first, heir) in self._heirs.items() if heir is old}

    def awaited(self, infos: Iterable[SaInfo]) -> Iterator[SaInfo]:
        """The SAs that others came of which lack CHILD_SAs, with what VICI lists of these."""
        if not self._heirs:
            return
        listed = {info.spis: info for info in infos}
        for old, heir in self._heirs.values():
            info = listed.get(heir.id.spis)
            if info is not None and heir.up and unreported(heir, info):
                yield info._replace(spi_i=old.spi_i, spi_r=old.spi_r, initiator=old.initiator)

    def was_rekeyed(self, spis: bytes) -> bool:
        """Whether an SA came of the one with these SPIs."""
        return spis in self._heirs

    def heir(self, old: IkeSa) -> IkeSa | None:
        """What came of an SA that the bank remembers, with what charon moved to it."""
        _, sa = self._heirs.pop(old.id.spis, (None, None))
        if sa is not None:
            inherit(sa, old)
        return sa

    def catch_up(self, sa: IkeSa, info: SaInfo, *, since: float) -> bool:
        """What happened since to an SA that the bank remembers; whether all its CHILD_SAs are known of those that VICI
        lists, which was asked at `since`. A long list is old when its end is read: what came later stands."""
        reported = self._early.get(sa.id.spis, ())
        later = [message for at, message in reported if at >= since]
        for at, message in reported:
            if at < since:
                _apply(sa, message)
        drop_unlisted(sa, info)
        known = {child.spi_in for child in sa.children}
        known |= {message.first(Attr.INBOUND_SPI, 0) for message in later}
        for message in later:
            _apply(sa, message)
        return _works(info) <= known


def _apply(sa: IkeSa, message: HaMessage) -> None:
    if message.type == MessageType.CHILD_ADD:
        sa.put_child(child_of(message))
    else:
        sa.drop_child(message.first(Attr.INBOUND_SPI, 0))


def inherit(sa: IkeSa, old: IkeSa) -> None:
    """What charon moves to the new SA of an IKE rekey without a message."""
    known = {child.spi_in for child in sa.children}
    sa.children = (*(child for child in old.children if child.spi_in not in known), *sa.children)
    sa.local_vips = sa.local_vips or old.local_vips
    sa.remote_vips = sa.remote_vips or old.remote_vips
    sa.eap_id = sa.eap_id or old.eap_id
    sa.reauth_at = old.reauth_at
    sa.authenticated_until = old.authenticated_until
    sa.traits = old.traits
    sa.predecessor = old.predecessor
    sa.first_spi = old.first_spi


def drop_unlisted(sa: IkeSa, info: SaInfo) -> bool:
    """Forget CHILD_SAs that charon does not have; whether there were any."""
    listed = {child.spi_in for child in info.children}
    left = tuple(child for child in sa.children if child.spi_in in listed)
    dropped, sa.children = len(left) < len(sa.children), left
    return dropped


def unreported(sa: IkeSa, info: SaInfo) -> list[ChildInfo]:
    """The CHILD_SAs that charon lists and that are not known, without those that it is replacing."""
    known = {child.spi_in for child in sa.children}
    return [child for child in info.children if child.spi_in not in known and child.works]


def _works(info: SaInfo) -> set[int]:
    return {child.spi_in for child in info.children if child.works}


def child_of(message: HaMessage) -> ChildSa:
    """The CHILD_SA of a CHILD_ADD."""
    group: int = message.first(Attr.ALG_KE, 0)
    return ChildSa(
        name=message.first(Attr.CONFIG_NAME, ""),
        mode=message.first(Attr.IPSEC_MODE, 0),
        ipcomp=message.first(Attr.IPCOMP, 0),
        encr=message.first(Attr.ALG_ENCR, 0),
        encr_len=message.first(Attr.ALG_ENCR_LEN, 0),
        integ=message.first(Attr.ALG_INTEG, 0),
        esn=message.first(Attr.ESN, 0),
        groups=tuple(number for number in (group, *groups(message.first(Attr.ALG_ADD_KES, b""))) if number),
        spi_in=message.first(Attr.INBOUND_SPI, 0),
        spi_out=message.first(Attr.OUTBOUND_SPI, 0),
        local_ts=message.all(Attr.LOCAL_TS),
        remote_ts=message.all(Attr.REMOTE_TS),
        initiator=bool(message.first(Attr.INITIATOR, 0)),
    )


def groups(raw: bytes) -> tuple[int, ...]:
    """ALG_ADD_KES: 16-bit transform ids by place, zero for an unused one; nothing behind the last one used."""
    ids = [int.from_bytes(raw[i : i + 2]) for i in range(0, len(raw), 2)]
    while ids and not ids[-1]:
        ids.pop()
    return tuple(ids)
