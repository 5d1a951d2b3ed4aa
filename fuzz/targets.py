"""One fuzz target for each parser: what it may raise, and what has to hold of whatever it takes.

A target is a function of octets. It returns where the parser refused in the way its docstring names, and raises where
the parser failed or a property does not hold. `seeds` are well-formed inputs to begin from.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import vici.exception
import vici.protocol

from bridge.charon import ha_codec as ha
from bridge.charon.ha_message import VERSIONS, Attr, HaError, IkeId, MessageType
from bridge.charon.vici_types import ViciError, parse_connection, parse_event
from bridge.charon.vici_watch import EVENTS
from bridge.client import session_file
from bridge.config import ClientConfig, ConfigError, GatewayConfig
from bridge.ike.cookie import Cookies, glance
from bridge.ike.encrypted_payload import NotAuthentic, Protection, protect, unprotect
from bridge.ike.key_confirmation import Confirmation
from bridge.ike.key_exchange import KeyExchange, can_exchange
from bridge.ike.keys import derive_keys
from bridge.ike.message import PAYLOAD_HEADER, VERSION, MalformedMessage, NotifyType, PayloadType, build, parse
from bridge.ike.resumption_answer import (
    build_refusal,
    build_response,
    parse_response,
    verify_refusal,
    verify_response,
)
from bridge.ike.resumption_request import build_request, parse_request, verify_request
from bridge.ike.stub_exchange import (
    MoveStatus,
    StubMessage,
    StubSa,
    build_announcement,
    build_download,
    build_get,
    build_here,
    build_move,
    build_moving,
    build_probe,
    parse_stub_message,
    verify,
)
from bridge.ike.sync_messages import MAX_REASON, CookieChallenge, SyncRefusal, SyncResponse
from bridge.ike.sync_payload import Attribute, SyncPayload, encode_child
from bridge.ike.transforms import Encr, Group, Integ, Prf, Suite
from bridge.ike.version_probe import answers_version_probe, build_version_probe
from bridge.net.packet import MARKER, has_marker, ipv6_packet, parse_datagram, udp_datagram
from bridge.service.config_file import load
from bridge.service.control import Answer, ControlServer
from bridge.stub import revocation
from bridge.stub.codec import decode, encode
from bridge.stub.keyring import Keyring, SealError
from bridge.stub.stub import Index, Stub, StubError
from bridge.stub.types import ChildSa, Endpoint, Identity, TrafficSelector

SUITE: Final = Suite(Encr.AES_CBC, 128, Integ.HMAC_SHA2_256_128, Prf.HMAC_SHA2_256, Group.CURVE_25519)
SK_D: Final = b"d" * 32
INDEX: Final = Index("192.0.2.1", b"O" * 8)
NAT: Final = ("192.0.2.10", 4500, "192.0.2.2", 4500)


class Target(NamedTuple):
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


# IKE messages


def _request(**changes: Any) -> bytes:
    values: dict[str, Any] = {
        "spi_i": b"I" * 8,
        "suite": SUITE,
        "ke_value": b"k" * 32,
        "nonce": b"i" * 32,
        "sync_index": INDEX,
        "prf": SUITE.prf,
        "sk_d_old": SK_D,
        "nat": NAT,
    }
    return build_request(**(values | changes))


REQUEST: Final = _request()


def _response(**changes: Any) -> bytes:
    request = parse_request(REQUEST)
    assert request is not None
    values: dict[str, Any] = {
        "spi_r": b"R" * 8,
        "nonce": b"r" * 32,
        "prf": SUITE.prf,
        "sk_d_old": SK_D,
        "lifetime": 3600,
        "nat": NAT,
    }
    return build_response(request, **(values | changes))


def _plain(*payloads: tuple[int, bytes], exchange: int = 34, flags: int = 0x20) -> bytes:
    return build(spi_i=b"I" * 8, spi_r=b"R" * 8, exchange=exchange, flags=flags, message_id=0, payloads=payloads)


def message(data: bytes) -> None:
    """bridge.ike.message.parse: payloads lie one behind the other, and fill the message."""
    try:
        parsed = parse(data)
    except MalformedMessage:
        return
    at = 28
    for payload in parsed.payloads:
        assert payload.offset == at + PAYLOAD_HEADER.size
        assert data[payload.offset : payload.offset + len(payload.body)] == payload.body
        at = payload.offset + len(payload.body)
    assert at == len(data) == parsed.header.length
    with contextlib.suppress(MalformedMessage):
        parsed.notifies(NotifyType.COOKIE)
        parsed.only(PayloadType.NONCE)


def sync(data: bytes) -> None:
    """bridge.ike.sync_payload: what decodes is encoded to the same octets, but for the reserved ones."""
    try:
        found = SyncPayload.decode(data)
    except MalformedMessage:
        return
    assert found.encode() == data[:2] + bytes(2) + data[4:]
    assert len(found.children) == sum(kind == Attribute.CHILD for kind, _ in found.attributes)


def request(data: bytes) -> None:
    """bridge.ike.resumption_request: nothing but the proven request proves itself; it blanks PROOF only."""
    try:
        found = parse_request(data)
    except MalformedMessage:
        return
    if found is None:
        return
    assert len(found.blank) == len(data)
    differing = sum(a != b for a, b in zip(found.blank, data, strict=True))
    assert differing <= len(found.proof or b"")
    assert verify_request(found, SUITE.prf, SK_D) is (data in (REQUEST, *_requests()))


@functools.cache
def _requests() -> list[bytes]:
    return [
        REQUEST,
        _request(cookie=b"c" * 17),
        _request(forward_secrecy=True),
        _request(refusable=True),
        _request(children=[(0, 0xC0000001), (1, 0xC0000002)], sealed_stub=b"sealed" * 20),
        _request(sync_index=("2001:db8::1", b"O" * 8), nat=None),
    ]


def first_look(data: bytes) -> None:
    """bridge.ike.cookie.glance: sees every request that `parse_request` takes, and takes no cookie but its own."""
    try:
        seen = glance(data)
    except MalformedMessage:
        with contextlib.suppress(MalformedMessage):
            assert parse_request(data) is None
        return
    if seen is not None:
        assert not _COOKIES.valid(seen, "192.0.2.10", 4500, 0.0)
        challenge = parse_response(_COOKIES.challenge(seen, "192.0.2.10", 4500, 0.0), data)
        assert isinstance(challenge, CookieChallenge)
        again = seen._replace(cookie=challenge.cookie)
        assert _COOKIES.valid(again, "192.0.2.10", 4500, 0.0)
        assert not _COOKIES.valid(again, "192.0.2.11", 4500, 0.0)
    with contextlib.suppress(MalformedMessage):
        whole = parse_request(data)
        if whole is None:
            assert seen is None
        else:
            assert seen is not None
            assert seen[:2] == (whole.spi_i, whole.nonce)
            assert seen.cookie in (None, whole.cookie)


_COOKIES: Final = Cookies()


def response(data: bytes) -> None:
    """bridge.ike.resumption_answer: only the gateway's own answers prove themselves."""
    try:
        found = parse_response(data, REQUEST)
    except MalformedMessage:
        return
    if isinstance(found, SyncResponse):
        assert verify_response(found, REQUEST, SUITE.prf, SK_D) is (data in _responses())
        assert found.lifetime is None or 0 <= found.lifetime < 2**32
    if isinstance(found, SyncRefusal):
        assert verify_refusal(found, REQUEST, SUITE.prf, SK_D) is (data == _refusal())
        assert found.reason.isascii()
        assert len(found.reason) <= MAX_REASON


