"""Rules of ours in the packet filter: nftables, or iptables where the kernel lacks what nftables needs for them.

What the rules say is in a `Rules` (bridge.net.queue_rules, bridge.net.owner_rules). Here they are set in one step,
looked at, and removed. Rules of others stay as they are.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

Backend = Literal["nftables", "iptables"]
Choice = Backend | Literal["auto"]
Family = Literal["ip", "ip6"]

TABLE = "security"
"""of iptables: the one that filters after `filter`, so the operator's rules decide first"""

_KINDS = ("", "-nft", "-legacy")
"""of iptables: the system's choice first; either of the others may be the only one that a kernel serves"""
_TIMEOUT = 15
_LOCK_WAIT = "5"
"""seconds for the lock that legacy iptables share"""
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
_IPV6 = Path("/proc/thread-self/net/if_inet6")
# nft: counters, and the elements that packets put into a set; iptables-save: counters in front of a rule or chain
_NFT_STATE = re.compile(r"(?<=counter) packets (?P<packets>\d+) bytes \d+|\n\s*elements = \{[^}]*\}")
_COUNTS = re.compile(r"^\[(?P<packets>\d+):\d+\] ")


class RulesError(Exception):
    """The rules cannot be set or removed; the text names the cause and the fix."""


class Jump(NamedTuple):
    """iptables: the built-in chain `hook` of TABLE sends what `match` describes to the chain `chain` of ours."""

    hook: str
    match: str
    chain: str


@dataclass(frozen=True)
class Rules:
    """One set of rules, in both languages."""

    name: str
    """of the nftables table (family inet)"""
    chains: tuple[str, ...]
    """of iptables, ours alone, in both families; a chain comes before those that it sends packets to"""
    nftables: str
    """what `nft -f -` reads: a transaction, which also replaces an old table"""
    iptables: Callable[[Family, bool], str]
    """what `iptables-restore --noflush` reads, without the table's frame and the jumps; of the full form (True), or of
    one that needs fewer matches"""
    jumps: tuple[Jump, ...]
    nftables_optional: tuple[str, ...] = ()
    """for transactions of their own, each of which may fail"""
    iptables_optional: Callable[[Family], Sequence[tuple[str, ...]]] = lambda _: ()
    """more rules, as arguments of iptables, each of which may fail"""
    external: str = "intercept: {rules: external}"
    """what an operator configures who sets such rules himself"""


class Placed(NamedTuple):
    """By what the rules were set."""

    backend: Backend
    kind: str = ""
    """of iptables: "", -nft, -legacy"""
    full: bool = True
    """False: the form that needs fewer matches"""


class View(NamedTuple):
    """Rules as they are in place now."""

    lines: tuple[str, ...]
    """without counters; comparable with those of a moment ago"""
    counts: tuple[tuple[str, int], ...]
    """(rule, packets that it counted), of rules with a counter"""


def install(rules: Rules, *, backend: Choice = "auto") -> Placed:
    """Set rules in the network namespace of the caller.

    Replaces those that are there already, such as those of a killed sidecar. Raises RulesError.
    """
    placed = _first_that_works(rules, backend, ())
    # the same rules by another backend, of a sidecar that found another kernel or other packages
    if placed.backend == "iptables":
        _remove_nftables(rules)
    _remove_iptables(rules, keep=placed)
    return placed


def detect(rules: Rules, *, backend: Choice = "auto") -> Backend:
    """The backend that `install` would use, tried in a network namespace of its own. Raises RulesError."""
    return _first_that_works(rules, backend, ("unshare", "--net")).backend


def remove(rules: Rules) -> None:
    """Take rules away, by whichever backend they were set. Raises RulesError."""
    _remove_nftables(rules)
    _remove_iptables(rules)


