"""HA messages and VICI reports, joined into IKE_SAs (bridge.charon.sa_tracker), on what real charons sent."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.charon.ha_codec import decode
from bridge.charon.ha_message import Attr, HaMessage, IkeId, MessageType
from bridge.charon.ha_reports import HaReports
from bridge.charon.ike_sa import Condition, IkeSa, Trait, new_conditions
from bridge.charon.sa_comparison import Comparison
from bridge.charon.sa_notes import HALF_OPEN_SECONDS
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import ChildInfo, ConnectionInfo, Event, SaInfo
from bridge.ike.transforms import Group
from bridge.stub.stub import Index
from bridge.stub.types import Endpoint, Identity
from vectors_support import NAMES, SIDES, VECTORS, messages

NOW = 1_800_000_000


class Recorder:
    """A Listener that writes down what it is told."""

    def __init__(self) -> None:
        self.news: list[tuple[str, Any]] = []

    def changed(self, sa: IkeSa) -> None:
        self.news.append(("changed", sa.id))

    def gone(self, sa: IkeSa) -> None:
        self.news.append(("gone", sa.id))

    def verified(self, ike_id: IkeId) -> None:
        self.news.append(("verified", ike_id))

    def down(self, sa: SaInfo) -> None:
        self.news.append(("down", sa.state))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def tracker() -> tuple[SaTracker, Recorder, Clock]:
    recorder, clock = Recorder(), Clock()
    return SaTracker(recorder, wall=lambda: NOW, clock=clock), recorder, clock


def reconcile(known: SaTracker, infos: list[SaInfo], *, since: float) -> dict[bytes, SaInfo]:
    """Compare with a list of VICI's that comes in parts of one."""
    comparison = Comparison(known, since=since)
    for one in infos:
        comparison.take([one])
    return comparison.end()


def feed(into: SaTracker, vector: dict[str, Any], side: str, until: MessageType | None = None, count: int = 1) -> None:
    """The vector's messages, up to and with the `count`th of type `until`; and VICI says the same."""
    for octets in messages(vector, side):
        message = decode(octets)
        HaReports(into).handle(message)
        confirm(into, message)
        if message.type is until:
            count -= 1
            if not count:
                return


def confirm(known: SaTracker, message: HaMessage) -> None:
    """VICI's event beside an IKE_UPDATE of charon."""
    sa = known.sas.get(message.first(Attr.IKE_ID).spis)
    if sa is None or message.type is not MessageType.IKE_UPDATE:
        return
    vips = tuple(vip.address for vip in message.all(Attr.REMOTE_VIP))
    if vips:
        known.event(Event("child-updown", info(sa, remote_vips=vips), True))
    elif not sa.up:
        # a new SA has the virtual IPs of the one that it was rekeyed from
        old = known.notes.rekeyed_from.get(sa.id.spis)
        vips = old.remote_vips if old is not None else ()
        known.event(Event("ike-updown", info(sa, remote_vips=vips), True))


def text(identity: Identity | None) -> str:
    return "" if identity is None else identity.data.decode()


def info(sa: IkeSa, **changes: Any) -> SaInfo:
    """What VICI would say of an SA."""
    assert sa.local is not None
    assert sa.remote is not None
    said = SaInfo(
        connection=sa.connection,
        spi_i=sa.id.spi_i,
        spi_r=sa.id.spi_r,
        initiator=sa.id.initiator,
        version=2,
        state="ESTABLISHED",
        local=sa.local,
        remote=sa.remote,
        local_vips=(),
        remote_vips=sa.remote_vips,
        established=0,
        rekey=14000,
        reauth=None,
        children=(),
        local_id=text(sa.local_id),
        remote_id=text(sa.remote_id),
        eap_id=text(sa.eap_id),
    )
    return said._replace(**changes)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("vector", VECTORS, ids=NAMES)
def test_sk_d_is_what_charon_logged_first_and_after_the_rekey(vector: dict[str, Any], side: str) -> None:
    known, _, _ = tracker()
    feed(known, vector, side, MessageType.IKE_UPDATE)
    [sa] = known.established()
    assert sa.sk_d.hex() == vector["initial"]["sk_d"]
    feed(known, vector, side)
    [sa] = known.established()
    assert sa.sk_d.hex() == vector["rekeyed"]["sk_d"]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("vector", VECTORS, ids=NAMES)
def test_the_shared_secret_is_what_both_sides_agree_on(vector: dict[str, Any], side: str) -> None:
    known, other = tracker()[0], tracker()[0]
    feed(known, vector, side, MessageType.IKE_UPDATE)
    feed(other, vector, SIDES[1 - SIDES.index(side)], MessageType.IKE_UPDATE)
    assert next(known.established()).shared_secret == next(other.established()).shared_secret is not None


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("vector", VECTORS, ids=NAMES)
def test_a_resynchronisation_leads_to_the_same_sk_d(vector: dict[str, Any], side: str) -> None:
    known, late = tracker()[0], tracker()[0]
    feed(known, vector, side, MessageType.IKE_UPDATE)
    for into in (known, late):
        feed(into, vector, side, MessageType.IKE_UPDATE)
        [sa] = into.established()
        assert sa.sk_d.hex() == vector["initial"]["sk_d"]