@functools.cache
def _refusal() -> bytes:
    request = parse_request(REQUEST)
    assert request is not None
    return build_refusal(request, "connection-missing", prf=SUITE.prf, sk_d_old=SK_D)


@functools.cache
def _responses() -> list[bytes]:
    return [
        _response(),
        _response(children=[(0, 1)], sealed_stub=b"s" * 40),
        _response(nat=None),
        _response(key_exchange=(31, b"K" * 32)),
        _response(auth_lifetime=3600),
    ]


SUITES: Final = (
    SUITE,
    Suite(Encr.AES_CTR, 256, Integ.AES_CMAC_96, Prf.AES128_CMAC, Group.MODP_2048),
    Suite(Encr.AES_GCM_16, 128, 0, Prf.HMAC_SHA2_256, Group.CURVE_25519),
    Suite(Encr.CHACHA20_POLY1305, 0, 0, Prf.HMAC_SHA2_256, Group.CURVE_25519),
)
_WAYS: Final = [
    Protection.of(suite, derive_keys(suite, b"s" * 32, b"i" * 32, b"r" * 32, b"I" * 8, b"R" * 8), initiator=True)
    for suite in SUITES
]


def protected(data: bytes) -> None:
    """bridge.ike.encrypted_payload.unprotect. The first octet chooses the suite, and whether the rest is a message that
    nobody without the keys can make, or what one with the keys put into it."""
    if not data:
        return
    way = _WAYS[data[0] % len(_WAYS)]
    if data[0] < 0x80:
        with contextlib.suppress(MalformedMessage):
            unprotect(way, data[1:])
            raise AssertionError("a message without the keys verified")
        return
    # `protect` frames one body; the plaintext of a peer with keys may be anything, so the framing is cut off again
    inner = data[2:]
    octets = _enclosed(way, data[1] if len(data) > 1 else 0, inner)
    try:
        _, payloads = unprotect(way, octets)
    except NotAuthentic:
        raise AssertionError("a message under the keys did not verify") from None
    except MalformedMessage:
        return
    # zeros that make whole blocks may belong to the last of them
    assert sum(len(payload.body) + PAYLOAD_HEADER.size for payload in payloads) < len(inner) + 16


