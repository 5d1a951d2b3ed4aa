"""Which IKE_SAs are one session, and when it is up, lost or forgotten (bridge.client.sessions)."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.vici_types import ConnectionInfo, SaInfo
from bridge.charon.vpns import ConfiguredVpns, LearnedVpns
from bridge.client.sessions import LOST_SECONDS, Session, Sessions
from bridge.config import ClientConfig, GatewayEntry, VpnConfig
from bridge.ike.transforms import Suite
from bridge.stub.types import ChildSa, Endpoint, Identity

ME, VPN = Identity(3, b"client@example.org"), Identity(2, b"vpn.example.org")
SUITE = Suite(12, 128, 12, 5, 31)
NAMES = {"x": ("home", "home-gw2"), "y": ("work",)}
_numbers = count(1)


class Client:
    """Two VPNs, x and y; the clock stands still unless it is set."""

    def __init__(self, **connections: ConnectionInfo) -> None:
        self.now = 1000.0
        vpns = {
            name: VpnConfig(tuple(GatewayEntry(f"192.0.2.{n}", one) for n, one in enumerate(names, 1)))
            for name, names in NAMES.items()
        }
        self.sas: dict[bytes, IkeSa] = {}
        self.heirs: dict[bytes, list[IkeSa]] = {}
        """what an IKE_SA is being rekeyed to, by both its SPIs"""
        tracker = SimpleNamespace(
            connections=connections, sas=self.sas, heirs=lambda old: self.heirs.get(old.id.spis, [])
        )
        charon = SimpleNamespace(tracker=tracker)
        self.sessions = Sessions(
            cast(Any, charon), ConfiguredVpns(ClientConfig(vpns=vpns)), clock=lambda: self.now, wall=lambda: self.now
        )

    def comes_up(self, connection: str, *, local: str = "192.0.2.10", child: int = 0, **more: Any) -> IkeSa:
        """charon has an IKE_SA more."""
        sa = ike_sa(connection, local=local, child=child, **more)
        self.sessions.changed(sa)
        return sa

    def rekeyed(self, old: IkeSa, *, by_gateway: bool) -> IkeSa:
        """One of the sides rekeys an IKE_SA; charon reports the end of the old one first."""
        new = self.begins_rekey(old, by_gateway=by_gateway)
        self.sessions.gone(old)
        self.completes(old, new)
        return new

    def begins_rekey(self, old: IkeSa, *, by_gateway: bool) -> IkeSa:
        """charon reports a new IKE_SA, which is not up yet."""
        new = ike_sa(old.connection)
        new.id = IkeId.of(new.id.spi_i, new.id.spi_r, not by_gateway)
        self.sas[new.id.spis] = new
        self.heirs.setdefault(old.id.spis, []).append(new)
        return new

    def completes(self, old: IkeSa, new: IkeSa) -> None:
        """The new one is up."""
        self.heirs[old.id.spis].remove(new)
        self.sessions.changed(new)

    def of(self, sa: IkeSa) -> Session | None:
        return self.sessions.of(sa.id.spis)

    def ends(self, sa: IkeSa) -> None:
        """One of the sides deletes an IKE_SA: VICI and the HA channel say so."""
        self.sessions.ended(info_of(sa))
        self.sessions.gone(sa)


def ike_sa(connection: str, *, local: str = "192.0.2.10", child: int = 0, **more: Any) -> IkeSa:
    number = next(_numbers)
    sa = IkeSa(
        IkeId.of(number.to_bytes(8), (number + 1000).to_bytes(8), True),
        SUITE,
        b"d" * 32,
        up=True,
        local_id=ME,
        remote_id=VPN,
        local=Endpoint(local, 4500),
        remote=Endpoint("192.0.2.1", 4500),
        connection=connection,
        **more,
    )
    if child:
        sa.children = (cast(ChildSa, SimpleNamespace(spi_in=child, name="net")),)
    return sa


def info_of(sa: IkeSa) -> SaInfo:
    return cast(SaInfo, SimpleNamespace(spis=sa.id.spis, connection=sa.connection))


def test_sessions_of_two_vpns_know_nothing_of_each_other() -> None:
    client = Client()
    home, work = client.comes_up("home"), client.comes_up("work")
    client.sessions.gone(home)
    [lost] = [session for session in client.sessions if not session.up]
    assert (lost.vpn, lost.last) == ("x", home)
    session = client.of(work)
    assert session is not None
    assert session.up


def test_an_ike_sa_of_no_vpn_is_no_session() -> None:
    client = Client()
    assert client.sessions.changed(ike_sa("other")) is None
    assert list(client.sessions) == []


def test_a_rekeyed_ike_sa_belongs_to_the_session_whose_child_sas_it_has() -> None:
    client = Client()
    one, two = (
        client.comes_up("home", local="192.0.2.10", child=1),
        client.comes_up("home", local="192.0.2.11", child=2),
    )
    assert client.of(one) is not client.of(two)
    # the second one roamed to where the first is
    new = client.comes_up("home", local="192.0.2.10", child=2)
    assert client.of(new) is client.of(two)
    client.sessions.gone(two)
    session = client.of(new)
    assert session is not None
    assert session.up
    assert session.last is new


def test_a_reauthenticated_session_stays_one_and_is_not_lost_when_its_first_ike_sa_goes() -> None:
    client = Client()
    old = client.comes_up("home")
    new = client.comes_up("home")
    client.ends(old)
    [session] = client.sessions
    assert session.up
    assert session.last is new


def test_what_a_side_ended_is_forgotten_and_what_went_by_itself_is_lost_for_a_day() -> None:
    client = Client()
    ended, lost = client.comes_up("home"), client.comes_up("work")
    client.ends(ended)
    client.sessions.gone(lost)
    assert [session.last for session in client.sessions] == [lost]
    client.now += LOST_SECONDS + 1
    assert list(client.sessions) == []


def test_the_order_of_the_two_reports_does_not_matter() -> None:
    client = Client()
    sa = client.comes_up("home")
    client.sessions.gone(sa)
    assert [session.up for session in client.sessions] == [False]
    client.sessions.ended(info_of(sa))
    assert list(client.sessions) == []


def test_a_lost_session_whose_ike_sa_has_expired_is_none() -> None:
    client = Client()
    sa = client.comes_up("home", expires=int(client.now) + 10)
    client.sessions.gone(sa)
    client.now += 11
    assert list(client.sessions) == []


def test_what_the_sidecar_does_itself_is_no_news() -> None:
    client = Client()
    sa = client.comes_up("home")
    with client.sessions.owning(sa.id.spis):
        client.sessions.gone(sa)
        new = ike_sa("home-gw2")
        with client.sessions.owning(new.id.spis):
            assert client.sessions.changed(new) is None
    session = client.of(sa)
    assert session is not None
    assert session.up


def test_a_moved_session_has_the_new_ike_sa_alone() -> None:
    client = Client()
    old = client.comes_up("home")
    session = client.of(old)
    assert session is not None
    new = ike_sa("home-gw2")
    client.sessions.moved(session, new)
    assert client.of(new) is session
    assert client.of(old) is None
    assert session.connection == "home-gw2"


def test_a_session_set_up_again_takes_the_ike_sa_of_the_connection_that_it_expects() -> None:
    client = Client()
    lost, other = client.comes_up("home"), client.comes_up("home-gw2", local="192.0.2.11")
    client.sessions.gone(lost)
    session = client.of(lost)
    assert session is not None
    with client.sessions.expecting(session, "home-gw2"):
        first, second = client.comes_up("home-gw2"), client.comes_up("home-gw2", local="192.0.2.12")
    assert client.of(first) is session
    assert client.of(second) is not session
    assert client.of(other) is not session


def test_an_ike_sa_that_charon_sets_up_stands_for_a_lost_session_of_its_uplink_only() -> None:
    uplinks = {
        name: ConnectionInfo(name, 0, 0, (), local_addresses=(local,))
        for name, local in (("home", "192.0.2.10"), ("home-gw2", "192.0.2.11"))
    }
    client = Client(**uplinks)
    lost = client.comes_up("home")
    client.sessions.gone(lost)
    session = client.of(lost)
    assert client.of(client.comes_up("home-gw2", local="192.0.2.11")) is not session
    assert client.of(client.comes_up("home")) is session


def test_an_operator_means_a_lost_session_before_one_that_is_up() -> None:
    client = Client()
    home, work = client.comes_up("home"), client.comes_up("work")
    assert client.sessions.chosen(None, None) is client.of(home)
    client.sessions.gone(work)
    assert client.sessions.chosen(None, None) is client.of(work)
    assert client.sessions.chosen("x", None) is client.of(home)
    assert client.sessions.chosen(None, "home") is client.of(home)
    assert client.sessions.chosen("x", "work") is None


def test_of_an_ike_sa_that_cannot_be_resumed_nothing_is_left() -> None:
    client = Client()
    sa = client.comes_up("home", resumable=False)
    assert [session.last for session in client.sessions] == [sa]
    client.sessions.gone(sa)
    assert list(client.sessions) == []


def test_a_session_stays_one_when_its_learned_vpn_gets_another_name() -> None:
    loaded = {"home": ConnectionInfo("home", 0, 0, (), remote_addresses=("192.0.2.1",), remote_ids=("vpn",))}
    charon = SimpleNamespace(tracker=SimpleNamespace(connections={}))
    sessions = Sessions(cast(Any, charon), LearnedVpns(lambda: loaded, True), clock=lambda: 0.0, wall=lambda: 0.0)
    old, new = ike_sa("home", child=1), ike_sa("home", child=1)
    session = sessions.changed(old)
    assert session is not None
    assert session.vpn == "home"
    loaded = {"first": loaded["home"]._replace(name="first"), **loaded}
    assert sessions.changed(new) is session
    assert session.vpn == "first"


def test_what_a_gateway_rekeyed_is_kept_while_the_gateway_may_lack_the_answer() -> None:
    client = Client()
    old = client.comes_up("home")
    new = client.rekeyed(old, by_gateway=True)
    [session] = client.sessions
    assert (session.last, session.previous) == (new, old)
    # another gateway may announce the end of this one by the stub that there is
    assert client.sessions.sa(old.id.spis) is old
    # charon gives up: it knows no more of the answer
    client.sessions.gone(new)
    assert (session.up, session.last, session.previous) == (False, new, old)
    assert client.sessions.previous() == {old.id.spis}


@pytest.mark.parametrize("on_old", [True, False])
def test_a_request_of_the_gateway_on_either_shows_that_it_has_the_answer(on_old: bool) -> None:
    """On the old one it is the DELETE."""
    client = Client()
    old = client.comes_up("home")
    new = client.rekeyed(old, by_gateway=True)
    client.sessions.verified(ike_sa("home").id.spis)
    [session] = client.sessions
    assert session.previous is old
    client.sessions.verified((old if on_old else new).id.spis)
    assert session.previous is None
    assert client.sessions.sa(old.id.spis) is None


def test_the_end_of_what_was_rekeyed_ends_no_session() -> None:
    client = Client()
    old = client.comes_up("home")
    new = client.rekeyed(old, by_gateway=True)
    client.sessions.gone(new)
    assert client.sessions.ended(info_of(old)) is None
    [session] = client.sessions
    assert (session.last, session.previous) == (new, None)


def test_what_the_client_itself_rekeyed_is_not_kept_nor_what_was_before_it() -> None:
    client = Client()
    first = client.comes_up("home")
    second = client.rekeyed(first, by_gateway=True)
    client.rekeyed(second, by_gateway=False)
    [session] = client.sessions
    assert session.previous is None


def test_of_a_session_that_went_on_nothing_from_before_is_kept() -> None:
    client = Client()
    client.rekeyed(client.comes_up("home"), by_gateway=True)
    [session] = client.sessions
    client.sessions.moved(session, ike_sa("home-gw2"))
    assert session.previous is None


@pytest.mark.parametrize("vici_first", [False, True])
def test_a_session_that_ended_with_its_rekey_half_made_is_forgotten(vici_first: bool) -> None:
    """charon reports the new IKE_SA before all key exchanges of the rekey are done (RFC 9370)."""
    client = Client()
    old = client.comes_up("home")
    client.begins_rekey(old, by_gateway=True)
    if vici_first:
        assert client.sessions.ended(info_of(old)) is not None
        client.sessions.gone(old)
    else:
        client.sessions.gone(old)
        assert client.sessions.ended(info_of(old)) is not None
    assert list(client.sessions) == []
    assert client.sessions.resumable_sas() == []


def test_until_the_new_one_is_up_the_old_one_is_the_last_and_nothing_is_before_it() -> None:
    client = Client()
    first = client.comes_up("home")
    old = client.rekeyed(first, by_gateway=True)
    new = client.begins_rekey(old, by_gateway=True)
    client.sessions.gone(old)
    [session] = client.sessions
    assert (session.last, session.previous) == (old, None)
    client.completes(old, new)
    assert (session.last, session.previous) == (new, old)


@pytest.mark.parametrize("on_old", [True, False])
def test_a_request_of_the_gateway_before_the_new_one_is_up_shows_the_same(on_old: bool) -> None:
    client = Client()
    old = client.comes_up("home")
    new = client.begins_rekey(old, by_gateway=True)
    client.sessions.gone(old)
    client.sessions.verified((old if on_old else new).id.spis)
    client.completes(old, new)
    [session] = client.sessions
    assert (session.last, session.previous) == (new, None)


@pytest.mark.parametrize("gateway_wins", [True, False])
def test_of_two_rekeys_at_the_same_time_the_one_that_comes_up_counts(gateway_wins: bool) -> None:
    client = Client()
    old = client.comes_up("home")
    loser = client.begins_rekey(old, by_gateway=not gateway_wins)
    winner = client.begins_rekey(old, by_gateway=gateway_wins)
    client.sessions.gone(old)
    client.completes(old, winner)
    [session] = client.sessions
    assert session.last is winner
    assert session.last is not loser
    assert session.previous is (old if gateway_wins else None)


def test_what_is_lost_is_not_what_was_before_it() -> None:
    """An attempt that began with it failed after its rekey."""
    client = Client()
    old = client.comes_up("home")
    client.rekeyed(old, by_gateway=True)
    [session] = client.sessions
    client.sessions.lose(session, old)
    assert (session.last, session.previous) == (old, None)
