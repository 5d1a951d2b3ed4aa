"""IKE messages as two readers see them: tshark with the dissector that ships, and the codec of bridge.ike."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

import pytest

from bridge.ike.message import ExchangeType, PayloadType, decode_ke, decode_notify, parse
from bridge.ike.sync_payload import SyncPayload, proof_offset
from bridge.ike.transforms import Suite, TransformType
from bridge.lab.daemon import wait_until
from bridge.lab.host import Host

DISSECTOR = Path(__file__).parent.parent / "wireshark/ike_sa_sync.lua"
Layers = dict[str, Any]


def dissect(capture: Path, *options: str) -> list[Layers]:
    """Every packet's layers as `tshark -T json` gives them."""
    if shutil.which("tshark") is None:
        pytest.fail("tshark is missing: make setup installs it")
    command = ["tshark", "-X", f"lua_script:{DISSECTOR}", "-r", str(capture), "-T", "json", "--no-duplicate-keys"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=120)
    return [entry["_source"]["layers"] for entry in json.loads(done.stdout)]


def values(layers: Any, name: str) -> list[Any]:
    """All values of a field, wherever in the tree."""
    found: list[Any] = []
    if isinstance(layers, dict):
        for key, value in layers.items():
            if key == name:
                found += value if isinstance(value, list) else [value]
            else:
                found += values(value, name)
    elif isinstance(layers, list):
        for value in layers:
            found += values(value, name)
    return found


