"""The sidecar's end of the HA channel (bridge.charon.ha_channel), with real sockets: who sent what, and is it whole."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from structlog.testing import capture_logs

from bridge.charon.ha_channel import ChannelError, HaChannel
from bridge.charon.ha_codec import encode
from bridge.charon.ha_message import PORT, Attr, HaMessage, IkeId, MessageType
from bridge.stub.types import Endpoint
from net_support import alone

SIDECAR, CHARON = "127.0.0.2", "127.0.0.1"
SA = IkeId.of(b"I" * 8, b"R" * 8, False)
VIP = Endpoint("10.20.0.1", 0)
DELETE = encode(3, MessageType.IKE_DELETE, [(Attr.IKE_ID, SA)])

# Binds charon's address as a user without privileges, sends a datagram (hex) to the sidecar, and ends.
FORGER = """
import os, socket, sys
os.setuid(65534)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind((sys.argv[1], int(sys.argv[3])))
    sock.sendto(bytes.fromhex(sys.argv[4]), (sys.argv[2], int(sys.argv[3])))
"""


class Scene:
    """A channel, and what it hands on."""

    def __init__(self) -> None:
        self.messages: list[tuple[HaMessage, bool]] = []
        self.malformed: list[IkeId | None] = []
        self.channel = HaChannel(
            SIDECAR,
            CHARON,
            lambda message, genuine: self.messages.append((message, genuine)),
            lambda ike_id, reason: self.malformed.append(ike_id),
        )

    @property
    def genuine(self) -> list[bool]:
        return [genuine for _, genuine in self.messages]


def charon() -> socket.socket:
    """charon's end."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    sock.bind((CHARON, PORT))
    sock.connect((SIDECAR, PORT))
    return sock


def forge(message: bytes) -> None:
    words = (CHARON, SIDECAR, str(PORT), message.hex())
    subprocess.run([sys.executable, "-c", FORGER, *words], check=True, timeout=30)


@pytest.fixture
def scene() -> Iterator[Scene]:
    """Within a network namespace where no other process has the HA channel's port."""
    with alone():
        scene = Scene()
        scene.channel.open()
        scene.channel.expect(3)
        yield scene
        scene.channel.close()


def test_what_charon_sends_while_its_socket_is_known_is_genuine(scene: Scene) -> None:
    with charon() as sock:
        # the first may have been sent before this charon was there
        sock.send(DELETE)
        scene.channel.receive()
        sock.send(DELETE)
        scene.channel.receive()
    assert scene.genuine == [False, True]


def test_what_waited_in_the_socket_before_charon_was_seen_may_be_forged(scene: Scene) -> None:
    """A sidecar that was stopped: charon crashed meanwhile, a user without privileges took its port for a moment, and
    charon is back when the sidecar reads."""
    forge(DELETE)
    with charon() as sock:
        sock.send(DELETE)
        scene.channel.receive()
        assert scene.genuine == [False, False]
        sock.send(DELETE)
        scene.channel.receive()
        assert scene.genuine[2:] == [True]


def test_what_came_between_two_charons_may_be_forged(scene: Scene) -> None:
    with charon() as sock:
        scene.channel.receive()
        sock.send(DELETE)
        scene.channel.receive()
        assert scene.genuine == [True]
    forge(DELETE)
    with charon() as sock:
        scene.channel.receive()
        assert scene.genuine == [True, False]
        sock.send(DELETE)
        scene.channel.receive()
        assert scene.genuine == [True, False, True]


def test_a_charon_that_is_gone_says_nothing(scene: Scene) -> None:
    with charon() as sock:
        scene.channel.receive()
        sock.send(DELETE)
    # it could have been sent by any process since
    scene.channel.receive()
    forge(DELETE)
    scene.channel.receive()
    assert scene.messages == []
    assert scene.channel.malformed == 2