def look(rules: Rules, placed: Placed) -> View:
    """What is in place of rules that were set by `placed`; without lines if nothing is. Raises RulesError."""
    if placed.backend == "nftables":
        done = _run(["nft", "--terse", "list", "table", "inet", rules.name], check=False)
        return _nft_view(done.stdout if done.returncode == 0 else "")
    lines: list[str] = []
    counts: list[tuple[str, int]] = []
    for family in _families(rules):
        done = _run([f"{family}tables{placed.kind}-save", "-c", "-t", TABLE], check=False)
        for line in done.stdout.splitlines() if done.returncode == 0 else ():
            if any(re.search(rf"[ :]{re.escape(chain)}( |$)", line) for chain in rules.chains):
                rule = _COUNTS.sub("", line)
                lines.append(f"{family} {rule if rule[0] != ':' else rule.split()[0]}")
                if counted := _COUNTS.match(line):
                    counts.append((lines[-1], int(counted["packets"])))
    return View(tuple(lines), tuple(counts))


def listing(rules: Rules) -> str:
    """What is in place of `rules`, set by whichever backend, as its tool writes it; empty if nothing is."""
    nft = _run(["nft", "list", "table", "inet", rules.name], check=False).stdout if _found("nft") else ""
    return nft + "".join(_chain(tool, chain) for tool in _iptables_tools() for chain in rules.chains)


def _nft_view(text: str) -> View:
    counts = []
    for line in text.splitlines():
        if (state := _NFT_STATE.search(line)) and state["packets"] is not None:
            counts.append((_NFT_STATE.sub("", line).strip(), int(state["packets"])))
    return View(tuple(_NFT_STATE.sub("", text).splitlines()), tuple(counts))


def families() -> Sequence[Family]:
    """Those that this host has."""
    return ("ip", "ip6") if _IPV6.exists() else ("ip",)


def _families(rules: Rules) -> Sequence[Family]:
    """Those of them that the rules are about."""
    return [family for family in families() if rules.iptables(family, True)]


def _first_that_works(rules: Rules, backend: Choice, prefix: Sequence[str]) -> Placed:
    """Apply the rules by the first backend that takes them, each command after `prefix`."""
    candidates: Sequence[Backend] = get_args(Backend) if backend == "auto" else (backend,)
    reasons = []
    for candidate in candidates:
        attempts = _by_nftables(rules, prefix) if candidate == "nftables" else _by_iptables(rules, prefix)
        for outcome in attempts:
            if isinstance(outcome, Placed):
                return outcome
            reasons.append(outcome)
    raise RulesError(
        f"{'; '.join(dict.fromkeys(reasons))}. Run as root; install nftables, or iptables where the kernel lacks "
        f"nft_queue; or set the rules yourself and say `{rules.external}`"
    )


def _by_nftables(rules: Rules, prefix: Sequence[str]) -> Iterator[Placed | str]:
    """How it was set, or why not."""
    if not _found("nft"):
        yield "nft is not installed"
        return
    done = _run([*prefix, "nft", "-f", "-"], rules.nftables, check=False)
    if done.returncode == 0 and not prefix:
        for text in rules.nftables_optional:
            _run(["nft", "-f", "-"], text, check=False)
    yield Placed("nftables") if done.returncode == 0 else f"nft: {_complaint(done)}"


def _by_iptables(rules: Rules, prefix: Sequence[str]) -> Iterator[Placed | str]:
    """For each kind and form: how it was set, or why not."""
    if not _found("iptables"):
        yield "iptables is not installed"
    about = _families(rules)
    forms = (True,) if rules.iptables("ip", True) == rules.iptables("ip", False) else (True, False)
    for kind in _KINDS:
        tools = [(family, f"{family}tables{kind}-restore") for family in about]
        if not all(_found(tool) for _, tool in tools):
            continue
        for full in forms:
            for family, tool in tools:
                text = _restore(
                    rules, family, full, missing=rules.jumps if prefix else _missing_jumps(rules, family, kind)
                )
                done = _run([*prefix, tool, "-w", _LOCK_WAIT, "--noflush"], text, check=False)
                if done.returncode:
                    yield f"{tool}: {_complaint(done)}"
                    if not prefix:
                        # the other family may have taken them
                        _remove_iptables(rules)
                    break
            else:
                for family in about if not prefix else ():
                    for rule in rules.iptables_optional(family):
                        _run([f"{family}tables{kind}", "-w", _LOCK_WAIT, "-t", TABLE, *rule], check=False)
                yield Placed("iptables", kind, full)


