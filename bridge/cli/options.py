"""Options and configuration files that the commands have in common."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from bridge.config import ClientConfig, ConfigError, GatewayConfig, canonical_address
from bridge.service.config_file import Config, check_together, load, read, role_of

BAD_CONFIGURATION = 2

GATEWAY_FILE = "/etc/ike-sa-sync/gateway.yaml"

CLIENT_FILE = "/etc/ike-sa-sync/client.yaml"

Function = TypeVar("Function", bound=Callable[..., Any])


def fail(text: object, code: int = 1) -> NoReturn:
    """One line on stderr, and out."""
    click.echo(f"ike-sa-sync: {text}", err=True)
    sys.exit(code)


def read_config(path: str | None, kind: type[Config]) -> Config:
    """The configuration, or one line and exit 2."""
    default = GATEWAY_FILE if kind is GatewayConfig else CLIENT_FILE
    if path is None and kind is ClientConfig and not Path(default).exists():
        # a client needs no file
        return kind()
    try:
        return load(path or default, kind)
    except ConfigError as error:
        fail(error, BAD_CONFIGURATION)


def read_any(path: str | None) -> GatewayConfig | ClientConfig:
    """A configuration of either role, recognised by its keys, else by the file's name."""
    if path is None:
        return read_config(None, GatewayConfig) if Path(GATEWAY_FILE).exists() else read_config(None, ClientConfig)
    try:
        role = role_of(read(path))
    except ConfigError as error:
        fail(error, BAD_CONFIGURATION)
    if role is None:
        role = "client" if Path(path).name == Path(CLIENT_FILE).name else "gateway"
    return read_config(path, ClientConfig) if role == "client" else read_config(path, GatewayConfig)


def read_roles(paths: Sequence[str]) -> list[GatewayConfig | ClientConfig]:
    """The configurations of one sidecar; without paths those of the files that packages look at, and of a client where
    there is none of them."""
    paths = paths or [path for path in (GATEWAY_FILE, CLIENT_FILE) if Path(path).exists()]
    configs = [read_any(path) for path in paths] or [read_config(None, ClientConfig)]
    try:
        check_together(configs)
    except ConfigError as error:
        fail(error, BAD_CONFIGURATION)
    return configs


def _config_option(default: str) -> Callable[[Function], Function]:
    where = f"Configuration file (YAML).  [default: {default}]"
    return click.option("-c", "--config", "path", metavar="FILE", help=where)


gateway_config_option = _config_option(GATEWAY_FILE)
"""-c FILE; without it the one that packages install"""

client_config_option = _config_option(CLIENT_FILE)

config_option = _config_option(f"{GATEWAY_FILE} or client.yaml")
"""where both roles have the command"""


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Duration(click.ParamType[int]):
    """30d, 12h, 90m, 45s."""

    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", str(value))
        if match is None:
            self.fail(f"{value!r} is not a duration, such as 30d, 12h, 90m or 45s", param, ctx)
        return int(match[1]) * UNITS[match[2]]


def an_address(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Callback of an argument or option: an IP address, as everything here writes it."""
    if value is None:
        return None
    try:
        return canonical_address(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not an IP address") from None


def json_option(function: Function) -> Function:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")(function)
