"""HA messages and VICI reports of one charon, joined into its IKE_SAs. No I/O.

HA messages bring the keys and what each SA is. VICI says which SAs there are, who their peers are, which addresses they
have and how long they live. An SA is up here once VICI has named it too: what VICI does not list is not stored, and
where the two differ the SA cannot be resumed. Either may come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from typing import Any

import structlog
from msgspec.structs import replace

from bridge.charon import sa_lifetime
from bridge.charon.granted_children import GrantedChildren
from bridge.charon.ha_message import Attr, HaMessage, IkeId, MessageType
from bridge.charon.half_open import HalfOpenSas
from bridge.charon.ike_sa import Condition, IkeSa
from bridge.charon.sa_keys import derivation_of, derived_keys
from bridge.charon.sa_listener import Listener
from bridge.charon.sa_peers import differs
from bridge.charon.sa_recovery import SaRecovery, child_of, drop_unlisted, groups, inherit
from bridge.charon.vici_types import ConnectionInfo, Event, SaInfo
from bridge.charon.virtual_ips import VirtualIps
from bridge.ike.transforms import Suite, UnsupportedSuite, check_resumable
from bridge.stub.derivation import Derivation
from bridge.stub.types import ChildSa, Endpoint

log = structlog.get_logger()

EARLY_MAX = 200_000
"""reports of VICI's kept for SAs whose HA messages are still to come"""
FIRST_MESSAGE_ID = 1
"""what a rebuilt SA expects first; more means that a request verified"""
HALF_OPEN_SECONDS = 60.0
"""an SA that has keys but is not up after this long never will be"""
WORD_SECONDS = 1.0
"""VICI's event about an SA comes within this time of its HA messages, or VICI has to be asked"""
MALFORMED_MAX = 20_000
"""SAs with malformed messages that are remembered"""


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
        self.ignored: Set[bytes] = frozenset()
        """SAs, by both SPIs, that are no sessions"""
        self.on_deleting: Callable[[IkeSa], None] = lambda _: None
        """called for an SA that VICI lists as DELETING: one of the sides ended it, and charon waits for an answer"""
        self.on_info: list[Callable[[SaInfo], None]] = []
        """called for each IKE_SA that VICI reports, with the figures of its CHILD_SAs"""
        self.on_lost: list[Callable[[list[IkeSa]], None]] = []
        """called when charon was restarted, with the IKE_SAs that it had"""
        self.lands_at: Callable[[str], bool] = lambda _: False
        """whether SAs have this address between their installation and their activation"""
        self.on_own_request: Callable[[], None] = lambda: None
        """called when charon sent a request: a DELETE, perhaps"""
        self._listener = listener
        self._wall = wall
        self._clock = clock
        self._early: dict[bytes, tuple[SaInfo, float]] = {}
        """what VICI said of SAs whose HA messages are still to come, and when"""
        self._unconfirmed: dict[bytes, float] = {}
        """SAs of which HA messages say what VICI has not said yet, and since when; oldest first"""
        self._malformed: dict[bytes, tuple[str, float]] = {}
        """SAs that charon sent a malformed message about: why, and when"""
        self._incomplete: dict[bytes, IkeSa] = {}
        self._rekeyed_from: dict[bytes, IkeSa] = {}
        """by the SPIs of SAs that are not up yet: what they were rekeyed from"""
        self._unproven: set[bytes] = set()
        """SAs that this gateway rebuilt and charon reported again, and on which no request verified yet"""
        self._tables: tuple[dict[bytes, Any], ...] = (
            self._incomplete,
            self._unconfirmed,
            self._early,
            self._malformed,
            self._rekeyed_from,
        )
        """all that is noted of single SAs, by both SPIs"""

    # HA

    def handle(self, message: HaMessage, genuine: bool = True) -> None:
        """Take in one message of charon. One that is not `genuine` may be from another process: it ends nothing, and
        confirms no keys."""
        ike_id: IkeId | None = message.first(Attr.IKE_ID)
        if ike_id is None or ike_id.spis in self.ignored:
            return
        match message.type:
            case MessageType.IKE_ADD:
                self._add(ike_id, message)
            case MessageType.IKE_UPDATE:
                self._update(ike_id, message)
            case MessageType.CHILD_ADD:
                self._child_add(ike_id, message)
            case MessageType.IKE_DELETE | MessageType.CHILD_DELETE | MessageType.IKE_MID_RESPONDER if not genuine:
                self._ask(ike_id)
            case MessageType.IKE_MID_INITIATOR:
                if (sa := self.sas.get(ike_id.spis)) is not None:
                    if sa.requests is not None:
                        sa.requests.own, sa.requests.own_next = self._clock(), message.first(Attr.MID, 0)
                    self.on_own_request()
                    self._own_request(sa, message.first(Attr.MID, 0), genuine)
            case MessageType.IKE_MID_RESPONDER:
                self.verified(ike_id, message.first(Attr.MID, 0))
            case MessageType.IKE_DELETE:
                self._delete(ike_id)
            case MessageType.CHILD_DELETE:
                self._child_delete(ike_id, message)
            case _:
                pass

    def malformed(self, ike_id: IkeId | None, reason: str) -> None:
        """charon sent a malformed message, about this SA. What it said is lost, so the SA cannot be resumed."""
        if ike_id is None:
            return
        spis, text = ike_id.spis, f"charon's HA message about it is malformed: {reason}"
        known = spis in self._malformed
        if not known and len(self._malformed) >= MALFORMED_MAX:
            del self._malformed[next(iter(self._malformed))]
        self._malformed[spis] = (text, self._clock())
        self.half_open.ended(spis)
        sa = self.sas.get(spis)
        if sa is None:
            self.unresumable += not known
            self._log_unresumable(ike_id, text)
        elif sa.up:
            self._refuse(sa, text)
            self._listener.changed(sa)
        else:
            self._come_up(sa)

    def unconfirmed_since(self) -> float | None:
        """Since when (clock seconds) VICI is to be asked about an SA; None where there is nothing to ask."""
        return next(iter(self._unconfirmed.values()), None)

    def _ask(self, ike_id: IkeId) -> None:
        self._unconfirmed.setdefault(ike_id.spis, self._clock())

    def _own_request(self, sa: IkeSa, next_id: int, genuine: bool) -> None:
        if sa.derivation is not None and genuine:
            sa.derivation = replace(sa.derivation, next_request=next_id)
            if sa.up:
                self.on_message_id(sa)

    def verified(self, ike_id: IkeId, next_id: int) -> None:
        """A protected request of the peer was verified, by charon or with the same keys; `next_id` is the Message ID of
        the peer's next one."""
        sa = self.sas.get(ike_id.spis)
        if sa is not None and sa.requests is not None:
            sa.requests.of_peer = self._clock()
        if sa is not None and sa.derivation is not None:
            # the next stub has it: the peer's next request tells it to a gateway that takes the SA over
            sa.derivation = replace(sa.derivation, next_expected=next_id)
        if sa is not None and ike_id.spis in self._unproven and next_id > FIRST_MESSAGE_ID:
            self._unproven.discard(ike_id.spis)
            self._come_up(sa)
        self.granted.verified(ike_id.spis, self._clock())
        self._listener.verified(ike_id)

    def _add(self, ike_id: IkeId, message: HaMessage) -> None:
        if message.first(Attr.IKE_VERSION) != 2:
            return
        suite = Suite(
            encr=message.first(Attr.ALG_ENCR, 0),
            encr_len=message.first(Attr.ALG_ENCR_LEN, 0),
            integ=message.first(Attr.ALG_INTEG, 0),
            prf=message.first(Attr.ALG_PRF, 0),
            group=message.first(Attr.ALG_KE, 0),
            additional=groups(message.first(Attr.ALG_ADD_KES, b"")),
        )
        known = self.sas.get(ike_id.spis)
        if known is not None and (known.up or known.adopted):
            # a resynchronisation repeats what is known. The keys of an SA that is up do not change
            return
        if not suite.prf:
            # a further key exchange of the same SA (RFC 9370) comes without its proposal
            if known is None:
                return
            suite = known.suite
        derivation: Derivation | None = None
        try:
            check_resumable(suite)
            sk_d, secret = derived_keys(ike_id, suite, known, message)
            if self.shared:
                derivation = derivation_of(suite, known, message, self.owner)
        except (UnsupportedSuite, ValueError) as error:
            self.unresumable += 1
            self._log_unresumable(ike_id, str(error))
            sk_d, secret, resumable = b"", None, False
        else:
            resumable = True
        rekeyed: IkeId | None = message.first(Attr.IKE_REKEY_ID)
        if known is not None:
            # of each key exchange of RFC 9370 charon sends the keys that come of it
            known.sk_d, known.shared_secret, known.suite, known.resumable = sk_d, secret, suite, resumable
            known.derivation = derivation
            return
        self._sweep()
        sa = IkeSa(ike_id, suite, sk_d, secret, seen=self._clock(), resumable=resumable)
        sa.derivation = derivation
        if rekeyed is not None:
            old = self.sas.get(rekeyed.spis)
            if old is None:
                self.recall.rekeyed(rekeyed, sa)
            else:
                self._rekeyed_from[ike_id.spis] = old
        # a rebuilt SA, reported again after the sidecar forgot it: perhaps its peer never proved the keys
        rebuilt = message.first(Attr.OLD_SKD) is not None and rekeyed is None
        if rebuilt and not ike_id.initiator:
            self._unproven.add(ike_id.spis)
        self.sas[ike_id.spis] = sa
        self._incomplete[ike_id.spis] = sa
        remote: Endpoint | None = message.first(Attr.REMOTE_ADDR)
        if remote is not None and rekeyed is None and not rebuilt:
            self.half_open.began(ike_id.spis, remote.address, sa.seen)

    def _update(self, ike_id: IkeId, message: HaMessage) -> None:
        sa = self.sas.get(ike_id.spis)
        if sa is None:
            return
        if sa.up or sa.adopted:
            self._update_known(sa, message)
            return
        for name, value in message.attributes:
            match name:
                case Attr.LOCAL_ID:
                    sa.local_id = value
                case Attr.REMOTE_ID:
                    sa.remote_id = value
                case Attr.REMOTE_EAP_ID:
                    sa.eap_id = value
                case Attr.LOCAL_ADDR:
                    sa.local = value
                case Attr.REMOTE_ADDR:
                    sa.remote = value
                case Attr.CONFIG_NAME:
                    sa.connection = value
        if conditions := message.all(Attr.CONDITIONS):
            sa.conditions = conditions
        if extensions := message.all(Attr.EXTENSIONS):
            sa.extensions = extensions
        if peers := message.all(Attr.PEER_ADDR):
            sa.peer_addresses = peers
        if sa.connection:
            self.half_open.ended(ike_id.spis)
        self._come_up(sa)

    def _update_known(self, sa: IkeSa, message: HaMessage) -> None:
        """charon repeats what it said (a resynchronisation), or reports virtual IPs, which VICI has too. Who the peers
        of an SA are does not change."""
        said = (sa.local_id, sa.remote_id, sa.eap_id, sa.connection)
        attributes = (Attr.LOCAL_ID, Attr.REMOTE_ID, Attr.REMOTE_EAP_ID, Attr.CONFIG_NAME)
        now = tuple([message.first(name) for name in attributes])
        if sa.resumable and any(value is not None for value in now) and now != said:
            self._refuse(sa, "charon's HA messages name other peers of it than before")
            if sa.up:
                self._listener.changed(sa)
        for name, known in ((Attr.REMOTE_VIP, sa.remote_vips), (Attr.LOCAL_VIP, sa.local_vips)):
            vips = tuple([vip.address for vip in message.all(name)])
            if vips and vips != known:
                self._ask(sa.id)

    def _whole(self, sa: IkeSa) -> bool:
        """Whether charon's HA messages have said all that they say of an SA that is up."""
        said = sa.connection and sa.local_id is not None and sa.remote_id is not None
        return bool(said or sa.id.spis in self._malformed) and sa.id.spis not in self._unproven

    def _come_up(self, sa: IkeSa) -> None:
        """Have an SA up once both HA messages and VICI have named it."""
        if sa.up or not self._whole(sa):
            return
        info, since = self._early.get(sa.id.spis, (None, 0.0))
        if info is None or info.state != "ESTABLISHED":
            self._ask(sa.id)
            return
        del self._early[sa.id.spis]
        self._is_up(sa, info, since=since)

    def _is_up(self, sa: IkeSa, info: SaInfo, *, since: float) -> None:
        sa.up = True
        self._incomplete.pop(sa.id.spis, None)
        self._unconfirmed.pop(sa.id.spis, None)
        self.half_open.ended(sa.id.spis)
        if (old := self._rekeyed_from.pop(sa.id.spis, None)) is not None:
            inherit(sa, old)
            self.recall.rekeyed_again(old, sa)
            self.virtual_ips.put(sa.id.spis, sa.remote_vips, self._clock())
        malformed, _ = self._malformed.get(sa.id.spis, ("", 0.0))
        if malformed:
            sa.connection = sa.connection or info.connection
            self._refuse(sa, malformed)
        elif difference := differs(sa, info):
            self._refuse(sa, difference)
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
        self._listener.changed(sa)

    def _unresumable(self, sa: IkeSa, reason: str) -> None:
        if sa.resumable:
            sa.resumable = False
            self.unresumable += 1
            self._log_unresumable(sa.id, reason, connection=sa.connection)

    def _refuse(self, sa: IkeSa, reason: str) -> None:
        """What HA messages say of the peers of an SA is not true: forget it."""
        self._unresumable(sa, reason)
        sa.local_id = sa.remote_id = sa.eap_id = None

    @staticmethod
    def _log_unresumable(ike_id: IkeId, reason: str, **more: str) -> None:
        log.warning("sa-not-resumable", **ike_id.logged, reason=reason, **more)

    def _delete(self, ike_id: IkeId) -> None:
        sa = self.sas.pop(ike_id.spis, None)
        self._drop(ike_id.spis)
        if sa is not None and (sa.up or sa.adopted):
            self._listener.gone(sa)

    def _drop(self, spis: bytes) -> None:
        """Forget what is noted of an SA that is gone."""
        for table in self._tables:
            table.pop(spis, None)
        self._unproven.discard(spis)
        self.granted.drop(spis)
        self.half_open.ended(spis)
        self.virtual_ips.drop(spis)

    def _child_add(self, ike_id: IkeId, message: HaMessage) -> None:
        sa = self.sas.get(ike_id.spis)
        if sa is None:
            self.recall.keep(message, self._clock())
            return
        self.put_child(sa, child_of(message))
        if sa.up:
            self._listener.changed(sa)

    def _child_delete(self, ike_id: IkeId, message: HaMessage) -> None:
        sa, spi_in = self.sas.get(ike_id.spis), message.first(Attr.INBOUND_SPI, 0)
        self.granted.child_ended(ike_id.spis, spi_in)
        if sa is None:
            self.recall.keep(message, self._clock())
        elif sa.drop_child(spi_in) and sa.up:
            self._listener.changed(sa)

    def _sweep(self) -> None:
        """Forget handshakes that came to nothing; the oldest come first."""
        limit = self._clock() - HALF_OPEN_SECONDS
        while self._incomplete:
            spis, sa = next(iter(self._incomplete.items()))
            if sa.seen > limit:
                return
            del self._incomplete[spis]
            self._unconfirmed.pop(spis, None)
            self._rekeyed_from.pop(spis, None)
            self._unproven.discard(spis)
            self.sas.pop(spis, None)

    # VICI

    def event(self, event: Event) -> None:
        """Take in one VICI event."""
        spis, now = event.sa.spis, self._clock()
        for told in self.on_info:
            told(event.sa)
        if event.kind == "ike-updown" and event.up is False:
            self._early.pop(spis, None)
            self.virtual_ips.drop(spis)
            self._listener.down(event.sa)
            return
        if event.kind == "ike-updown" and event.sa.remote_vips:
            # its end is reported in the same way, and after all other events of it
            self.virtual_ips.put(spis, event.sa.remote_vips, now)
        sa = self.sas.get(spis)
        if sa is not None and sa.up:
            if event.up is not False:
                # asked before that, a list does not know it
                sa.reported_at = now
            self._unconfirmed.pop(spis, None)
            if self._take_info(sa, event.sa, since=now):
                self._listener.changed(sa)
        elif event.up is not False:
            if len(self._early) > EARLY_MAX:
                self._early.clear()
            self._early[spis] = (event.sa, now)
            if sa is not None and not sa.adopted:
                self._come_up(sa)

    def _take_info(self, sa: IkeSa, info: SaInfo, *, since: float) -> bool:
        """Join what VICI says, asked for at `since`; whether that changed the stub by more than a second of jitter."""
        if info.state != "ESTABLISHED":
            return False
        # a long list is as of when it was asked for, however late it is read
        now = self._wall() - (self._clock() - since)
        moved = sa_lifetime.take(sa, info, self.connections.get(sa.connection), now)
        sa.unique_id = info.unique_id
        if sa.resumable and (difference := differs(sa, info)):
            self._refuse(sa, difference)
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
            self.virtual_ips.put(sa.id.spis, sa.remote_vips, self._clock())
            return True
        return moved

    # changes that no message reports

    def put_child(self, sa: IkeSa, child: ChildSa) -> None:
        """A CHILD_SA that `sa` has from now on."""
        sa.put_child(child)
        sa.children_at = self._clock()

    def adopt(self, sa: IkeSa) -> None:
        """An SA that the sidecar itself installed, or knew before it restarted: charon reports nothing about these."""
        sa.seen = self._clock()
        sa.adopted = True
        sa.children_at = sa.seen
        sa.share()
        self.sas[sa.id.spis] = sa
        self.virtual_ips.put(sa.id.spis, sa.remote_vips, sa.seen)
        self._early.pop(sa.id.spis, None)

    def has_come_up(self, sa: IkeSa) -> None:
        """charon has an adopted SA: of lists that were asked for before, none says that it ended, which CHILD_SAs it
        has, or where its peer is."""
        sa.up = True
        sa.seen = sa.children_at = sa.reported_at = self._clock()

    def heir(self, old: IkeSa) -> bytes | None:
        """Both SPIs of the SA that `old` is being rekeyed to, until that is up."""
        return next((spis for spis, sa in self._rekeyed_from.items() if sa is old), None)

    def take_back(self, sa: IkeSa, info: SaInfo, *, since: float) -> bool:
        """An SA that the bank remembers and VICI, asked at `since`, lists; False where it has CHILD_SAs
        that were not reported."""
        heir = self.recall.heir(sa)
        if heir is not None:
            self._listener.changed(heir)
            return True
        remembered = sa.children
        if not self.recall.catch_up(sa, info, since=since):
            return False
        self.adopt(sa)
        if sa.children != remembered:
            self._listener.changed(sa)
        return True

    def end(self, ike_id: IkeId) -> None:
        """An SA that the sidecar itself removed, and whose end is news."""
        self._delete(ike_id)

    def forget(self, ike_id: IkeId) -> IkeSa | None:
        """Drop an SA that the sidecar itself removes, without news of it."""
        self._drop(ike_id.spis)
        return self.sas.pop(ike_id.spis, None)

    def forget_all(self) -> None:
        """charon died: its SAs are gone without a word, and their stubs are what clients resume from."""
        lost = list(self.established())
        for listener in self.on_lost:
            listener(lost)
        for table in (self.sas, *self._tables):
            table.clear()
        self._unproven.clear()
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
        return set(self._early)

    def listed(self, info: SaInfo, *, since: float) -> bool:
        """Take what VICI lists of an SA that is up: who its peers are, its lifetime, where it is, CHILD_SAs that it no
        longer has. False where the keys of it are missing here."""
        spis = info.spis
        for told in self.on_info:
            told(info)
        sa = self.sas.get(spis)
        if sa is None or not (sa.up or sa.adopted):
            # until the HA channel has brought the rest
            self._early[spis] = (info, since)
            if sa is not None:
                self._come_up(sa)
            # charon would only send again what is malformed
            return spis in self._malformed or (sa is not None and sa.up)
        if sa.up:
            changed = self._take_info(sa, info, since=since)
            self.granted.listed(sa, info, since)
            if sa.children_at < since and drop_unlisted(sa, info):
                changed = True
            if changed:
                self._listener.changed(sa)
        return True

    def unlisted(self, present: Set[bytes], early: Set[bytes], *, since: float) -> None:
        """End the SAs that charon no longer has; `present` are the SPIs of those that it has, `early` of those that
        were reported before."""
        for spis in early - present:
            self._early.pop(spis, None)
        for spis, (_, at) in list(self._malformed.items()):
            if spis not in present and at < since:
                del self._malformed[spis]
        for spis, at in list(self._unconfirmed.items()):
            if at < since:
                # VICI has said what there is to say: an SA that it does not list is none, whatever HA messages say
                del self._unconfirmed[spis]
                sa = self.sas.get(spis)
                if sa is not None and not sa.up and not sa.adopted and spis not in present:
                    self._delete(sa.id)
        for spis, sa in list(self.sas.items()):
            if sa.up and spis not in present and sa.seen < since:
                self._delete(sa.id)
        # a rebuilt SA that is about to be installed has its addresses already
        self.virtual_ips.keep(present | self.sas.keys(), since=since)
