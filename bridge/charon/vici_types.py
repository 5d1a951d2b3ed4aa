"""What charon says over VICI, as types, and when its SAs end. No I/O.

Reports come as dictionaries of text, and what is in them may differ from release to release.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from enum import StrEnum
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, NamedTuple

from bridge.stub.types import Endpoint

OVER_TIME = 0.1
"""charon's default over_time: this share of the larger of rekey_time and reauth_time"""

Section = dict[str, Any]


class ViciError(Exception):
    """charon cannot be reached over VICI, or refused a command; the text says which, and why."""


class ChildInfo(NamedTuple):
    """One CHILD_SA of list-sas. `spi_in` is charon's in-memory value, as in HA messages; 0 while it has none."""

    name: str
    state: str
    spi_in: int
    packets_in: int = 0
    packets_out: int = 0
    octets_in: int = 0
    octets_out: int = 0
    idle_in: int | None = None
    """seconds since the last packet came in; None: none has"""
    spi_out: int = 0
    """as `spi_in`"""

    @property
    def works(self) -> bool:
        """Whether it is installed, and not replaced or about to go."""
        return self.state in ("INSTALLED", "REKEYING")


class SaInfo(NamedTuple):
    """An IKE_SA as VICI reports it. Times in seconds from now; None where charon has set none."""

    connection: str
    spi_i: bytes
    spi_r: bytes
    initiator: bool
    version: int
    state: str
    local: Endpoint
    remote: Endpoint
    local_vips: tuple[str, ...]
    remote_vips: tuple[str, ...]
    established: int
    rekey: int | None
    reauth: int | None
    children: tuple[ChildInfo, ...]
    local_id: str
    """identities as strongSwan writes them"""
    remote_id: str
    eap_id: str
    """that of EAP, where it is another than `remote_id`; else empty"""
    unique_id: str = ""
    """by which charon names it: a decimal number"""

    @property
    def spis(self) -> bytes:
        return self.spi_i + self.spi_r


class ChildConfig(NamedTuple):
    name: str
    local_ts: tuple[str, ...] = ()
    """traffic selectors as charon writes them"""
    remote_ts: tuple[str, ...] = ()
    dpd_action: str = ""
    """as VICI has it: none, trap, start (restart)"""
    close_action: str = ""
    mode: str = ""
    """as VICI has it: TUNNEL, TRANSPORT, DROP ..."""


class GuardInfo(NamedTuple):
    """An installed policy of a child with `mode = drop`, or a trap."""

    local_ts: tuple[str, ...]
    """traffic selectors as charon writes them: `dynamic` is any"""
    remote_ts: tuple[str, ...]


class Unique(StrEnum):
    """Connection uniqueness policy (`unique` in swanctl.conf), as VICI writes it."""

    NEVER = "UNIQUE_NEVER"
    NO = "UNIQUE_NO"
    REPLACE = "UNIQUE_REPLACE"
    KEEP = "UNIQUE_KEEP"


class ConnectionInfo(NamedTuple):
    """A configured connection. Times in seconds, 0 = never."""

    name: str
    rekey_time: int
    reauth_time: int
    children: tuple[ChildConfig, ...]
    dpd_delay: int = 0
    remote_addresses: tuple[str, ...] = ()
    """as configured: addresses, ranges or names; none where any will do"""
    local_addresses: tuple[str, ...] = ()
    """likewise"""
    local_ids: tuple[str, ...] = ()
    """identities as text, one for each authentication round that has one; none where any will do"""
    remote_ids: tuple[str, ...] = ()
    version: str = ""
    """IKEv1, IKEv2, or IKEv1/2"""
    ppk: bool = False
    """whether a post-quantum preshared key is configured (RFC 8784)"""
    unique: Unique = Unique.NO

    @property
    def over_time(self) -> int:
        """charon's default; VICI does not report a configured one."""
        return int(OVER_TIME * max(self.rekey_time, self.reauth_time))

    @property
    def lifetime(self) -> int:
        """How long a fresh IKE_SA of this connection lives at most, in seconds; 0 = for ever."""
        soft = [t for t in (self.rekey_time, self.reauth_time) if t]
        return min(soft) + self.over_time if soft else 0


