"""What charon says over VICI, read (bridge.charon.vici_types); that real charons say it: every test with a lab."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from bridge.charon import vici_client
from bridge.charon.vici_client import EVENTS, ViciClient
from bridge.charon.vici_types import ChildInfo, SaInfo, ViciError, parse_connection, parse_event, parse_ike_sa
from bridge.stub.types import Endpoint

SA: dict[str, Any] = {
    "version": b"2",
    "state": b"ESTABLISHED",
    "local-host": b"192.0.2.1",
    "local-port": b"4500",
    "remote-host": b"fe80::1%eth0",
    "remote-port": b"500",
    "initiator-spi": b"1" * 16,
    "responder-spi": b"2" * 16,
    "initiator": b"yes",
    "remote-vips": [b"10.0.0.1"],
    "child-sas": {"net-1": {"name": b"net", "state": b"INSTALLED", "spi-in": b"c0000001"}},
}


def test_an_ike_sa_is_read() -> None:
    info = parse_ike_sa("home", SA)
    assert (info.spi_i.hex(), info.spi_r.hex(), info.initiator) == ("1" * 16, "2" * 16, True)
    assert (info.remote.address, info.remote_vips) == ("fe80::1", ("10.0.0.1",))
    assert info.children == (ChildInfo("net", "INSTALLED", int.from_bytes(b"\xc0\0\0\1", sys.byteorder)),)
    assert info.rekey is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("initiator-spi", b"x"),
        ("local-host", b"nowhere"),
        ("child-sas", b"a value"),
        ("child-sas", {"net-1": b"a value"}),
        ("remote-vips", [b"nowhere"]),
    ],
)
def test_an_ike_sa_that_charon_would_not_send_is_an_error_of_its_own(field: str, value: Any) -> None:
    with pytest.raises(ViciError, match="home"):
        parse_ike_sa("home", SA | {field: value})


@pytest.mark.parametrize("section", [{}, {"old": SA}, {"old": SA, "new": b"a value"}])
def test_a_rekey_without_both_sas_is_an_error_and_does_not_end_the_listener(section: dict[str, Any]) -> None:
    with pytest.raises(ViciError):
        parse_event("ike-rekey", {"home": section})


def test_a_move_is_read_from_beside_the_sa_where_charon_tells_the_new_addresses() -> None:
    """charon raises the event before it changes the SA; test_paths shows that it does."""
    moved = {"local-port": b"4500", "remote-host": b"2001:db8::7", "remote-port": b"4501", "local-host": b"192.0.2.2"}
    [event] = parse_event("ike-update", {**moved, "home": SA})
    assert event.sa.local == Endpoint("192.0.2.2", 4500)
    assert event.sa.remote == Endpoint("2001:db8::7", 4501)
    assert event.sa.spi_i.hex() == "1" * 16


def test_a_move_to_nowhere_is_an_error_of_its_own() -> None:
    with pytest.raises(ViciError, match="home"):
        parse_event("ike-update", {"remote-host": b"nowhere", "home": SA})


@pytest.mark.parametrize("kind", EVENTS)
def test_what_is_no_section_in_an_event_is_passed_over(kind: str) -> None:
    assert parse_event(kind, {"up": b"yes", "list": [b"x"]}) == []


@pytest.mark.parametrize("section", [{"children": b"a value"}, {"children": {"net": b"a value"}}])
def test_a_connection_that_charon_would_not_send_is_an_error_of_its_own(section: dict[str, Any]) -> None:
    with pytest.raises(ViciError, match="home"):
        parse_connection("home", section)


async def test_who_takes_a_long_list_in_parts_gets_its_own_error_and_no_further_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or what comes next would be taken for all that there is."""
    path = tmp_path / "vici"
    monkeypatch.setattr(vici_client, "LISTED_AT_ONCE", 1)
    monkeypatch.setattr(vici_client, "_listed", lambda session, connection: iter([parse_ike_sa("home", SA)] * 3))
    taken: list[SaInfo] = []

    def take(infos: list[SaInfo]) -> None:
        taken.extend(infos)
        raise RuntimeError("one that cannot be taken")

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        vici = ViciClient(str(path), on_event=print, on_connect=print, on_disconnect=print)
        with pytest.raises(RuntimeError, match="cannot be taken"):
            await vici.each_sas(take)
        vici.close()
    assert len(taken) == 1
