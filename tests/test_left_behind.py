"""Which of the IKE_SAs that charon lost are taken out of the kernel, and when (bridge.gateway.left_in_kernel), without
root: the kernel is a list of what is to go."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bank_support import GATEWAY, stub_of
from bridge.bank.interface import AddressEntry
from bridge.bank.keyspace import Event
from bridge.charon.charon import Charon
from bridge.charon.ike_sa import IkeSa, sa_of
from bridge.gateway.left_in_kernel import LeftInKernel
from bridge.net.xfrm import EspSa
from bridge.service.metrics import Metrics
from bridge.service.tasks import end, spawn
from bridge.stub import bank_keys
from bridge.stub.child_sa import wire_spi
from bridge.stub.stub import Index, Stub
from role_support import FakeBank

OTHER = "192.0.2.99"
LOOK = 0.1
"""seconds between two looks"""


class Bank(FakeBank):
    """With virtual IPs, and all stubs of a gateway."""

    async def addresses(self, ranges: Sequence[tuple[str, str]]) -> list[AddressEntry]:
        wanted = {first for first, _ in ranges}
        return [AddressEntry(vip, of) for of, stub in self.stubs.items() for vip in stub.remote_vips if vip in wanted]

    async def download(self, gateway: str) -> AsyncIterator[list[Stub]]:
        yield [stub for index, stub in self.stubs.items() if index.gateway == gateway]


class Gateway:
    """A gateway whose kernel has these outbound ESP SAs from an earlier charon."""

    def __init__(self, *left: EspSa) -> None:
        self.bank = Bank()
        self.gone: list[EspSa] = []
        self.removed: list[IkeSa] = []
        self.failure: OSError | None = None
        self.listed: list[Any] = []
        reconciled = asyncio.Event()
        reconciled.set()

        async def list_sas() -> list[Any]:
            return self.listed

        self.charon = SimpleNamespace(
            reconciled=reconciled,
            alive=lambda: True,
            tracker=SimpleNamespace(sas={}),
            vici=SimpleNamespace(list_sas=list_sas),
        )
        self.part = LeftInKernel(
            cast(Charon, self.charon),
            self.bank.as_bank(),
            GATEWAY,
            outbound=lambda table: dict.fromkeys(left, GATEWAY),
            remove=self._remove,
            look=LOOK,
        )
        self.part.removed = self.removed.append

    def _remove(self, outbound: Sequence[EspSa], inbound: Sequence[EspSa], table: int) -> int:
        if self.failure is not None:
            raise self.failure
        self.gone += outbound
        return 3 * len(outbound)

    def lost(self, stub: Stub) -> IkeSa:
        """charon has lost the SA of this stub."""
        sa = sa_of(stub)
        self.bank.stubs[stub.index] = stub
        self.part.lost([sa])
        return sa

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = spawn("left-in-kernel", self.part.run())
        try:
            yield
        finally:
            await end(task)

    async def settled(self, looks: int = 3) -> list[EspSa]:
        """What was taken out of the kernel after so many looks."""
        await asyncio.sleep(looks * LOOK)
        return self.gone


def outbound(stub: Stub) -> EspSa:
    return EspSa(stub.remote.address, wire_spi(stub.children[0].spi_out))


pytestmark = pytest.mark.asyncio


async def test_a_session_that_may_still_be_carried_by_the_kernel_stays() -> None:
    gateway = Gateway()
    gateway.lost(stub_of())
    async with gateway.running():
        assert await gateway.settled() == []


async def test_a_session_that_went_on_elsewhere_is_removed_when_its_mark_is_reported() -> None:
    gateway = Gateway()
    stub = stub_of()
    sa = gateway.lost(stub)
    async with gateway.running():
        assert await gateway.settled(1) == []
        gateway.bank.went_on[stub.index] = Index(OTHER, b"12345678")
        gateway.part.on_event(Event(bank_keys.moved_key(*stub.index), "set"))
        assert await gateway.settled() == [outbound(stub)]
    assert gateway.removed == [sa]


async def test_a_report_without_a_mark_removes_nothing() -> None:
    gateway = Gateway()
    stub = stub_of()
    gateway.lost(stub)
    async with gateway.running():
        gateway.part.on_event(Event(bank_keys.moved_key(*stub.index), "set"))
        assert await gateway.settled() == []


async def test_without_a_report_the_next_look_finds_the_mark() -> None:
    gateway = Gateway()
    stub = stub_of()
    gateway.lost(stub)
    async with gateway.running():
        assert await gateway.settled(1) == []
        gateway.bank.went_on[stub.index] = Index(OTHER, b"12345678")
        assert await gateway.settled() == [outbound(stub)]


@pytest.mark.parametrize("how", ["ended", "expired", "its virtual IP is another session's"])
async def test_a_session_that_is_over_is_removed(how: str) -> None:
    gateway = Gateway()
    stub = stub_of(lifetime=-1 if how == "expired" else 3600)
    gateway.lost(stub)
    if how == "ended":
        gateway.bank.over.add(stub.index)
    elif how != "expired":
        del gateway.bank.stubs[stub.index]
        new = stub_of(gateway=OTHER)
        assert new.remote_vips == stub.remote_vips
        gateway.bank.stubs[new.index] = new
    async with gateway.running():
        assert await gateway.settled() == [outbound(stub)]


async def test_a_bank_that_is_away_decides_nothing() -> None:
    gateway = Gateway()
    stub = stub_of()
    gateway.lost(stub)
    gateway.bank.over.add(stub.index)
    gateway.bank.away = True
    async with gateway.running():
        assert await gateway.settled() == []
        gateway.bank.away = False
        assert await gateway.settled() == [outbound(stub)]


async def test_a_session_that_was_taken_back_as_it_is_keeps_its_esp_sas() -> None:
    gateway = Gateway()
    stub = stub_of()
    sa = gateway.lost(stub)
    gateway.charon.tracker.sas[sa.id.spis] = sa
    gateway.bank.over.add(stub.index)
    async with gateway.running():
        assert await gateway.settled() == []
        assert len(gateway.part) == 0


async def test_what_is_left_from_before_the_start_goes_but_for_living_sas_and_sessions_of_the_bank() -> None:
    kept, unknown, living = stub_of(), EspSa("198.51.100.8", 1), EspSa("198.51.100.9", 2)
    gateway = Gateway(outbound(kept), unknown, living)
    gateway.bank.stubs[kept.index] = kept
    gateway.listed.append(
        SimpleNamespace(
            remote=SimpleNamespace(address=living.destination), children=[SimpleNamespace(spi_out=wire_spi(living.spi))]
        )
    )
    async with gateway.running():
        assert await gateway.settled() == [unknown]
        gateway.bank.went_on[kept.index] = Index(OTHER, b"12345678")
        assert await gateway.settled() == [unknown, outbound(kept)]


async def test_an_sa_of_a_client_that_is_just_moving_is_not_taken_for_one_that_is_left() -> None:
    """VICI has the client's new address, the kernel the one before."""
    left = EspSa("198.51.100.9", 2)
    gateway = Gateway(left)
    gateway.listed.append(
        SimpleNamespace(
            remote=SimpleNamespace(address="198.51.100.77"), children=[SimpleNamespace(spi_out=wire_spi(left.spi))]
        )
    )
    async with gateway.running():
        assert await gateway.settled() == []