def as_text(value: Any, default: str = "") -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else default


def as_number(value: Any) -> int | None:
    try:
        return int(as_text(value))
    except ValueError:
        return None


def _spi(value: Any) -> int:
    """An ESP SPI in hex as the number that charon has in memory, where it is in network order."""
    return int.from_bytes(bytes.fromhex(as_text(value)), sys.byteorder)


def _addresses(values: Any) -> tuple[str, ...]:
    return tuple(str(ip_address(as_text(value))) for value in values or ())


_UNKNOWN = {"%any": "0.0.0.0", "%any6": "::"}  # noqa: S104 - a peer that charon cannot resolve, nothing to listen on


def _endpoint(section: Section, side: str) -> Endpoint:
    # a link-local address carries its zone, which no table of ours wants
    text = as_text(section.get(f"{side}-host"))
    host = _UNKNOWN.get(text) or text.split("%")[0]
    return _seen_endpoint(host, as_number(section.get(f"{side}-port")) or 0)


@lru_cache(maxsize=4096)
def _seen_endpoint(host: str, port: int) -> Endpoint:
    return Endpoint(str(ip_address(host)), port)


_ENDPOINTS = ("local-host", "local-port", "remote-host", "remote-port")

_NOT_AS_EXPECTED = (KeyError, ValueError, AttributeError, TypeError)
"""a field is missing or no number or address; a value, a list or a section is there in place of another of them"""


def _child_sections(children: Section) -> Iterator[Section]:
    """The CHILD_SAs of a report: of a rekeyed one both that it was and that it is."""
    for child in children.values():
        if "old" in child and "new" in child:
            yield child["old"]
            yield child["new"]
        else:
            yield child


def parse_ike_sa(connection: str, section: Section) -> SaInfo:
    """One IKE_SA section of list-sas or an event. Raises ViciError on what charon would not send."""
    try:
        return SaInfo(
            connection=sys.intern(connection),
            spi_i=bytes.fromhex(as_text(section["initiator-spi"])),
            spi_r=bytes.fromhex(as_text(section["responder-spi"])),
            initiator=as_text(section.get("initiator")) == "yes",
            version=as_number(section.get("version")) or 0,
            state=sys.intern(as_text(section.get("state"))),
            local=_endpoint(section, "local"),
            remote=_endpoint(section, "remote"),
            local_vips=_addresses(section.get("local-vips")),
            remote_vips=_addresses(section.get("remote-vips")),
            established=as_number(section.get("established")) or 0,
            rekey=as_number(section.get("rekey-time")),
            reauth=as_number(section.get("reauth-time")),
            children=tuple(
                ChildInfo(
                    sys.intern(as_text(child.get("name"))),
                    sys.intern(as_text(child.get("state"))),
                    _spi(child.get("spi-in")),
                    as_number(child.get("packets-in")) or 0,
                    as_number(child.get("packets-out")) or 0,
                    as_number(child.get("bytes-in")) or 0,
                    as_number(child.get("bytes-out")) or 0,
                    as_number(child.get("use-in")),
                    _spi(child.get("spi-out")),
                )
                for child in _child_sections(section.get("child-sas", {}))
            ),
            local_id=as_text(section.get("local-id")),
            remote_id=as_text(section.get("remote-id")),
            eap_id=as_text(section.get("remote-eap-id")),
            unique_id=as_text(section.get("uniqueid")),
        )
    except _NOT_AS_EXPECTED as error:
        raise ViciError(f"an IKE_SA of connection {connection!r} could not be read from VICI: {error}") from error


def parse_tasks(section: Section) -> frozenset[str]:
    """The tasks of an IKE_SA section of list-sas that charon has begun or queued. Raises ViciError on what charon would
    not send."""
    try:
        return frozenset(as_text(name) for key in ("tasks-active", "tasks-queued") for name in section.get(key, ()))
    except _NOT_AS_EXPECTED as error:
        raise ViciError(f"tasks could not be read from VICI: {error}") from error


def _selectors(section: Section, side: str) -> tuple[str, ...]:
    return tuple(as_text(value) for value in section.get(side, ()))