class Rules:
    """What the look at the rules says; `asked`: of which moments."""

    def __init__(self, scene: Scene, held: bool) -> None:
        self.held = held
        self.asked: list[float] = []
        self.answer = asyncio.Event()
        self.answer.set()
        scene.channel.guarded = self.in_place_since
        scene.channel.start()

    async def in_place_since(self, moment: float) -> bool:
        self.asked.append(moment)
        await self.answer.wait()
        return self.held


async def turns() -> None:
    """All that is due is done."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("held", [True, False], ids=["in place", "not in place"])
async def test_the_last_words_of_a_charon_count_where_only_root_can_have_sent_them(scene: Scene, held: bool) -> None:
    rules = Rules(scene, held)
    with charon() as sock:
        before = time.monotonic()
        scene.channel.receive()
        after = time.monotonic()
        sock.send(DELETE)
    scene.channel.receive()
    assert scene.messages == []
    await turns()
    assert scene.genuine == ([True] if held else [])
    assert scene.channel.malformed == (0 if held else 1)
    # they came after the queue was empty
    [moment] = rules.asked
    assert before <= moment <= after


async def test_what_waited_since_before_the_first_look_at_the_queue_does_not_count(scene: Scene) -> None:
    rules = Rules(scene, True)
    with charon() as sock:
        sock.send(DELETE)
    scene.channel.receive()
    await turns()
    assert (scene.messages, rules.asked) == ([], [])


async def test_last_words_that_come_during_a_look_at_the_rules_need_another_one(scene: Scene) -> None:
    rules = Rules(scene, True)
    with charon() as sock:
        scene.channel.receive()
        rules.answer.clear()
        sock.send(DELETE)
    scene.channel.receive()
    await turns()
    with charon() as sock:
        sock.send(DELETE)
    scene.channel.receive()
    await turns()
    rules.answer.set()
    await turns()
    assert scene.genuine == [True, True]
    # of the same moment: nothing was known to be charon's since
    assert rules.asked[0] == rules.asked[1]


async def test_another_charon_ends_what_the_one_before_said_last(scene: Scene) -> None:
    rules = Rules(scene, True)
    rules.answer.clear()
    with charon() as sock:
        scene.channel.receive()
        sock.send(DELETE)
    scene.channel.receive()
    await turns()
    scene.channel.expect(3)
    rules.answer.set()
    await turns()
    assert scene.messages == []


async def test_where_another_process_has_charons_end_the_rules_are_not_asked(scene: Scene) -> None:
    rules = Rules(scene, True)
    with charon() as sock:
        scene.channel.receive()
        sock.send(DELETE)
    with charon():
        scene.channel.receive()
    await turns()
    assert (scene.genuine, rules.asked) == ([False], [])


def test_another_user_who_holds_charons_end_is_named_and_not_believed(scene: Scene) -> None:
    staying = FORGER + "    sys.stdin.read(1)"
    words = [sys.executable, "-c", staying]
    forger = subprocess.Popen([*words, CHARON, SIDECAR, str(PORT), DELETE.hex()], stdin=subprocess.PIPE, text=True)
    assert forger.stdin is not None
    try:
        with capture_logs() as log:
            until(lambda: received(scene) > 0)
        assert scene.messages == []
        assert not scene.channel.ready()
        assert scene.channel.holder() is None
        assert [line["uid"] for line in log if line["event"] == "ha-channel-foreign"] == [65534]
    finally:
        forger.kill()
        forger.wait()


def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - there is no event of it
                await asyncio.sleep(0.01)

    asyncio.run(wait())


def received(scene: Scene) -> int:
    scene.channel.receive()
    return scene.channel.received


def test_a_message_of_any_length_is_read_whole(scene: Scene) -> None:
    addresses: list[tuple[Attr, Any]] = [(Attr.IKE_ID, SA)]
    many = (
        encode(3, MessageType.IKE_UPDATE, addresses)
        + 6000 * encode(3, MessageType.IKE_UPDATE, [(Attr.REMOTE_VIP, VIP)])[2:]
    )
    assert len(many) > 40_000
    with charon() as sock:
        scene.channel.receive()
        sock.send(many)
        scene.channel.receive()
    [(message, _)] = scene.messages
    assert len(message.all(Attr.REMOTE_VIP)) == 6000


def test_a_datagram_that_was_cut_is_malformed_and_names_its_sa(scene: Scene) -> None:
    """It ends between two attributes: it reads as a whole message."""
    update = encode(3, MessageType.IKE_UPDATE, [(Attr.IKE_ID, SA), (Attr.REMOTE_VIP, VIP), (Attr.REMOTE_VIP, VIP)])
    scene.channel._buffer = bytearray(len(update) - 8)
    with charon() as sock:
        scene.channel.receive()
        sock.send(update)
        scene.channel.receive()
    assert scene.messages == []
    assert scene.malformed == [SA]


def test_a_malformed_message_is_reported_with_its_sa(scene: Scene) -> None:
    with charon() as sock:
        scene.channel.receive()
        sock.send(DELETE + DELETE[2:])
        scene.channel.receive()
    assert scene.messages == []
    assert scene.malformed == [SA]
    assert scene.channel.malformed == 1


# versions


def test_the_version_that_charon_sends_wins_over_the_one_that_its_release_lets_expect(scene: Scene) -> None:
    scene.channel.expect(3)
    with charon() as sock:
        scene.channel.receive()
        sock.send(encode(5, MessageType.IKE_DELETE, [(Attr.IKE_ID, SA)]))
        scene.channel.receive()
    assert scene.channel.version == 5
    assert scene.genuine == [True]


def test_a_message_that_may_be_forged_changes_no_version(scene: Scene) -> None:
    forge(encode(5, MessageType.IKE_DELETE, [(Attr.IKE_ID, SA)]))
    forge(bytes((9, 5)))
    with charon():
        scene.channel.receive()
        assert scene.channel.version == 3
        assert scene.channel.unsupported is None
        assert scene.channel.ready()


def test_a_release_that_is_not_known_is_ready_once_it_has_shown_its_version(scene: Scene) -> None:
    scene.channel.expect(None)
    with charon() as sock:
        scene.channel.receive()
        assert not scene.channel.ready()
        sock.send(encode(5, MessageType.IKE_DELETE, [(Attr.IKE_ID, SA)]))
        scene.channel.receive()
        assert scene.channel.ready()
        assert scene.channel.version == 5


def test_a_version_that_is_not_known_is_not_ready_and_one_error_names_the_fix(scene: Scene) -> None:
    with charon() as sock, capture_logs() as log:
        scene.channel.receive()
        for _ in range(3):
            sock.send(bytes((6,)) + DELETE[1:])
            scene.channel.receive()
        assert not scene.channel.ready()
    assert scene.messages == []
    assert scene.channel.unsupported == 6
    [error] = [line for line in log if line["event"] == "ha-version-unsupported"]
    assert error["log_level"] == "error"
    assert error["version"] == 6
    assert "install" in error["fix"]
    # another charon, of a release that is known
    scene.channel.expect(5)
    assert scene.channel.unsupported is None


async def test_a_charon_that_dies_while_its_queue_is_full_is_a_channel_error(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """Stands for the socket: that charon dies between two tries cannot be timed."""

        errors: ClassVar[list[OSError]] = [BlockingIOError(), ConnectionRefusedError(111, "Connection refused")]

        def send(self, message: bytes) -> None:
            raise self.errors.pop(0)

    async def below(octets: int) -> None: ...

    monkeypatch.setattr(scene.channel, "_socket", Full())
    monkeypatch.setattr(scene.channel, "_below", below)
    with pytest.raises(ChannelError, match="does not take HA messages"):
        await scene.channel.send([b"message"])
    monkeypatch.undo()
