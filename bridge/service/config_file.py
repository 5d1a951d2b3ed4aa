"""Configuration files: reading them, what the types of bridge.config alone do not say, and errors of one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import yaml
from msgspec import Struct

from bridge.config import (
    DEFAULT_VPN,
    ClientConfig,
    ConfigError,
    GatewayConfig,
    GatewayEntry,
    canonical_address,
    is_name,
    parse_host_port,
)
from bridge.net import redis_url
from bridge.stub.types import printable

Config = TypeVar("Config", GatewayConfig, ClientConfig)


def read(path: str | Path) -> object:
    """What is in a YAML file, not validated; {} where it is empty. Raises ConfigError."""
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: is not YAML{where}: {getattr(error, 'problem', None) or 'unreadable'}") from error
    except (ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML's constructors do not expect a date of month 13, a number without digits, a thousand brackets
        raise ConfigError(f"{path}: holds a value that cannot be read: quote it if it is text") from error
    return {} if raw is None else raw


def load(path: str | Path, kind: type[Config]) -> Config:
    """Read and validate one file. Raises ConfigError, whose text fits one line."""
    try:
        config = msgspec.convert(_off_in_quotes(read(path)), kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {printable(_key_and_reason(str(error), kind))}") from error
    _check(path, config)
    return _canonical(config)


def check_together(configs: Sequence[GatewayConfig | ClientConfig]) -> None:
    """Whether one sidecar can run these roles beside one charon. Raises ConfigError."""
    if len({type(config) for config in configs}) < len(configs):
        raise ConfigError("-c: one file for each role: two are of the same role")
    first = configs[0]
    for other in configs[1:]:
        for key in ("vici", "ha", "swanctl"):
            if getattr(first, key) != getattr(other, key):
                raise ConfigError(f"{key}: differs between the files: one sidecar serves one charon")
        for key in ("control", "metrics"):
            if getattr(first, key) is not None and getattr(first, key) == getattr(other, key):
                raise ConfigError(f"{key}: {getattr(first, key)} is in both files: each role needs its own")


def role_of(raw: object) -> Literal["gateway", "client"] | None:
    """The role that a file is for, by its keys; None where they do not say."""
    if not isinstance(raw, dict):
        return None
    shared = set(GatewayConfig.__struct_fields__) & set(ClientConfig.__struct_fields__)
    keys = set(raw) - shared
    if keys & set(ClientConfig.__struct_fields__):
        return "client"
    return "gateway" if keys & set(GatewayConfig.__struct_fields__) else None


def _off_in_quotes(raw: object) -> object:
    """YAML reads `off` without quotes as false."""
    if isinstance(raw, dict) and isinstance(sync := raw.get("sync"), dict):
        words = {key: "off" for key in ("client_stub", "forward_secrecy") if sync.get(key) is False}
        return {**raw, "sync": {**sync, **words}}
    return raw


def _canonical(config: Config) -> Config:
    if isinstance(config, GatewayConfig):
        bank = msgspec.structs.replace(
            config.bank,
            peers={canonical_address(address): url for address, url in config.bank.peers.items()},
            targets=tuple(map(canonical_address, config.bank.targets)),
        )
        address = None if config.address is None else canonical_address(config.address)
        shared = tuple(dict.fromkeys(map(canonical_address, config.takeover.addresses)))
        takeover = msgspec.structs.replace(config.takeover, addresses=shared)
        return msgspec.structs.replace(config, address=address, bank=bank, takeover=takeover)
    vpns = {
        name: msgspec.structs.replace(vpn, gateways=_canonical_entries(vpn.gateways))
        for name, vpn in config.vpns.items()
    }
    return msgspec.structs.replace(config, gateways=_canonical_entries(config.gateways), vpns=vpns)


def _canonical_entries(entries: tuple[GatewayEntry, ...]) -> tuple[GatewayEntry, ...]:
    return tuple(
        entry if is_name(entry.address) else msgspec.structs.replace(entry, address=canonical_address(entry.address))
        for entry in entries
    )


def _key_and_reason(text: str, kind: type[Struct]) -> str:
    """msgspec's "reason - at `$.bank.url`" as "bank.url: reason"."""
    reason, _, where = text.partition(" - at `$")
    key = where.rstrip("`").lstrip(".")
    if reason.startswith("Object contains unknown field `"):
        unknown = reason.split("`")[1]
        role, other = ("gateway", ClientConfig) if kind is GatewayConfig else ("client", GatewayConfig)
        if not key and unknown in other.__struct_fields__:
            return f"{unknown}: is not an option of a {role}'s file: is this the right one?"
        return f"{key + '.' if key else ''}{unknown}: is not a known option"
    return f"{key or 'file'}: {reason[:1].lower()}{reason[1:]}"