def _enclosed(way: Protection, first: int, plaintext: bytes) -> bytes:
    """A message under the keys whose decrypted octets are `plaintext`, made whole blocks."""
    iv = bytes(way.iv_length)
    if not way.suite.is_aead and way.iv_length == 16:
        plaintext += bytes(-len(plaintext) % 16)
    size = PAYLOAD_HEADER.size + len(iv) + len(plaintext) + way.checksum_length
    head = b"I" * 8 + b"R" * 8 + bytes((PayloadType.SK, VERSION, 37, 8)) + bytes(4) + (28 + size).to_bytes(4)
    head += PAYLOAD_HEADER.pack(first, 0, size)
    if way.suite.is_aead:
        return head + iv + way.seal(iv, plaintext, head)
    encryptor = way.cipher(iv).encryptor()
    octets = head + iv + encryptor.update(plaintext) + encryptor.finalize()
    return octets + way.checksum(octets)


def confirmation(data: bytes) -> None:
    """bridge.ike.key_confirmation: nothing that the gateway did not protect answers; not even the request itself."""
    assert not _CONFIRMATION.is_answered_by(data)


_CONFIRMATION: Final = Confirmation(
    SUITE,
    derive_keys(SUITE, b"s" * 32, b"i" * 32, b"r" * 32, b"I" * 8, b"R" * 8),
    b"I" * 8,
    b"R" * 8,
    random=bytes,
)


def _protected_seeds() -> list[bytes]:
    made = [
        protect(
            way,
            spi_i=b"I" * 8,
            spi_r=b"R" * 8,
            exchange=37,
            flags=8,
            message_id=1,
            payloads=[(PayloadType.NONCE, b"n" * 20)],
            iv=bytes(way.iv_length),
        )
        for way in _WAYS
    ]
    # a whole message would verify: a seed has a wrong tag, in more octets than are guessed
    raw = [bytes((number,)) + octets[:-8] + bytes(8) for number, octets in enumerate(made)]
    inner = b"\x00\x00\x00\x18" + b"n" * 20 + b"\x00"
    return raw + [bytes((0x80 + number, PayloadType.NONCE)) + inner for number in range(len(_WAYS))]


def stub_message(data: bytes) -> None:
    """bridge.ike.stub_exchange.parse_stub_message: only what the two sides made proves itself."""
    try:
        found = parse_stub_message(data)
    except MalformedMessage:
        return
    assert len(found.blank) == len(data)
    assert found.lifetime is None or 0 <= found.lifetime < 2**32
    proved = [verify(found, SUITE.prf, SK_D, before=before) for before in (None, *_asked())]
    assert any(proved) is (data in _stub_messages())


