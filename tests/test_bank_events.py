"""Which part of a gateway gets which event of the bank (bridge.gateway.bank_events), and an operator's downloads."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bank_support import GATEWAY, keyring, stub_of
from bridge.bank.key_file import KeyFile
from bridge.bank.key_rotation import KeyRotation
from bridge.bank.keyspace import Event
from bridge.bank.prefetch import Prefetch
from bridge.bank.redis_gateways import GATEWAYS_MAX
from bridge.config import FailoverConfig
from bridge.gateway.bank_events import BankEvents
from bridge.gateway.bank_followers import BankFollowers
from bridge.gateway.downloads import Downloads
from bridge.gateway.failover import Failover
from bridge.gateway.left_in_kernel import LeftInKernel
from bridge.gateway.metrics import GatewayMetrics
from bridge.gateway.peer_watch import PeerState
from bridge.gateway.revocation import LockOut
from bridge.gateway.session_elsewhere import SessionElsewhere
from bridge.gateway.shared_addresses import SharedAddresses
from bridge.stub import bank_keys
from role_support import FakeTime, Wire
from test_bank_comparison import OTHER, SOON, Gateway, loop

__all__ = ["loop"]


class Followers:
    """All that follows the bank at a gateway."""

    def __init__(self, loop: FakeTime) -> None:
        self.loop = loop
        self.gateway = gateway = Gateway(loop)
        bank, charon = gateway.bank.as_bank(), gateway.charon
        self.prefetch = Prefetch(bank)
        self.failover = Failover(FailoverConfig(), GATEWAY, bank, self.prefetch, charon, Wire(), lambda index: False)
        self.events = BankEvents("redis://127.0.0.1:1")
        self.downloads = Downloads(bank, self.prefetch, GATEWAY, self.events)
        self.looks = 0
        self.followers = BankFollowers(
            self.prefetch,
            self.failover,
            gateway.reconciler,
            SessionElsewhere(charon, bank, GatewayMetrics()),
            LockOut(gateway.known.revocations, bank, charon, gateway.endings, gateway.writer, GATEWAY),
            KeyRotation(bank, KeyFile(keyring(), "/nonexistent"), GATEWAY),
            LeftInKernel(charon, bank, GATEWAY),
            cast(SharedAddresses, SimpleNamespace(look_soon=self._look)),
        )
        self.followers.follow(self.events)

    def _look(self) -> None:
        self.looks += 1

    def event(self, key: str, what: str) -> None:
        async def happens() -> None:
            self.events.event(Event(key, what))

        self.loop.run(happens())


@pytest.fixture
def followers(loop: FakeTime) -> Followers:
    return Followers(loop)


def test_keys_that_no_gateway_wrote_are_ignored(followers: Followers) -> None:
    followers.gateway.start()
    for key in (
        f"{bank_keys.GONE}{{{GATEWAY}/zz}}",
        f"{bank_keys.FETCH}\ufffd",
        f"{bank_keys.HEARTBEAT}{os.urandom(4).hex()}",
        f"{bank_keys.STUB}x",
        f"{bank_keys.MOVED}x",
        "ike:other:x",
        "ike:",
        "",
    ):
        for what in ("zadd", "set", "del", "expired"):
            followers.event(key, what)
    followers.loop.pass_time(SOON)


def own_heartbeat(followers: Followers, *alive: str) -> None:
    """This gateway's heartbeat was written, and these others have one."""
    followers.loop.run(followers.failover.own_heartbeat(True, 0.0, alive))


def test_a_heartbeat_and_its_end_come_to_the_watch_of_other_gateways(followers: Followers) -> None:
    own_heartbeat(followers, OTHER)
    followers.event(f"{bank_keys.HEARTBEAT}{OTHER}", "set")
    assert OTHER in followers.failover.beats.written
    followers.event(f"{bank_keys.HEARTBEAT}{GATEWAY}", "set")
    assert GATEWAY not in followers.failover.beats.written
    followers.event(f"{bank_keys.HEARTBEAT}{OTHER}", "del")
    assert followers.failover.watch.state(OTHER) is PeerState.FAILED


def test_a_mark_of_a_locked_out_identity_has_the_marks_read(
    followers: Followers, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bool] = []
    monkeypatch.setattr(LockOut, "soon", lambda _: looked.append(True))
    followers.event(bank_keys.REVOKED_STAMP, "set")
    assert looked == [True]


@pytest.mark.parametrize("state", [True, False])
def test_events_that_arrive_again_have_all_compared(followers: Followers, state: bool) -> None:
    followers.gateway.start()
    followers.gateway.bank.done.clear()
    followers.gateway.sa()

    async def changes() -> None:
        followers.events.state(state)

    followers.loop.run(changes())
    followers.loop.pass_time(SOON)
    assert ("revisions" in followers.gateway.bank.done) is state


def test_moves_from_an_address_of_the_other_family_are_followed_from_its_first_session_on(
    followers: Followers, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[str] = []

    async def add(pattern: str) -> None:
        added.append(pattern)

    monkeypatch.setattr(followers.events, "add", add)
    followers.gateway.start()
    for _ in range(2):
        followers.gateway.sa(stub_of(gateway="fd00::1"))
        # before the next comparison
        followers.loop.pass_time(0.1)
        assert added == [bank_keys.moved_pattern("fd00::1")]


@pytest.mark.parametrize(("of", "fetched"), [(OTHER, True), (GATEWAY, False)])
def test_an_operators_download_is_for_all_but_the_gateway_itself(followers: Followers, of: str, fetched: bool) -> None:
    followers.event(f"{bank_keys.FETCH}{of}", "set")
    followers.loop.pass_time(SOON)
    assert (of in followers.prefetch.progress) is fetched


def test_without_keyspace_events_the_operators_download_says_what_is_missing(followers: Followers) -> None:
    answer: dict[str, Any] = followers.loop.run(followers.downloads.fetch({"from": OTHER}))
    assert "notify-keyspace-events" in answer["error"]


def test_forged_heartbeats_of_gateways_that_never_lived_cost_nothing(followers: Followers) -> None:
    followers.gateway.start()
    own_heartbeat(followers, OTHER)
    for number in range(100):
        for what in ("set", "del", "expired"):
            followers.event(f"{bank_keys.HEARTBEAT}198.18.0.{number}", what)
    assert not any(followers.failover.has_failed(f"198.18.0.{number}") for number in range(100))
    assert followers.prefetch.progress == {}
    assert followers.failover.beats.written == {}


def test_of_more_gateways_than_there_can_be_the_latest_are_known(followers: Followers) -> None:
    followers.gateway.start()
    for block in range(4):
        forged = [f"198.18.{block}.{number}" for number in range(1, 255)]
        followers.loop.pass_time(1.0)
        own_heartbeat(followers, OTHER, *forged, *(f"198.19.{block}.{number}" for number in range(1, 255)))
        for gateway in forged:
            followers.event(f"{bank_keys.HEARTBEAT}{gateway}", "set")
    assert len(followers.failover.beats.written) <= GATEWAYS_MAX
    followers.event(f"{bank_keys.HEARTBEAT}198.18.0.1", "del")
    assert not followers.failover.has_failed("198.18.0.1")
    followers.event(f"{bank_keys.HEARTBEAT}{OTHER}", "del")
    assert followers.failover.has_failed(OTHER)


def test_where_the_bank_was_away_a_gateway_looks_whether_another_one_has_taken_its_sessions(
    followers: Followers,
) -> None:
    followers.followers.returned()
    assert followers.looks == 1
