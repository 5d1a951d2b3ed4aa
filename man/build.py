"""Manual pages, shell completions and docs/configuration.md, made from the commands and from bridge/config.py.

python man/build.py DIRECTORY       ike-sa-sync.8, ike-sa-sync.yaml.5 and the completions into DIRECTORY
python man/build.py --markdown      docs/configuration.md again
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec
from click.shell_completion import get_completion_class

from bridge import config
from bridge.cli.main import cli

NAME = "ike-sa-sync"
ROOT = Path(__file__).parents[1]
COMPLETIONS = {"bash": NAME, "zsh": f"_{NAME}", "fish": f"{NAME}.fish"}
"""shell to file name, as each looks it up"""


class Option(NamedTuple):
    """One key of a configuration file."""

    key: str
    default: str
    text: str


# commands


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """A command and all below it, by name."""
    yield command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from commands(child, click.Context(child, info_name=name, parent=context))


def all_commands() -> list[tuple[click.Command, click.Context]]:
    return list(commands(cli, click.Context(cli, info_name=NAME)))


# configuration


def options(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[Option]:
    """The keys of a configuration and of the objects in it, as the source documents them."""
    texts = _documented(kind)
    for field in msgspec.structs.fields(kind):
        inner = field.default_factory if isinstance(field.default_factory, type) else None
        if inner is not None and issubclass(inner, msgspec.Struct):
            yield from options(inner, f"{prefix}{field.name}.")
        elif field.name == "gateways":
            yield Option("gateways", "", "the gateways, in order of preference: a list of objects with the keys below")
            yield from options(config.GatewayEntry, "gateways[].")
        else:
            yield Option(prefix + field.name, _default(field), texts.get(field.name, ""))


def _default(field: Any) -> str:
    if field.default is msgspec.NODEFAULT:
        return "{}" if field.default_factory is dict else ""
    value = field.default
    if value is None or value == ():
        return "none"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else f"{value}"


def _documented(kind: type[msgspec.Struct]) -> dict[str, str]:
    """The string literal behind each field."""
    [body] = ast.parse(inspect.getsource(kind)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(after.value.value).split())
    return found


FILES = (
    ("gateway.yaml", "A gateway's", config.GatewayConfig),
    ("client.yaml", "A client's", config.ClientConfig),
)


def markdown() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Written by `make reference` from bridge/config.py; do not edit. YAML; what is not named here is an error. The",
        "sidecar reads its file when it starts. Times are in seconds.",
    ]
    for file, whose, kind in FILES:
        lines += [
            "",
            f"## /etc/ike-sa-sync/{file}",
            "",
            f"{whose} sidecar.",
            "",
            "| key | default | |",
            "|---|---|---|",
        ]
        for option in options(kind):
            default = f"`{option.default}`" if option.default else "required" if "[]" in option.key else ""
            lines.append(f"| `{option.key}` | {default} | {option.text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


# pages


def roff(text: str) -> str:
    """Text for a manual page."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "\n".join(line if not line.startswith(".") else f"\\&{line}" for line in escaped.splitlines())


def _head(title: str, section: int, what: str) -> list[str]:
    when = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    return [
        f'.TH {roff(title.upper())} {section} {when} "{NAME}"',
        ".SH NAME",
        f"{roff(title)} \\- {roff(what)}",
    ]


def commands_page() -> str:
    """ike-sa-sync.8."""
    lines = _head(NAME, 8, "IKEv2 SA synchronization for session resumption, beside strongSwan")
    lines += [".SH SYNOPSIS", f".B {roff(NAME)}", ".I COMMAND", "[OPTION]...", ".SH DESCRIPTION"]
    everything = all_commands()
    lines += _paragraphs(everything[0][0])
    lines += [".SH OPTIONS", ".TP", f".B {roff('--version')}", "Show the version and exit.", ".SH COMMANDS"]
    for command, context in everything[1:]:
        if isinstance(command, click.Group):
            continue
        usage = " ".join(command.collect_usage_pieces(context))
        lines += [f".SS {roff(context.command_path.removeprefix(NAME).strip())} {roff(usage)}", *_paragraphs(command)]
        for parameter in command.params:
            record = parameter.get_help_record(context)
            if record is not None and "--help" not in record[0]:
                lines += [".TP", f".B {roff(record[0])}", roff(record[1]) or "\\&"]
    lines += [".SH FILES", ".TP", ".I /etc/ike\\-sa\\-sync/gateway.yaml", "of the gateway\\(aqs sidecar"]
    lines += [".TP", ".I /etc/ike\\-sa\\-sync/client.yaml", "of the client\\(aqs sidecar"]
    lines += [".SH EXIT STATUS", "0: done. 1: it failed, or something was found. 2: bad configuration or usage."]
    lines += [".SH SEE ALSO", ".BR ike\\-sa\\-sync.yaml (5),", ".BR swanctl (8),", ".BR strongswan.conf (5)"]
    return "\n".join(lines) + "\n"


def _paragraphs(command: click.Command) -> list[str]:
    parts = re.split(r"\n\s*\n", inspect.cleandoc(command.help or "").replace("\b", ""))
    lines: list[str] = []
    for number, part in enumerate(parts):
        lines += [".PP"] * bool(number) + [roff(" ".join(part.split()))]
    return lines


def configuration_page() -> str:
    """ike-sa-sync.yaml.5."""
    lines = _head(f"{NAME}.yaml", 5, "configuration of the sidecars")
    lines += [".SH DESCRIPTION", "YAML. What is not named here is an error. Times are in seconds."]
    for file, whose, kind in FILES:
        lines += [f".SH {roff(file.upper())}", roff(f"{whose} sidecar reads /etc/{NAME}/{file}.")]
        for option in options(kind):
            lines += [".TP", f".B {roff(option.key)}", roff(option.text) or "\\&"]
            if option.default:
                lines += [".br", f"Default: {roff(option.default)}"]
    lines += [".SH SEE ALSO", ".BR ike\\-sa\\-sync (8)"]
    return "\n".join(lines) + "\n"


def completion(shell: str) -> str:
    """The script that a shell loads to complete our commands."""
    kind = get_completion_class(shell)
    assert kind is not None
    return kind(cli, {}, NAME, "_IKE_SA_SYNC_COMPLETE").source()


def write(directory: Path) -> None:
    """All pages and completions."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{NAME}.8").write_text(commands_page())
    (directory / f"{NAME}.yaml.5").write_text(configuration_page())
    for shell, file in COMPLETIONS.items():
        (directory / shell).mkdir(exist_ok=True)
        (directory / shell / file).write_text(completion(shell))


if __name__ == "__main__":
    if sys.argv[1:] == ["--markdown"]:
        (ROOT / "docs/configuration.md").write_text(markdown())
    else:
        write(Path(sys.argv[1]))