def version_probe(data: bytes) -> None:
    """bridge.ike.version_probe.answers_version_probe: never raises, and only under the SPIi that was sent."""
    if answers_version_probe(data, b"S" * 8):
        assert data[:8] == b"S" * 8
        assert not answers_version_probe(data, b"T" * 8)


def _version_probe_answers() -> list[bytes]:
    notify = (PayloadType.NOTIFY, b"\0\0" + NotifyType.INVALID_MAJOR_VERSION.to_bytes(2))
    header: dict[str, Any] = {"spi_i": b"S" * 8, "spi_r": bytes(8), "exchange": 37, "flags": 0x20, "message_id": 0}
    return [build(**header, payloads=[notify]), build_version_probe(b"S" * 8)]


_SA: Final = StubSa(b"I" * 8, b"R" * 8, True, INDEX, SUITE.prf, SK_D)


@functools.cache
def _asked() -> tuple[StubMessage, ...]:
    """The messages that others answer."""
    move = parse_stub_message(build_move(_SA, "192.0.2.2", 0xF0000001))
    probe = parse_stub_message(build_probe(_SA, move, b"n" * 32))
    return parse_stub_message(build_get(_SA, b"n" * 32)), move, probe


@functools.cache
def _stub_messages() -> list[bytes]:
    get, move, probe = _asked()
    return [
        build_get(_SA, b"n" * 32),
        build_download(_SA, get, b"sealed" * 20, 3600),
        build_move(_SA, "192.0.2.2", 0xF0000001),
        build_moving(_SA, move, MoveStatus.MOVING, b"n" * 32),
        build_moving(_SA, move, MoveStatus.DAEMON_ANSWERS, b"n" * 32),
        build_announcement(_SA, "192.0.2.2", 0xF0000001),
        build_probe(_SA, move, b"n" * 32),
        build_here(_SA, probe),
        build_here(_SA, probe, MoveStatus.NOT_HERE),
    ]


# what charon and the bank say


def ha_message(data: bytes) -> None:
    """bridge.charon.ha_codec.decode: what decodes is encoded to what decodes to the same."""
    try:
        found = ha.decode(data)
    except HaError:
        return
    try:
        octets = ha.encode(found.version, found.type, found.attributes)
    except HaError:
        assert len(data) > ha.MAX_MESSAGE
        return
    assert ha.decode(octets) == found


def _ha_seeds() -> list[bytes]:
    ike_id = IkeId.of(b"I" * 8, b"R" * 8, False)
    v4, v6 = Endpoint("192.0.2.1", 4500), Endpoint("2001:db8::1", 500)
    selector = TrafficSelector(7, 0, 0, 65535, False, "10.0.0.0", "10.255.255.255")
    update = [
        (Attr.IKE_ID, ike_id),
        (Attr.LOCAL_ID, Identity(2, b"vpn.example.org")),
        (Attr.REMOTE_ID, Identity(11, b"\x01\x02")),
        (Attr.LOCAL_ADDR, v4),
        (Attr.REMOTE_ADDR, v6),
        (Attr.CONDITIONS, 7),
        (Attr.EXTENSIONS, 1 << 31),
        (Attr.CONFIG_NAME, "home"),
        (Attr.REMOTE_VIP, v4),
    ]
    child = [
        (Attr.IKE_ID, ike_id),
        (Attr.INITIATOR, 1),
        (Attr.INBOUND_SPI, 1),
        (Attr.NONCE_I, b"n" * 32),
        (Attr.ALG_ENCR, 12),
        (Attr.LOCAL_TS, selector),
        (Attr.REMOTE_TS, selector),
    ]
    seeds = []
    for version in VERSIONS:
        seeds.append(ha.encode(version, MessageType.IKE_UPDATE, update))
        seeds.append(ha.encode(version, MessageType.CHILD_ADD, child))
        seeds.append(ha.encode(version, MessageType.SEGMENT_TAKE, [(Attr.SEGMENT, 3)]))
    return seeds


