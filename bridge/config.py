"""The options of gateway.yaml and client.yaml, with their types (bridge.service.config_file reads the files).

Every option and its default is in this file and nowhere else.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

Seconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


class ConfigError(Exception):
    """A configuration file that cannot be used; the text names file, key and reason on one line."""


class HaConfig(Struct, forbid_unknown_fields=True, frozen=True):
    """The ends of charon's ha plugin: `local` and `remote` of charon.plugins.ha, seen from the sidecar."""

    listen: str = "127.0.0.2"
    """the sidecar's end, charon.plugins.ha.remote"""
    charon: str = "127.0.0.1"
    """charon's end, charon.plugins.ha.local"""
    segments: Annotated[int, Meta(ge=1, le=16)] = 16
    """as charon.plugins.ha.segment_count"""
    placeholders: Annotated[int, Meta(ge=0)] = 20_000
    """the most placeholders, each for an address of charon's HA pools that is in use at another gateway; 13 KB of
    charon's memory each"""
    receive_buffer: Annotated[int, Meta(ge=65536)] = 16 * 1024 * 1024
    """size of the socket buffer for charon's datagrams, in octets"""
    rules: Literal["auto", "nftables", "iptables", "external"] = "auto"
    """what sets the rules that let only root send to and from both ends; external: the administrator"""


class BankConfig(Struct, forbid_unknown_fields=True, frozen=True):
    mode: Literal["centralised", "distributed", "mixed"] = "centralised"
    """centralised: one bank for all gateways; distributed: one at each gateway; mixed: both"""
    url: str | None = None
    """redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://; none: a private Redis.
    The bank of all gateways; in mode distributed this gateway's own, with an address that the others can reach"""
    local: str | None = None
    """mixed: this gateway's own bank; none: a private Redis"""
    peers: dict[str, str] = field(default_factory=dict)
    """distributed and mixed: the banks of other gateways, address in the index to URL"""
    targets: tuple[str, ...] = ()
    """the `peers` that store copies of this gateway's stubs; none: `copies` peers for each stub, chosen by its SPI"""
    copies: Annotated[int, Meta(ge=0)] = 1
    """number of peers that store a copy of each stub, if `targets` is empty"""
    peer_timeout: Seconds = 0.1
    """how long a request waits for the other banks if this gateway's own bank has no stub for it"""
    key_file: str = "/etc/ike-sa-sync/bank.key"
    """from `ike-sa-sync keygen`; the same on all gateways of a bank, and readable by no other user"""
    runtime: str = "/run/ike-sa-sync/redis"
    """folder of the private Redis: socket and append-only file"""
    get_timeout: Seconds = 1.0
    """how long a request may wait for its stub before it goes to charon"""
    pending: Count = 200_000
    """the most changes of stubs kept in memory while the bank is unreachable"""
    cache: Count = 200_000
    """the most stubs of failed gateways kept in memory"""


class DrainConfig(Struct, forbid_unknown_fields=True, frozen=True):
    on_stop: bool = True
    """whether sessions are moved to the other living gateways before strongSwan's unit is stopped or restarted"""
    timeout: Seconds = 30.0
    """how long that may take; charon ends the sessions that have not moved by then"""


class FailoverConfig(Struct, forbid_unknown_fields=True, frozen=True):
    detect: Annotated[float, Meta(ge=0.3, le=60)] = 1.0
    """seconds after which a gateway without a heartbeat in the bank counts as failed; it writes three in that time"""
    announce: bool = True
    """announce the failure of another gateway to its clients, so that they resume here; needs `address`"""
    rate: Annotated[int, Meta(ge=1)] = 2000
    """announcements a second at most; two cores resume about as many sessions"""
    uplink: bool = True
    """whether a gateway that cannot send to its clients any more says so itself (docs/failures.md). Set it to false
    where charon's packets take other routes than the kernel's answer to a plain question: by a mark
    (`fwmark`), or in a VRF"""


ChildrenInExchange = Literal["auto", "always", "never"]


def children_policy(in_exchange: ChildrenInExchange, at_once: bool | None) -> ChildrenInExchange:
    """What the option says, or its old name where that is there."""
    return in_exchange if at_once is None else "always" if at_once else "never"


