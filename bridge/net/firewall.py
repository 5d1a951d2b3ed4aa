"""The input rules that show the sidecar IKE requests: nftables where the kernel has nft_queue, else iptables.

A request matches when it goes to port 500, or to 4500 with the non-ESP marker, its exchange type is IKE_SA_INIT or
GET Stub, and its response flag is clear. Nothing else ever enters the queue, above all no ESP. The queue is bypassed
while nobody reads it. The rules come after the operator's filter rules, so the firewall decides first:
in a table of our own at a later priority, or, with iptables, in its table `security`.

IPv4 puts fragments together before its input rules, IPv6 after them, so that a fragmented request would never be whole
there. One more rule, which matches nothing, has the kernel do it first, as connection tracking does, but without
that: only the match for sockets and TPROXY ask for it. Where the kernel has neither, such requests go to charon.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

from bridge.net.packet import EXCHANGE_OFFSET, EXCHANGES, FLAG_RESPONSE, PORT_IKE, PORT_NAT_T, UDP_HEADER

Backend = Literal["nftables", "iptables"]
Family = Literal["ip", "ip6"]

NAME = "ike-sa-sync"
"""of our nftables table, and of our iptables chain"""
TABLE = "security"
"""of iptables: the one that filters input after `filter`"""

_KINDS = ("", "-nft", "-legacy")
"""of iptables: the system's choice first; either of the others may be the only one that a kernel serves"""
_TIMEOUT = 15
_LOCK_WAIT = "5"
"""seconds for the lock that legacy iptables share"""
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
_IPV6 = Path("/proc/thread-self/net/if_inet6")

# Exchange type and flags are neighbours: one 16-bit comparison, the response flag being the only one looked at.
_MASK = 0xFF00 | FLAG_RESPONSE
_VALUES = [f"{exchange << 8:#06x}" for exchange in EXCHANGES]
_EXCHANGE = UDP_HEADER + EXCHANGE_OFFSET
_MARKER_OCTETS = 4


class RulesError(Exception):
    """The rules cannot be set or removed; the text names the cause and the mend."""


def install(queue: int, *, backend: Backend | Literal["auto"] = "auto") -> Backend:
    """Send IKE requests to `queue`, in the network namespace of the caller; the backend that took the rules.

    Replaces rules that are there already, such as those of a killed sidecar. Raises RulesError.
    """
    remove()
    return _first_that_works(queue, backend, ())


def detect(*, backend: Backend | Literal["auto"] = "auto") -> Backend:
    """The backend that `install` would use, tried in a network namespace of its own. Raises RulesError."""
    return _first_that_works(0, backend, ("unshare", "--net"))


def remove() -> None:
    """Take our rules away, whoever set them, by whichever backend. Raises RulesError."""
    if _nft_listing():
        _run(["nft", "delete", "table", "inet", NAME])
    for tool in _iptables_tools():
        if not _iptables_listing(tool):
            continue
        command = [tool, "-w", _LOCK_WAIT, "-t", TABLE]
        while _run([*command, "-D", "INPUT", "-p", "udp", "-j", NAME], check=False).returncode == 0:
            pass
        _run([*command, "-F", NAME])
        _run([*command, "-X", NAME])
        _remove_empty_table(tool)


def present(queue: int | None = None) -> bool:
    """Whether rules of ours are in place: any, or those to `queue`."""
    listings = [_nft_listing(), *map(_iptables_listing, _iptables_tools())]
    wanted = re.compile(r"queue\b" if queue is None else rf"queue\b.*\b{queue}\b", re.IGNORECASE)
    return any(wanted.search(line) for listing in listings for line in listing.splitlines())


def nftables_rules(queue: int) -> str:
    """What `nft -f -` reads, one transaction that also replaces an old table."""
    values = "{ " + ", ".join(_VALUES) + " }"
    # raw payload expressions count bits
    plain = f"@th,{_EXCHANGE * 8},16 & {_MASK:#x} {values}"
    marked = f"@th,{UDP_HEADER * 8},32 0 @th,{(_EXCHANGE + _MARKER_OCTETS) * 8},16 & {_MASK:#x} {values}"
    return f"""\
table inet {NAME}
delete table inet {NAME}
table inet {NAME} {{
    chain input {{
        type filter hook input priority filter + 10; policy accept;
        udp dport {PORT_IKE} {plain} queue num {queue} bypass
        udp dport {PORT_NAT_T} {marked} queue num {queue} bypass
    }}
}}
"""


def iptables_rules(queue: int, family: Family) -> str:
    """What `iptables-restore --noflush` or `ip6tables-restore --noflush` reads.

    u32 loads 32 bits that begin at the given octet, so exchange type and flags are the low half of octets 16 to 19 of
    the IKE header. It cannot walk extension headers: IPv6 packets that have some are not matched.
    """
    if family == "ip":
        before, base = "0>>22&0x3C@", 0  # @ moves the origin past the IPv4 header, whatever its length
    else:
        before, base = "", 40
    values = ",".join(_VALUES)
    match = "4&0xFF00=0x1100&&" if family == "ip6" else ""  # UDP follows the IPv6 header at once

    def exchange(shift: int) -> str:
        return f"{before}{base + _EXCHANGE - 2 + shift}&{_MASK:#x}={values}"

    marker = f"{before}{base + UDP_HEADER}=0"
    target = f"-j NFQUEUE --queue-num {queue} --queue-bypass"
    return f"""\
*{TABLE}
:{NAME} - [0:0]
-A {NAME} -p udp --dport {PORT_IKE} -m u32 --u32 "{match}{exchange(0)}" {target}
-A {NAME} -p udp --dport {PORT_NAT_T} -m u32 --u32 "{match}{marker}&&{exchange(_MARKER_OCTETS)}" {target}
-A INPUT -p udp -j {NAME}
COMMIT
"""


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


