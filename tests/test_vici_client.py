"""What charon says over VICI, read (bridge.charon.vici_types); that real charons say it: every test with a lab."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from vici.protocol import Message, Packet

from bridge.charon import vici_client, vici_watch
from bridge.charon.vici_client import ViciClient
from bridge.charon.vici_session import AGAIN_SECONDS, ViciSession
from bridge.charon.vici_types import ChildInfo, SaInfo, ViciError, parse_connection, parse_event, parse_ike_sa
from bridge.charon.vici_watch import EVENTS, ViciWatch
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


def test_a_move_is_read_from_beside_the_sa_where_charon_reports_the_new_addresses() -> None:
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


# over a socket


class Charon:
    """The far end of a VICI socket: answers from a table."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.answers: dict[str, list[bytes]] = {"version": [answer({"version": b"5.9.8"})]}
        self.asked = asyncio.Event()
        self.writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        self._server.close()
        self.hang_up()
        Path(self.path).unlink()

    def hang_up(self) -> None:
        for writer in self.writers:
            writer.close()
        self.writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                packet = await reader.readexactly(int.from_bytes(await reader.readexactly(4)))
                self.asked.set()
                name = packet[2 : 2 + packet[1]].decode()
                if packet[0] == Packet.EVENT_REGISTER:
                    answers = self.answers.get(name, [bytes([Packet.EVENT_CONFIRM])])
                else:
                    answers = self.answers.get(name, [bytes([Packet.CMD_UNKNOWN])])
                for octets in answers:
                    self.send(octets, writer)

    def send(self, octets: bytes, *writers: asyncio.StreamWriter) -> None:
        for writer in writers or self.writers:
            writer.write(len(octets).to_bytes(4) + octets)


def answer(message: dict[str, Any]) -> bytes:
    return bytes([Packet.CMD_RESPONSE, *Message.serialize(message)])


def event(kind: str, message: dict[str, Any]) -> bytes:
    return bytes([Packet.EVENT, len(kind), *kind.encode(), *Message.serialize(message)])


LISTED = {"home": SA | {"remote-host": b"192.0.2.7"}}


@pytest.fixture
async def charon(tmp_path: Path) -> AsyncIterator[Charon]:
    charon = Charon(tmp_path / "vici")
    await charon.start()
    yield charon
    await charon.stop()


async def test_a_command_is_answered(charon: Charon) -> None:
    assert await ViciClient(charon.path).version() == "5.9.8"


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (answer({"success": b"no", "errmsg": b"CHILD_SA not found"}), "CHILD_SA not found"),
        (answer({"success": b"no"}), "without a reason"),
        (bytes([Packet.CMD_UNKNOWN]), "does not know"),
        (bytes([Packet.EVENT_CONFIRM]), "type 5"),
        (b"", "initiate"),
        (answer({})[:1] + bytes([Message.SECTION_END]), "Unexpected end of section"),
        (answer({})[:1] + bytes([Message.KEY_VALUE, 9]), "initiate"),
        (answer({})[:1] + bytes([Message.KEY_VALUE, 1, 0xFF, 0, 0]), "initiate"),
    ],
)
async def test_an_answer_that_is_none_is_an_error_that_names_the_command(
    charon: Charon, octets: bytes, reason: str
) -> None:
    charon.answers["initiate"] = [octets]
    with pytest.raises(ViciError, match=f"^initiate home/net: .*{reason}|^{reason}"):
        await ViciClient(charon.path).initiate("home", "net", 1.0, set())


async def test_a_packet_of_more_octets_than_vici_allows_is_not_waited_for(charon: Charon) -> None:
    charon.answers["version"] = [bytes(512 * 1024 + 1)]
    with pytest.raises(ViciError, match="octets"):
        await ViciClient(charon.path).version()


async def test_a_charon_that_is_not_there_or_hangs_up_is_an_error(charon: Charon, tmp_path: Path) -> None:
    with pytest.raises(ViciError, match="version: "):
        await ViciClient(str(tmp_path / "nowhere")).version()
    charon.answers["version"] = []
    asking = asyncio.create_task(ViciClient(charon.path).version())
    await charon.asked.wait()
    charon.hang_up()
    with pytest.raises(ViciError, match="closed the connection"):
        await asking


async def test_all_ike_sas_are_listed_and_one_that_cannot_be_read_is_left_out(charon: Charon) -> None:
    broken = {"home": SA | {"local-host": b"nowhere"}}
    charon.answers["list-sas"] = [event("list-sa", one) for one in (LISTED, broken, LISTED)] + [answer({})]
    assert [info.remote.address for info in await ViciClient(charon.path).list_sas()] == ["192.0.2.7"] * 2


async def test_the_tasks_of_ike_sas_are_asked_for_over_one_connection(charon: Charon) -> None:
    busy = {"home": SA | {"tasks-active": [b"CHILD_REKEY"], "tasks-queued": [b"IKE_DPD"], "tasks-passive": [b"X"]}}
    charon.answers["list-sas"] = [event("list-sa", busy), answer({})]
    assert await ViciClient(charon.path).tasks(["1", "2"]) == [{"CHILD_REKEY", "IKE_DPD"}] * 2
    assert len(charon.writers) == 1
    charon.answers["list-sas"] = [event("list-sa", LISTED), answer({})]
    assert await ViciClient(charon.path).tasks(["1"]) == [set()]