def stub(data: bytes) -> None:
    """bridge.stub.codec.decode: a stub that decodes is encoded to octets that decode to it."""
    try:
        found = decode(data)
    except StubError:
        return
    with contextlib.suppress(StubError):
        assert decode(encode(found)) == found


def _stub() -> Stub:
    selector = TrafficSelector(7, 0, 0, 65535, False, "10.0.0.0", "10.255.255.255")
    narrow = TrafficSelector(8, 17, 500, 500, True, "2001:db8::1", "2001:db8::1")
    end = Endpoint("192.0.2.1", 4500)
    child = ChildSa("net", 2, 0, 12, 128, 12, 0, (31,), 1, 2, (selector, narrow), (selector,), False)
    return Stub(
        index=INDEX,
        spi_i=b"I" * 8,
        spi_r=b"O" * 8,
        initiator=False,
        local_id=Identity(2, b"vpn.example.org"),
        remote_id=Identity(3, b"client@example.org"),
        eap_id=None,
        suite=SUITE,
        sk_d=SK_D,
        shared_secret=b"g" * 32,
        local=end,
        remote=Endpoint("2001:db8::2", 500),
        connection="gw",
        local_vips=(),
        remote_vips=("10.20.1.1",),
        conditions=(7,),
        extensions=(1, 1 << 31),
        peer_addresses=(),
        children=(child,),
        established=1_700_000_000,
        rekey_at=1_700_014_400,
        reauth_at=0,
        expires=1_700_015_840,
        revision=1_700_000_000_000,
    )


def _extended_stub() -> Stub:
    before = Index("192.0.2.9", b"P" * 8)
    return msgspec.structs.replace(_stub(), authenticated_until=1_700_028_800, predecessor=before, session_spi=b"S" * 8)


_KEYRING: Final = Keyring({b"key0": b"k" * 32})
_AAD: Final = INDEX.key.encode()


def sealed(data: bytes) -> None:
    """bridge.stub.keyring.Keyring.open: nothing opens but what was sealed, where it was sealed for."""
    with contextlib.suppress(SealError):
        _KEYRING.open(data, _AAD)
        raise AssertionError("an envelope that nobody sealed opened")
    own = _KEYRING.seal(data, _AAD)
    assert _KEYRING.open(own, _AAD) == data
    with contextlib.suppress(SealError):
        _KEYRING.open(own, _AAD + b"0")
        raise AssertionError("an envelope opened at another index")


def index(data: bytes) -> None:
    """bridge.stub.stub.Index.parse: of the key of a stub, or its short form."""
    try:
        found = Index.parse(data.decode(errors="replace"))
    except StubError:
        return
    assert Index.parse(found.key) == Index.parse(str(found)) == found


def datagram(data: bytes) -> None:
    """bridge.net.packet.parse_datagram: never raises, and finds nothing that is not in the packet."""
    for answers in (False, True):
        found = parse_datagram(data, answers=answers)
        if found is not None:
            assert found.ike in data
            assert len(found.ike) >= 28
            assert found.marker == has_marker(found.sport, found.dport)


def _datagram_seeds() -> list[bytes]:
    v4, v6 = ("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")
    seeds = []
    for marker, port in ((False, 500), (True, 4500)):
        udp = udp_datagram(v4[0], port, v4[1], port, REQUEST, marker)
        head = bytes.fromhex("4500") + (20 + len(udp)).to_bytes(2) + bytes.fromhex("00000000401100 00")
        seeds.append(head + bytes((192, 0, 2, 1, 192, 0, 2, 2)) + udp)
        udp = udp_datagram(v6[0], port, v6[1], port, REQUEST, marker)
        seeds.append(ipv6_packet(bytes(15) + b"\x01", bytes(15) + b"\x02", udp))
    return [*seeds, MARKER]


def vici_event(data: bytes) -> None:
    """bridge.charon.vici_types: events, IKE_SAs and connections, of any sections that the `vici` package reads."""
    try:
        sections = vici.protocol.Message.deserialize(vici.protocol.FiniteStream(data))
    except Exception:  # that package's own affair: bridge.charon.vici_client ends the connection
        return
    for kind in EVENTS:
        with contextlib.suppress(ViciError):
            parse_event(kind, sections)
    for name, section in sections.items():
        if isinstance(section, dict):
            with contextlib.suppress(ViciError):
                parse_connection(name, section)