class SyncConfig(Struct, forbid_unknown_fields=True, frozen=True):
    proof: Literal["required", "optional"] = "required"
    """required: requests without PROOF are refused; optional: plain requests of the draft, which are not
    authenticated, are served too"""
    refused: Literal["handshake", "drop"] = "handshake"
    """what follows a refused request (draft section 3.1). handshake: a full handshake; clients from release 0.2 on
    receive a notification, and requests of other clients go to charon. drop: no answer"""
    confirm_timeout: Seconds = 10.0
    """after this long without a verified message a rebuilt SA is removed"""
    cookie_threshold: Annotated[int, Meta(ge=0)] = 100
    """number of unconfirmed SAs, including requests that wait to become one, from which on requests need a cookie"""
    cookie_rate: Count = 1_000
    """requests a second, from all sources, beyond which they need a cookie"""
    source_rate: Count = 100
    """requests a second from one source, beyond which they need a cookie; with cookies, beyond which they go to
    charon. A source is an IPv4 address or an IPv6 /64"""
    max_unconfirmed: Count = 10_000
    """the most unconfirmed SAs; further requests go to charon"""
    max_unconfirmed_per_source: Count = 64
    """the most unconfirmed SAs of one source; from half of it on, requests of this source need a cookie"""
    lifetime: Annotated[int, Meta(ge=60)] | None = None
    """the longest lifetime of a stub, in seconds; none: that of its IKE_SA"""
    children_in_exchange: ChildrenInExchange = "auto"
    """whether CHILD_SAs without PFS come up in the round trip of their IKE_SA, where charon raises no events for
    them; auto: all but those with an updown script or `inactivity`, those with marks if charon has loaded connmark or
    forecast, and all while a program is connected to charon's lookip plugin"""
    children_at_once: bool | None = None
    """the old name: true is always, false is never"""
    duplicate_address: Literal["end-newer", "report"] = "end-newer"
    """what follows if a full handshake was assigned a virtual IP that another peer's session has. end-newer: the
    gateway ends the newer session, three times an hour for one peer at most; report: it only reports it"""
    shared_secret: bool = False
    """whether stubs contain the Diffie-Hellman shared secret, as in the draft; no derivation needs it"""
    forward_secrecy: Literal["offered", "required", "off"] = "offered"
    """a Diffie-Hellman exchange in the round trip, on a curve. offered: for clients that ask; required: sessions
    resume only with it; off: never"""
    client_stub: Literal["off", "fallback", "prefer"] = "off"
    """client-held stubs. off: clients get none; fallback: used if the bank has no stub or is unreachable; prefer: used
    before the bank"""
    tell_gateways: bool = True
    """whether the gateway sends clients the addresses of the other gateways of the bank, at most 16, so that they can
    resume there without configuration"""


class NetworkConfig(Struct, forbid_unknown_fields=True, frozen=True):
    """How packets to a client reach the gateway that has its session: docs/network.md."""

    return_path: Literal["routed", "announced", "external"] | None = None
    """routed: a routing daemon exports charon's table 220; announced: the sidecar announces virtual IPs of directly
    connected networks by ARP and neighbour discovery; external: other means. None: as announced, and `check` warns
    if it finds neither"""


class HooksConfig(Struct, forbid_unknown_fields=True, frozen=True):
    """Programs that the gateway calls."""

    session: str | None = None
    """program that is called for each event of a session, with the event as JSON on standard input: docs/hooks.md"""
    timeout: Seconds = 10.0
    """how long one call may take; the program is then killed"""


class InterceptConfig(Struct, forbid_unknown_fields=True, frozen=True):
    rules: Literal["auto", "nftables", "iptables", "external"] = "auto"
    """what sets the rules that queue requests to the sidecar; external: the administrator"""
    queue: Annotated[int, Meta(ge=0, le=65535)] = 4510
    """NFQUEUE number"""
    ports: tuple[Annotated[int, Meta(ge=1, le=65535)], ...] | None = None
    """UDP ports that charon receives IKE messages on; none: charon.port and charon.port_nat_t of strongswan.conf"""
    match: Literal["first", "anywhere"] = "first"
    """position of IKE_SA_SYNC in a request. first: in front, as clients from release 0.2 on send it, so that requests
    for a full handshake do not pass through the sidecar. anywhere: also last, as clients of release 0.1 and plain
    clients of the draft send it; every IKE_SA_INIT request then passes through the sidecar"""


