"""How a client keeps its stubs (bridge.client.stub_keeper), without root and without a lab: the gateway answers from
memory, and the clock does not pass by itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bank_support import stub_of
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.sa_tracker import SaTracker
from bridge.client.stub_keeper import (
    NAMED_SECONDS,
    REFRESH_SHARE,
    RETRY_MAX,
    RETRY_MIN,
    SAVE_SECONDS,
    SETTLE_SECONDS,
    StubKeeper,
    gateway_message,
)
from bridge.config import HeldConfig
from bridge.ike.stub_exchange import StubSa, build_download, build_get, parse_stub_message
from bridge.stub.types import Endpoint, Identity
from role_support import FakeTime

GATEWAY, OTHERS = "192.0.2.1", ("192.0.2.2", "192.0.2.3")
WALL = 1_800_000_000.0
LIFETIME = 1000


class Nobody:
    def changed(self, sa: IkeSa) -> None: ...
    def gone(self, sa: IkeSa) -> None: ...
    def verified(self, ike_id: Any) -> None: ...
    def down(self, sa: Any) -> None: ...


class Client:
    """A StubKeeper with one IKE_SA, whose gateway answers as `gives` says."""

    def __init__(self, loop: FakeTime, config: HeldConfig) -> None:
        self.loop = loop
        self.began = loop.time()
        self.tracker = SaTracker(Nobody(), wall=self.wall, clock=loop.time)
        stub = stub_of()
        self.sa = IkeSa(
            id=IkeId.of(os.urandom(8), os.urandom(8), True),
            suite=stub.suite,
            sk_d=stub.sk_d,
            up=True,
            local_id=Identity(3, b"client@example"),
            remote_id=Identity(2, b"gw.example"),
            local=Endpoint("198.51.100.7", 4500),
            remote=Endpoint(GATEWAY, 4500),
            connection="gw1",
            children=stub.children,
            expires=int(WALL) + 7200,
        )
        self.tracker.adopt(self.sa)
        self.requests: list[float] = []
        """when each was sent"""
        self.named: list[Sequence[str]] = []
        self.gives: bytes | None = b"sealed"
        self.answers = True
        self.keys = self.sa.sk_d
        self.sessions = [self.sa]
        self.keeper = StubKeeper(
            config, self.tracker, self, lambda: self.sessions, lambda _, names: self.named.append(names), wall=self.wall
        )

    def wall(self) -> float:
        return WALL + self.loop.time() - self.began

    def send(self, src: str, sport: int, dst: str, dport: int, payload: bytes, marker: bool) -> None:
        self.requests.append(self.loop.time() - self.began)
        if not self.answers:
            return
        gateway = StubSa(self.sa.id.spi_i, self.sa.id.spi_r, False, (GATEWAY, self.sa.id.spi_r), 5, self.keys)
        octets = build_download(gateway, parse_stub_message(payload), self.gives, LIFETIME, OTHERS)
        message = gateway_message(octets)
        assert message is not None
        self.keeper.received(message)

    def up(self) -> None:
        self.loop.run(self._changed())

    async def _changed(self) -> None:
        self.keeper.changed(self.sa)

    @property
    def stub(self) -> bytes | None:
        return self.keeper.stub_of(self.sa)


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is written within the turn of the event loop: the fake clock does not wait for threads."""

    async def inline(work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", inline)


@pytest.fixture
def client(loop: FakeTime) -> Client:
    return Client(loop, HeldConfig())


def test_a_stub_is_fetched_once_the_gateway_has_learned_of_the_sa_too(client: Client) -> None:
    client.up()
    assert client.requests == []
    client.loop.pass_time(SETTLE_SECONDS + 0.1)
    assert len(client.requests) == 1
    assert client.stub == b"sealed"
    assert client.named == [OTHERS]


def test_it_is_fetched_again_in_good_time_and_useless_when_it_has_expired(client: Client) -> None:
    client.up()
    client.loop.pass_time(SETTLE_SECONDS + LIFETIME * REFRESH_SHARE - 1)
    assert len(client.requests) == 1
    client.loop.pass_time(2)
    assert len(client.requests) == 2
    client.answers = False
    client.loop.pass_time(LIFETIME + 1)
    assert client.stub is None


def test_a_gateway_that_does_not_answer_is_asked_again_less_and_less_often(client: Client) -> None:
    client.answers = False
    client.up()
    client.loop.pass_time(20 * RETRY_MAX)
    # each attempt sends several times; between two attempts is a longer pause
    begins = [later for one, later in pairwise(client.requests) if later - one >= RETRY_MIN]
    pauses = [later - one for one, later in pairwise(begins)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(pauses[-2])
    assert RETRY_MAX <= pauses[-1] < RETRY_MAX + 30
    assert client.stub is None


def test_a_gateway_without_a_stub_is_asked_for_the_others_alone_and_rarely(client: Client) -> None:
    client.gives = None
    client.up()
    client.loop.pass_time(NAMED_SECONDS)
    assert len(client.requests) == 1
    assert client.named == [OTHERS]
    client.loop.pass_time(SETTLE_SECONDS + 1)
    assert len(client.requests) == 2
    assert client.stub is None


def test_an_answer_that_is_not_proved_is_not_accepted(client: Client) -> None:
    client.keys = b"?" * 32
    client.up()
    client.loop.pass_time(SETTLE_SECONDS + 1)
    assert client.requests
    assert client.stub is None
    assert client.named == []


def test_an_answer_to_an_earlier_request_is_not_accepted(client: Client) -> None:
    client.up()
    client.loop.pass_time(SETTLE_SECONDS + 1)
    old = StubSa(client.sa.id.spi_i, client.sa.id.spi_r, True, (GATEWAY, client.sa.id.spi_r), 5, client.keys)
    earlier = parse_stub_message(build_get(old, b"n" * 32))
    gateway = StubSa(client.sa.id.spi_i, client.sa.id.spi_r, False, (GATEWAY, client.sa.id.spi_r), 5, client.keys)
    message = gateway_message(build_download(gateway, earlier, b"replayed", LIFETIME))
    assert message is not None
    client.keeper.received(message)
    assert client.stub == b"sealed"


def test_what_changes_the_stub_has_it_fetched_again(client: Client) -> None:
    client.up()
    client.loop.pass_time(SETTLE_SECONDS + 1)
    client.up()
    client.loop.pass_time(SETTLE_SECONDS + 1)
    assert len(client.requests) == 1
    client.sa.children = ()
    client.up()
    client.loop.pass_time(SETTLE_SECONDS + 1)
    assert len(client.requests) == 2


def test_an_sa_that_ended_is_not_asked_about_any_more(client: Client) -> None:
    client.up()
    client.tracker.forget(client.sa.id)
    client.loop.pass_time(10 * SETTLE_SECONDS)
    assert client.requests == []


def test_without_fetch_no_gateway_is_asked_and_no_stub_is_kept(loop: FakeTime) -> None:
    client = Client(loop, HeldConfig(fetch=False))
    client.up()
    client.keeper.given(client.sa, b"sealed", LIFETIME)
    loop.pass_time(SETTLE_SECONDS + 1)
    assert client.requests == []
    assert client.stub is None


def test_a_resumed_sa_has_the_stub_of_its_answer_until_it_fetches_one(client: Client) -> None:
    async def resumed() -> None:
        client.keeper.given(client.sa, b"of the answer", LIFETIME)

    client.loop.run(resumed())
    assert client.stub == b"of the answer"
    client.loop.pass_time(SETTLE_SECONDS + 1)
    assert client.stub == b"sealed"


def test_a_host_that_comes_back_has_its_sessions_and_stubs_from_the_file(loop: FakeTime, tmp_path: Path) -> None:
    file = tmp_path / "sessions"
    client = Client(loop, HeldConfig(file=str(file)))
    client.up()
    client.loop.pass_time(SETTLE_SECONDS + 2 * SAVE_SECONDS)
    loop.run(client.keeper.close())
    again = Client(loop, HeldConfig(file=str(file)))
    [restored] = again.keeper.restore()
    assert restored.id.spis == client.sa.id.spis
    assert again.keeper.stub_of(restored) == b"sealed"


def test_a_session_that_expired_meanwhile_is_not_restored(loop: FakeTime, tmp_path: Path) -> None:
    file = tmp_path / "sessions"
    client = Client(loop, HeldConfig(file=str(file)))
    client.sa.expires = int(WALL) + 60
    client.up()
    client.loop.pass_time(SETTLE_SECONDS + 2 * SAVE_SECONDS)
    assert len(client.keeper.restore()) == 1
    client.loop.pass_time(60)
    assert client.keeper.restore() == []


def test_sessions_that_are_over_leave_the_file(loop: FakeTime, tmp_path: Path) -> None:
    file = tmp_path / "sessions"
    client = Client(loop, HeldConfig(file=str(file)))
    client.up()
    client.loop.pass_time(SETTLE_SECONDS + 2 * SAVE_SECONDS)
    assert len(client.keeper.restore()) == 1
    client.sessions.clear()
    client.tracker.forget(client.sa.id)
    client.up()
    client.loop.pass_time(SETTLE_SECONDS)
    assert client.keeper.restore() == []
