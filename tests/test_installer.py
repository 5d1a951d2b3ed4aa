"""What a charon is told of a rebuilt IKE_SA (bridge.charon.installer)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import cast

import msgspec
import pytest

from bank_support import stub_of
from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError, HaChannel
from bridge.charon.ha_codec import decode
from bridge.charon.ha_commands import add_message, update_message
from bridge.charon.ha_message import VERSIONS, Attr, HaMessage, IkeId, MessageType
from bridge.charon.ha_segments import SegmentChooser, landing_addresses, segment_of
from bridge.charon.half_open import HalfOpenSas
from bridge.charon.handshakes import Holds
from bridge.charon.ike_sa import Condition
from bridge.charon.install import Install
from bridge.charon.installer import Installer
from bridge.charon.socket_diag import CharonSocket
from bridge.config import HaConfig
from bridge.ike.transforms import Encr, Group, Prf, Suite
from bridge.stub.child_sa import NewChild
from bridge.stub.types import Endpoint, Identity

PLAIN, PRIVATE = int(Condition.NAT_ANY), int(Condition.PRIVATE) | 4
REBUILT = Install(
    id=IkeId.of(b"initiate", b"responds", False),
    suite=Suite(Encr.AES_GCM_16, 256, 0, Prf.HMAC_SHA2_384, Group.CURVE_25519, (Group.ML_KEM_768, 0, Group.ECP_384)),
    sk_d_old=bytes(48),
    nonce_i=bytes(32),
    nonce_r=bytes(range(32)),
    local_id=Identity(2, b"vpn.example.org"),
    remote_id=Identity(3, b"client@example.org"),
    eap_id=None,
    local=Endpoint("192.168.50.2", 4500),
    remote=Endpoint("192.168.50.10", 4500),
    connection="gw",
    conditions=(PLAIN, PRIVATE),
    extensions=(3, PRIVATE),
    local_vips=(),
    remote_vips=("10.20.1.1",),
)
SEGMENT_CHANGES = (MessageType.SEGMENT_TAKE, MessageType.SEGMENT_DROP)
ANOTHER = msgspec.structs.replace(REBUILT, id=IkeId.of(b"another1", b"responds", False))


@pytest.mark.parametrize("version", VERSIONS)
def test_further_key_exchanges_are_named_where_the_release_knows_them(version: int) -> None:
    message = decode(add_message(version, REBUILT, "198.18.0.8"))
    named = (Group.ML_KEM_768, 0, Group.ECP_384)
    expected = None if version == 3 else b"".join(group.to_bytes(2) for group in named)
    assert message.first(Attr.ALG_ADD_KES) == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_no_secret_but_the_old_sk_d_goes_into_the_keys(version: int) -> None:
    message = decode(add_message(version, REBUILT, "198.18.0.8"))
    assert message.first(Attr.SECRET) == b""
    assert message.first(Attr.OLD_SKD) == REBUILT.sk_d_old
    assert message.first(Attr.ADD_SECRET) is None
    assert message.first(Attr.IKE_REKEY_ID) is None


@pytest.mark.parametrize("version", VERSIONS)
def test_private_conditions_and_extensions_go_to_releases_that_know_them(version: int) -> None:
    message = decode(update_message(version, REBUILT, "198.18.0.8"))
    assert message.all(Attr.CONDITIONS) == ((PLAIN, PRIVATE) if version == 5 else (PLAIN,))
    assert message.all(Attr.EXTENSIONS) == ((3, PRIVATE) if version == 5 else (3,))


class OneChannel:
    """Stands for a channel: that charon is restarted between two messages cannot be provoked at will."""

    version = 3

    def __init__(self) -> None:
        self.inode = 1
        self.stuck = False
        self.messages: list[HaMessage] = []

    @property
    def sent(self) -> list[MessageType]:
        return [message.type for message in self.messages]

    def charon_socket(self) -> CharonSocket:
        return CharonSocket(0, 0, 0, self.inode)

    async def send(self, messages: Iterable[bytes]) -> None:
        if self.stuck:
            raise ChannelError("charon did not read its HA channel for 30 s")
        self.messages += [decode(message) for message in messages]

    async def drained(self) -> None: ...

    def receive(self) -> None: ...

    def send_now(self, message: bytes, *, to: int, idle: bool = False) -> bool:
        if to != self.inode:
            return False
        self.messages.append(decode(message))
        return True


async def test_what_was_installed_is_activated_together() -> None:
    channel = OneChannel()
    installer = Installer(cast(HaChannel, channel), SegmentChooser())
    await installer.land([REBUILT])
    await installer.land([ANOTHER])
    assert MessageType.SEGMENT_DROP not in channel.sent
    await installer.activate()
    assert channel.sent.count(MessageType.SEGMENT_DROP) == 1
    # and each gets its peer's address
    assert channel.sent[-2:] == [MessageType.IKE_UPDATE] * 2


async def test_sas_whose_segment_has_a_handshake_since_are_moved_to_another_and_activated_there() -> None:
    channel, half_open = OneChannel(), HalfOpenSas()
    segments = SegmentChooser(16, half_open)
    installer = Installer(cast(HaChannel, channel), segments)
    await installer.land([REBUILT])
    landed = segments.next(0.0)
    half_open.began(b"one", landing_addresses()[landed], 0.0)
    channel.messages.clear()
    await installer.activate()
    moved, *activation, at_last = channel.messages
    assert moved.type is at_last.type is MessageType.IKE_UPDATE
    [segment] = {message.first(Attr.SEGMENT) for message in activation}
    assert segment != landed
    assert segment_of(moved.first(Attr.REMOTE_ADDR).address) == segment
    assert at_last.first(Attr.REMOTE_ADDR) == REBUILT.remote


async def test_where_each_segment_has_a_handshake_the_activation_waits_until_one_is_over() -> None:
    channel, half_open, asked = OneChannel(), HalfOpenSas(), []
    for segment, address in landing_addresses().items():
        half_open.began(bytes((segment,)), address, 0.0)
    installer = Installer(cast(HaChannel, channel), SegmentChooser(16, half_open), blocked=lambda: asked.append(1))
    assert installer.wait() > 0
    await installer.land([REBUILT])
    activation = asyncio.create_task(installer.activate())
    # VICI is asked again and again which of them are over
    async with asyncio.timeout(60):
        while len(asked) < 3:  # noqa: ASYNC110 - there is no event of it
            await asyncio.sleep(0.01)
    assert MessageType.SEGMENT_TAKE not in channel.sent
    half_open.ended(b"\x07")
    await activation
    assert {message.first(Attr.SEGMENT) for message in channel.messages} >= {7}


async def test_vici_is_asked_for_handshakes_before_each_activation() -> None:
    channel, half_open = OneChannel(), HalfOpenSas()
    segments = SegmentChooser(16, half_open)
    order: list[str] = []

    @asynccontextmanager
    async def known() -> AsyncIterator[Holds]:
        order.append(f"asked after {channel.sent[-1].name}")
        half_open.listed({b"one": landing_addresses()[segments.next(0.0)]}, 0.0)
        yield lambda: True

    installer = Installer(cast(HaChannel, channel), segments, known)
    await installer.install([REBUILT])
    # all of what charon was told is done, or the SA would be one without a connection itself
    assert order == ["asked after IKE_MID_RESPONDER"]


async def test_handshakes_are_known_and_none_begins_until_charon_has_the_sas_active() -> None:
    channel, order = OneChannel(), []

    @asynccontextmanager
    async def known() -> AsyncIterator[Holds]:
        order.append("held")
        yield lambda: True
        order.append(f"let go after {channel.sent[-1].name}")

    installer = Installer(cast(HaChannel, channel), SegmentChooser(), known)
    await installer.install([REBUILT])
    assert order == ["held", "let go after IKE_UPDATE"]
    assert channel.sent.index(MessageType.SEGMENT_TAKE) < channel.sent.index(MessageType.SEGMENT_DROP)


@pytest.mark.parametrize("what", ["not held any more", "a handshake has begun"])
async def test_where_a_handshake_may_have_begun_since_vici_was_asked_it_is_asked_again(what: str) -> None:
    channel, half_open = OneChannel(), HalfOpenSas()
    segments = SegmentChooser(16, half_open)
    asked = 0

    @asynccontextmanager
    async def known() -> AsyncIterator[Holds]:
        nonlocal asked
        asked += 1
        first = asked == 1

        def holds() -> bool:
            if first and what == "a handshake has begun":
                half_open.began(b"one", landing_addresses()[segments.next(0.0)], 0.0)
                return False
            return not first

        yield holds
        if first:
            assert MessageType.SEGMENT_TAKE not in channel.sent

    installer = Installer(cast(HaChannel, channel), segments, known)
    await installer.install([REBUILT])
    assert asked == 2
    activated = {message.first(Attr.SEGMENT) for message in channel.messages if message.type in SEGMENT_CHANGES}
    assert not activated & segments.occupied(0.0)


async def test_what_was_installed_in_a_charon_that_was_restarted_since_is_not_there() -> None:
    channel = OneChannel()
    installer = Installer(cast(HaChannel, channel), SegmentChooser())
    await installer.land([REBUILT])
    channel.inode = 2
    with pytest.raises(ChannelError, match="restarted"):
        await installer.activate()
    channel.messages.clear()
    await installer.install([REBUILT])
    assert channel.sent.count(MessageType.IKE_ADD) == 1
    assert channel.sent[-1] == MessageType.IKE_UPDATE


class Watch:
    """Follows activations."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[bytes]]] = []

    def begins(self, spis: Sequence[bytes]) -> None:
        self.seen.append(("begins", list(spis)))

    def done(self, spis: Sequence[bytes]) -> None:
        self.seen.append(("done", list(spis)))

    def failed(self, spis: Sequence[bytes]) -> None:
        self.seen.append(("failed", list(spis)))

    def lost(self, spis: Sequence[bytes]) -> None:
        if spis:
            self.seen.append(("lost", list(spis)))