@pytest.mark.parametrize("side", SIDES)
def test_an_sa_of_several_key_exchanges_names_them_all_before_and_after_its_rekey(side: str) -> None:
    [vector] = [vector for vector in VECTORS if "ke7" in vector["proposal"]]
    known, _, _ = tracker()
    suites, secrets = [], []
    for until in (MessageType.IKE_UPDATE, None):
        feed(known, vector, side, until)
        [sa] = known.established()
        suites.append(sa.suite)
        secrets.append(sa.shared_secret)
    assert suites[0] == suites[1]
    assert suites[0].additional == (Group.ML_KEM_1024, Group.ML_KEM_512, 0, 0, 0, 0, Group.MODP_2048)
    assert suites[0].name.endswith("/ECP_384/KE1_ML_KEM_1024/KE2_ML_KEM_512/KE7_MODP_2048")
    # P-384, twice ML-KEM, 2048 bits
    assert [len(secret or b"") for secret in secrets] == [48 + 32 + 32 + 256] * 2


def test_a_gateways_sa_has_all_that_a_stub_needs() -> None:
    known, _, _ = tracker()
    vector = VECTORS[0]
    feed(known, vector, "gateway", MessageType.IKE_UPDATE, 2)
    [sa] = known.established()
    stub = sa.stub(sa.index_here(), with_secret=True, expires=NOW + 60)
    assert stub.index == Index("192.168.50.1", sa.id.spi_r)
    assert not stub.initiator
    assert (stub.local_id.text, stub.remote_id.text) == ("gw0.example", "cl0.example")
    assert stub.remote == Endpoint("192.168.50.10", 4500)
    assert stub.connection == "g0"
    assert stub.remote_vips == ("10.20.0.1",)
    [child] = stub.children
    assert child.name == "net"
    assert (child.encr, child.encr_len, child.groups) == (20, 128, ())
    assert [(ts.first, ts.last) for ts in child.local_ts] == [("10.10.0.0", "10.10.0.255")]
    assert [(ts.first, ts.last) for ts in child.remote_ts] == [("10.20.0.1", "10.20.0.1")]


def test_the_client_names_the_same_stub_as_the_gateway() -> None:
    gateway, client = tracker()[0], tracker()[0]
    feed(gateway, VECTORS[0], "gateway", MessageType.IKE_UPDATE)
    feed(client, VECTORS[0], "client", MessageType.IKE_UPDATE)
    assert next(gateway.established()).index_here() == next(client.established()).index_there()


def test_a_configured_address_stands_in_the_index() -> None:
    known, _, _ = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.IKE_UPDATE)
    assert next(known.established()).index_here("203.0.113.9").gateway == "203.0.113.9"


def test_a_rekey_replaces_the_sa_and_keeps_children_and_virtual_ips() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.IKE_UPDATE, 2)
    [old] = known.established()
    recorder.news.clear()
    feed(known, VECTORS[0], "gateway")
    [new] = known.established()
    assert new.id != old.id
    assert new.children == old.children
    assert new.remote_vips == old.remote_vips
    assert ("gone", old.id) in recorder.news
    assert ("changed", new.id) in recorder.news


def test_every_verified_request_is_reported() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "gateway")
    assert [kind for kind, _ in recorder.news].count("verified") == 2 + 1


def test_a_delete_ends_the_sa() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "gateway")
    [sa] = known.established()
    HaReports(known).handle(HaMessage(3, MessageType.IKE_DELETE, [(Attr.IKE_ID, sa.id)]))
    assert recorder.news[-1] == ("gone", sa.id)
    assert not known.sas


def test_a_closed_child_leaves_the_sa() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.IKE_UPDATE, 2)
    [sa] = known.established()
    [child] = sa.children
    HaReports(known).handle(
        HaMessage(3, MessageType.CHILD_DELETE, [(Attr.IKE_ID, sa.id), (Attr.INBOUND_SPI, child.spi_in)])
    )
    assert not sa.children
    assert recorder.news[-1] == ("changed", sa.id)


def the_update() -> HaMessage:
    """The first vector's IKE_UPDATE of an SA that comes up, on the gateway."""
    sent = (decode(octets) for octets in messages(VECTORS[0], "gateway"))
    return next(message for message in sent if message.type is MessageType.IKE_UPDATE)


def whole(known: SaTracker) -> IkeSa:
    """The first vector's SA, with all that HA messages say of it, and nothing yet from VICI."""
    feed(known, VECTORS[0], "gateway", MessageType.IKE_ADD)
    HaReports(known).handle(the_update())
    [sa] = known.sas.values()
    return sa


def the_info(**changes: Any) -> SaInfo:
    """What VICI says of it."""
    return info(whole(tracker()[0]), **changes)