def _vici_seeds() -> list[bytes]:
    sa = {
        "uniqueid": "1",
        "version": "2",
        "state": "ESTABLISHED",
        "local-host": "192.0.2.1",
        "local-port": "4500",
        "remote-host": "%any",
        "remote-port": "4500",
        "initiator-spi": "1" * 16,
        "responder-spi": "2" * 16,
        "initiator": "yes",
        "established": "5",
        "rekey-time": "100",
        "local-vips": ["10.0.0.1"],
        "child-sas": {"net-1": {"name": "net", "state": "INSTALLED"}},
    }
    connection = {"rekey_time": "14400", "reauth_time": "0", "children": {"net": {"mode": "TUNNEL"}}}
    messages: list[dict[str, Any]] = [
        {"up": "yes", "home": sa},
        {"home": {"old": sa, "new": sa}},
        {"home": connection},
    ]
    return [bytes(vici.protocol.Message.serialize(message)) for message in messages]


# what the operator gives


_SCRATCH: Final = tempfile.TemporaryDirectory(prefix="ike-sa-sync-fuzz-", dir="/dev/shm")
_FILE: Final = Path(_SCRATCH.name) / "input"


def _one_line(error: Exception) -> None:
    assert "\n" not in str(error)


def config(data: bytes) -> None:
    """bridge.service.config_file.load: any file is a configuration, or a ConfigError of one line."""
    _FILE.write_bytes(data)
    loaders: list[Callable[[], object]] = [lambda: load(_FILE, GatewayConfig), lambda: load(_FILE, ClientConfig)]
    for attempt in loaders:
        try:
            attempt()
        except ConfigError as error:
            _one_line(error)


def _config_seeds() -> list[bytes]:
    gateway = """\
address: 192.168.50.1
ha: {listen: 127.0.0.2, charon: 127.0.0.1, segments: 16}
bank: {url: "redis://127.0.0.1:6379/0", key_file: /etc/key}
sync: {proof: required, confirm_timeout: 10, cookie_threshold: 100}
metrics: 127.0.0.1:9470
"""
    client = """\
gateways:
  - address: 2001:db8::1
    connection: home
resume: {answer_timeout: 4.0}
resume_on_down: true
"""
    more = ["bank: {url: redis+cluster://a:1,b:2}", "bank: {url: 'redis+sentinel://h/name/0'}", "2001-01-01: &a [*a]"]
    return [text.encode() for text in (gateway, client, *more)]


def key_file(data: bytes) -> None:
    """bridge.stub.keyring.Keyring.load: any file is a key file, or a SealError of one line that quotes no key."""
    _FILE.write_bytes(data)
    os.chmod(_FILE, 0o600)
    try:
        Keyring.load(_FILE)
    except SealError as error:
        _one_line(error)


_CURVES: Final = [int(group) for group in Group if can_exchange(group)]


def public_value(data: bytes) -> None:
    """bridge.ike.key_exchange.KeyExchange.shared: any octets are a public value of the group, or a ValueError."""
    if not data:
        return
    group = _CURVES[data[0] % len(_CURVES)]
    with contextlib.suppress(ValueError):
        assert any(KeyExchange(group).shared(data[1:]))


_MARKS: Final = Keyring({b"mark": b"m" * 32}, random=lambda length: b"n" * length)


def _mark() -> bytes:
    return revocation.seal(revocation.Mark("CN=alice, O=Example\\, Inc.", True, 1, 2), _MARKS)


def mark(data: bytes) -> None:
    """bridge.stub.revocation.open_mark: what opens under the key is a mark, or a SealError; and any text has one
    canonical form."""
    for sealed in (data, _MARKS.seal(data, revocation.PLACE)):
        try:
            found = revocation.open_mark(sealed, _MARKS)
        except SealError:
            continue
        assert found.name == revocation.canonical(found.identity)
    text = data.decode(errors="replace")
    assert revocation.canonical(f" {text} ") == revocation.canonical(text)