def remotes(channel: OneChannel) -> list[str]:
    """The addresses that IKE_UPDATE messages gave, in order."""
    return [
        message.first(Attr.REMOTE_ADDR).address
        for message in channel.messages
        if message.type == MessageType.IKE_UPDATE
    ]


CHILD = NewChild(stub_of().children[0], bytes(32), bytes(range(32)))
WITH_CHILD = msgspec.structs.replace(REBUILT, children=(CHILD,))


async def test_the_child_sas_of_a_passive_sa_have_its_peers_address() -> None:
    channel = OneChannel()
    installer = Installer(cast(HaChannel, channel), SegmentChooser())
    await installer.land([WITH_CHILD])
    landing, real = remotes(channel)[0], REBUILT.remote.address
    assert remotes(channel) == [landing, real, landing]
    assert installer.lands_at(landing)
    child = channel.sent.index(MessageType.CHILD_ADD)
    assert channel.sent[child - 1 : child + 2] == [
        MessageType.IKE_UPDATE,
        MessageType.CHILD_ADD,
        MessageType.IKE_UPDATE,
    ]
    channel.messages.clear()
    await installer.activate()
    assert MessageType.CHILD_ADD not in channel.sent
    assert remotes(channel) == [real]


async def test_an_sa_that_takes_the_place_of_another_has_its_child_sas_before_that_goes() -> None:
    channel = OneChannel()
    installer = Installer(cast(HaChannel, channel), SegmentChooser())
    await installer.install([msgspec.structs.replace(WITH_CHILD, replaces=ANOTHER.id)])
    assert channel.sent[-3:] == [MessageType.IKE_UPDATE, MessageType.CHILD_ADD, MessageType.IKE_DELETE]