def _check(path: str | Path, config: GatewayConfig | ClientConfig) -> None:
    """What the types alone do not say."""
    addresses = {"ha.listen": config.ha.listen, "ha.charon": config.ha.charon}
    if isinstance(config, GatewayConfig):
        if config.address is not None:
            addresses["address"] = config.address
        addresses |= {f"takeover.addresses[{n}]": each for n, each in enumerate(config.takeover.addresses)}
        _check_bank(path, config)
    else:
        _check_vpns(path, config)
        places = [
            ("gateways", config.gateways),
            *((f"vpns.{name}.gateways", v.gateways) for name, v in config.vpns.items()),
        ]
        addresses |= {
            f"{key}[{n}].address": entry.address
            for key, entries in places
            for n, entry in enumerate(entries)
            if not is_name(entry.address)
        }
    for key, value in addresses.items():
        try:
            canonical_address(value)
        except ValueError:
            raise ConfigError(f"{path}: {key}: {value!r} is not an IP address") from None
    if isinstance(config, GatewayConfig) and config.takeover.addresses:
        _check_takeover(path, config)
    if config.ha.listen == config.ha.charon:
        raise ConfigError(f"{path}: ha.listen: must differ from ha.charon, which is charon's own end")
    if config.metrics is not None:
        try:
            parse_host_port(config.metrics)
        except ValueError as error:
            raise ConfigError(f"{path}: metrics: {error}") from None


def _check_takeover(path: str | Path, config: GatewayConfig) -> None:
    if config.address is None:
        raise ConfigError(f"{path}: address: is needed with takeover.addresses: it names the owner of a session")
    if config.bank.mode != "centralised":
        raise ConfigError(
            f"{path}: takeover.addresses: needs bank.mode centralised, where one bank decides who owns what"
        )
    if canonical_address(config.address) in map(canonical_address, config.takeover.addresses):
        raise ConfigError(f"{path}: takeover.addresses: {config.address} is this gateway's own address")


def _check_vpns(path: str | Path, config: ClientConfig) -> None:
    """A connection decides which VPN a session belongs to, so it is in one only."""
    if config.gateways and DEFAULT_VPN in config.vpns:
        raise ConfigError(f"{path}: vpns.{DEFAULT_VPN}: is the name of the VPN of `gateways`: choose another")
    vpn_of = {entry.connection: DEFAULT_VPN for entry in config.gateways}
    for name, vpn in config.vpns.items():
        for entry in vpn.gateways:
            if vpn_of.setdefault(entry.connection, name) != name:
                other = vpn_of[entry.connection]
                where = f"{path}: vpns.{printable(name)}.gateways"
                raise ConfigError(f"{where}: connection {entry.connection!r} is in VPN {other!r} too")


def _check_bank(path: str | Path, config: GatewayConfig) -> None:
    bank = config.bank
    if bank.url is not None:
        _check_url(path, "bank.url", bank.url)
    if bank.local is not None:
        _check_url(path, "bank.local", bank.local)
    addresses = []
    for address, url in bank.peers.items():
        try:
            addresses.append(canonical_address(address))
        except ValueError:
            raise ConfigError(f"{path}: bank.peers: {address!r} is not an IP address") from None
        _check_url(path, f"bank.peers.{address}", url)
    wrong = _misplaced(config, addresses)
    if wrong:
        raise ConfigError(f"{path}: bank.{wrong}")


def _misplaced(config: GatewayConfig, peers: list[str]) -> str | None:
    """The key of `bank` that does not go with the others, and why."""
    bank = config.bank
    if bank.mode == "centralised":
        for key in ("local", "peers", "targets"):
            if getattr(bank, key):
                return f"{key}: has no meaning in mode centralised"
        return None
    if bank.url is None:
        why = "the other gateways ask this bank too" if bank.mode == "distributed" else "the bank of all gateways"
        return f"url: is needed in mode {bank.mode}: {why}"
    if bank.mode == "distributed" and bank.local is not None:
        return "local: has no meaning in mode distributed, where url is this gateway's own bank"
    if bank.mode == "distributed" and not bank.peers:
        return "peers: is needed in mode distributed: the banks of the other gateways"
    if config.address is not None and canonical_address(config.address) in peers:
        return f"peers: {config.address} is this gateway itself"
    for target in bank.targets:
        try:
            known = canonical_address(target) in peers
        except ValueError:
            return f"targets: {target!r} is not an IP address"
        if not known:
            return f"targets: {target} is not among bank.peers"
    if bank.peer_timeout >= bank.get_timeout:
        return f"peer_timeout: must be less than get_timeout, which is {bank.get_timeout:g}"
    return None


def _check_url(path: str | Path, key: str, url: str) -> None:
    try:
        redis_url.parse(url)
    except ValueError as error:
        # the URL may hold a password: not repeated
        raise ConfigError(f"{path}: {key}: {error}") from None