async def test_tasks_that_charon_would_not_send_are_an_error(charon: Charon) -> None:
    charon.answers["list-sas"] = [event("list-sa", {"home": b"a value"}), answer({})]
    with pytest.raises(ViciError, match="tasks"):
        await ViciClient(charon.path).tasks(["1"])


async def test_a_list_that_ends_half_way_is_an_error_and_not_taken_for_all_there_is(charon: Charon) -> None:
    charon.answers["list-sas"] = [event("list-sa", LISTED), bytes([Packet.CMD_UNKNOWN])]
    with pytest.raises(ViciError):
        await ViciClient(charon.path).list_sas()


async def test_a_long_list_leaves_the_event_loop_its_turns(charon: Charon) -> None:
    charon.answers["list-sas"] = [event("list-sa", LISTED)] * 500 + [answer({})]
    parts: list[int] = []
    slept = await ViciClient(charon.path).each_sas(lambda infos: parts.append(len(infos)))
    assert sum(parts) == 500
    assert len(parts) > 5
    assert slept == pytest.approx((len(parts) - 1) * 0.003)


async def test_who_takes_a_long_list_in_parts_gets_its_own_error_and_no_further_part(
    monkeypatch: pytest.MonkeyPatch, charon: Charon
) -> None:
    """Or what comes next would be taken for all that there is."""
    monkeypatch.setattr(vici_client, "SLICE_SECONDS", 0.0)
    charon.answers["list-sas"] = [event("list-sa", LISTED)] * 3 + [answer({})]
    taken: list[SaInfo] = []

    def take(infos: list[SaInfo]) -> None:
        taken.extend(infos)
        raise KeyError("one that cannot be taken")

    with pytest.raises(KeyError, match="cannot be taken"):
        await ViciClient(charon.path).each_sas(take)
    assert len(taken) == 1


async def test_why_an_ike_sa_was_not_ended_is_said_and_the_next_is_ended_over_the_same_connection(
    charon: Charon,
) -> None:
    async with ViciClient(charon.path).ending(lambda: True) as end_sa:
        charon.answers["terminate"] = [answer({"success": b"no", "errmsg": b"no matching SAs"})]
        assert await end_sa("7") == "no matching SAs"
        charon.answers["terminate"] = [answer({"success": b"yes"})]
        assert await end_sa("8") == ""
    assert len(charon.writers) == 1


async def test_over_a_connection_to_another_charon_nothing_is_ended(charon: Charon) -> None:
    with pytest.raises(ViciError, match="restarted"):
        async with ViciClient(charon.path).ending(lambda: False):
            pass


async def test_a_charon_that_goes_while_it_is_to_end_an_ike_sa_is_an_error_like_any_other(charon: Charon) -> None:
    async def end() -> None:
        async with ViciClient(charon.path).ending(lambda: True) as end_sa:
            charon.hang_up()
            await end_sa("7")

    with pytest.raises(ViciError):
        await end()


class Heard:
    """What a ViciWatch passes on."""

    def __init__(self, path: str) -> None:
        self.said: list[str] = []
        self.watch = ViciWatch(
            path,
            on_event=lambda event: self.said.append(event.kind),
            on_connect=lambda release: self.said.append(f"connected to {release}"),
            on_disconnect=lambda: self.said.append("disconnected"),
        )

    async def until(self, *said: str) -> None:
        async with asyncio.timeout(10):
            while self.said != list(said):  # noqa: ASYNC110 - a test polls what it is to see
                await asyncio.sleep(0.001)


async def test_events_are_passed_on_from_the_first_one_on_in_order(charon: Charon) -> None:
    updown = event("ike-updown", {"up": b"yes", **LISTED})
    # between the first registration and the last one
    charon.answers["ike-update"] = [updown, bytes([Packet.EVENT_CONFIRM])]
    heard = Heard(charon.path)
    heard.watch.start()
    await heard.until("connected to 5.9.8", "ike-updown")
    charon.send(event("ike-update", {"home": b"a value"}))
    charon.send(event("child-updown", {"up": b"yes", "home": {}}))
    charon.send(event("child-updown", {"up": b"no", **LISTED}))
    await heard.until("connected to 5.9.8", "ike-updown", "child-updown")
    await heard.watch.close()
    await heard.until("connected to 5.9.8", "ike-updown", "child-updown", "disconnected")
    assert not heard.watch.connected


async def test_a_charon_that_comes_back_is_listened_to_again(charon: Charon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vici_watch, "RETRY_SECONDS", 0.01)
    heard = Heard(charon.path)
    heard.watch.start()
    await heard.until("connected to 5.9.8")
    await charon.stop()
    await heard.until("connected to 5.9.8", "disconnected")
    assert not heard.watch.connected
    await charon.start()
    await heard.until("connected to 5.9.8", "disconnected", "connected to 5.9.8")
    await heard.watch.close()


async def test_a_connection_that_finds_no_place_in_the_queue_is_tried_again(tmp_path: Path) -> None:
    """charon's socket lets three wait; more at the same time get EAGAIN."""
    path = str(tmp_path / "vici")
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(path)
        server.listen(0)
        waiting = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                first = stack.enter_context(socket.socket(socket.AF_UNIX))
                first.setblocking(False)
                first.connect(path)
                waiting += 1

        async def connect() -> None:
            async with ViciSession.open(path):
                pass

        task = asyncio.ensure_future(connect())
        await asyncio.sleep(5 * AGAIN_SECONDS)
        assert not task.done()
        for _ in range(waiting):
            stack.enter_context(server.accept()[0])
        await task