def _restore(rules: Rules, family: Family, full: bool, missing: Sequence[Jump]) -> str:
    """What `iptables-restore --noflush` reads, one transaction of its family. It replaces what is in our chains."""
    chains = "".join(f":{chain} - [0:0]\n" for chain in rules.chains)
    jumps = "".join(f"-A {jump.hook} {jump.match} -j {jump.chain}\n" for jump in missing)
    return f"*{TABLE}\n{chains}{rules.iptables(family, full)}{jumps}COMMIT\n"


def _missing_jumps(rules: Rules, family: Family, kind: str) -> list[Jump]:
    command = [f"{family}tables{kind}", "-w", _LOCK_WAIT, "-t", TABLE, "-C"]
    return [
        jump
        for jump in rules.jumps
        if _run([*command, jump.hook, *jump.match.split(), "-j", jump.chain], check=False).returncode
    ]


def _remove_nftables(rules: Rules) -> None:
    if _found("nft") and _run(["nft", "list", "table", "inet", rules.name], check=False).returncode == 0:
        _run(["nft", "delete", "table", "inet", rules.name])


def _remove_iptables(rules: Rules, *, keep: Placed | None = None) -> None:
    """But for those that were set by `keep`."""
    kept = _in_nf_tables(f"iptables{keep.kind}") if keep is not None and keep.backend == "iptables" else None
    for tool in _iptables_tools():
        if _in_nf_tables(tool) == kept or not any(_chain(tool, chain) for chain in rules.chains):
            continue
        command = [tool, "-w", _LOCK_WAIT, "-t", TABLE]
        for jump in rules.jumps:
            delete = [*command, "-D", jump.hook, *jump.match.split(), "-j", jump.chain]
            while _run(delete, check=False).returncode == 0:
                pass
        for action in ("-F", "-X"):
            for chain in rules.chains:
                _run([*command, action, chain], check=False)
        _remove_empty_table(tool)


def _iptables_tools() -> list[str]:
    """Every iptables of this host that can be asked without leaving a trace."""
    tools = [f"{family}tables{kind}" for family in get_args(Family) for kind in _KINDS]
    return [tool for tool in tools if _found(tool) and not _would_create_table(tool)]


def _would_create_table(tool: str) -> bool:
    """Legacy iptables register a table with the kernel by looking at it, and nothing unregisters it again."""
    if _in_nf_tables(tool):
        return False
    registered = Path(f"/proc/thread-self/net/{tool.partition('tables')[0]}_tables_names")
    return not registered.exists() or TABLE not in registered.read_text().split()


def _in_nf_tables(tool: str) -> bool:
    """Whether this iptables keeps its rules in nf_tables, not in tables of its own."""
    return "nf_tables" in _run([tool, "--version"], check=False).stdout


def _chain(tool: str, chain: str) -> str:
    """A chain's rules, empty if there is none."""
    done = _run([tool, "-w", _LOCK_WAIT, "-t", TABLE, "-S", chain], check=False)
    return done.stdout if done.returncode == 0 else ""


def _remove_empty_table(tool: str) -> None:
    """iptables over nftables creates a table for its first rule and keeps it for ever: take it away with the last."""
    saved = _run([tool, "-w", _LOCK_WAIT, "-t", TABLE, "-S"], check=False)
    empty = all(re.fullmatch(r"-P \w+ ACCEPT", line) for line in saved.stdout.splitlines())
    if saved.returncode == 0 and empty and _found("nft"):
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
