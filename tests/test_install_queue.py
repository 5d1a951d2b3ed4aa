"""What is answered once a batch is installed (bridge.gateway.install_queue). Only what the lab cannot time is here: a
request that is decided on while charon takes in its SA."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import HaError
from bridge.charon.ha_segments import LONGEST_PAUSE
from bridge.gateway import install_queue
from bridge.gateway.install_queue import InstallQueue, Prepared
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.rebuilt import Rebuilt
from bridge.gateway.rebuilt_state import Event, State
from bridge.gateway.unconfirmed import Unconfirmed
from bridge.stub.stub import Index


class Request:
    """A held request."""

    src, sport, dst, dport, marker, ike = "192.0.2.9", 4500, "192.0.2.1", 4500, True, b""

    def __init__(self) -> None:
        self.held = True
        self.accepted = 0

    def accept(self) -> None:
        self.accepted += self.held
        self.held = False

    def drop(self) -> None:
        self.held = False


class Installer:
    """Has something happen while it installs."""

    toggle_seconds = 0.0

    def __init__(self) -> None:
        self.meanwhile: Callable[[], None] = lambda: None
        self.installed: list[Any] = []
        self.activated: list[int] = []
        """how many were installed at each activation"""

    def wait(self) -> float:
        return 0.0

    async def land(self, batch: list[Any]) -> None:
        if any(install.untold for install in batch):
            raise HaError("too long")
        self.installed += batch

    async def activate(self) -> None:
        self.activated.append(len(self.installed))
        await asyncio.sleep(0)
        self.meanwhile()


class Table(list[Any]):
    """Stands for `Unconfirmed`."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped: list[Any] = []

    def add(self, made: Any) -> None:
        self.append(made)

    def installed(self, made: Any) -> None:
        made.state = State.UNCONFIRMED

    def forget(self, made: Any, why: Event) -> None:
        assert why in (Event.GIVEN_UP, Event.SUPERSEDED)
        if made in self:
            self.remove(made)

    async def drop(self, ike_ids: list[Any], **_: Any) -> None:
        self.dropped += ike_ids


class Made:
    """Stands for a `Rebuilt`."""

    response = b"answer"

    def __init__(self) -> None:
        self.sa = self.install = self.old = self
        self.id = self
        self.index = Index("", b"")
        self.spi_i = self.spi_r = b""
        self.connection = ""
        self.untold = False
        """charon cannot be told of it"""
        self.state = State.INSTALLING


class OneCharon:
    """Stands for a `Charon`."""

    def __init__(self, installer: Installer) -> None:
        self.installer = installer
        self.requests: list[str] = []
        """where requests come from that it may begin a handshake for"""

    def request(self, spi_i: bytes, address: str) -> None:
        self.requests.append(address)

    def sharing(self, ike_ids: list[Any]) -> set[bytes]:
        return set()


class Confirming:
    """Stands for an activation."""

    def __init__(self) -> None:
        self.early = False
        """whether first requests can be answered before charon has the SAs active"""
        self.charon_has_them = True
        self.seen: list[Any] = []

    def can_confirm(self, made: Any) -> bool:
        return self.early

    def landed(self, made: Any) -> None:
        self.seen.append(made)

    def has(self, made: Any) -> bool:
        return self.charon_has_them


class Scene:
    def __init__(self) -> None:
        self.installer = Installer()
        self.charon = OneCharon(self.installer)
        self.table = Table()
        self.answers: list[Any] = []
        self.activation = Confirming()
        self.coming = False
        self.batches = InstallQueue(
            cast(Charon, self.charon),
            cast(Unconfirmed, self.table),
            self.activation,
            GatewayMetrics(),
            self.answer,
            lambda packet, _: packet.accept(),
            lambda: self.coming,
        )
        self.request, self.made = self.added()

    def added(self) -> tuple[Request, Made]:
        """One more request with what is rebuilt for it."""
        request, made = Request(), Made()
        self.batches.add(*cast(Prepared, (request, cast(Rebuilt, made))))
        return request, made

    def answer(self, packet: Any, response: bytes) -> None:
        self.answers.append(packet)

    async def played(self) -> None:
        """Until the batch is through."""
        task = asyncio.create_task(self.batches.run())
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert self.installer.installed


async def until(done: Callable[[], bool]) -> None:
    for _ in range(5000):
        if done():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("waited in vain")