@pytest.mark.parametrize("vici_first", [True, False])
def test_vici_reports_the_lifetime_whether_before_or_after_the_keys(vici_first: bool) -> None:
    known, _, _ = tracker()
    known.connections = {"g0": ConnectionInfo("g0", 14400, 0, ())}
    feed(known, VECTORS[0], "gateway", MessageType.IKE_ADD)
    event = Event("ike-updown", the_info(rekey=13000), True)
    if vici_first:
        known.event(event)
        HaReports(known).handle(the_update())
    else:
        HaReports(known).handle(the_update())
        known.event(event)
    [sa] = known.established()
    assert sa.rekey_at == NOW + 13000
    assert sa.expires == NOW + 13000 + 1440


# VICI says which SAs there are, and who their peers are


def test_an_sa_that_vici_has_not_named_is_not_up() -> None:
    known, recorder, _ = tracker()
    sa = whole(known)
    assert not sa.up
    assert not recorder.news
    known.event(Event("ike-updown", the_info(), True))
    assert sa.up
    assert recorder.news == [("changed", sa.id)]


def test_an_sa_that_vici_does_not_list_is_forgotten_without_having_been_up() -> None:
    known, recorder, clock = tracker()
    whole(known)
    clock.now = 2.0
    assert known.unconfirmed_since() == 0.0
    reconcile(known, [], since=1.0)
    assert not known.sas
    assert not recorder.news
    assert known.unconfirmed_since() is None


def test_an_sa_that_came_after_the_list_was_asked_for_still_waits_for_vici() -> None:
    known, _, clock = tracker()
    clock.now = 5.0
    sa = whole(known)
    reconcile(known, [], since=4.0)
    assert known.unconfirmed_since() == 5.0
    assert reconcile(known, [the_info()], since=6.0) == {}
    assert sa.up


@pytest.mark.parametrize(
    "difference",
    [
        {"remote_id": "admin@corp.example"},
        {"local_id": "other.example"},
        {"eap_id": "admin"},
        {"connection": "admins"},
        {"remote_id": ""},
    ],
)
@pytest.mark.parametrize("by", ["event", "list"])
def test_an_sa_whose_peers_are_others_in_vici_is_not_resumable(difference: dict[str, str], by: str) -> None:
    known, recorder, _ = tracker()
    sa = whole(known)
    if by == "event":
        known.event(Event("ike-updown", the_info(**difference), True))
    else:
        assert reconcile(known, [the_info(**difference)], since=1.0) == {}
    assert sa.up
    assert not sa.resumable
    assert known.unresumable == 1
    # what was not true is nowhere to be seen
    assert sa.remote_id is None
    assert recorder.news == [("changed", sa.id)]


def test_an_eap_identity_that_vici_does_not_know_makes_an_sa_not_resumable() -> None:
    known, _, _ = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.IKE_ADD)
    update = the_update()
    at = next(place for place, (name, _) in enumerate(update.attributes) if name is Attr.LOCAL_ADDR)
    update.attributes.insert(at, (Attr.REMOTE_EAP_ID, Identity(3, b"admin")))
    HaReports(known).handle(update)
    [sa] = known.sas.values()
    known.event(Event("ike-updown", the_info(), True))
    assert not sa.resumable
    assert sa.eap_id is None


def test_a_difference_that_is_seen_later_withdraws_an_sa() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "gateway")
    [sa] = known.established()
    recorder.news.clear()
    reconcile(known, [info(sa, remote_id="admin@corp.example")], since=1.0)
    assert not sa.resumable
    assert recorder.news == [("changed", sa.id)]


def test_virtual_ips_are_those_that_vici_names_and_none_where_it_names_none() -> None:
    known, _, clock = tracker()
    sa = whole(known)
    known.event(Event("ike-updown", the_info(), True))
    forged = [(Attr.IKE_ID, sa.id), (Attr.REMOTE_VIP, Endpoint("10.20.2.77", 0))]
    HaReports(known).handle(HaMessage(3, MessageType.IKE_UPDATE, forged))
    assert not sa.remote_vips
    # it is asked of VICI
    assert known.unconfirmed_since() == 0.0
    known.event(Event("child-updown", info(sa, remote_vips=("10.20.0.1",)), True))
    assert sa.remote_vips == ("10.20.0.1",)
    clock.now = 1.0
    reconcile(known, [info(sa, remote_vips=())], since=0.5)
    assert not sa.remote_vips


def test_a_later_message_changes_neither_the_keys_nor_the_peers_of_an_sa_that_is_up() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.IKE_UPDATE)
    [sa] = known.established()
    sk_d = sa.sk_d
    add = decode(messages(VECTORS[0], "gateway")[0])
    forged = [(name, b"F" * len(value) if name is Attr.SECRET else value) for name, value in add.attributes]
    HaReports(known).handle(HaMessage(3, MessageType.IKE_ADD, forged))
    assert sa.sk_d == sk_d
    update = the_update()
    named = [(name, Identity(3, b"admin") if name is Attr.REMOTE_ID else value) for name, value in update.attributes]
    recorder.news.clear()
    HaReports(known).handle(HaMessage(3, MessageType.IKE_UPDATE, named))
    assert not sa.resumable
    assert recorder.news == [("changed", sa.id)]