def held_file(data: bytes) -> None:
    """bridge.client.session_file.load: any octets behind the header are sessions, written and read again the same, or
    an error of one line."""
    _FILE.write_bytes(session_file.HEADER + data)
    os.chmod(_FILE, 0o600)
    try:
        sessions = session_file.load(_FILE)
    except session_file.SessionFileError as error:
        _one_line(error)
        return
    with contextlib.suppress(StubError):
        _FILE.write_bytes(session_file.pack(sessions))
        assert session_file.load(_FILE) == sessions


def _held_file_seeds() -> list[bytes]:
    sessions = [session_file.Session(_stub(), b"sealed" * 20, 1.5), session_file.Session(_stub(), None, 0.0)]
    whole = session_file.pack(sessions)
    return [whole[len(session_file.HEADER) :], b"\x90"]


async def _echo(request: dict[str, Any]) -> Answer:
    return {"got": len(request)}


_CONTROL: Final = ControlServer("/dev/null", {"status": _echo})


def control(data: bytes) -> None:
    """bridge.service.control: any line gets an answer."""
    coroutine = _CONTROL._answer(data)
    try:
        coroutine.send(None)
    except StopIteration as done:
        answer: Answer = done.value
    else:
        raise AssertionError("the answer waits")
    assert set(answer) & {"got", "error"}


TARGETS: Final = {
    "message": Target(message, lambda: [*_requests(), *_responses(), _plain((PayloadType.NONCE, b"n" * 20))]),
    "sync": Target(
        sync,
        lambda: [
            SyncPayload(False, "192.0.2.1", b"O" * 8).encode(),
            SyncPayload(
                True, "2001:db8::1", b"O" * 8, (encode_child(0, 1), (Attribute.PROOF, bytes(32)), (9, b""))
            ).encode(),
            SyncPayload(
                True, "192.0.2.1", b"O" * 8, ((Attribute.LIFETIME, bytes(4)), (Attribute.SEALED_STUB, b"s"))
            ).encode(),
        ],
    ),
    "request": Target(request, _requests),
    "first-look": Target(first_look, _requests),
    "response": Target(
        response,
        lambda: [
            *_responses(),
            _refusal(),
            _plain((PayloadType.NOTIFY, b"\0\0\x20\x08")),
            _plain((PayloadType.NOTIFY, b"\0\0\x00\x0e")),
            _plain((PayloadType.NOTIFY, b"\0\0\x40\x06" + b"c" * 17)),
            _plain((PayloadType.SA, SUITE.proposal()), (PayloadType.NONCE, b"n" * 20)),
        ],
    ),
    "stub-message": Target(stub_message, _stub_messages),
    "version-probe": Target(version_probe, _version_probe_answers),
    "protected": Target(protected, _protected_seeds),
    "confirmation": Target(confirmation, lambda: [_CONFIRMATION.request, _CONFIRMATION.request[:-8] + bytes(8)]),
    "ha": Target(ha_message, _ha_seeds),
    "stub": Target(stub, lambda: [encode(_stub()), encode(_extended_stub())]),
    "sealed": Target(sealed, lambda: [b"key0" + bytes(60), b"key1" + bytes(60)]),
    "index": Target(index, lambda: [INDEX.key.encode(), str(Index("2001:db8::1", b"\xff" * 8)).encode()]),
    "datagram": Target(datagram, _datagram_seeds),
    "vici": Target(vici_event, _vici_seeds),
    "config": Target(config, _config_seeds),
    "key-file": Target(
        key_file,
        lambda: [
            b"# keys\n01234567 " + b"A" * 43 + b"=\n",
            b"01234567 " + b"A" * 43 + b"= epoch=20000/86400\n89abcdef " + b"B" * 42 + b"A=\n",
        ],
    ),
    "public-value": Target(public_value, lambda: [bytes((group,)) + KeyExchange(group).public for group in _CURVES]),
    "mark": Target(mark, lambda: [_mark(), b"key0" + bytes(60)]),
    "held-file": Target(held_file, _held_file_seeds),
    "control": Target(control, lambda: [b'{"command": "status"}\n', b'{"command": ["x"]}', b"[[1]]"]),
}
