"""How a client's charon goes on with a session at another gateway (bridge.client.switchover), without root and without
a lab: charon answers from memory, and the clock does not pass by itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from msgspec.structs import replace

import role_support
from bank_support import stub_of
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.sa_ends import SaEnds
from bridge.charon.vici_client import ViciClient
from bridge.charon.vici_types import ChildInfo, SaInfo, ViciError
from bridge.charon.vpns import vpns_of
from bridge.client.sessions import Session, Sessions
from bridge.client.switchover import Switchover
from bridge.client.sync_request import Answer, Target
from bridge.config import ClientConfig, GatewayEntry, ResumeConfig
from bridge.ike.key_confirmation import Confirmation
from bridge.ike.keys import Resumption
from bridge.stub.child_sa import NewChild
from bridge.stub.types import Endpoint
from role_support import LOCAL, FakeTime, fake_charon

OLD, NEW = "192.0.2.1", "192.0.2.2"
THERE = Target(NEW, "gw2")
CONFIG = ClientConfig(gateways=(GatewayEntry(OLD, "gw1"), GatewayEntry(NEW, "gw2")))
WALL = 1_800_000_000


def ike_sa(connection: str, gateway: str) -> IkeSa:
    sa = role_support.ike_sa(connection, gateway)
    sa.children, sa.expires = stub_of().children, WALL + 3600
    return sa


class Client:
    """A client with one session at OLD, and a charon that keeps what it is given as the attributes say."""

    def __init__(self, loop: FakeTime) -> None:
        self.loop = loop
        self.charon, self.installer, self.channel = fake_charon("gw1", "gw2")
        self.charon.vici = self  # type: ignore[assignment]
        self.charon.ends = SaEnds(self.charon.tracker, cast(ViciClient, self), lambda: True)
        self.charon.reconcile_soon = lambda: None  # type: ignore[method-assign]
        tracker = self.charon.tracker
        self.sessions = Sessions(
            self.charon, vpns_of(CONFIG, lambda: tracker.connections), clock=loop.time, wall=lambda: WALL
        )
        self.switchover = Switchover(
            self.charon,
            self.sessions,
            ResumeConfig(),
            clock=loop.time,
            wall=lambda: float(WALL),
            remove_address=self.remove_address,
        )
        self.old = ike_sa("gw1", OLD)
        tracker.adopt(self.old)
        session = self.sessions.changed(self.old)
        assert session is not None
        self.session: Session = session
        self.keeps_sa = self.keeps_children = self.initiates = self.gateway_confirms = True
        self.initiated: list[tuple[str, str]] = []
        self.had_old_at_initiate: list[bool] = []
        self.confirmed_with: list[bool] = []
        """for each confirmation that was sent, whether charon had the new IKE_SA by then"""
        self.listed: list[SaInfo] = []
        self.ended: list[str] = []
        self.removed: list[tuple[str, bool]] = []
        """each address that was taken from the host, and whether charon had the old IKE_SA then"""
        self.seconds = 0.05
        """that the gateway takes to answer a confirmation"""

    # what charon answers over VICI

    async def find_sa(self, connection: str, spis: bytes) -> SaInfo | None:
        await asyncio.sleep(0.001)
        install = self.installer.installed.get(spis)
        if install is None or not self.keeps_sa:
            return None
        children = [ChildInfo("net", "INSTALLED", self.spi)] if self.keeps_children else []
        return info(connection, install.id, "ESTABLISHED", *children)

    async def initiate(self, connection: str, child: str, timeout: float, used: set[str]) -> None:
        self.initiated.append((connection, child))
        self.had_old_at_initiate.append(self.has_old)
        await asyncio.sleep(0.1)
        if not self.initiates:
            raise ViciError("the gateway does not answer")

    async def list_sas(self, connection: str | None = None) -> list[SaInfo]:
        return [info for info in self.listed if connection in (None, info.connection)]

    async def end_sa(self, unique_id: str, seconds: float | None = None) -> None:
        self.ended.append(unique_id)

    @asynccontextmanager
    async def ending(self, same: Callable[[], bool]) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
        async def end_sa(unique_id: str) -> str:
            self.ended.append(unique_id)
            return ""

        yield end_sa

    def remove_address(self, address: str) -> None:
        self.removed.append((address, self.old.id.spis in self.charon.tracker.sas))

    # what the gateway answers

    @property
    def spi(self) -> int:
        return 0x1234

    def answer(self, *, children: bool = True, auth_lifetime: int | None = None) -> Answer:
        child = NewChild(replace(self.old.children[0], spi_in=self.spi), b"i" * 32, b"r" * 32)
        ike_id = IkeId.of(os.urandom(8), os.urandom(8), True)
        given = (child,) if children else ()
        return Answer(
            ike_id=ike_id,
            nonce_i=b"i" * 32,
            nonce_r=b"r" * 32,
            local=LOCAL,
            remote=Endpoint(NEW, 4500),
            nat_here=False,
            nat_there=False,
            exchange=0.01,
            sealed_stub=None,
            lifetime=None,
            children=given,
            auth_lifetime=auth_lifetime,
        )

    async def confirm(self, confirmation: Confirmation, answer: Answer) -> bool:
        self.confirmed_with.append(answer.ike_id.spis in self.installer.installed)
        await asyncio.sleep(self.seconds)
        return self.gateway_confirms

    def resume(
        self, answer: Answer, *, stay: bool = False, origin: IkeSa | None = None
    ) -> tuple[IkeSa, list[str], float]:
        return self.loop.run(
            self.switchover.resume(
                self.session, self.old, THERE, answer, self.confirm, stay=stay, origin=origin or self.old
            )
        )

    def keeps(self, ike_id: IkeId) -> None:
        """charon cannot be told to drop an IKE_SA just now."""
        delete = self.installer.delete

        async def fails(ike_ids: Sequence[IkeId]) -> None:
            if ike_id in ike_ids:
                raise ChannelError("charon does not read")
            await delete(ike_ids)

        self.installer.delete = fails  # type: ignore[method-assign]

    def loses_old(self) -> None:
        """charon ended the IKE_SA."""
        self.charon.tracker.forget(self.old.id)
        self.sessions.gone(self.old)

    @property
    def has_old(self) -> bool:
        return self.old.id.spis in self.charon.tracker.sas


def info(connection: str, ike_id: IkeId, state: str, *children: ChildInfo, unique_id: str = "7") -> SaInfo:
    values: dict[str, Any] = dict.fromkeys(SaInfo._fields)
    values |= {"connection": connection, "spi_i": ike_id.spi_i, "spi_r": ike_id.spi_r, "state": state}
    values |= {"initiator": True, "local": LOCAL, "remote": Endpoint(NEW, 4500), "unique_id": unique_id}
    return SaInfo(**(values | {"children": children}))


@pytest.fixture
def client(loop: FakeTime) -> Client:
    return Client(loop)


def test_the_session_goes_on_with_the_new_sa_and_its_child_sas(client: Client) -> None:
    new, names, _ = client.resume(client.answer())
    assert names == ["net"]
    assert client.initiated == []
    assert client.session.last is new
    assert list(client.session.sas) == [new.id.spis]
    assert client.charon.tracker.sas[new.id.spis] is new
    assert not client.has_old
    assert [child.spi_in for child in new.children] == [client.spi]


def test_the_old_sa_goes_only_after_charon_has_the_new_one(client: Client) -> None:
    answer = client.answer()
    deleted = client.installer.delete

    async def delete(ike_ids: Any) -> None:
        assert answer.ike_id.spis in client.installer.installed
        await deleted(ike_ids)

    client.installer.delete = delete  # type: ignore[method-assign]
    client.resume(answer)
    assert client.installer.deleted == [client.old.id]


def test_the_confirmation_of_a_lost_session_is_under_way_while_charon_installs(client: Client) -> None:
    client.loses_old()
    client.resume(client.answer())
    assert client.confirmed_with == [False]


def test_while_the_old_sa_is_there_the_confirmation_waits_for_the_new_child_sas(client: Client) -> None:
    """The old gateway ends its SA as soon as it learns of the confirmation."""
    client.resume(client.answer())
    assert client.confirmed_with == [True]


def test_the_end_of_the_old_sa_is_no_news_while_its_session_moves(client: Client) -> None:
    confirm = client.confirm

    async def ended(confirmation: Confirmation, answer: Answer) -> bool:
        client.charon.tracker.forget(client.old.id)
        assert client.sessions.is_own(client.old.id.spis)
        return await confirm(confirmation, answer)

    client.confirm = ended  # type: ignore[method-assign]
    new, *_ = client.resume(client.answer(), stay=True)
    assert list(client.session.sas) == [new.id.spis]
    assert not client.sessions.is_own(client.old.id.spis)


@pytest.mark.parametrize("lost", [False, True])
def test_what_is_resumed_from_before_a_rekey_has_keys_of_that_and_takes_the_place_of_both(
    client: Client, lost: bool
) -> None:
    origin = ike_sa("gw1", OLD)
    client.session.previous = origin
    if lost:
        client.loses_old()
    answer = client.answer()
    new, names, _ = client.resume(answer, origin=origin)
    ids = (answer.ike_id.spi_i, answer.ike_id.spi_r)
    assert new.sk_d == Resumption(origin.suite, origin.sk_d, answer.nonce_i, answer.nonce_r, *ids).sk_d()
    assert client.installer.installed[new.id.spis].sk_d_old == origin.sk_d
    assert names == ["net"]
    assert list(client.session.sas) == [new.id.spis]
    assert client.session.previous is None
    # charon keeps what was rekeyed until the DELETE of its gateway
    assert {client.old.id, origin.id} == set(client.installer.deleted)


def test_a_session_that_went_on_stays_where_what_was_before_its_rekey_cannot_be_removed(client: Client) -> None:
    origin = client.session.previous = ike_sa("gw1", OLD)
    client.keeps(origin.id)
    new, names, _ = client.resume(client.answer(), origin=origin)
    assert names == ["net"]
    assert list(client.session.sas) == [new.id.spis]
    assert client.installer.deleted == [client.old.id]


def test_a_failed_ike_sa_that_cannot_be_removed_leaves_the_old_session_resumable(client: Client) -> None:
    client.gateway_confirms = False
    answer = client.answer()
    client.keeps(answer.ike_id)
    with pytest.raises(ViciError, match="under the new keys"):
        client.resume(answer)
    assert client.session.last is client.old
    assert not client.session.up


def test_a_failure_leaves_what_was_before_a_rekey_resumable(client: Client) -> None:
    origin = client.session.previous = ike_sa("gw1", OLD)
    client.gateway_confirms = False
    with pytest.raises(ViciError):
        client.resume(client.answer(), origin=origin)
    assert client.session.previous is origin
    assert client.session.last is client.old


def test_child_sas_by_create_child_sa_are_up_before_the_old_ones_go(client: Client) -> None:
    _, names, _ = client.resume(client.answer(children=False))
    assert names == ["net"]
    assert client.had_old_at_initiate == [True]
    assert client.installer.deleted == [client.old.id]


def test_with_one_connection_for_both_the_old_sa_goes_first(client: Client) -> None:
    """charon would send CREATE_CHILD_SA on the old SA."""
    here = Target(NEW, "gw1")
    answer = client.answer(children=False)
    client.loop.run(
        client.switchover.resume(client.session, client.old, here, answer, client.confirm, stay=True, origin=client.old)
    )
    assert client.initiated == [("gw1", "net")]
    assert client.had_old_at_initiate == [False]


def test_with_stay_it_is_sent_once_charon_has_the_sa_and_the_old_one_goes_last(client: Client) -> None:
    client.resume(client.answer(), stay=True)
    assert client.confirmed_with == [True]
    assert not client.has_old


def test_child_sas_that_charon_did_not_install_come_by_create_child_sa(client: Client) -> None:
    client.keeps_children = False
    _, names, _ = client.resume(client.answer())
    assert client.initiated == [("gw2", "net")]
    assert names == ["net"]


def test_without_child_sas_in_the_answer_they_come_by_create_child_sa_which_confirms(client: Client) -> None:
    _, names, _ = client.resume(client.answer(children=False))
    assert client.initiated == [("gw2", "net")]
    assert names == ["net"]
    assert client.confirmed_with == []


def test_a_gateway_that_does_not_confirm_leaves_the_old_session_resumable(client: Client) -> None:
    client.gateway_confirms = False
    answer = client.answer()
    with pytest.raises(ViciError, match="under the new keys"):
        client.resume(answer)
    # the new SA never worked: it is gone, and the old stub stays what can be resumed
    assert answer.ike_id in client.installer.deleted
    assert answer.ike_id.spis not in client.charon.tracker.sas
    assert client.session.last is client.old
    assert client.sessions.has(client.session)
    assert not client.session.up


@pytest.mark.parametrize("failure", ["no such connection", "charon ends", "charon drops it", "no child comes up"])
def test_whatever_fails_the_old_session_can_be_resumed(client: Client, failure: str) -> None:
    answer, errors = client.answer(), (ViciError, ChannelError)
    if failure == "no such connection":
        del client.charon.tracker.connections["gw2"]
    elif failure == "charon ends":
        client.installer.failure = ChannelError("charon's end of the HA channel is gone")
    elif failure == "charon drops it":
        client.keeps_sa = False
    else:
        client.keeps_children = client.initiates = False
    with pytest.raises(errors):
        client.resume(answer)
    assert client.session.last is client.old
    assert client.sessions.has(client.session)
    assert answer.ike_id.spis not in client.charon.tracker.sas


def test_with_stay_a_failure_leaves_the_old_sa_where_it_is(client: Client) -> None:
    client.gateway_confirms = False
    with pytest.raises(ViciError):
        client.resume(client.answer(), stay=True)
    assert client.has_old
    assert client.session.up


def test_the_end_of_the_authentication_comes_with_the_answer_or_from_the_old_sa(client: Client) -> None:
    client.old.authenticated_until = WALL + 500
    new, *_ = client.resume(client.answer())
    assert new.authenticated_until == WALL + 500
    client.old, client.session.last = new, new
    newer, *_ = client.resume(client.answer(auth_lifetime=300))
    assert newer.authenticated_until == WALL + 300
    assert newer.authentication_inherited


def test_a_full_handshake_takes_the_place_of_the_session(client: Client) -> None:
    new = ike_sa("gw2", NEW)

    async def initiate(connection: str, child: str, timeout: float, used: set[str]) -> None:
        client.initiated.append((connection, child))
        client.charon.tracker.adopt(new)
        client.sessions.changed(new)

    client.initiate = initiate  # type: ignore[method-assign]
    ended: list[IkeSa] = []

    async def end_surely(sa: IkeSa) -> None:
        ended.append(sa)

    client.charon.end_surely = end_surely  # type: ignore[method-assign]
    assert client.loop.run(client.switchover.handshake(client.session, THERE)) == ["net"]
    assert client.session.last is new
    # the gateway that it was at may live: it gets a DELETE
    assert ended == [client.old]


def fall_back(client: Client, *vips: str) -> None:
    """A full handshake at another gateway, which gives these virtual IPs. The old IKE_SA has 10.20.1.1 and fd20::1."""
    client.old.local_vips, client.old.unique_id = ("10.20.1.1", "fd20::1"), "3"
    new = ike_sa("gw2", NEW)

    async def initiate(connection: str, child: str, timeout: float, used: set[str]) -> None:
        client.charon.tracker.adopt(new)
        client.sessions.changed(new)
        old = info("gw1", client.old.id, "ESTABLISHED", unique_id="3")
        client.listed = [
            old._replace(local_vips=client.old.local_vips),
            info("gw2", new.id, "ESTABLISHED")._replace(local_vips=vips),
        ]

    client.initiate = initiate  # type: ignore[method-assign]
    client.loop.run(client.switchover.handshake(client.session, THERE))
    assert client.ended == ["3"]


def test_the_addresses_of_the_old_sa_go_before_charon_removes_its_policies(client: Client) -> None:
    fall_back(client, "10.20.2.1", "fd20::2")
    assert client.removed == [("10.20.1.1", True), ("fd20::1", True)]


def test_an_address_that_the_new_sa_has_too_stays(client: Client) -> None:
    fall_back(client, "10.20.1.1", "fd20::2")
    assert client.removed == [("fd20::1", True)]


def test_an_address_that_the_kernel_keeps_does_not_keep_the_old_sa(client: Client) -> None:
    def fails(address: str) -> None:
        raise OSError(99, "Cannot assign requested address")

    client.switchover._remove_address = fails
    fall_back(client, "10.20.2.1")


def test_with_one_connection_for_both_gateways_the_old_one_gets_a_delete_before_the_handshake(client: Client) -> None:
    client.old.unique_id = "3"
    client.listed.append(info("gw1", client.old.id, "ESTABLISHED", unique_id="3"))

    async def initiate(connection: str, child: str, timeout: float, used: set[str]) -> None:
        assert client.ended == ["3"]
        assert not client.session.up

    client.initiate = initiate  # type: ignore[method-assign]
    client.loop.run(client.switchover.handshake(client.session, Target(NEW, "gw1")))
    assert client.installer.deleted == []


def test_a_handshake_that_comes_to_nothing_is_ended_so_that_it_does_not_come_up_later(client: Client) -> None:
    client.initiates = False
    half_open = info("gw2", IkeId.of(os.urandom(8), bytes(8), True), "CONNECTING", unique_id="9")

    async def initiate(connection: str, child: str, timeout: float, used: set[str]) -> None:
        client.listed.append(half_open)
        used.add("9")
        raise ViciError("timeout")

    client.initiate = initiate  # type: ignore[method-assign]
    with pytest.raises(ViciError, match="no CHILD_SA came up"):
        client.loop.run(client.switchover.handshake(client.session, THERE))
    assert client.ended == ["9"]


def test_handshakes_of_another_session_are_not_ended(client: Client) -> None:
    client.listed.append(info("gw2", IkeId.of(os.urandom(8), bytes(8), True), "CONNECTING", unique_id="9"))
    vpn = next(iter(vpns_of(CONFIG, lambda: client.charon.tracker.connections)))
    waiting = Session(client.session.vpn, ike_sa("gw2", NEW))
    with client.sessions.expecting(waiting, "gw2"):
        client.loop.run(client.switchover.end_half_open(client.session, vpn))
    assert client.ended == []
    client.loop.run(client.switchover.end_half_open(client.session, vpn))
    assert client.ended == ["9"]