def _first_that_works(queue: int, backend: Backend | Literal["auto"], prefix: Sequence[str]) -> Backend:
    """Apply the rules by the first backend that takes them, each command after `prefix`."""
    candidates: Sequence[Backend] = get_args(Backend) if backend == "auto" else (backend,)
    reasons = []
    for candidate in candidates:
        attempts = _by_nftables(queue, prefix) if candidate == "nftables" else _by_iptables(queue, prefix)
        for reason in attempts:
            if reason is None:
                return candidate
            reasons.append(reason)
    raise RulesError(
        f"{'; '.join(reasons)}. Run as root; install nftables, or iptables where the kernel lacks nft_queue; "
        "or set the rules yourself and say `intercept: {rules: external}`"
    )


def _by_nftables(queue: int, prefix: Sequence[str]) -> Iterator[str | None]:
    """None if it worked, else why not."""
    if not _found("nft"):
        yield "nft is not installed"
        return
    done = _run([*prefix, "nft", "-f", "-"], nftables_rules(queue), check=False)
    if done.returncode == 0 and not prefix:
        # apart from the others: a kernel without nft_tproxy does without
        _run(["nft", "-f", "-"], NFTABLES_WHOLE, check=False)
    yield None if done.returncode == 0 else f"nft: {_complaint(done)}"


def _by_iptables(queue: int, prefix: Sequence[str]) -> Iterator[str | None]:
    """For each kind of iptables: None if it worked, else why not."""
    if not _found("iptables"):
        yield "iptables is not installed"
    families: Sequence[Family] = ("ip", "ip6") if _IPV6.exists() else ("ip",)
    for kind in _KINDS:
        tools = [(family, f"{family}tables{kind}-restore") for family in families]
        if not all(_found(tool) for _, tool in tools):
            continue
        for family, tool in tools:
            done = _run([*prefix, tool, "-w", _LOCK_WAIT, "--noflush"], iptables_rules(queue, family), check=False)
            if done.returncode:
                yield f"{tool}: {_complaint(done)}"
                if not prefix:
                    # the other family may have taken them
                    remove()
                break
        else:
            if "ip6" in families and not prefix:
                # a kernel without xt_socket does without
                _run([f"ip6tables{kind}", "-w", _LOCK_WAIT, "-t", TABLE, "-A", NAME, *IP6TABLES_WHOLE], check=False)
            yield None


def _nft_listing() -> str:
    """Our table, empty if there is none."""
    return _run(["nft", "list", "table", "inet", NAME], check=False).stdout if _found("nft") else ""


def _iptables_tools() -> list[str]:
    """Every iptables of this host that can be asked without leaving a trace."""
    tools = [f"{family}tables{kind}" for family in get_args(Family) for kind in _KINDS]
    return [tool for tool in tools if _found(tool) and not _would_create_table(tool)]


def _would_create_table(tool: str) -> bool:
    """Legacy iptables register a table with the kernel by looking at it, and nothing unregisters it again."""
    if "nf_tables" in _run([tool, "--version"], check=False).stdout:
        return False
    registered = Path(f"/proc/thread-self/net/{tool.partition('tables')[0]}_tables_names")
    return not registered.exists() or TABLE not in registered.read_text().split()


def _iptables_listing(tool: str) -> str:
    """Our chain, empty if there is none."""
    done = _run([tool, "-w", _LOCK_WAIT, "-t", TABLE, "-S", NAME], check=False)
    return done.stdout if done.returncode == 0 else ""


def _remove_empty_table(tool: str) -> None:
    """iptables over nftables creates a table for its first rule and keeps it for ever: take it away with the last."""
    listing = _run([tool, "-w", _LOCK_WAIT, "-t", TABLE, "-S"], check=False)
    empty = all(re.fullmatch(r"-P \w+ ACCEPT", line) for line in listing.stdout.splitlines())
    if listing.returncode == 0 and empty and _found("nft"):
        _run(["nft", "delete", "table", tool.partition("tables")[0], TABLE], check=False)


def _found(tool: str) -> bool:
    return shutil.which(tool, path=_PATH) is not None


def _run(command: Sequence[str], text: str = "", *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run to the end, `text` on stdin. Raises RulesError when it fails, if `check`, or does not end."""
    environment = {**os.environ, "PATH": _PATH, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_TIMEOUT, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RulesError(f"{command[0]} does not run: {error}") from error
    if check and done.returncode:
        raise RulesError(f"{' '.join(command)}: {_complaint(done)}. Run as root")
    return done


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The first line of what a command said that names a fault."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith("#")]
    return next(iter(lines), f"exit status {done.returncode}")
