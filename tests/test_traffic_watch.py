"""Whether resumed sessions carry traffic (bridge.client.traffic_watch)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from bridge.charon.ha_message import IkeId
from bridge.charon.vici_types import ChildInfo, SaInfo
from bridge.client.sessions import Session
from bridge.client.traffic_watch import SILENT_SECONDS, TrafficWatch

OLD, NEW = b"o" * 16, b"n" * 16


class Client:
    """One session; `again` are those that were to be set up again."""

    def __init__(self) -> None:
        self.now = 100.0
        self.again: list[Session] = []
        self.session = Session("x", self._sa(OLD), {OLD: self._sa(OLD)})
        sessions = SimpleNamespace(of=lambda spis: self.session if spis in self.session.sas else None)
        self.watch = TrafficWatch(cast(Any, None), cast(Any, sessions), self.again.append, clock=lambda: self.now)

    @staticmethod
    def _sa(spis: bytes) -> Any:
        return SimpleNamespace(id=IkeId.of(spis[:8], spis[8:], True))

    def look(self, spis: bytes, packets_in: int, packets_out: int) -> None:
        child = ChildInfo("net", "INSTALLED", 1, packets_in, packets_out)
        remote = SimpleNamespace(address="192.0.2.2")
        self.watch.look([cast(SaInfo, SimpleNamespace(spis=spis, children=(child,), connection="home", remote=remote))])

    def resume(self) -> None:
        self.session.last, self.session.sas = self._sa(NEW), {NEW: self._sa(NEW)}
        self.watch.resumed(self.session)

    def silent(self, packets_out: int = 5) -> None:
        """Nothing comes, for as long as that may be."""
        for _ in range(5):
            self.look(NEW, 0, packets_out)
            self.now += SILENT_SECONDS / 4


def test_a_session_that_sends_and_gets_nothing_any_more_is_set_up_again_once() -> None:
    client = Client()
    client.look(OLD, 7, 7)
    client.resume()
    client.silent()
    client.silent()
    assert client.again == [client.session]


def test_one_that_never_got_anything_is_left_alone() -> None:
    client = Client()
    client.look(OLD, 0, 7)
    client.resume()
    client.silent()
    assert client.again == []


def test_one_that_sends_nothing_is_left_alone() -> None:
    client = Client()
    client.look(OLD, 7, 7)
    client.resume()
    client.silent(packets_out=0)
    assert client.again == []


def test_one_packet_is_enough() -> None:
    client = Client()
    client.look(OLD, 7, 7)
    client.resume()
    client.look(NEW, 1, 5)
    client.silent()
    assert client.again == []


def test_one_that_moved_on_is_forgotten() -> None:
    client = Client()
    client.look(OLD, 7, 7)
    client.resume()
    client.session.sas = {}
    client.silent()
    assert client.again == []
