"""A UDP socket of this host, and who holds it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from bridge.charon.socket_diag import proc_address


class Holder(NamedTuple):
    pid: int
    name: str


class UdpSocket(NamedTuple):
    """A row of /proc/net/udp."""

    remote: str
    """as the kernel writes it; see proc_address"""
    uid: int
    inode: int
    drops: int

    def holders(self) -> list[Holder]:
        """The processes that have it open; none where only root may know."""
        return [
            Holder(int(entry.name), process_name(int(entry.name)))
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _has_open(entry, self.inode)
        ]


def udp_socket(address: str, port: int) -> UdpSocket | None:
    """The socket that is bound to an address, if any."""
    table, local = proc_address(address, port)
    for line in Path(table).read_text().splitlines()[1:]:
        columns = line.split()
        if columns[1] == local:
            return UdpSocket(columns[2], int(columns[7]), int(columns[9]), int(columns[12]))
    return None


def process_name(pid: int) -> str:
    """What the kernel calls a process; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _has_open(process: Path, inode: int) -> bool:
    try:
        return any(os.readlink(entry) == f"socket:[{inode}]" for entry in (process / "fd").iterdir())
    except OSError:
        return False
