"""Two sessions with one virtual IP (bridge.gateway.duplicates), with a bank and a clock of the test's own."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from bank_support import GATEWAY, stub_of
from bridge.bank.interface import BankUnavailable
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.config import SyncConfig
from bridge.gateway.address_book import AddressBook, Holder
from bridge.gateway.duplicates import CONFIRM_SECONDS, ENDS_OF_ONE_PEER, Duplicates
from bridge.gateway.metrics import GatewayMetrics
from bridge.stub.stub import Index, Stub
from bridge.stub.types import Identity

HERE = "192.0.2.2"


class Lab:
    """One Duplicates, with the sessions that charon and the bank have."""

    def __init__(self, policy: str = "end-newer") -> None:
        self.now = 0.0
        self.stubs: list[Stub] = []
        self.away = False
        self.ended: list[str] = []
        self.sas: dict[bytes, IkeSa] = {}
        sync = msgspec.convert({"duplicate_address": policy}, SyncConfig)
        charon = SimpleNamespace(tracker=SimpleNamespace(sas=self.sas), vici=self)
        self.duplicates = Duplicates(
            cast(Charon, charon), cast(AddressBook, self), sync, GatewayMetrics(), HERE, clock=lambda: self.now
        )

    async def holders(self, ranges: list[tuple[str, str]]) -> list[Holder]:
        if self.away:
            raise BankUnavailable("away")
        wanted = {first for first, _ in ranges}
        return [Holder(vip, stub) for stub in self.stubs for vip in stub.remote_vips if vip in wanted]

    async def find_sa(self, _: str, spis: bytes) -> Any:
        return SimpleNamespace(unique_id=spis.hex()) if spis in self.sas else None

    async def end_sa(self, unique_id: str) -> None:
        self.ended.append(unique_id)

    def handshake(self, established: int = 200, who: bytes = b"new@example") -> IkeSa:
        stub = msgspec.structs.replace(stub_of(gateway=HERE), established=established, remote_id=Identity(3, who))
        sa = sa_of(stub)
        self.sas[sa.id.spis] = sa
        self.duplicates.changed(sa)
        return sa

    def other(self, established: int = 100, who: bytes = b"old@example") -> Stub:
        stub = msgspec.structs.replace(stub_of(gateway=GATEWAY), established=established, remote_id=Identity(3, who))
        self.stubs.append(stub)
        return stub

    def look(self, times: int = 2) -> None:
        for _ in range(times):
            asyncio.run(self.duplicates.look())
            self.now += CONFIRM_SECONDS


def test_the_newer_session_is_ended_once_the_duplicate_is_confirmed() -> None:
    lab = Lab()
    lab.other()
    sa = lab.handshake()
    lab.look(1)
    assert lab.ended == []
    lab.look(1)
    assert lab.ended == [sa.id.spis.hex()]


def test_what_is_over_a_moment_later_is_no_duplicate() -> None:
    lab = Lab()
    lab.other()
    lab.handshake()
    lab.look(1)
    lab.stubs.clear()
    lab.look()
    assert lab.ended == []
    assert len(lab.duplicates) == 0


@pytest.mark.parametrize("why", ["report", "same identity", "ours is older", "its own stub", "rebuilt here"])
def test_a_session_is_left_alone(why: str) -> None:
    lab = Lab("report" if why == "report" else "end-newer")
    lab.other(
        established=300 if why == "ours is older" else 100, who=b"new@example" if why == "same identity" else b"old"
    )
    sa = lab.handshake()
    if why == "its own stub":
        lab.stubs = [msgspec.structs.replace(lab.stubs[0], index=sa.index_here(HERE))]
    if why == "rebuilt here":
        lab.duplicates.gone(sa)
        sa.adopted = True
        lab.duplicates.changed(sa)
    lab.look()
    assert lab.ended == []
    assert len(lab.duplicates) == (1 if why == "report" else 0)


@pytest.mark.parametrize("spi", [bytes(8), b"\xff" * 8])
@pytest.mark.parametrize("established", [200, 201])
def test_what_an_earlier_charon_of_this_gateway_had_is_older_whatever_the_second(spi: bytes, established: int) -> None:
    lab = Lab()
    sa = lab.handshake(established=200)
    stub = msgspec.structs.replace(lab.other(established), index=Index(HERE, spi), spi_r=spi)
    lab.stubs = [stub]
    lab.look()
    assert lab.ended == [sa.id.spis.hex()]


@pytest.mark.parametrize(("established", "ended"), [(199, 1), (201, 0)])
def test_of_two_sessions_that_are_here_the_newer_one_is_ended(established: int, ended: int) -> None:
    lab = Lab()
    stub = msgspec.structs.replace(lab.other(established), index=Index(HERE, b"\x07" * 8), spi_r=b"\x07" * 8)
    lab.stubs = [stub]
    other = sa_of(stub)
    lab.sas[other.id.spis] = other
    lab.handshake(established=200)
    lab.look()
    assert len(lab.ended) == ended


def test_while_the_bank_is_away_what_is_due_waits() -> None:
    lab = Lab()
    lab.other()
    lab.handshake()
    lab.away = True
    with pytest.raises(BankUnavailable):
        lab.look(1)
    lab.away = False
    lab.look()
    assert len(lab.ended) == 1


def test_one_peer_is_ended_a_few_times_and_then_left_alone() -> None:
    lab = Lab()
    lab.other()
    for _ in range(ENDS_OF_ONE_PEER + 2):
        sa = lab.handshake()
        lab.look()
        del lab.sas[sa.id.spis]
        lab.duplicates.gone(sa)
    assert len(lab.ended) == ENDS_OF_ONE_PEER
    lab.handshake(who=b"third@example")
    lab.look()
    assert len(lab.ended) == ENDS_OF_ONE_PEER + 1


@pytest.mark.parametrize("resumed", [False, True])
def test_a_session_from_before_the_sidecars_start_is_looked_at_again(resumed: bool) -> None:
    lab = Lab("report")
    other = lab.other()
    changes = {"predecessor": other.index} if resumed else {}
    stub = msgspec.structs.replace(
        stub_of(gateway=HERE), established=200, remote_id=Identity(3, b"new@example"), **changes
    )
    sa = sa_of(stub)
    sa.adopted = True
    lab.sas[sa.id.spis] = sa
    lab.duplicates.known(sa)
    lab.look()
    # one that was resumed here brought its address along
    assert len(lab.duplicates) == (0 if resumed else 1)