async def test_an_esp_sa_that_a_living_session_has_stays() -> None:
    """Behind the same NAT: its client chose the SPI that the session which is over has, too."""
    gateway = Gateway()
    stub = stub_of()
    gateway.lost(stub)
    living = sa_of(stub_of(gateway=OTHER))
    living.remote, living.children = stub.remote, stub.children
    assert living.id != sa_of(stub).id
    gateway.charon.tracker.sas[living.id.spis] = living
    gateway.bank.went_on[stub.index] = Index(OTHER, b"12345678")
    async with gateway.running():
        assert await gateway.settled() == []
    assert len(gateway.part) == 0


async def test_a_session_of_a_charon_that_hangs_is_removed_though_charon_has_it() -> None:
    gateway = Gateway()
    sa = sa_of(stub_of())
    gateway.charon.tracker.sas[sa.id.spis] = sa
    gateway.part.over(sa)
    async with gateway.running():
        assert await gateway.settled() == [outbound(stub_of())]


async def test_reports_about_other_sessions_are_not_kept() -> None:
    """Who may write to the bank can have any number of them sent."""
    gateway = Gateway()
    gateway.lost(stub_of())
    gateway.part._suspected.clear()
    for number in range(1000):
        gateway.part.on_event(Event(bank_keys.moved_key(GATEWAY, number.to_bytes(8)), "set"))
    assert not gateway.part._suspected


async def test_the_time_of_a_look_is_not_spent_on_nothing() -> None:
    gateway = Gateway()
    async with gateway.running():
        began = time.process_time()
        await gateway.settled(5)
        assert time.process_time() - began < LOOK
    assert not gateway.bank.asked


async def test_what_cannot_be_removed_is_counted_and_tried_again() -> None:
    gateway = Gateway()
    metrics = Metrics()
    gateway.part.gauges(metrics)
    stub = stub_of()
    gateway.lost(stub)
    gateway.failure = OSError(1, "Operation not permitted")
    async with gateway.running():
        gateway.bank.went_on[stub.index] = Index(OTHER, b"12345678")
        gateway.part.on_event(Event(bank_keys.moved_key(*stub.index), "set"))
        assert await gateway.settled(2) == []
        assert metrics.values()["left_in_kernel_failures_total"] > 0
        assert metrics.values()["sessions_left_in_kernel"] == 1
        gateway.failure = None
        assert await gateway.settled(2) == [outbound(stub)]
        assert metrics.values()["sessions_left_in_kernel"] == 0