def test_an_sa_with_a_malformed_message_is_up_and_not_resumable_and_nothing_is_asked_of_charon_for_it() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.IKE_ADD)
    [sa] = known.sas.values()
    HaReports(known).malformed(sa.id, "REMOTE_ID is 2 times in IKE_UPDATE")
    assert not sa.up
    assert reconcile(known, [the_info()], since=1.0) == {}
    assert sa.up
    assert not sa.resumable
    assert known.unresumable == 1
    assert recorder.news == [("changed", sa.id)]


@pytest.mark.parametrize("keys_known", [True, False])
def test_a_malformed_message_of_an_sa_makes_no_resynchronisation(keys_known: bool) -> None:
    known, _, clock = tracker()
    if keys_known:
        feed(known, VECTORS[0], "gateway", MessageType.IKE_ADD)
    said = the_info()
    HaReports(known).malformed(IkeId.of(said.spi_i, said.spi_r, False), "cut")
    for _ in range(3):
        clock.now += 30.0
        assert reconcile(known, [said], since=clock.now) == {}
    assert known.unresumable == 1
    reconcile(known, [], since=clock.now + 1)
    # once it is gone, nothing of it is kept
    assert not known.notes.malformed


def test_a_malformed_message_takes_back_an_sa_that_was_up() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "gateway")
    [sa] = known.established()
    recorder.news.clear()
    HaReports(known).malformed(sa.id, "cut")
    assert not sa.resumable
    assert recorder.news == [("changed", sa.id)]


# messages that may be from another process


@pytest.mark.parametrize("kind", [MessageType.IKE_DELETE, MessageType.CHILD_DELETE])
def test_a_delete_that_may_be_forged_ends_nothing_and_asks_vici(kind: MessageType) -> None:
    known, recorder, clock = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.CHILD_ADD)
    [sa] = known.established()
    [child] = sa.children
    recorder.news.clear()
    attributes: list[tuple[Attr, Any]] = [(Attr.IKE_ID, sa.id)]
    if kind is MessageType.CHILD_DELETE:
        attributes.append((Attr.INBOUND_SPI, child.spi_in))
    clock.now = 3.0
    HaReports(known).handle(HaMessage(3, kind, attributes), genuine=False)
    assert (sa.up, sa.children, recorder.news) == (True, (child,), [])
    assert known.unconfirmed_since() == 3.0
    reconcile(known, [info(sa, children=listed(child.spi_in))], since=4.0)
    assert (sa.up, sa.children) == (True, (child,))
    reconcile(known, [], since=5.0)
    assert recorder.news[-1] == ("gone", sa.id)


def test_a_message_that_may_be_forged_confirms_no_keys() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "gateway")
    [sa] = known.established()
    recorder.news.clear()
    attributes: list[tuple[Attr, Any]] = [(Attr.IKE_ID, sa.id), (Attr.MID, 2)]
    HaReports(known).handle(HaMessage(3, MessageType.IKE_MID_RESPONDER, attributes), genuine=False)
    assert not recorder.news
    HaReports(known).handle(HaMessage(3, MessageType.IKE_MID_RESPONDER, attributes))
    assert recorder.news == [("verified", sa.id)]


# handshakes in progress


def test_a_handshake_is_half_open_from_its_keys_until_its_sa_is_up() -> None:
    known, _, _ = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.IKE_ADD)
    assert list(known.half_open.addresses()) == ["192.168.50.10"]
    HaReports(known).handle(the_update())
    assert not len(known.half_open)


def test_a_rekey_is_no_handshake() -> None:
    known, _, _ = tracker()
    feed(known, VECTORS[0], "gateway")
    assert not len(known.half_open)


def test_a_move_that_vici_reports_changes_the_sa() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "gateway")
    [sa] = known.established()
    recorder.news.clear()
    known.event(Event("ike-update", info(sa, remote=Endpoint("198.51.100.7", 4500))))
    assert sa.remote == Endpoint("198.51.100.7", 4500)
    assert recorder.news == [("changed", sa.id)]


def test_a_list_that_was_on_its_way_while_an_sa_moved_does_not_take_it_back() -> None:
    known, recorder, clock = tracker()
    feed(known, VECTORS[0], "gateway")
    [sa] = known.established()
    was, there, further = info(sa), Endpoint("198.51.100.7", 4500), Endpoint("198.51.100.8", 4500)
    children = tuple(ChildInfo("net", "INSTALLED", child.spi_in) for child in sa.children)
    clock.now = 10.0
    known.event(Event("ike-update", info(sa, remote=there)))
    recorder.news.clear()
    reconcile(known, [was._replace(children=children)], since=9.0)
    assert sa.remote == there
    assert not recorder.news
    reconcile(known, [was._replace(remote=further, children=children)], since=11.0)
    assert sa.remote == further
    assert recorder.news == [("changed", sa.id)]


def test_an_sa_that_is_being_activated_keeps_its_clients_address() -> None:
    known, _, _ = tracker()
    known.lands_at = lambda address: address == "198.18.0.13"
    feed(known, VECTORS[0], "gateway")
    [sa] = known.established()
    before, children = sa.remote, tuple(ChildInfo("net", "INSTALLED", child.spi_in) for child in sa.children)
    reconcile(known, [info(sa, remote=Endpoint("198.18.0.13", 4500))._replace(children=children)], since=11.0)
    assert sa.remote == before


