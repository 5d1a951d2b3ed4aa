"""HA messages and VICI reports of one charon, joined into its IKE_SAs. No I/O.

HA messages bring the keys and what each SA is. VICI says which SAs there are, who their peers are, which addresses they
have and how long they live. An SA is up here once VICI has named it too: what VICI does not list is not stored, and
where the two differ the SA cannot be resumed. Either may come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set

import structlog
from msgspec.structs import replace

from bridge.charon import sa_lifetime
from bridge.charon.granted_children import GrantedChildren
from bridge.charon.ha_message import IkeId
from bridge.charon.half_open import HalfOpenSas
from bridge.charon.ike_sa import Condition, IkeSa
from bridge.charon.sa_listener import Listener
from bridge.charon.sa_notes import SaNotes
from bridge.charon.sa_peers import differs
from bridge.charon.sa_recovery import SaRecovery, drop_unlisted, inherit
from bridge.charon.vici_types import ConnectionInfo, Event, SaInfo
from bridge.charon.virtual_ips import VirtualIps
from bridge.stub.types import ChildSa

log = structlog.get_logger()

FIRST_MESSAGE_ID = 1
"""what a rebuilt SA expects first; more means that a request verified"""
WORD_SECONDS = 1.0
"""VICI's event about an SA comes within this time of its HA messages, or VICI has to be asked"""


