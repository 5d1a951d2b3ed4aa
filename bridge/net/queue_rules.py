"""The input rules that show the sidecar requests to resume, and let everything else pass.

`first`: a request matches when IKE_SA_SYNC is its first payload, or follows a COOKIE notification that is (IKE header's
Next Payload 200, or 41 and then 200). Requests for a full handshake never enter the queue. `anywhere`: every
IKE_SA_INIT request does, since a packet filter cannot walk the payloads. Both: GET Stub and Moving, which begin with
Ni. It goes to one of charon's ports, to any but 500 with the non-ESP marker, and its response flag is clear.

With a `tag`, the two octets that SPIr of each rebuilt IKE_SA ends with: also requests of such IKE_SAs, of the exchange
types CREATE_CHILD_SA and INFORMATIONAL, whose Message ID is below TAGGED_REQUESTS. charon may not have activated the
IKE_SA when they come (bridge.gateway.activation).

What matches is counted, then queued if the sidecar has shown within STALL_SECONDS that its event loop runs
(bridge.net.liveness): the kernel itself forgets a sidecar that stands still, whatever stopped it. The queue is bypassed
while no process reads it. The rules come after the operator's filter rules, so the firewall decides first: in a table
of our own at a later priority, or, with iptables, in its table `security`.

While the sidecar says that there is a flood, what matches is metered before it is queued, and dropped and counted
beyond a rate: requests that begin with IKE_SA_SYNC (FLOOD_RATE), requests with a cookie, which only the sidecar can
check (twice as many), and messages of exchange type 240 (STRAYS_RATE): so a flood of one kind takes no other kind's
place. Requests of rebuilt IKE_SAs are not dropped: most are of those that charon has activated long ago, and beyond the
rate (STRAYS_RATE) they go past the queue to charon, as they would without the rules. Sources are not told apart: an
attacker could forge the address of a client, and have its requests dropped. The kernel forgets the flood FLOOD_SECONDS
after it was last told of it. A kernel that cannot meter queues all of them; so do the rules for `anywhere`, but for
the last two kinds.

While the sidecar says that segments of charon's ha plugin change hands, all that may begin a handshake is queued: from
strongSwan 6.0.1 on an activation ends handshakes in progress, or crashes charon. The kernel forgets it HOLD_SECONDS
after it was last told of it. A kernel that has no xt_recent cannot be told. ip6tables cannot look behind extension
headers: what has some is dropped then.

IPv4 puts fragments together before its input rules, IPv6 after them, so that a fragmented request would never be whole
there. One more rule, which matches nothing, has the kernel do it first, as connection tracking does, but without
that: only the match for sockets and TPROXY ask for it. Where the kernel has neither, such requests go to charon.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from bridge.ike.message import ExchangeType, NotifyType, PayloadType
from bridge.net.firewall import Family, Jump, Rules, View, listing
from bridge.net.packet import (
    BEGINNINGS,
    EXCHANGE_OFFSET,
    FLAG_RESPONSE,
    IKE_HEADER,
    PORT_IKE,
    PORT_NAT_T,
    UDP_HEADER,
)

Match = Literal["first", "anywhere"]

NAME = "ike-sa-sync"
"""of our nftables table, and of our iptables chain"""
QUEUE_CHAIN = "ike-sa-sync-queue"
METER_CHAIN, COOKIE_CHAIN, SA_CHAIN = "ike-sa-sync-meter", "ike-sa-sync-meter-2", "ike-sa-sync-meter-3"
"""of requests without a cookie, with one, and of messages of exchange type 240"""
TAGGED_CHAIN = "ike-sa-sync-meter-4"
"""of requests of rebuilt IKE_SAs"""
HOLD_CHAIN = "ike-sa-sync-hold"
"""of what may begin a handshake"""
ALIVE: dict[Family, str] = {"ip": "ike-sa-sync", "ip6": "ike-sa-sync-6"}
"""the lists of xt_recent, with iptables: a list has one mask, that of the first rule that names it"""
FLOODED: dict[Family, str] = {"ip": "ike-sa-sync-flood", "ip6": "ike-sa-sync-flood-6"}
"""the same while there is a flood"""
HELD: dict[Family, str] = {"ip": "ike-sa-sync-hold", "ip6": "ike-sa-sync-hold-6"}
"""the same while segments change hands"""
STALL_SECONDS = 1
"""an event loop that stood still for so long gets no packets"""
BEAT_PORT = 9
"""of 127.0.0.1: a datagram that root sends to it shows nftables that the event loop runs; it goes nowhere"""

FLOOD_PORT = 10
"""the same, while there is a flood"""
FLOOD_SECONDS = 2
HOLD_PORT = 11
"""the same, while segments change hands"""
HOLD_SECONDS = 1
FLOOD_RATE = 25_000
"""requests without a cookie a second, about what the sidecar can answer with a cookie on one core"""
STRAYS_RATE = 10_000
"""messages about IKE_SAs a second: more than the sidecar can resume"""

# Next Payload, version, exchange type and flags are neighbours: one 32-bit comparison. Of the flags the response flag
# alone is looked at.
_WORD = UDP_HEADER + EXCHANGE_OFFSET - 2
_EXCHANGE_MASK, _MASK = 0x0000FF00 | FLAG_RESPONSE, 0xFF00FF00 | FLAG_RESPONSE
_FIRST_PAYLOAD = UDP_HEADER + IKE_HEADER
_NOTIFY_TYPE = 6
"""offset in a Notify payload (RFC 7296 section 3.10)"""
_MARKER_OCTETS = 4
_TAG = UDP_HEADER + 14
"""offset of the last two octets of SPIr"""
_MESSAGE_ID = UDP_HEADER + 20
TAGGED_REQUESTS = 32
"""a power of two: until a rebuilt IKE_SA is active, its client sends fewer requests"""
_ID_MASK = 0x100000000 - TAGGED_REQUESTS
TAG_OCTETS = 2


def _word(payload: int, exchange: int, flag: int = 0) -> str:
    return f"{payload << 24 | exchange << 8 | flag:#010x}"


_STUB = _word(PayloadType.NONCE, ExchangeType.STUB)
_SYNC_FIRST = _word(PayloadType.SYNC, ExchangeType.IKE_SA_INIT)
_COOKIE_FIRST = _word(PayloadType.NOTIFY, ExchangeType.IKE_SA_INIT)
_ANYWHERE = (_word(0, ExchangeType.IKE_SA_INIT), _word(0, ExchangeType.STUB))
_BEGINNINGS = tuple(_word(0, exchange, flag) for exchange, flag in BEGINNINGS)
_TAGGED = (_word(0, ExchangeType.CREATE_CHILD_SA), _word(0, ExchangeType.INFORMATIONAL))


PORTS = (PORT_IKE, PORT_NAT_T)
"""charon's, unless it is configured to others"""


