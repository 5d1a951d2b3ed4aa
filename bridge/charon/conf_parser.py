"""strongswan.conf and swanctl.conf, read as strongSwan reads them: VICI does not report most of what they set.

name { ... }            a section; one that is opened again is added to
name : other.path { }   which takes from another what it does not set itself
key = value             up to the end of the line, a comment or a brace; or in double quotes
include pattern         relative to the file it is in, into the section it is in
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bridge.charon.files_read import FilesRead
from bridge.charon.ipsec_conf import IPSEC_CONF, IpsecConf

_BLANK = re.compile(r"(?:\s+|#[^\n]*)*")
_NAME = re.compile(r'"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^\s{}=:,#"]+)')
_VALUE = re.compile(r'[ \t]*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^\n#{}]*))')
_BASES = re.compile(r":(?P<bases>[^{]*)")
_REST = re.compile(r"[^\n#{}]*")
_DEPTH = 8
"""of includes, and of sections that refer to others"""
_GROUP = re.compile(r"modp\d+(s\d+)?|ecp\d+(bp)?|curve25519|x25519|curve448|x448|mlkem\d+|ke[1-7]_\w+")
"""the key exchange methods among a proposal's algorithms"""


@dataclass
class Section:
    values: dict[str, str] = field(default_factory=dict)
    sections: dict[str, Section] = field(default_factory=dict)
    bases: list[str] = field(default_factory=list)
    """paths of the sections that it refers to"""


class Settings:
    """One such file with all it includes. What is missing or cannot be read is as if it were empty."""

    def __init__(self, path: Path) -> None:
        self.read_from = FilesRead()
        self._root = Section()
        self._read(path, self._root, 0)

    @property
    def files(self) -> list[Path]:
        """Those that were read."""
        return self.read_from.files

    def get(self, path: str) -> str | None:
        """The value at a dotted path."""
        *sections, key = path.split(".")
        return next((found.values[key] for found in self._chain(sections) if key in found.values), None)

    def names(self, path: str) -> list[str]:
        """The sections within the section at a dotted path."""
        return list(dict.fromkeys(name for found in self._chain(path.split(".")) for name in found.sections))

    def has(self, path: str) -> bool:
        """Whether there is a section at a dotted path."""
        return bool(self._chain(path.split(".")))

    def leaves(self) -> Iterator[tuple[str, str]]:
        """Every (dotted path, value) as it stands, references aside."""
        yield from _leaves(self._root, "")

    def _chain(self, names: Sequence[str], depth: int = 0) -> list[Section]:
        """The section at a path, and behind it those that it refers to."""
        current = [self._root]
        for name in names:
            following = []
            for section in current:
                if name in section.sections:
                    found = section.sections[name]
                    following.append(found)
                    if depth < _DEPTH:
                        for base in found.bases:
                            following += self._chain(base.split("."), depth + 1)
            current = following
        return current

    def _read(self, path: Path, into: Section, depth: int) -> None:
        text = self.read_from.read(path)
        if text is None:
            return
        open_sections = [into]
        at = _skip(text, 0)
        while at < len(text):
            if text[at] == "}":
                if len(open_sections) > 1:
                    open_sections.pop()
                at += 1
            elif match := _NAME.match(text, at):
                at = self._statement(match, path, open_sections, depth)
            else:
                at += 1  # strongSwan would refuse the file; the rest is still useful
            at = _skip(text, at)

    def _statement(self, match: re.Match[str], path: Path, open_sections: list[Section], depth: int) -> int:
        """What begins with a name; the place behind it."""
        text, name, section = match.string, _unquoted(match), open_sections[-1]
        if name == "include" and match["plain"]:
            rest = _REST.match(text, match.end())
            assert rest is not None
            if depth < _DEPTH:
                for included in self.read_from.matching(path.parent, rest[0].strip().strip('"')):
                    self._read(included, section, depth + 1)
            return rest.end()
        at = _skip(text, match.end())
        bases: list[str] = []
        if reference := _BASES.match(text, at):
            bases = [part.strip() for part in reference["bases"].split(",")]
            at = reference.end()
        if text[at : at + 1] == "{":
            opened = section.sections.setdefault(name, Section())
            opened.bases += bases
            open_sections.append(opened)
            return at + 1
        if text[at : at + 1] == "=":
            value = _VALUE.match(text, at + 1)
            assert value is not None
            section.values[name] = _unquoted(value).strip()
            return value.end()
        return at


class ChildProposals:
    """The ESP proposals of charon's connections, which VICI does not report: as they are in the files that it was
    loaded from. `path` is swanctl.conf; None: where swanctl looks for it."""

    def __init__(self, path: Path | None = None, ipsec: Path = IPSEC_CONF) -> None:
        self.path = path or swanctl_conf()
        self._settings = Settings(self.path)
        self._ipsec = IpsecConf(ipsec)

    def changed(self) -> bool:
        """Whether any of the files has changed since."""
        return self._settings.read_from.changed() or self._ipsec.read_from.changed()

    def in_ipsec_conf(self, connection: str) -> bool:
        """Whether a connection was loaded from ipsec.conf."""
        return not self._settings.has(f"connections.{connection}") and self._ipsec.has(connection)

    def unseen(self, connections: Iterable[str]) -> list[str]:
        """The connections that none of the files has: they were loaded from elsewhere."""
        return [
            name for name in connections if not self._settings.has(f"connections.{name}") and not self._ipsec.has(name)
        ]

    def with_pfs(self, connections: Iterable[str]) -> dict[tuple[str, str], str]:
        """Children with a key exchange of their own (PFS), by (connection, child): the first of its methods."""
        found = {}
        for name in connections:
            base = f"connections.{name}.children"
            children = {
                child: self._settings.get(f"{base}.{child}.esp_proposals") for child in self._settings.names(base)
            }
            if self.in_ipsec_conf(name):
                children = {name: self._ipsec.get(name, "esp")}
            for child, proposals in children.items():
                groups = [part for part in re.split(r"[-,\s!]+", proposals or "") if _GROUP.fullmatch(part)]
                if groups:
                    found[name, child] = groups[0]
        return found

    def with_option(
        self, connections: Iterable[str], swanctl: Sequence[str], ipsec: Sequence[str]
    ) -> set[tuple[str, str]]:
        """Children with one of these options of swanctl.conf, or of ipsec.conf, by (connection, child)."""
        found = set()
        for name in connections:
            if self.in_ipsec_conf(name):
                if any(self._ipsec.get(name, key) for key in ipsec):
                    found.add((name, name))
                continue
            for child in self._settings.names(f"connections.{name}.children"):
                if any(self.option(name, child, key) for key in swanctl):
                    found.add((name, child))
        return found

    def option(self, connection: str, child: str | None, key: str) -> str | None:
        """An option of a connection, or of a child of it, in swanctl.conf."""
        base = f"connections.{connection}" + (f".children.{child}" if child is not None else "")
        return self._settings.get(f"{base}.{key}")


def swanctl_conf() -> Path:
    """Where swanctl looks for its configuration."""
    return Path(os.environ.get("SWANCTL_DIR", "/etc/swanctl")) / "swanctl.conf"


def _skip(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None
    return match.end()


def _unquoted(match: re.Match[str]) -> str:
    return match["plain"] if match["quoted"] is None else re.sub(r"\\(.)", r"\1", match["quoted"])


def _leaves(section: Section, prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in section.values.items():
        yield prefix + key, value
    for name, inner in section.sections.items():
        yield from _leaves(inner, f"{prefix}{name}.")