async def test_the_watcher_follows_what_happens() -> None:
    channel, watch = OneChannel(), Watch()
    installer = Installer(cast(HaChannel, channel), SegmentChooser())
    installer.watcher = watch
    one, other = REBUILT.id.spis, ANOTHER.id.spis
    await installer.land([REBUILT, ANOTHER])
    assert installer.is_passive(one)
    await installer.delete([ANOTHER.id])
    assert watch.seen == [("lost", [other])]
    channel.stuck = True
    with pytest.raises(ChannelError):
        await installer.activate()
    assert installer.is_passive(one)
    channel.stuck = False
    await installer.activate()
    assert not installer.is_passive(one)
    assert watch.seen[1:] == [("begins", [one]), ("failed", [one]), ("begins", [one]), ("done", [one])]
    # nothing is left to be activated
    channel.messages.clear()
    await installer.activate()
    assert channel.messages == []


async def test_what_landed_in_a_charon_that_is_gone_is_lost_when_the_next_one_gets_something() -> None:
    channel, watch = OneChannel(), Watch()
    installer = Installer(cast(HaChannel, channel), SegmentChooser())
    installer.watcher = watch
    await installer.land([REBUILT])
    channel.inode = 2
    assert not installer.set_next_id_now(REBUILT.id, 2)
    await installer.land([ANOTHER])
    assert watch.seen == [("lost", [REBUILT.id.spis])]
    assert not installer.is_passive(REBUILT.id.spis)


async def test_charon_is_told_the_next_message_id_of_an_sa_that_is_passive() -> None:
    channel = OneChannel()
    installer = Installer(cast(HaChannel, channel), SegmentChooser())
    await installer.land([REBUILT])
    assert installer.set_next_id_now(REBUILT.id, 2)
    assert channel.sent[-1] == MessageType.IKE_MID_RESPONDER
    assert channel.messages[-1].first(Attr.MID) == 2
    await installer.activate()
    # from now on it counts by itself
    assert not installer.set_next_id_now(REBUILT.id, 3)


async def test_sas_of_a_sidecar_before_are_activated_at_their_peers_addresses() -> None:
    channel = OneChannel()
    installer = Installer(cast(HaChannel, channel), SegmentChooser())
    await installer.take_up([(REBUILT.id, REBUILT.remote)])
    landing, *last = remotes(channel)
    assert installer.lands_at(landing)
    assert last == [REBUILT.remote.address]
    assert MessageType.SEGMENT_DROP in channel.sent
    assert MessageType.IKE_ADD not in channel.sent