def test_a_second_report_that_says_the_same_changes_nothing() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "gateway")
    [sa] = known.established()
    known.event(Event("child-updown", info(sa), True))
    recorder.news.clear()
    known.event(Event("child-updown", info(sa), True))
    assert not recorder.news


def test_a_down_event_is_passed_on_with_its_state() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "client")
    [sa] = known.established()
    known.event(Event("ike-updown", info(sa, state="DELETING"), False))
    assert recorder.news[-1] == ("down", "DELETING")


def test_reconciliation_names_what_is_missing_and_ends_what_charon_no_longer_has() -> None:
    known, recorder, clock = tracker()
    feed(known, VECTORS[0], "gateway")
    [sa] = known.established()
    stranger = info(sa, spi_i=bytes(8), spi_r=bytes(8))
    clock.now = 10.0
    assert list(reconcile(known, [stranger], since=5.0)) == [bytes(16)]
    assert recorder.news[-1] == ("gone", sa.id)


def test_a_list_that_is_read_late_is_as_of_when_it_was_asked_for() -> None:
    known, _, clock = tracker()
    feed(known, VECTORS[0], "gateway")
    [sa] = known.established()
    known.event(Event("ike-updown", info(sa, rekey=13000, established=50), True))
    told = sa.rekey_at, sa.expires, sa.established
    clock.now = 40.0
    reconcile(known, [info(sa, rekey=13000, established=50)], since=0.0)
    assert (sa.rekey_at, sa.expires, sa.established) == (told[0] - 40, told[1] - 40, told[2] - 40)


def test_what_was_listed_of_an_sa_that_came_and_went_is_not_kept() -> None:
    """Nobody tells of it again: it would be kept for ever."""
    before, _, _ = tracker()
    feed(before, VECTORS[0], "gateway", MessageType.IKE_UPDATE)
    [sa] = before.established()
    known, _, _ = tracker()
    reconcile(known, [info(sa, rekey=13000)], since=0.0)
    reconcile(known, [], since=1.0)
    assert not whole(known).up


def test_reconciliation_spares_what_came_up_after_the_list_was_asked_for() -> None:
    known, _, clock = tracker()
    clock.now = 10.0
    feed(known, VECTORS[0], "gateway")
    reconcile(known, [], since=5.0)
    assert len(list(known.established())) == 1


def test_a_resynchronisation_leaves_a_known_sa_up() -> None:
    known, _, _ = tracker()
    vector = VECTORS[0]
    feed(known, vector, "gateway", MessageType.IKE_UPDATE, 2)
    feed(known, vector, "gateway", MessageType.IKE_ADD)
    [sa] = known.established()
    assert sa.sk_d.hex() == vector["initial"]["sk_d"]
    assert sa.remote_vips == ("10.20.0.1",)


# CHILD_SAs, and a sidecar that was not there


def listed(*spis: int) -> tuple[ChildInfo, ...]:
    return tuple(ChildInfo("net", "INSTALLED", spi) for spi in spis)


def children(sa: IkeSa) -> list[int]:
    return [child.spi_in for child in sa.children]


def told_of_children(vector: dict[str, Any], kind: MessageType) -> list[HaMessage]:
    return [message for octets in messages(vector, "gateway") if (message := decode(octets)).type is kind]


def test_a_child_sa_that_charon_does_not_have_is_forgotten_and_one_that_was_not_reported_asks_for_nothing() -> None:
    known, recorder, clock = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.CHILD_ADD)
    [sa] = known.established()
    clock.now = 10.0
    recorder.news.clear()
    # a list that was asked for before charon told of it says nothing about it
    assert not reconcile(known, [info(sa)], since=-1.0)
    assert len(children(sa)) == 1
    assert not reconcile(known, [info(sa, children=listed(77))], since=5.0)
    assert children(sa) == []
    assert recorder.news[-1] == ("changed", sa.id)


def test_what_charon_reported_of_child_sas_before_their_ike_sa_was_recalled_is_not_lost() -> None:
    before, _, _ = tracker()
    feed(before, VECTORS[0], "gateway", MessageType.CHILD_ADD)
    [sa] = before.established()
    [old] = children(sa)
    known, recorder, _ = tracker()
    HaReports(known).handle(HaMessage(3, MessageType.CHILD_DELETE, [(Attr.IKE_ID, sa.id), (Attr.INBOUND_SPI, old)]))
    added = told_of_children(VECTORS[0], MessageType.CHILD_ADD)[0]
    new = [(name, 77 if name is Attr.INBOUND_SPI else value) for name, value in added.attributes]
    HaReports(known).handle(HaMessage(3, MessageType.CHILD_ADD, new))
    assert known.take_back(sa, info(sa, children=listed(77)), since=1.0)
    assert known.sas[sa.id.spis] is sa
    assert children(sa) == [77]
    assert recorder.news == [("changed", sa.id)]