def rules(
    queue: int,
    match: Match = "first",
    ports: Sequence[int] = PORTS,
    *,
    tag: bytes | None = None,
    flood_rate: int = FLOOD_RATE,
) -> Rules:
    """Those that send requests to `queue`; `ports` are those that charon receives IKE messages on. `tag`: the last
    TAG_OCTETS of SPIr of rebuilt IKE_SAs. In a flood `flood_rate` requests without a cookie a second pass, and in
    proportion of all else."""
    return Rules(
        name=NAME,
        chains=(NAME, METER_CHAIN, COOKIE_CHAIN, SA_CHAIN, TAGGED_CHAIN, HOLD_CHAIN, QUEUE_CHAIN),
        nftables=nftables_text(queue, match, ports, tag),
        iptables=lambda family, full: iptables_text(queue, match, family, full, ports, tag),
        jumps=(Jump("INPUT", "-p udp", NAME),),
        nftables_optional=(NFTABLES_WHOLE, nftables_meter(flood_rate)),
        iptables_optional=lambda family: _iptables_optional(family, flood_rate),
    )


def present(queue: int | None = None) -> bool:
    """Whether rules of ours are in place: any, or those to `queue`."""
    wanted = re.compile(r"queue\b" if queue is None else rf"queue\b.*\b{queue}\b", re.IGNORECASE)
    return any(wanted.search(line) for line in listing(rules(0)).splitlines())


def guarded() -> bool:
    """Whether rules that are in place forget a sidecar that stands still."""
    text = listing(rules(0))
    return "@alive" in text or "--rcheck" in text


def matched(view: View) -> int:
    """The packets that were for the queue, whether it took them or not."""
    return sum(count for rule, count in view.counts if "@alive" in rule or f"-g {QUEUE_CHAIN}" in rule)


def metered(view: View) -> int:
    """The requests that were dropped in a flood."""
    return sum(
        count
        for rule, count in view.counts
        if ("@flooded" in rule and "drop" in rule) or ("hashlimit" in rule and "DROP" in rule)
    )


def _shifts(ports: Sequence[int]) -> list[tuple[int, int]]:
    """Each port, and the octets of the marker before a message to it."""
    return [(port, 0 if port == PORT_IKE else _MARKER_OCTETS) for port in ports]