LogLevel = Literal["debug", "info", "warning", "error"]


class TakeoverConfig(Struct, forbid_unknown_fields=True, frozen=True):
    """Experimental: sessions of clients without a sidecar go on at another gateway that gets their address."""

    addresses: tuple[str, ...] = ()
    """addresses that gateways share, each at one gateway at a time (VRRP): this gateway takes the sessions at one over
    when it gets it. Stubs of these sessions contain all that their keys come from"""
    trigger: Literal["netlink", "command"] = "netlink"
    """what tells that an address came or went. netlink: the kernel, when it appears on an interface or leaves it;
    command: `ike-sa-sync takeover` and `yield` alone"""


class LogConfig(Struct, forbid_unknown_fields=True, frozen=True):
    level: LogLevel = "info"
    """the level at the start; `ike-sa-sync log-level` changes it"""
    format: Literal["logfmt", "json"] = "logfmt"
    """logfmt or json, one event a line"""


class GatewayConfig(Struct, forbid_unknown_fields=True, frozen=True):
    address: str | None = None
    """this gateway's address in the index, for SAs of its family; none, and for others: the local address of each SA"""
    vici: str = "/run/charon.vici"
    """charon's socket"""
    swanctl: str | None = None
    """the swanctl.conf that charon is loaded from, for settings that VICI does not report (PFS); none:
    $SWANCTL_DIR/swanctl.conf, or /etc/swanctl/swanctl.conf. The sidecar reads ipsec.conf too"""
    ha: HaConfig = field(default_factory=HaConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    failover: FailoverConfig = field(default_factory=FailoverConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    drain: DrainConfig = field(default_factory=DrainConfig)
    hooks: HooksConfig = field(default_factory=HooksConfig)
    takeover: TakeoverConfig = field(default_factory=TakeoverConfig)
    intercept: InterceptConfig = field(default_factory=InterceptConfig)
    guard: Literal["check", "external"] = "check"
    """whether `check` looks for what stops packets to clients while their sessions are not here: docs/security.md.
    external: other means, a packet filter for instance, do it"""
    state: str | None = "/var/lib/ike-sa-sync"
    """folder where the gateway records, across restarts, which sessions ended or were resumed elsewhere; none: in
    memory"""
    control: str = "/run/ike-sa-sync/gateway.sock"
    """control socket of the sidecar, for `status` and other commands"""
    metrics: str | None = "127.0.0.1:9470"
    """address on which the sidecar serves metrics for Prometheus; none: no metrics"""
    log: LogConfig = field(default_factory=LogConfig)


class GatewayEntry(Struct, forbid_unknown_fields=True, frozen=True):
    """One gateway the client may move to."""

    address: str
    """the gateway's own `address`, or a name, which is resolved at each attempt and may stand for several gateways"""
    connection: str
    """the swanctl connection to it"""


class VpnConfig(Struct, forbid_unknown_fields=True, frozen=True):
    """Gateways that serve the same sessions."""

    gateways: Annotated[tuple[GatewayEntry, ...], Meta(min_length=1)]
    """in order of preference"""
    resume_on_down: bool = True
    """whether the client resumes automatically when a gateway of this VPN fails (DPD, retransmissions)"""


class ResumeConfig(Struct, forbid_unknown_fields=True, frozen=True):
    """The client's timers."""

    answer_timeout: Seconds = 4.0
    """how long the client waits for the answer of one gateway"""
    retransmit: Seconds = 0.4
    """time until the first retransmission; each further one waits 1.8 times as long"""
    refusal_grace: Seconds = 0.4
    """how long the client waits on for a proven answer after a normal response"""
    initiate_timeout: Seconds = 30.0
    """how long the client waits for charon to set up an IKE_SA or a CHILD_SA"""
    children_in_exchange: ChildrenInExchange = "auto"
    """whether to ask for CHILD_SAs without PFS in the round trip of their IKE_SA; auto: for all but those that
    need charon's events on this host, as `sync.children_in_exchange` of a gateway"""
    children_at_once: bool | None = None
    """the old name: true is always, false is never"""
    after_delete: Literal["nothing", "handshake"] = "nothing"
    """what follows when the gateway ends a session by a DELETE. nothing: what charon is configured to do; handshake: a
    full handshake with one of the gateways, the one that sent the DELETE last. A session that was resumed less
    than 30 s before is set up again in either case"""
    forward_secrecy: bool | Literal["preferred"] = False
    """whether to ask for a Diffie-Hellman exchange in the round trip; preferred: answers without
    one are accepted too"""


Keepalive = Literal["auto", "always", "off"]


class AnnounceConfig(Struct, forbid_unknown_fields=True, frozen=True):
    """How announcements of a gateway's failure reach a client."""

    keepalive: Keepalive = "auto"
    """whether to send the other gateways a NAT-keepalive every 20 s, so that a NAT or a stateful filter lets their
    announcements in; auto: to all but those on the client's own IPv4 network, unless there is a NAT; always: also to
    these, for a client whose own packet filter is stateful"""
    probe_interval: Seconds = 0.1
    """time between the three messages by which the client asks its gateway whether it lives; a client whose messages
    take longer than three of these for a round trip (satellite) would leave a living gateway on a false alarm"""


class HeldConfig(Struct, forbid_unknown_fields=True, frozen=True):
    """Client-held stubs, if the gateways provide them."""

    fetch: bool = True
    """whether the client asks for client-held stubs and presents them"""
    file: str | None = None
    """file for sessions with their keys (mode 0600), to survive a crash of this host; none: in memory"""


DEFAULT_VPN = "default"
"""the VPN of `gateways`"""


class ClientConfig(Struct, forbid_unknown_fields=True, frozen=True):
    vici: str = "/run/charon.vici"
    """charon's socket"""
    swanctl: str | None = None
    """the swanctl.conf that charon is loaded from, for settings that VICI does not report (PFS); none:
    $SWANCTL_DIR/swanctl.conf, or /etc/swanctl/swanctl.conf. The sidecar reads ipsec.conf too"""
    ha: HaConfig = field(default_factory=HaConfig)
    control: str = "/run/ike-sa-sync/client.sock"
    """control socket of the sidecar, for `resume`, `status` and other commands"""
    gateways: tuple[GatewayEntry, ...] = ()
    """of one VPN, named `default`, in order of preference"""
    vpns: dict[str, VpnConfig] = field(default_factory=dict)
    """gateways grouped by VPN, name to `gateways` and `resume_on_down`; a session moves within its VPN only"""
    resume_on_down: bool = True
    """whether the client resumes automatically when one of `gateways` fails (DPD, retransmissions); each of `vpns`
    has its own"""
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    held: HeldConfig = field(default_factory=HeldConfig)
    announce: AnnounceConfig = field(default_factory=AnnounceConfig)
    guard: Literal["check", "external"] = "check"
    """whether `check` looks for what stops packets to the networks behind the gateways while there is no CHILD_SA.
    external: other means, a packet filter for instance, do it"""
    metrics: str | None = "127.0.0.1:9471"
    """address on which the sidecar serves metrics for Prometheus; none: no metrics"""
    log: LogConfig = field(default_factory=LogConfig)


def parse_host_port(text: str) -> tuple[str, int]:
    """`host:port` (IPv6 in brackets) as a pair. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ValueError(f"{text!r} is not ADDRESS:PORT")
    return str(ip_address(host.strip("[]"))), int(port)


def canonical_address(text: str) -> str:
    """An IP address as everything here writes and compares it. Raises ValueError."""
    return str(ip_address(text))


_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")


def is_name(address: str) -> bool:
    """Whether a gateway's address is a host name that has to be resolved."""
    # the last label of an address, or of a range of them, is a number; that of a name is none
    last = address.rstrip(".").rpartition(".")[2]
    return bool(_HOST_NAME.fullmatch(address)) and not last.isdigit()