def test_a_recalled_sa_that_lacks_a_child_sa_has_to_be_asked_for() -> None:
    before, _, _ = tracker()
    feed(before, VECTORS[0], "gateway", MessageType.CHILD_ADD)
    [sa] = before.established()
    known, _, _ = tracker()
    assert not known.take_back(sa, info(sa, children=listed(*children(sa), 77)), since=1.0)
    assert not known.sas


def rekeyed(known: SaTracker, old: IkeId, new: IkeId) -> IkeSa:
    """The IKE rekey of the first vector, as one of `old` to `new`."""
    ids = {Attr.IKE_ID: new, Attr.IKE_REKEY_ID: old}
    sent = [decode(octets) for octets in messages(VECTORS[0], "gateway")]
    at = next(at for at, message in enumerate(sent) if message.first(Attr.IKE_REKEY_ID))
    for message in sent[at:]:
        if message.first(Attr.IKE_ID) == sent[at].first(Attr.IKE_ID):
            HaReports(known).handle(
                HaMessage(3, message.type, [(name, ids.get(name, value)) for name, value in message.attributes])
            )
    return known.sas[new.spis]


def test_an_sa_that_both_sides_rekey_has_two_heirs_until_one_is_up() -> None:
    known, _, _ = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.CHILD_ADD)
    [old] = known.established()
    ids = [IkeId.of(bytes([octet] * 8), b"gateway.", initiator) for octet, initiator in ((1, False), (2, True))]
    for one in ids:
        sent = [decode(octets) for octets in messages(VECTORS[0], "gateway")]
        first = next(message for message in sent if message.first(Attr.IKE_REKEY_ID))
        changed = {Attr.IKE_ID: one, Attr.IKE_REKEY_ID: old.id}
        HaReports(known).handle(
            HaMessage(3, first.type, [(name, changed.get(name, value)) for name, value in first.attributes])
        )
    assert [sa.id for sa in known.heirs(old)] == ids
    known.end(ids[0])
    assert [sa.id for sa in known.heirs(old)] == ids[1:]


def test_an_sa_that_was_rekeyed_before_it_was_recalled_leaves_its_child_sas_to_what_came_of_it() -> None:
    before, _, _ = tracker()
    feed(before, VECTORS[0], "gateway", MessageType.CHILD_ADD)
    [old] = before.established()
    known, recorder, _ = tracker()
    second, third = (IkeId.of(bytes((number,)) * 8, bytes((number,)) * 8, False) for number in (2, 3))
    rekeyed(known, old.id, second)
    HaReports(known).handle(HaMessage(3, MessageType.IKE_DELETE, [(Attr.IKE_ID, old.id)]))
    heir = rekeyed(known, second, third)
    HaReports(known).handle(HaMessage(3, MessageType.IKE_DELETE, [(Attr.IKE_ID, second)]))
    assert children(heir) == []
    now = info(heir, children=listed(*children(old)))
    awaited = reconcile(known, [now], since=5.0)
    assert list(awaited) == [old.id.spis]
    assert awaited[old.id.spis].initiator == old.id.initiator
    assert known.take_back(old, awaited[old.id.spis], since=5.0)
    assert children(heir) == children(old)
    assert recorder.news[-1] == ("changed", third)
    assert old.id.spis not in known.sas
    assert not reconcile(known, [now], since=5.0)


def test_a_list_that_is_read_late_takes_nothing_back_of_what_charon_reported_of_child_sas_since() -> None:
    before, _, _ = tracker()
    feed(before, VECTORS[0], "gateway", MessageType.CHILD_ADD)
    [sa] = before.established()
    [old] = children(sa)
    known, _, clock = tracker()
    clock.now = 6.0
    added = told_of_children(VECTORS[0], MessageType.CHILD_ADD)[0]
    new = [(name, 77 if name is Attr.INBOUND_SPI else value) for name, value in added.attributes]
    HaReports(known).handle(HaMessage(3, MessageType.CHILD_ADD, new))
    HaReports(known).handle(HaMessage(3, MessageType.CHILD_DELETE, [(Attr.IKE_ID, sa.id), (Attr.INBOUND_SPI, old)]))
    assert known.take_back(sa, info(sa, children=listed(old)), since=5.0)
    assert children(sa) == [77]


def test_once_all_is_recalled_nothing_is_kept_for_unknown_sas() -> None:
    known, _, _ = tracker()
    known.recall.end()
    before, _, _ = tracker()
    feed(before, VECTORS[0], "gateway", MessageType.CHILD_ADD)
    [sa] = before.established()
    [old] = children(sa)
    HaReports(known).handle(HaMessage(3, MessageType.CHILD_DELETE, [(Attr.IKE_ID, sa.id), (Attr.INBOUND_SPI, old)]))
    assert known.take_back(sa, info(sa, children=listed(old)), since=1.0)
    assert children(sa) == [old]


def test_handshakes_that_come_to_nothing_are_forgotten() -> None:
    known, _, clock = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.IKE_ADD)
    clock.now = HALF_OPEN_SECONDS + 1
    feed(known, VECTORS[1], "gateway", MessageType.IKE_ADD)
    assert len(known.sas) == 1