def nftables_text(queue: int, match: Match, ports: Sequence[int] = PORTS, tag: bytes | None = None) -> str:
    """What `nft -f -` reads, one transaction that also replaces an old table."""

    # raw payload expressions count bits
    def at(octet: int, octets: int) -> str:
        return f"@th,{octet * 8},{octets * 8}"

    lines = []
    for port, shift in _shifts(ports):
        before = f"udp dport {port}" + (f" {at(UDP_HEADER, _MARKER_OCTETS)} 0" if shift else "")
        head, payload = at(_WORD + shift, 4), _FIRST_PAYLOAD + shift
        if tag is not None:
            lines.append(
                f"{before} {at(_TAG + shift, TAG_OCTETS)} {int.from_bytes(tag):#x} "
                f"{head} & {_EXCHANGE_MASK:#x} {{ {', '.join(_TAGGED)} }} "
                f"{at(_MESSAGE_ID + shift, 4)} & {_ID_MASK:#x} 0 goto tagged"
            )
        if match == "anywhere":
            lines.append(f"{before} {head} & {_EXCHANGE_MASK:#x} {{ {', '.join(_ANYWHERE)} }} goto held")
        else:
            lines.append(f"{before} {head} & {_MASK:#x} {_STUB} goto about_sa")
            lines.append(f"{before} {head} & {_MASK:#x} {_SYNC_FIRST} goto unproved")
            lines.append(
                f"{before} {head} & {_MASK:#x} {_COOKIE_FIRST} {at(payload, 1)} {int(PayloadType.SYNC)} "
                f"{at(payload + _NOTIFY_TYPE, 2)} {int(NotifyType.COOKIE)} goto with_cookie"
            )
        lines.append(
            f"{before} {head} & {_EXCHANGE_MASK:#x} {{ {', '.join(_BEGINNINGS)} }} meta l4proto @activating goto held"
        )
    matches = "\n        ".join(lines)
    return f"""\
table inet {NAME}
delete table inet {NAME}
table inet {NAME} {{
    set alive {{
        type inet_proto; size 128; flags dynamic,timeout; timeout {STALL_SECONDS}s;
    }}
    set flooded {{
        type inet_proto; size 128; flags dynamic,timeout; timeout {FLOOD_SECONDS}s;
    }}
    set activating {{
        type inet_proto; size 128; flags dynamic,timeout; timeout {HOLD_SECONDS}s;
    }}
    chain beat {{
        type filter hook output priority raw; policy accept;
        ip daddr 127.0.0.1 udp dport {BEAT_PORT} meta skuid 0 update @alive {{ meta l4proto }} drop
        ip daddr 127.0.0.1 udp dport {FLOOD_PORT} meta skuid 0 update @flooded {{ meta l4proto }} drop
        ip daddr 127.0.0.1 udp dport {HOLD_PORT} meta skuid 0 update @activating {{ meta l4proto }} drop
    }}
    chain held {{
        counter meta l4proto @alive queue num {queue} bypass
    }}
    chain metered {{
    }}
    chain metered_cookie {{
    }}
    chain metered_sa {{
    }}
    chain metered_tagged {{
    }}
    chain unproved {{
        jump metered
        goto held
    }}
    chain with_cookie {{
        jump metered_cookie
        goto held
    }}
    chain about_sa {{
        jump metered_sa
        goto held
    }}
    chain tagged {{
        jump metered_tagged
        goto held
    }}
    chain input {{
        type filter hook input priority filter + 10; policy accept;
        {matches}
    }}
}}
"""