async def test_what_a_charon_that_hung_was_to_delete_is_deleted_before_anything_else_lands() -> None:
    """It executes what it has in its socket once it goes on."""
    channel = OneChannel()
    installer = Installer(cast(HaChannel, channel), SegmentChooser())
    await installer.land([REBUILT])
    channel.stuck = True
    with pytest.raises(ChannelError):
        await installer.delete([REBUILT.id])
    with pytest.raises(ChannelError):
        await installer.delete_left()
    channel.stuck = False
    channel.messages.clear()
    await installer.land([ANOTHER])
    assert channel.sent[0] == MessageType.IKE_DELETE
    assert channel.messages[0].first(Attr.IKE_ID) == REBUILT.id
    channel.messages.clear()
    await installer.delete_left()
    assert channel.messages == []


async def test_another_charon_has_nothing_to_delete() -> None:
    channel = OneChannel()
    installer = Installer(cast(HaChannel, channel), SegmentChooser())
    channel.stuck = True
    with pytest.raises(ChannelError):
        await installer.delete([REBUILT.id])
    channel.stuck, channel.inode = False, 2
    await installer.delete_left()
    assert channel.messages == []


async def test_what_lands_while_an_activation_waits_for_a_handshake_does_not_wait_and_shares_it() -> None:
    channel, half_open, watch = OneChannel(), HalfOpenSas(), Watch()
    for segment, address in landing_addresses().items():
        half_open.began(bytes((segment,)), address, 0.0)
    installer = Installer(cast(HaChannel, channel), SegmentChooser(16, half_open))
    installer.watcher = watch
    await installer.land([REBUILT])
    activation = asyncio.create_task(installer.activate())
    await asyncio.sleep(0.01)
    async with asyncio.timeout(10):
        await installer.land([ANOTHER])
    assert watch.seen == []
    assert installer.set_next_id_now(REBUILT.id, 2)
    half_open.ended(b"\x07")
    await activation
    assert [what for what, _ in watch.seen] == ["begins", "done"]
    assert watch.seen[-1][1] == [REBUILT.id.spis, ANOTHER.id.spis]
    landings = [address for address in remotes(channel) if installer.lands_at(address)]
    assert [segment_of(address) for address in landings[-2:]] == [7, 7]


async def test_what_could_not_be_installed_does_not_come_up_with_the_next_one() -> None:
    channel = OneChannel()
    installer = Installer(cast(HaChannel, channel), SegmentChooser())
    drained = channel.drained

    async def stands_still() -> None:
        raise ChannelError("charon did not read its HA channel for 30 s")

    channel.drained = stands_still  # type: ignore[method-assign]
    with pytest.raises(ChannelError):
        await installer.install([REBUILT])
    channel.drained = drained  # type: ignore[method-assign]
    channel.messages.clear()
    await installer.install([ANOTHER])
    about = {message.type for message in channel.messages if message.first(Attr.IKE_ID) == REBUILT.id}
    assert about == {MessageType.IKE_DELETE}


async def test_what_is_given_up_while_charon_stands_still_is_not_activated() -> None:
    channel = OneChannel()
    charon = Charon("/nowhere", HaConfig())
    charon.channel = cast(HaChannel, channel)
    charon.installer = installer = Installer(charon.channel, SegmentChooser())
    await installer.land([REBUILT])
    channel.stuck = True
    with pytest.raises(ChannelError):
        # a placeholder has its virtual IP: that is told first
        await charon.remove([REBUILT.id], sharing={REBUILT.id.spis})
    channel.stuck = False
    channel.messages.clear()
    await installer.land([ANOTHER])
    await installer.activate()
    about = [message.type for message in channel.messages if message.first(Attr.IKE_ID) == REBUILT.id]
    assert about == [MessageType.IKE_DELETE]


async def test_ends_of_passive_sas_keep_the_pace_of_activations() -> None:
    channel = OneChannel()
    charon = Charon("/nowhere", HaConfig())
    charon.channel = cast(HaChannel, channel)
    charon.installer = installer = Installer(charon.channel, SegmentChooser())
    waits = [0.02, 0.01]
    installer.wait = lambda: waits.pop(0) if waits else 0.0  # type: ignore[method-assign]
    await installer.land([REBUILT])
    assert await charon._not_active({REBUILT.id.spis}) == ""
    assert waits == []
    assert channel.sent.count(MessageType.SEGMENT_DROP) == 1


async def test_an_end_does_not_wait_for_an_activation_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.charon.charon.ACTIVATE_SECONDS", 0.05)
    channel = OneChannel()
    charon = Charon("/nowhere", HaConfig())
    charon.channel = cast(HaChannel, channel)
    charon.installer = installer = Installer(charon.channel, SegmentChooser())
    installer.wait = lambda: 1.0  # type: ignore[method-assign]
    await installer.land([REBUILT])
    assert "not active yet" in await charon._not_active({REBUILT.id.spis})