def test_an_unknown_prf_is_refused_by_name_and_never_half_served() -> None:
    known, _, _ = tracker()
    for octets in messages(VECTORS[0], "gateway"):
        message = decode(octets)
        attributes = [(name, 99 if name is Attr.ALG_PRF else value) for name, value in message.attributes]
        HaReports(known).handle(HaMessage(3, message.type, attributes))
        confirm(known, message)
    assert known.unresumable
    [sa] = known.established()
    assert not sa.resumable
    assert sa.sk_d == b""


def test_a_session_with_a_postquantum_preshared_key_is_not_resumable() -> None:
    known, _, _ = tracker()
    for octets in messages(VECTORS[0], "gateway"):
        message = decode(octets)
        attributes = [
            (name, value | Condition.PPK if name is Attr.CONDITIONS else value) for name, value in message.attributes
        ]
        HaReports(known).handle(HaMessage(3, message.type, attributes))
        confirm(known, message)
    [sa] = known.established()
    assert not sa.resumable


def test_after_a_crash_of_charon_no_end_of_its_sas_is_reported() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "gateway")
    recorder.news.clear()
    known.forget_all()
    assert not known.sas
    assert not recorder.news


def test_the_client_is_the_initiator_of_what_it_resumes() -> None:
    old = (int(Condition.NAT_ANY | Condition.STALE | Condition.REDIRECTED), 1 << 31 | 4)
    [word, private] = new_conditions(old, initiator=True, nat_here=False, nat_there=False)
    assert word == Condition.NAT_ANY | Condition.ORIGINAL_INITIATOR
    assert private == 1 << 31 | 4
    [word, _] = new_conditions(
        (word | Condition.ORIGINAL_INITIATOR, private), initiator=False, nat_here=False, nat_there=True
    )
    assert word == Condition.NAT_ANY | Condition.NAT_THERE


def test_no_key_is_in_the_text_of_an_sa() -> None:
    known, _, _ = tracker()
    feed(known, VECTORS[0], "gateway")
    [sa] = known.established()
    assert sa.sk_d.hex() not in repr(sa)
    assert repr(sa.sk_d) not in repr(sa)


def test_an_sa_that_the_sidecar_installed_is_never_asked_of_charon() -> None:
    known, _, _ = tracker()
    feed(known, VECTORS[0], "gateway")
    [sa] = known.established()
    said = info(sa)
    known.forget(sa.id)
    sa.up = False  # not confirmed yet
    known.adopt(sa)
    assert reconcile(known, [said], since=0.0) == {}
    assert list(known.sas) == [sa.id.spis]


def test_a_list_from_before_an_sa_was_installed_does_not_end_it() -> None:
    # a long list: meanwhile the SA was installed, and its client has confirmed it
    known, recorder, clock = tracker()
    sa = rebuilt(known)
    addresses = sa.remote_vips = ("10.7.0.1",)
    known.virtual_ips.put(sa.id.spis, addresses, clock.now)
    clock.now += 1.0
    asked = clock.now
    clock.now += 1.0
    known.has_come_up(sa)
    assert reconcile(known, [], since=asked) == {}
    assert list(known.established()) == [sa]
    assert known.virtual_ips.holders(addresses) == {sa.id.spis}
    assert recorder.news == []
    # one that was asked for afterwards says that it has ended
    clock.now += 1.0
    reconcile(known, [], since=clock.now)
    assert recorder.news == [("gone", sa.id)]
    assert not known.virtual_ips.holders(addresses)


def test_a_list_from_before_an_sa_had_its_child_sas_and_its_address_says_nothing_of_them() -> None:
    # charon has the IKE_SAs of a batch first; what belongs to them follows
    known, _, clock = tracker()
    sa = rebuilt(known)
    children, remote = sa.children, sa.remote
    said = info(sa)._replace(children=(), remote=Endpoint("198.18.0.8", 4500))
    clock.now += 1.0
    asked = clock.now
    clock.now += 1.0
    known.has_come_up(sa)
    reconcile(known, [said], since=asked)
    assert (sa.children, sa.remote) == (children, remote)


def test_a_list_keeps_the_addresses_of_an_sa_that_is_not_confirmed_yet() -> None:
    known, _, clock = tracker()
    sa = rebuilt(known)
    known.virtual_ips.put(sa.id.spis, ("10.7.0.1",), clock.now)
    clock.now += 1.0
    reconcile(known, [], since=clock.now)
    assert known.virtual_ips.holders(["10.7.0.1"]) == {sa.id.spis}


def test_what_many_sas_have_alike_is_in_memory_once() -> None:
    first, second = tracker()[0], tracker()[0]
    for known in (first, second):
        feed(known, VECTORS[0], "gateway", MessageType.IKE_UPDATE, 2)
    [one], [other] = first.established(), second.established()
    assert one is not other
    for name in ("suite", "local_id", "local", "connection", "conditions", "extensions"):
        assert getattr(one, name) is getattr(other, name), name


# what charon was given


