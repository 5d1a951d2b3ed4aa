"""One virtual IP, one session (bridge.gateway.addresses): what the lab cannot show quickly, with a real tracker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from bank_support import GATEWAY, stub_of
from bridge.bank.interface import BankUnavailable, StubBank
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.charon.sa_tracker import SaTracker
from bridge.charon.vici_types import ConnectionInfo, Unique
from bridge.gateway.addresses import AddressHolders
from bridge.stub.stub import Index, Stub
from bridge.stub.types import Endpoint, Identity

HERE = "192.0.2.2"


class Ignorant:
    """A Listener that takes no notice."""

    def __getattr__(self, name: str) -> Any:
        return lambda _: None


class EndsBank:
    """A bank that knows which sessions have ended, or is away."""

    def __init__(self, *over: Index, away: bool = False) -> None:
        self.over, self.away = over, away

    async def ended(self, indexes: Sequence[Index]) -> list[bool]:
        if self.away:
            raise BankUnavailable("away")
        return [index in self.over for index in indexes]


def holders(*sas: IkeSa, bank: EndsBank | None = None, unique: Unique = Unique.NO, **more: Any) -> AddressHolders:
    tracker = SaTracker(Ignorant(), wall=lambda: 0.0, clock=lambda: 0.0)
    for sa in sas:
        tracker.adopt(sa)
    connection = ConnectionInfo("home", 14400, 0, (), unique=unique)
    charon = SimpleNamespace(tracker=tracker, connection=lambda _: connection)
    return AddressHolders(cast(Charon, charon), cast(StubBank, bank or EndsBank()), HERE, **more)


def session(*vips: str, gateway: str = HERE) -> Stub:
    return msgspec.structs.replace(stub_of(gateway=gateway), remote_vips=vips)


def test_an_address_that_no_session_has_is_free() -> None:
    assert not holders(sa_of(session("10.20.0.8"))).of_others(session("10.20.0.7", gateway=GATEWAY))


def test_one_common_address_of_a_dual_stack_session_is_enough() -> None:
    other = session("10.20.0.9", "fd20::7")
    wanted = session("10.20.0.7", "fd20::7", gateway=GATEWAY)
    assert holders(sa_of(other)).of_others(wanted) == {other.spi_i + other.spi_r}


def test_the_sa_that_the_stub_describes_is_its_own_session() -> None:
    stub = session("10.20.0.7")
    found = holders(sa_of(stub))
    assert not found.of_others(stub)
    assert not found.beside(stub)


def test_the_sa_that_the_stubs_was_rebuilt_from_is_of_its_session_but_is_to_go() -> None:
    before = session("10.20.0.7")
    stub = msgspec.structs.replace(session("10.20.0.7", gateway=GATEWAY), predecessor=before.index)
    found = holders(sa_of(before))
    assert not found.of_others(stub)
    assert found.beside(stub) == {before.spi_i + before.spi_r}


def test_what_a_client_rekeyed_it_to_is_of_its_session_but_is_to_go() -> None:
    """The client lacks the answer, and resumes from what it has."""
    stub = session("10.20.0.7")
    rekeyed = sa_of(session("10.20.0.7"))
    rekeyed.established = stub.established + 60
    assert holders(rekeyed).of_others(stub) == {rekeyed.id.spis}
    found = holders(rekeyed, heir={stub.spi_i + stub.spi_r: rekeyed.id.spis}.get)
    assert not found.of_others(stub)
    assert found.beside(stub) == {rekeyed.id.spis}
    # without an address too
    assert found.beside(msgspec.structs.replace(stub, remote_vips=())) == {rekeyed.id.spis}


def test_an_older_sa_of_the_same_peer_holds_no_address_of_its_newer_one() -> None:
    """It fell back to a full handshake at another gateway, which gave it the address that it had."""
    stub = session("10.20.0.7", gateway=GATEWAY)
    old = msgspec.structs.replace(session("10.20.0.7"), established=stub.established - 60)
    found = holders(sa_of(old))
    assert not found.of_others(stub)
    # it is ended once the client has confirmed
    assert found.beside(stub) == {old.spi_i + old.spi_r}


@pytest.mark.parametrize("remote", [Endpoint("198.51.100.77", 4500), Endpoint(stub_of().remote.address, 1)])
def test_an_older_sa_of_another_device_of_the_same_user_holds_its_address(remote: Endpoint) -> None:
    """Also of one behind the same NAT. Not where a connection has one session of a user, the newest."""
    stub = session("10.20.0.7", gateway=GATEWAY)
    old = msgspec.structs.replace(session("10.20.0.7"), established=stub.established - 60, remote=remote)
    assert holders(sa_of(old)).of_others(stub) == {old.spi_i + old.spi_r}
    assert holders(sa_of(old), unique=Unique.KEEP).of_others(stub) == {old.spi_i + old.spi_r}
    assert not holders(sa_of(old), unique=Unique.REPLACE).of_others(stub)


@pytest.mark.parametrize(
    ("seconds", "identity"), [(60, b"client@example"), (0, b"client@example"), (-60, b"other@example")]
)
def test_a_younger_sa_of_the_same_peer_and_any_of_another_holds_its_address(seconds: int, identity: bytes) -> None:
    stub = session("10.20.0.7", gateway=GATEWAY)
    other = msgspec.structs.replace(
        session("10.20.0.7"), established=stub.established + seconds, remote_id=Identity(3, identity)
    )
    assert holders(sa_of(other)).of_others(stub) == {other.spi_i + other.spi_r}


def test_an_sa_whose_session_went_on_elsewhere_holds_its_address_no_more() -> None:
    left, stays = session("10.20.0.7"), session("10.20.0.8")
    wanted = [session("10.20.0.7", gateway=GATEWAY), session("10.20.0.8", gateway=GATEWAY)]
    found = holders(sa_of(left), sa_of(stays), bank=EndsBank(left.index))
    assert asyncio.run(found.moved_away(wanted)) == {left.spi_i + left.spi_r}


def test_while_the_bank_is_away_every_holder_counts() -> None:
    left = session("10.20.0.7")
    found = holders(sa_of(left), bank=EndsBank(left.index, away=True))
    assert not asyncio.run(found.moved_away([session("10.20.0.7", gateway=GATEWAY)]))