def from_hex(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def proof_range(message: bytes) -> slice:
    """Where the value of PROOF is in a message with IKE_SA_SYNC."""
    payload = parse(message).only(PayloadType.SYNC)
    assert payload is not None
    within = proof_offset(payload.body)
    assert within is not None
    length = int.from_bytes(payload.body[within - 2 : within])
    return slice(payload.offset + within, payload.offset + within + length)


class Capture:
    """All IKE packets that pass a host's eth0, from `with` on."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.file = host.directory / "wire.pcap"

    def __enter__(self) -> Self:
        # -P: the older format; it notes no machine. dumpcap says "File:" when it listens.
        arguments = ("-i", "eth0", "-P", "-f", "udp port 500 or udp port 4500", "-w", str(self.file))
        self._process = self._host.popen("dumpcap", *arguments, stderr=subprocess.PIPE)
        assert self._process.stderr is not None
        while not (line := self._process.stderr.readline()).startswith("File:"):
            assert line, "dumpcap ended"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Write what is there."""
        self._process.terminate()
        self._process.communicate(timeout=30)

    def wait_for(self, octets: bytes, what: str) -> None:
        """Until the capture holds these octets; dumpcap writes now and then."""
        wait_until(lambda: octets in self.file.read_bytes(), what)


@dataclass(frozen=True)
class Packet:
    """One captured IKE message. `octets` begin with the IKE header."""

    layers: Layers
    src: str
    sport: int
    dst: str
    dport: int
    marker: bool
    octets: bytes

    @classmethod
    def of(cls, layers: Layers) -> Packet:
        ip = layers.get("ip") or layers["ipv6"]
        name = "ip" if "ip" in layers else "ipv6"
        marker = "udpencap" in layers
        return cls(
            layers,
            str(ip_address(ip[f"{name}.src"])),
            int(layers["udp"]["udp.srcport"]),
            str(ip_address(ip[f"{name}.dst"])),
            int(layers["udp"]["udp.dstport"]),
            marker,
            from_hex(layers["udp"]["udp.payload"])[4 if marker else 0 :],
        )

    @property
    def exchange(self) -> int:
        return int(self.layers["isakmp"]["isakmp.exchangetype"])

    @property
    def is_answer(self) -> bool:
        return bool(values(self.layers["isakmp"], "isakmp.flag_r") == ["1"])

    @property
    def message_id(self) -> int:
        return int(self.layers["isakmp"]["isakmp.messageid"], 16)

    @property
    def resumes(self) -> bool:
        """Whether it is a message of a resumption: IKE_SA_INIT with IKE_SA_SYNC."""
        return self.exchange == ExchangeType.IKE_SA_INIT and "ike_sa_sync" in self.layers


def packets(capture: Path) -> list[Packet]:
    """The IKE messages of a capture, in order; no ESP, no keepalives."""
    return [Packet.of(layers) for layers in dissect(capture, "-Y", "isakmp.exchangetype")]


# What a message says, in one form for both readers: header, then (type, critical, length, fields) of each payload.

Reading = tuple[tuple[Any, ...], list[tuple[int, bool, int, Any]]]


def as_codec_reads(octets: bytes) -> Reading:
    message = parse(octets)
    payloads = [
        (payload.type, payload.critical, 4 + len(payload.body), _codec_fields(payload.type, payload.body))
        for payload in message.payloads
    ]
    return tuple(message.header), payloads


def _codec_fields(kind: int, body: bytes) -> Any:
    match kind:
        case PayloadType.KE:
            return decode_ke(body)
        case PayloadType.NOTIFY:
            return decode_notify(body)
        case PayloadType.SYNC:
            sync = SyncPayload.decode(body)
            return (sync.from_gateway, sync.gateway, sync.spi, list(sync.attributes))
    return body


def as_tshark_reads(layers: Layers) -> Reading:
    ike = layers["isakmp"]
    header = (
        from_hex(ike["isakmp.ispi"]),
        from_hex(ike["isakmp.rspi"]),
        int(ike["isakmp.nextpayload"]),
        int(ike["isakmp.version"], 16),
        int(ike["isakmp.exchangetype"]),
        int(ike["isakmp.flags"], 16),
        int(ike["isakmp.messageid"], 16),
        int(ike["isakmp.length"]),
    )
    kinds, trees = ike.get("isakmp.typepayload", []), ike.get("isakmp.typepayload_tree", [])
    if isinstance(kinds, str):
        kinds, trees = [kinds], [trees]
    payloads = [
        (
            int(kind),
            tree["isakmp.criticalpayload"] == "1",
            int(tree["isakmp.payloadlength"]),
            _tshark_fields(int(kind), tree, layers),
        )
        for kind, tree in zip(kinds, trees, strict=True)
    ]
    return header, payloads


def tree_of(layers: Layers, kind: int) -> Layers:
    """The one payload of a type, in a message of several."""
    ike = layers["isakmp"]
    pairs = zip(ike["isakmp.typepayload"], ike["isakmp.typepayload_tree"], strict=True)
    [tree] = [tree for found, tree in pairs if int(found) == kind]
    return dict(tree)


def _tshark_fields(kind: int, tree: Layers, layers: Layers) -> Any:
    match kind:
        case PayloadType.SA:
            return suite_as_tshark_reads(tree).proposal()
        case PayloadType.KE:
            return int(tree["isakmp.key_exchange.dh_group"]), from_hex(tree["isakmp.key_exchange.data"])
        case PayloadType.NONCE:
            return from_hex(tree["isakmp.nonce"])
        case PayloadType.NOTIFY:
            assert (tree["isakmp.notify.protoid"], tree["isakmp.spisize"]) == ("0", "0")
            return int(tree["isakmp.notify.msgtype"]), from_hex(tree.get("isakmp.notify.data", ""))
        case PayloadType.SYNC:
            return _sync_as_tshark_reads(layers["ike_sa_sync"])
    raise AssertionError(f"a payload of type {kind}")


def suite_as_tshark_reads(sa: Layers) -> Suite:
    """The one proposal of an SA payload."""
    proposal = sa["isakmp.typepayload_tree"]
    assert (proposal["isakmp.prop.number"], proposal["isakmp.prop.protoid"]) == ("1", "1")
    chosen: dict[int, int] = {}
    length = 0
    for transform in proposal["isakmp.typepayload_tree"]:
        [name] = [key for key in transform if key.startswith("isakmp.tf.id.")]
        chosen[int(transform["isakmp.tf.type"])] = int(transform[name])
        length = int((values(transform, "isakmp.ike2.attr.key_length") or [length])[0])
    return Suite(
        encr=chosen[TransformType.ENCR],
        encr_len=length,
        integ=chosen.get(TransformType.INTEG, 0),
        prf=chosen[TransformType.PRF],
        group=chosen[TransformType.KE],
    )


def _sync_as_tshark_reads(sync: Layers) -> Any:
    assert (sync["ike_sa_sync.version"], sync["ike_sa_sync.reserved"]) == ("0", "0x0000")
    family = sync["ike_sa_sync.family"]
    gateway = sync["ike_sa_sync.gateway" if family == "4" else "ike_sa_sync.gateway6"]
    kinds, trees = sync.get("ike_sa_sync.attribute", []), sync.get("ike_sa_sync.attribute_tree", [])
    if isinstance(kinds, str):
        kinds, trees = [kinds], [trees]
    attributes = []
    for kind, tree in zip(kinds, trees, strict=True):
        value = _attribute_as_tshark_reads(tree)
        assert len(value) == int(tree["ike_sa_sync.attribute.length"])
        attributes.append((int(kind), value))
    return (
        sync["ike_sa_sync.direction"] == "1",
        str(ip_address(gateway)),
        from_hex(sync["ike_sa_sync.spi"]),
        attributes,
    )


def _attribute_as_tshark_reads(tree: Layers) -> bytes:
    if "ike_sa_sync.child.number" in tree:
        return int(tree["ike_sa_sync.child.number"]).to_bytes(2) + int(tree["ike_sa_sync.child.spi"], 16).to_bytes(4)
    if "ike_sa_sync.old_child.spi" in tree:
        return b"".join(int(spi, 16).to_bytes(4) for spi in values(tree, "ike_sa_sync.old_child.spi"))
    if "ike_sa_sync.lifetime" in tree:
        return int(tree["ike_sa_sync.lifetime"]).to_bytes(4)
    if "ike_sa_sync.move.status" in tree:
        [target] = [value for key, value in tree.items() if key.startswith("ike_sa_sync.move.target")]
        return bytes((int(tree["ike_sa_sync.move.status"]),)) + ip_address(target).packed
    if "ike_sa_sync.refusal" in tree:
        return str(tree["ike_sa_sync.refusal"]).encode()
    if tree["ike_sa_sync.attribute.length"] == "0":
        return b""
    if "ike_sa_sync.attribute.value" in tree:
        # GATEWAYS, whose addresses are shown below it
        return from_hex(tree["ike_sa_sync.attribute.value"])
    [text] = [value for key, value in tree.items() if key != "ike_sa_sync.attribute.length"]
    return from_hex(text)


def proof_of(capture: Path, frame: int) -> tuple[bytes, bytes]:
    """A packet's IKE message with the octets of its PROOF zero, and those octets; tshark says where they are."""
    [layers] = dissect(capture, "-x", "-Y", f"frame.number == {frame}")
    octets = from_hex(layers["frame_raw"][0])
    begin = values(layers["isakmp"], "isakmp.ispi_raw")[1]
    _, at, length, *_ = values(layers["ike_sa_sync"], "ike_sa_sync.proof_raw")
    message = octets[begin : begin + int(layers["isakmp"]["isakmp.length"])]
    at -= begin
    return message[:at] + bytes(length) + message[at + length :], message[at : at + length]