def rebuilt(known: SaTracker) -> IkeSa:
    """A rebuilt SA with a CHILD_SA."""
    before, _, _ = tracker()
    feed(before, VECTORS[0], "gateway", MessageType.CHILD_ADD)
    [sa] = before.established()
    sa.up = False
    known.adopt(sa)
    known.granted.put(sa)
    return sa


def prove(known: SaTracker, sa: IkeSa) -> None:
    """Its client's first request, or another one."""
    HaReports(known).handle(HaMessage(3, MessageType.IKE_MID_RESPONDER, [(Attr.IKE_ID, sa.id), (Attr.MID, 2)]))
    known.has_come_up(sa)


def confirmed(known: SaTracker) -> IkeSa:
    """One whose client has confirmed it."""
    sa = rebuilt(known)
    prove(known, sa)
    return sa


@pytest.mark.parametrize("taken", [True, False])
def test_a_child_sa_that_charon_was_given_and_does_not_list_once_its_sa_is_confirmed_is_reported_once(
    taken: bool,
) -> None:
    known, _, clock = tracker()
    lacking: list[tuple[str, ...]] = []
    known.granted.not_taken = lambda sa, names: lacking.append(names)
    clock.now = 2.0
    sa = confirmed(known)
    spis = listed(*children(sa)) if taken else ()
    # asked for before it was confirmed, the list says nothing of it
    reconcile(known, [info(sa)], since=1.0)
    assert not lacking
    for since in (3.0, 4.0):
        reconcile(known, [info(sa, children=spis)], since=since)
    assert lacking == ([] if taken else [("net",)])


def test_a_child_sa_that_charon_could_not_install_is_reported_though_charon_said_that_it_is_gone() -> None:
    """Beside another one, as charon does where the kernel lacks an algorithm."""
    known, _, clock = tracker()
    lacking: list[tuple[str, ...]] = []
    known.granted.not_taken = lambda sa, names: lacking.append(names)
    sa = rebuilt(known)
    [spi] = children(sa)
    HaReports(known).handle(HaMessage(3, MessageType.CHILD_DELETE, [(Attr.IKE_ID, sa.id), (Attr.INBOUND_SPI, spi)]))
    prove(known, sa)
    clock.now = 2.0
    # its client goes on to send requests
    prove(known, sa)
    reconcile(known, [info(sa)], since=1.0)
    assert lacking == [("net",)]


def test_a_child_sa_that_its_peer_deleted_is_not_one_that_charon_did_not_take() -> None:
    known, _, clock = tracker()
    lacking: list[tuple[str, ...]] = []
    known.granted.not_taken = lambda sa, names: lacking.append(names)
    sa = confirmed(known)
    [spi] = children(sa)
    HaReports(known).handle(HaMessage(3, MessageType.CHILD_DELETE, [(Attr.IKE_ID, sa.id), (Attr.INBOUND_SPI, spi)]))
    clock.now = 2.0
    reconcile(known, [info(sa)], since=1.0)
    assert not lacking


# until when the peer is authenticated


def authenticated(known: SaTracker, sa: IkeSa, reauth: int | None) -> int:
    """The end after VICI reported a time of reauthentication."""
    reconcile(known, [info(sa, reauth=reauth)], since=0.0)
    return sa.authenticated_until


def test_an_authentication_ends_when_vici_says_that_it_is_to_be_repeated() -> None:
    known, recorder, _ = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.IKE_UPDATE)
    [sa] = known.established()
    assert authenticated(known, sa, None) == 0
    assert authenticated(known, sa, 3600) == NOW + 3600
    # its stub says so
    assert recorder.news[-1] == ("changed", sa.id)
    # RADIUS may prolong a session, and shorten it
    assert authenticated(known, sa, 7200) == NOW + 7200
    assert authenticated(known, sa, 60) == NOW + 60


def test_an_inherited_end_of_authentication_is_never_prolonged() -> None:
    known, _, _ = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.IKE_UPDATE)
    [sa] = known.established()
    sa.authenticated_until, sa.traits = NOW + 600, Trait.AUTHENTICATION_INHERITED
    assert authenticated(known, sa, None) == NOW + 600
    assert authenticated(known, sa, 3600) == NOW + 600
    assert authenticated(known, sa, 60) == NOW + 60


def test_a_rekeyed_ike_sa_inherits_the_end_of_authentication() -> None:
    known, _, _ = tracker()
    feed(known, VECTORS[0], "gateway", MessageType.IKE_UPDATE)
    [old] = known.established()
    old.authenticated_until, old.traits = NOW + 600, Trait.AUTHENTICATION_INHERITED
    feed(known, VECTORS[0], "gateway")
    [sa] = known.established()
    assert sa is not old
    assert authenticated(known, sa, 3600) == NOW + 600


def test_an_ike_sa_stays_small() -> None:
    # a gateway has tens of thousands: what few of them have is not in each
    first, second = tracker()[0], tracker()[0]
    for known in (first, second):
        feed(known, VECTORS[0], "gateway", MessageType.IKE_UPDATE, 2)
    [one], [other] = first.established(), second.established()
    assert one.__sizeof__() <= 280
    assert one._seldom is other._seldom
    one.first_spi = b"original"
    assert (one.first_spi, other.first_spi) == (b"original", b"")