def iptables_text(
    queue: int,
    match: Match,
    family: Family,
    full: bool,
    ports: Sequence[int] = PORTS,
    tag: bytes | None = None,
) -> str:
    """The rules of our chains. Not `full`: for a kernel without xt_recent, which cannot forget a sidecar.

    u32 loads 32 bits that begin at the given octet. It cannot walk extension headers: IPv6 packets that have some are
    not matched, and dropped while segments change hands, since a request may be behind them.
    """
    if family == "ip":
        before, base = "0>>22&0x3C@", 0  # @ moves the origin past the IPv4 header, whatever its length
    else:
        before, base = "", 40
    plain = "4&0xFF00=0x1100"  # UDP follows the IPv6 header at once
    udp_follows = f"{plain}&&" if family == "ip6" else ""

    def at(octet: int) -> str:
        return f"{before}{base + octet}"

    lines = []
    for port, shift in _shifts(ports):
        marker = f"{at(UDP_HEADER)}=0&&" if shift else ""
        head, payload = at(_WORD + shift), _FIRST_PAYLOAD + shift
        if match == "anywhere":
            tests = [(f"{head}&{_EXCHANGE_MASK:#x}={','.join(_ANYWHERE)}", QUEUE_CHAIN)]
        else:
            cookie = (
                f"{head}&{_MASK:#x}={_COOKIE_FIRST}&&{at(payload)}&0xFF000000={PayloadType.SYNC << 24:#x}"
                f"&&{at(payload + _NOTIFY_TYPE - 2)}&0xFFFF={NotifyType.COOKIE:#x}"
            )
            tests = [
                (f"{head}&{_MASK:#x}={_STUB}", SA_CHAIN),
                (f"{head}&{_MASK:#x}={_SYNC_FIRST}", METER_CHAIN),
                (cookie, COOKIE_CHAIN),
            ]
        if tag is not None:
            tagged = (
                f"{at(_TAG - 2 + shift)}&0xFFFF={int.from_bytes(tag):#x}"
                f"&&{head}&{_EXCHANGE_MASK:#x}={','.join(_TAGGED)}&&{at(_MESSAGE_ID + shift)}&{_ID_MASK:#x}=0"
            )
            tests.append((tagged, TAGGED_CHAIN))
        if full:
            tests.append((f"{head}&{_EXCHANGE_MASK:#x}={','.join(_BEGINNINGS)}", HOLD_CHAIN))
        lines += [
            f'-A {NAME} -p udp --dport {port} -m u32 --u32 "{udp_follows}{marker}{test}" -g {chain}'
            for test, chain in tests
        ]
        if full and family == "ip6":
            held = " ".join(_recent(family, HELD, HOLD_SECONDS))
            lines.append(f'-A {NAME} -p udp --dport {port} -m u32 ! --u32 "{plain}" {held} -j DROP')
    lines += [f"-A {chain} -g {QUEUE_CHAIN}" for chain in (METER_CHAIN, COOKIE_CHAIN, SA_CHAIN, TAGGED_CHAIN)]
    if full:
        lines.append(f"-A {HOLD_CHAIN} {' '.join(_recent(family, HELD, HOLD_SECONDS))} -g {QUEUE_CHAIN}")
    recent = " ".join(_recent(family, ALIVE, STALL_SECONDS)) + " " if full else ""
    lines.append(f"-A {QUEUE_CHAIN} {recent}-j NFQUEUE --queue-num {queue} --queue-bypass")
    return "\n".join(lines) + "\n"


def _recent(family: Family, names: dict[Family, str], seconds: int) -> tuple[str, ...]:
    # the list holds one address, that of any packet under the mask
    mask = "0.0.0.0" if family == "ip" else "::"  # noqa: S104 - no address is bound
    return ("-m", "recent", "--name", names[family], "--rcheck", "--seconds", str(seconds), "--mask", mask, "--rsource")


def _rates(rate: int) -> tuple[int, int, int, int]:
    """Those of the four kinds, where `rate` is that of requests without a cookie."""
    strays = rate * STRAYS_RATE // FLOOD_RATE
    return rate, 2 * rate, strays, strays


_METERED = ("metered", "metered_cookie", "metered_sa", "metered_tagged")
_METER_CHAINS = (METER_CHAIN, COOKIE_CHAIN, SA_CHAIN, TAGGED_CHAIN)


def nftables_meter(rate: int) -> str:
    """What `nft -f -` reads to meter requests in a flood."""
    chains = "".join(
        f"    chain {chain} {{\n        meta l4proto @flooded limit rate over {each}/second "
        f"burst {_burst(each)} packets counter {'accept' if chain == 'metered_tagged' else 'drop'}\n    }}\n"
        for chain, each in zip(_METERED, _rates(rate), strict=True)
    )
    return f"table inet {NAME} {{\n{chains}}}\n"


def _iptables_optional(family: Family, rate: int) -> list[tuple[str, ...]]:
    """Rules to meter requests in a flood, and to have IPv6 fragments put together."""
    flooded = _recent(family, FLOODED, FLOOD_SECONDS)
    meters: list[tuple[str, ...]] = []
    for number, (chain, each) in enumerate(zip(_METER_CHAINS, _rates(rate), strict=True)):
        name = f"{FLOODED[family]}-{number}"
        limit = ("--hashlimit-name", name, "--hashlimit-above", f"{each}/sec", "--hashlimit-burst", _burst(each))
        # RETURN leaves the chains that were gone to
        verdict = "RETURN" if chain == TAGGED_CHAIN else "DROP"
        meters.append(("-I", chain, "1", *flooded, "-m", "hashlimit", *limit, "-j", verdict))
    return [*meters, ("-A", NAME, *IP6TABLES_WHOLE)] if family == "ip6" else meters


def _burst(rate: int) -> str:
    return str(max(rate // 10, 1))


NFTABLES_WHOLE = f"""\
table inet {NAME} {{
    chain whole {{
        type filter hook prerouting priority raw; policy accept;
        meta nfproto ipv6 udp sport 0 udp dport 0 tproxy ip6 to :{PORT_IKE}
    }}
}}
"""
"""what `nft -f -` reads to have IPv6 fragments put together: packets of ports that nothing has, to a socket that would
have to be transparent"""
IP6TABLES_WHOLE = ("-p", "udp", "--sport", "0", "--dport", "0", "-m", "socket")
"""the same as a rule of ip6tables, without a target"""