class SaTracker:
    """The IKE_SAs of one charon, by both SPIs.

    `wall` gives Unix seconds, `clock` monotonic ones.
    """

    def __init__(self, listener: Listener, *, wall: Callable[[], float], clock: Callable[[], float]) -> None:
        self.sas: dict[bytes, IkeSa] = {}
        self.connections: dict[str, ConnectionInfo] = {}
        self.unresumable = 0
        self.virtual_ips = VirtualIps()
        self.half_open = HalfOpenSas()
        self.granted = GrantedChildren()
        self.recall = SaRecovery()
        self.shared: Set[str] = frozenset()
        """local addresses that this gateway shares with others: their SAs can be taken over as they are"""
        self.owner = ""
        """this gateway, as the owner of their sessions"""
        self.on_message_id: Callable[[IkeSa], None] = lambda _: None
        """called when charon sent a request on one of these"""
        self.on_deleting: Callable[[IkeSa], None] = lambda _: None
        """called for an SA that VICI lists as DELETING: one of the sides ended it, and charon waits for an answer"""
        self.on_info: list[Callable[[SaInfo], None]] = []
        """called for each IKE_SA that VICI reports, with the figures of its CHILD_SAs"""
        self.on_child_down: list[Callable[[SaInfo], None]] = []
        """called for each CHILD_SA whose end VICI reports, with its last figures: after that of its IKE_SA, if both
        end"""
        self.on_lost: list[Callable[[list[IkeSa]], None]] = []
        """called when charon was restarted, with the IKE_SAs that it had"""
        self.lands_at: Callable[[str], bool] = lambda _: False
        """whether SAs have this address between their installation and their activation"""
        self.listener = listener
        self.clock = clock
        self.notes = SaNotes()
        self._wall = wall

    # both: HA messages come by bridge.charon.ha_reports

    def unconfirmed_since(self) -> float | None:
        """Since when (clock seconds) VICI is to be asked about an SA; None where there is nothing to ask."""
        return next(iter(self.notes.unconfirmed.values()), None)

    def verified(self, ike_id: IkeId, next_id: int) -> None:
        """A protected request of the peer was verified, by charon or with the same keys; `next_id` is the Message ID of
        the peer's next one."""
        sa = self.sas.get(ike_id.spis)
        if sa is not None and sa.requests is not None:
            sa.requests.of_peer = self.clock()
        if sa is not None and sa.derivation is not None:
            # the next stub has it: the peer's next request tells it to a gateway that takes the SA over
            sa.derivation = replace(sa.derivation, next_expected=next_id)
        if sa is not None and ike_id.spis in self.notes.unproven and next_id > FIRST_MESSAGE_ID:
            self.notes.unproven.discard(ike_id.spis)
            self.come_up(sa)
        self.granted.verified(ike_id.spis, self.clock())
        self.listener.verified(ike_id)

    def _whole(self, sa: IkeSa) -> bool:
        """Whether charon's HA messages have said all that they say of an SA that is up."""
        said = sa.connection and sa.local_id is not None and sa.remote_id is not None
        return bool(said or sa.id.spis in self.notes.malformed) and sa.id.spis not in self.notes.unproven

    def come_up(self, sa: IkeSa) -> None:
        """Have an SA up once both HA messages and VICI have named it."""
        if sa.up or not self._whole(sa):
            return
        info, since = self.notes.early.get(sa.id.spis, (None, 0.0))
        if info is None or info.state != "ESTABLISHED":
            self.notes.ask(sa.id.spis, self.clock())
            return
        del self.notes.early[sa.id.spis]
        self._is_up(sa, info, since=since)

    def _is_up(self, sa: IkeSa, info: SaInfo, *, since: float) -> None:
        sa.up = True
        self.notes.incomplete.pop(sa.id.spis, None)
        self.notes.unconfirmed.pop(sa.id.spis, None)
        self.half_open.ended(sa.id.spis)
        if (old := self.notes.rekeyed_from.pop(sa.id.spis, None)) is not None:
            inherit(sa, old)
            self.recall.rekeyed_again(old, sa)
            self.virtual_ips.put(sa.id.spis, sa.remote_vips, self.clock())
        malformed, _ = self.notes.malformed.get(sa.id.spis, ("", 0.0))
        if malformed:
            sa.connection = sa.connection or info.connection
            self.refuse(sa, malformed)
        elif difference := differs(sa, info):
            self.refuse(sa, difference)
        elif sa.has(Condition.PPK):
            # charon mixes the PPK into SK_d behind the ha plugin's back (RFC 8784)
            self._unresumable(
                sa, "it uses a post-quantum preshared key (RFC 8784), which charon's ha plugin does not carry"
            )
        now = int(self._wall())
        sa.established = now
        sa_lifetime.assume(sa, self.connections.get(sa.connection), now)
        self._take_info(sa, info, since=since)
        if sa.local is None or sa.local.address not in self.shared:
            sa.derivation = None
        sa.share()
        self.listener.changed(sa)

    def _unresumable(self, sa: IkeSa, reason: str) -> None:
        if sa.resumable:
            sa.resumable = False
            self.unresumable += 1
            self.log_unresumable(sa.id, reason, connection=sa.connection)

    def refuse(self, sa: IkeSa, reason: str) -> None:
        """What HA messages say of the peers of an SA is not true: forget it."""
        self._unresumable(sa, reason)
        sa.local_id = sa.remote_id = sa.eap_id = None

    @staticmethod
    def log_unresumable(ike_id: IkeId, reason: str, **more: str) -> None:
        """Say why an SA cannot be resumed."""
        log.warning("sa-not-resumable", **ike_id.logged, reason=reason, **more)

    def _drop(self, spis: bytes) -> None:
        """Forget what is noted of an SA that is gone."""
        self.notes.drop(spis)
        self.granted.drop(spis)
        self.half_open.ended(spis)
        self.virtual_ips.drop(spis)

    # VICI

    def event(self, event: Event) -> None:
        """Take in one VICI event."""
        spis, now = event.sa.spis, self.clock()
        for told in self.on_info:
            told(event.sa)
        if event.kind == "child-updown" and event.up is False:
            for down in self.on_child_down:
                down(event.sa)
        if event.kind == "ike-updown" and event.up is False:
            self.notes.early.pop(spis, None)
            self.virtual_ips.drop(spis)
            self.listener.down(event.sa)
            return
        if event.kind == "ike-updown" and event.sa.remote_vips:
            # its end is reported in the same way, and after that only those of its CHILD_SAs
            self.virtual_ips.put(spis, event.sa.remote_vips, now)
        sa = self.sas.get(spis)
        if sa is not None and sa.up:
            if event.up is not False:
                # asked before that, a list does not know it
                sa.reported_at = now
            self.notes.unconfirmed.pop(spis, None)
            if self._take_info(sa, event.sa, since=now):
                self.listener.changed(sa)
        elif event.up is not False:
            self.notes.reported(event.sa, now)
            if sa is not None and not sa.adopted:
                self.come_up(sa)

    def _take_info(self, sa: IkeSa, info: SaInfo, *, since: float) -> bool:
        """Join what VICI says, asked for at `since`; whether that changed the stub by more than a second of jitter."""
        if info.state != "ESTABLISHED":
            return False
        # a long list is as of when it was asked for, however late it is read
        now = self._wall() - (self.clock() - since)
        moved = sa_lifetime.take(sa, info, self.connections.get(sa.connection), now)
        sa.unique_id = info.unique_id
        if sa.resumable and (difference := differs(sa, info)):
            self.refuse(sa, difference)
            return True
        if since < sa.reported_at:
            # a list that was on its way while the SA moved has it where it was
            return moved
        if self.lands_at(info.remote.address):
            # it is being activated, and has its client's address in a moment
            return moved
        where = (info.local, info.remote, info.local_vips, info.remote_vips)
        # what is equal stays the object that others share
        if where != (sa.local, sa.remote, sa.local_vips, sa.remote_vips):
            sa.local, sa.remote, sa.local_vips, sa.remote_vips = where
            self.virtual_ips.put(sa.id.spis, sa.remote_vips, self.clock())
            return True
        return moved

    def is_up(self, spis: bytes) -> bool:
        """Whether the IKE_SA with these SPIs is known, and up."""
        sa = self.sas.get(spis)
        return sa is not None and sa.up

    # changes that no message reports

    def put_child(self, sa: IkeSa, child: ChildSa) -> None:
        """A CHILD_SA that `sa` has from now on."""
        sa.put_child(child)
        sa.children_at = self.clock()

    def adopt(self, sa: IkeSa) -> None:
        """An SA that the sidecar itself installed, or knew before it restarted: charon reports nothing about these."""
        sa.seen = self.clock()
        sa.adopted = True
        sa.children_at = sa.seen
        sa.share()
        self.sas[sa.id.spis] = sa
        self.virtual_ips.put(sa.id.spis, sa.remote_vips, sa.seen)
        self.notes.early.pop(sa.id.spis, None)

    def has_come_up(self, sa: IkeSa) -> None:
        """charon has an adopted SA: of lists that were asked for before, none says that it ended, which CHILD_SAs it
        has, or where its peer is."""
        sa.up = True
        sa.seen = sa.children_at = sa.reported_at = self.clock()

    def heirs(self, old: IkeSa) -> list[IkeSa]:
        """What `old` is being rekeyed to, until one is up: two where both sides rekey it, and not all are completed."""
        return [self.sas[spis] for spis, sa in self.notes.rekeyed_from.items() if sa is old and spis in self.sas]

    def take_back(self, sa: IkeSa, info: SaInfo, *, since: float) -> bool:
        """An SA that the bank remembers and VICI, asked at `since`, lists; False where it has CHILD_SAs
        that were not reported."""
        heir = self.recall.heir(sa)
        if heir is not None:
            self.listener.changed(heir)
            return True
        remembered = sa.children
        if not self.recall.catch_up(sa, info, since=since):
            return False
        self.adopt(sa)
        if sa.children != remembered:
            self.listener.changed(sa)
        return True

    def end(self, ike_id: IkeId) -> None:
        """An SA ended, and that is news."""
        sa = self.sas.pop(ike_id.spis, None)
        self._drop(ike_id.spis)
        if sa is not None and (sa.up or sa.adopted):
            self.listener.gone(sa)

    def forget(self, ike_id: IkeId) -> IkeSa | None:
        """Drop an SA that the sidecar itself removes, without news of it."""
        self._drop(ike_id.spis)
        return self.sas.pop(ike_id.spis, None)

    def forget_all(self) -> None:
        """charon died: its SAs are gone without a word, and their stubs are what clients resume from."""
        lost = list(self.established())
        for listener in self.on_lost:
            listener(lost)
        self.sas.clear()
        self.notes.clear()
        self.granted.clear()
        self.half_open.clear()
        self.virtual_ips.clear()
        self.recall.end()

    def child_spis(self) -> Iterator[int]:
        """The inbound ESP SPIs of all CHILD_SAs."""
        return (child.spi_in for sa in self.sas.values() for child in sa.children)

    def established(self) -> Iterator[IkeSa]:
        """All SAs that are up."""
        # a copy: metrics are read in another thread
        return (sa for sa in list(self.sas.values()) if sa.up)

    def count(self) -> tuple[int, int]:
        """How many SAs are up, and how many of them have a stub that was given to the bank."""
        up = [sa.published_at for sa in list(self.sas.values()) if sa.up]
        return len(up), len(up) - up.count("")

    def early(self) -> Set[bytes]:
        """SPIs of the SAs that VICI reported and whose HA messages are still to come."""
        return set(self.notes.early)

    def listed(self, info: SaInfo, *, since: float) -> bool:
        """Take what VICI lists of an SA that is up: who its peers are, its lifetime, where it is, CHILD_SAs that it no
        longer has. False where the keys of it are missing here."""
        spis = info.spis
        for told in self.on_info:
            told(info)
        sa = self.sas.get(spis)
        if sa is None or not (sa.up or sa.adopted):
            # until the HA channel has brought the rest
            self.notes.early[spis] = (info, since)
            if sa is not None:
                self.come_up(sa)
            # charon would only send again what is malformed
            return spis in self.notes.malformed or (sa is not None and sa.up)
        if sa.up:
            changed = self._take_info(sa, info, since=since)
            self.granted.listed(sa, info, since)
            if sa.children_at < since and drop_unlisted(sa, info):
                changed = True
            if changed:
                self.listener.changed(sa)
        return True

    def unlisted(self, present: Set[bytes], early: Set[bytes], *, since: float) -> None:
        """End the SAs that charon no longer has; `present` are the SPIs of those that it has, `early` of those that
        were reported before."""
        for spis in early - present:
            self.notes.early.pop(spis, None)
        for spis, (_, at) in list(self.notes.malformed.items()):
            if spis not in present and at < since:
                del self.notes.malformed[spis]
        for spis, at in list(self.notes.unconfirmed.items()):
            if at < since:
                # VICI has said what there is to say: an SA that it does not list is none, whatever HA messages say
                del self.notes.unconfirmed[spis]
                sa = self.sas.get(spis)
                if sa is not None and not sa.up and not sa.adopted and spis not in present:
                    self.end(sa.id)
        for spis, sa in list(self.sas.items()):
            if sa.up and spis not in present and sa.seen < since:
                self.end(sa.id)
        # a rebuilt SA that is about to be installed has its addresses already
        self.virtual_ips.keep(present | self.sas.keys(), since=since)
