"""Rules to the sidecar's queue, from any origin, that would hold IKE up when no process reads it."""

from __future__ import annotations

import re
import shutil
import subprocess

_TIMEOUT = 15
_NFT = ("nft", "list", "ruleset")
_LEGACY = tuple((f"{family}tables-legacy-save",) for family in ("ip", "ip6"))
_IPTABLES = tuple((f"{family}tables{kind}-save",) for family in ("ip", "ip6") for kind in ("", "-nft"))
"""which show what nft shows, or legacy rules"""
# `queue num 4510`, `queue to 4510`, `queue flags bypass to 4510`; `-j NFQUEUE --queue-num 4510`
_QUEUE = re.compile(
    r"(?:\bqueue\b(?:\s+flags\s+\S+)?\s+(?:num|to)|--queue-num|--queue-balance)\s+(?P<first>\d+)(?:[-:](?P<last>\d+))?"
)
_IPTABLES_DEFAULT = re.compile(r"-j NFQUEUE\b(?!.*--queue-(?:num|balance))")


def without_bypass(queue: int) -> list[str]:
    """The rules of this host, as their tools write them, that send packets to `queue` without the bypass flag."""
    found = []
    for command in ((_NFT,) if shutil.which("nft") else _IPTABLES) + _LEGACY:
        if shutil.which(command[0]) is None:
            continue
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        found += [line.strip() for line in done.stdout.splitlines() if _holds_up(line, queue)]
    return list(dict.fromkeys(found))


def _holds_up(line: str, queue: int) -> bool:
    if "bypass" in line or line.lstrip().startswith("#"):
        return False
    if match := _QUEUE.search(line):
        return int(match["first"]) <= queue <= int(match["last"] or match["first"])
    return queue == 0 and _IPTABLES_DEFAULT.search(line) is not None