def _child(name: str, section: Section) -> ChildConfig:
    actions = (as_text(section.get("dpd_action")), as_text(section.get("close_action")))
    return ChildConfig(
        name, _selectors(section, "local-ts"), _selectors(section, "remote-ts"), *actions, as_text(section.get("mode"))
    )


def _configured(values: Any) -> tuple[str, ...]:
    return tuple(address for value in values if not (address := as_text(value)).startswith("%any"))


def _identities(section: Section, side: str) -> tuple[str, ...]:
    rounds = [value for key, value in section.items() if key.startswith(side) and isinstance(value, dict)]
    return tuple(identity for one in rounds if (identity := as_text(one.get("id"))) and "%any" not in identity)


_UNIQUE = {str(policy): policy for policy in Unique}


def parse_connection(name: str, section: Section) -> ConnectionInfo:
    """One connection of list-conns. Raises ViciError on what charon would not send."""
    try:
        return ConnectionInfo(
            name=name,
            rekey_time=as_number(section.get("rekey_time")) or 0,
            reauth_time=as_number(section.get("reauth_time")) or 0,
            children=tuple(_child(child, value) for child, value in section.get("children", {}).items()),
            dpd_delay=as_number(section.get("dpd_delay")) or 0,
            remote_addresses=_configured(section.get("remote_addrs", ())),
            local_addresses=_configured(section.get("local_addrs", ())),
            local_ids=_identities(section, "local"),
            remote_ids=_identities(section, "remote"),
            version=as_text(section.get("version")),
            ppk=bool(as_text(section.get("ppk_id"))),
            unique=_UNIQUE.get(as_text(section.get("unique")), Unique.NO),
        )
    except _NOT_AS_EXPECTED as error:
        raise ViciError(f"connection {name!r} could not be read from VICI: {error}") from error


def parse_guard(section: Section) -> GuardInfo:
    """One policy of list-policies. Raises ViciError on what charon would not send."""
    try:
        return GuardInfo(_configured(section.get("local-ts", ())), _configured(section.get("remote-ts", ())))
    except _NOT_AS_EXPECTED as error:
        raise ViciError(f"a policy could not be read from VICI: {error}") from error


class Event(NamedTuple):
    """A VICI event. `up` is None where the event has no direction; `old` is the SA before an ike-rekey."""

    kind: str
    sa: SaInfo
    up: bool | None = None
    old: SaInfo | None = None


def parse_event(kind: str, message: Section) -> list[Event]:
    """The IKE_SAs that a VICI event is about. Raises ViciError."""
    up = (as_text(message.get("up")) == "yes") if kind.endswith("updown") else None
    events = []
    for name, section in message.items():
        if not isinstance(section, dict):
            continue
        if kind == "ike-rekey":
            # without one of them, parse_ike_sa says what it misses
            old, new = parse_ike_sa(name, section.get("old", {})), parse_ike_sa(name, section.get("new", {}))
            events.append(Event(kind, new, None, old))
        elif kind == "ike-update":
            # raised before charon changes the SA: the new endpoints stand beside the section, the old ones in it
            moved = {field: message[field] for field in _ENDPOINTS if field in message}
            events.append(Event(kind, parse_ike_sa(name, section | moved)))
        else:
            events.append(Event(kind, parse_ike_sa(name, section), up))
    return events


def expiry(info: SaInfo, connection: ConnectionInfo | None, now: float | None = None) -> tuple[int, int, int]:
    """(rekey_at, reauth_at, expires) of an IKE_SA in Unix seconds, 0 = never.

    charon deletes an IKE_SA at min(rekey, reauth) + over_time; over_time is charon's default,
    for VICI does not report it.
    """
    at = time.time() if now is None else now
    rekey_at = int(at + info.rekey) if info.rekey is not None else 0
    reauth_at = int(at + info.reauth) if info.reauth is not None else 0
    soft = [t for t in (rekey_at, reauth_at) if t]
    if not soft:
        return rekey_at, reauth_at, 0
    over = connection.over_time if connection else int(OVER_TIME * (min(soft) - at))
    return rekey_at, reauth_at, min(soft) + over
