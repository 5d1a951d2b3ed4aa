"""ipsec.conf(5), the older configuration that starter and stroke load, as far as it says more than VICI does.

conn NAME           a connection, which is its CHILD_SA too; %default is what all others begin with
    key = value
    also = NAME     takes what that one has
include pattern     relative to the file it is in
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bridge.charon.files_read import FilesRead

IPSEC_CONF: Final = Path("/etc/ipsec.conf")
_DEPTH: Final = 8
"""of includes, and of `also`"""
_DEFAULT: Final = "%default"


class IpsecConf:
    """One such file with all it includes. What is missing or cannot be read is as if it were empty."""

    def __init__(self, path: Path = IPSEC_CONF) -> None:
        self.read_from = FilesRead()
        self._conns: dict[str, dict[str, str]] = {}
        self._read(path, 0)

    def has(self, name: str) -> bool:
        """Whether a connection is in it."""
        return name in self._conns and name != _DEFAULT

    def get(self, name: str, key: str) -> str | None:
        """What a connection has under a key."""
        return self._get(name, key, 0) or self._conns.get(_DEFAULT, {}).get(key)

    def _get(self, name: str, key: str, depth: int) -> str | None:
        conn = self._conns.get(name, {})
        if key in conn:
            return conn[key]
        if "also" in conn and depth < _DEPTH:
            return self._get(conn["also"], key, depth + 1)
        return None

    def _read(self, path: Path, depth: int) -> None:
        text = self.read_from.read(path)
        if text is None:
            return
        section: dict[str, str] = {}
        for raw in text.splitlines():
            line = raw.split("#")[0].rstrip()
            words = line.split(None, 1)
            if not words:
                continue
            if line[0].isspace():
                key, equals, value = line.partition("=")
                if equals:
                    section[key.strip()] = value.strip().strip('"')
            elif words[0] == "include" and len(words) == 2 and depth < _DEPTH:
                for included in self.read_from.matching(path.parent, words[1].strip()):
                    self._read(included, depth + 1)
            else:
                # config setup and ca sections say nothing about connections
                section = self._conns.setdefault(words[1].strip(), {}) if words[0] == "conn" and len(words) == 2 else {}