async def test_a_request_is_kept_from_charon_and_answered_once_its_sa_is_there() -> None:
    scene = Scene()
    await scene.played()
    assert scene.answers == [scene.request]
    assert (scene.request.held, scene.request.accepted) == (False, 0)
    assert scene.table == [scene.made]


async def test_a_request_that_charon_got_meanwhile_is_charons_to_answer_and_its_sa_goes() -> None:
    """The interceptor ends first when a sidecar stops, and lets go of all that it holds."""
    scene = Scene()
    scene.installer.meanwhile = scene.request.accept
    await scene.played()
    assert scene.answers == []
    assert scene.request.accepted == 1
    assert scene.table == []
    assert scene.table.dropped == [scene.made]


async def test_a_request_whose_session_was_confirmed_otherwise_meanwhile_goes_to_charon() -> None:
    scene = Scene()
    scene.installer.meanwhile = lambda: scene.table.forget(scene.made, Event.SUPERSEDED)
    await scene.played()
    assert scene.answers == []
    assert scene.request.accepted == 1
    assert scene.table.dropped == [scene.made]


async def test_what_is_being_activated_is_not_answered_yet() -> None:
    """Those decide whether there is a crowd (bridge.gateway.activation)."""
    scene = Scene()
    seen: list[int] = []
    scene.installer.meanwhile = lambda: seen.append(scene.batches.unanswered)
    scene.added()
    assert scene.batches.unanswered == 2
    await scene.played()
    assert (seen, scene.batches.unanswered) == ([2], 0)
    assert len(scene.answers) == 2


async def test_an_activation_that_fails_leaves_nothing_unanswered() -> None:
    scene = Scene()

    def fail() -> None:
        raise ChannelError("charon hangs")

    scene.installer.meanwhile = fail
    await scene.played()
    assert (scene.answers, scene.batches.unanswered) == ([], 0)


async def test_an_activation_that_takes_long_waits_for_those_that_are_on_their_way() -> None:
    scene = Scene()
    scene.installer.toggle_seconds = 3600.0
    scene.coming = True
    task = asyncio.create_task(scene.batches.run())
    await until(lambda: bool(scene.installer.installed))
    await asyncio.sleep(0.05)
    assert scene.installer.activated == []
    request, _ = scene.added()
    scene.coming = False
    await until(lambda: len(scene.answers) == 2)
    task.cancel()
    assert scene.installer.activated == [2]
    assert scene.answers == [scene.request, request]


@pytest.mark.parametrize(("toggle_seconds", "longest"), [(0.001, LONGEST_PAUSE), (3600.0, 0.01)])
async def test_they_are_waited_for_no_longer_than_a_few_activations_take_nor_than_clients_wait(
    monkeypatch: pytest.MonkeyPatch, toggle_seconds: float, longest: float
) -> None:
    monkeypatch.setattr(install_queue, "LONGEST_PAUSE", longest)
    scene = Scene()
    scene.installer.toggle_seconds = toggle_seconds
    scene.coming = True
    task = asyncio.create_task(scene.batches.run())
    await until(lambda: bool(scene.answers))
    task.cancel()
    assert scene.answers == [scene.request]


async def test_a_stub_that_cannot_be_encoded_for_charon_costs_no_other_its_turn() -> None:
    scene = Scene()
    scene.made.untold = True
    request, made = scene.added()
    await scene.played()
    assert scene.answers == [request]
    assert scene.request.accepted == 1
    assert scene.table == [made]


async def test_an_answer_that_fails_costs_no_later_request_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()

    def fail(packet: Any, response: bytes) -> None:
        raise ValueError("nothing that anybody thought of")

    monkeypatch.setattr(scene.batches, "_answer", fail)
    await scene.played()
    monkeypatch.setattr(scene.batches, "_answer", scene.answer)
    request, _ = scene.added()
    await scene.played()
    assert scene.answers == [request]


async def test_what_can_be_confirmed_before_it_is_active_is_answered_before_any_activation() -> None:
    scene = Scene()
    scene.activation.early = True
    await scene.played()
    assert scene.answers == [scene.request]
    assert scene.installer.activated == []
    assert scene.activation.seen == [scene.made]


async def test_what_charon_did_not_take_in_time_is_removed_once_it_reads_again() -> None:
    """It has it in its socket."""
    scene = Scene()

    def hang() -> None:
        raise ChannelError("charon did not read its HA channel for 30 s")

    scene.installer.meanwhile = hang
    await scene.played()
    assert scene.answers == []
    assert scene.table == []
    assert scene.table.dropped == [scene.made]
