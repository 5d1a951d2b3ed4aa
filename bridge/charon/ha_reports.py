"""What charon's HA messages say of its IKE_SAs, taken into bridge.charon.sa_tracker. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Set

from msgspec.structs import replace

from bridge.charon.ha_message import Attr, HaMessage, IkeId, MessageType
from bridge.charon.ike_sa import IkeSa
from bridge.charon.sa_keys import derivation_of, derived_keys
from bridge.charon.sa_recovery import child_of, groups
from bridge.charon.sa_tracker import SaTracker
from bridge.ike.transforms import Suite, UnsupportedSuite, check_resumable
from bridge.stub.derivation import Derivation
from bridge.stub.types import Endpoint


class HaReports:
    """Of one charon, whose IKE_SAs are in `sas`."""

    def __init__(self, sas: SaTracker) -> None:
        self.ignored: Set[bytes] = frozenset()
        """SAs, by both SPIs, that are no sessions"""
        self.on_own_request: Callable[[], None] = lambda: None
        """called when charon sent a request: a DELETE, perhaps"""
        self._sas = sas
        self._notes = sas.notes

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
                self._notes.ask(ike_id.spis, self._sas.clock())
            case MessageType.IKE_MID_INITIATOR:
                if (sa := self._sas.sas.get(ike_id.spis)) is not None:
                    if sa.requests is not None:
                        sa.requests.own, sa.requests.own_next = self._sas.clock(), message.first(Attr.MID, 0)
                    self.on_own_request()
                    self._own_request(sa, message.first(Attr.MID, 0), genuine)
            case MessageType.IKE_MID_RESPONDER:
                self._sas.verified(ike_id, message.first(Attr.MID, 0))
            case MessageType.IKE_DELETE:
                self._sas.end(ike_id)
            case MessageType.CHILD_DELETE:
                self._child_delete(ike_id, message)
            case _:
                pass

    def malformed(self, ike_id: IkeId | None, reason: str) -> None:
        """charon sent a malformed message, about this SA. What it said is lost, so the SA cannot be resumed."""
        if ike_id is None:
            return
        spis, text = ike_id.spis, f"charon's HA message about it is malformed: {reason}"
        first = self._notes.spoilt(spis, text, self._sas.clock())
        self._sas.half_open.ended(spis)
        sa = self._sas.sas.get(spis)
        if sa is None:
            self._sas.unresumable += first
            self._sas.log_unresumable(ike_id, text)
        elif sa.up:
            self._sas.refuse(sa, text)
            self._sas.listener.changed(sa)
        else:
            self._sas.come_up(sa)

    def _own_request(self, sa: IkeSa, next_id: int, genuine: bool) -> None:
        if sa.derivation is not None and genuine:
            sa.derivation = replace(sa.derivation, next_request=next_id)
            if sa.up:
                self._sas.on_message_id(sa)

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
        known = self._sas.sas.get(ike_id.spis)
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
            if self._sas.shared:
                derivation = derivation_of(suite, known, message, self._sas.owner)
        except (UnsupportedSuite, ValueError) as error:
            self._sas.unresumable += 1
            self._sas.log_unresumable(ike_id, str(error))
            sk_d, secret, resumable = b"", None, False
        else:
            resumable = True
        rekeyed: IkeId | None = message.first(Attr.IKE_REKEY_ID)
        if known is not None:
            # of each key exchange of RFC 9370 charon sends the keys that come of it
            known.sk_d, known.shared_secret, known.suite, known.resumable = sk_d, secret, suite, resumable
            known.derivation = derivation
            return
        for spis in self._notes.half_open(self._sas.clock()):
            self._sas.sas.pop(spis, None)
        sa = IkeSa(ike_id, suite, sk_d, secret, seen=self._sas.clock(), resumable=resumable)
        sa.derivation = derivation
        if rekeyed is not None:
            old = self._sas.sas.get(rekeyed.spis)
            if old is None:
                self._sas.recall.rekeyed(rekeyed, sa)
            else:
                self._notes.rekeyed_from[ike_id.spis] = old
        # a rebuilt SA, reported again after the sidecar forgot it: perhaps its peer never proved the keys
        rebuilt = message.first(Attr.OLD_SKD) is not None and rekeyed is None
        if rebuilt and not ike_id.initiator:
            self._notes.unproven.add(ike_id.spis)
        self._sas.sas[ike_id.spis] = sa
        self._notes.incomplete[ike_id.spis] = sa
        remote: Endpoint | None = message.first(Attr.REMOTE_ADDR)
        if remote is not None and rekeyed is None and not rebuilt:
            self._sas.half_open.began(ike_id.spis, remote.address, sa.seen)

    def _update(self, ike_id: IkeId, message: HaMessage) -> None:
        sa = self._sas.sas.get(ike_id.spis)
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
            self._sas.half_open.ended(ike_id.spis)
        self._sas.come_up(sa)

    def _update_known(self, sa: IkeSa, message: HaMessage) -> None:
        """charon repeats what it said (a resynchronisation), or reports virtual IPs, which VICI has too. Who the peers
        of an SA are does not change."""
        said = (sa.local_id, sa.remote_id, sa.eap_id, sa.connection)
        attributes = (Attr.LOCAL_ID, Attr.REMOTE_ID, Attr.REMOTE_EAP_ID, Attr.CONFIG_NAME)
        now = tuple([message.first(name) for name in attributes])
        if sa.resumable and any(value is not None for value in now) and now != said:
            self._sas.refuse(sa, "charon's HA messages name other peers of it than before")
            if sa.up:
                self._sas.listener.changed(sa)
        for name, known in ((Attr.REMOTE_VIP, sa.remote_vips), (Attr.LOCAL_VIP, sa.local_vips)):
            vips = tuple([vip.address for vip in message.all(name)])
            if vips and vips != known:
                self._notes.ask(sa.id.spis, self._sas.clock())

    def _child_add(self, ike_id: IkeId, message: HaMessage) -> None:
        sa = self._sas.sas.get(ike_id.spis)
        if sa is None:
            self._sas.recall.keep(message, self._sas.clock())
            return
        self._sas.put_child(sa, child_of(message))
        if sa.up:
            self._sas.listener.changed(sa)

    def _child_delete(self, ike_id: IkeId, message: HaMessage) -> None:
        sa, spi_in = self._sas.sas.get(ike_id.spis), message.first(Attr.INBOUND_SPI, 0)
        self._sas.granted.child_ended(ike_id.spis, spi_in)
        if sa is None:
            self._sas.recall.keep(message, self._sas.clock())
        elif sa.drop_child(spi_in) and sa.up:
            self._sas.listener.changed(sa)
