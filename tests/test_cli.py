"""The commands as a stranger meets them: help, errors, colours."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import click
import pytest

from bridge.lab.sidecar import program
from test_man import builder

COMMANDS = builder().all_commands()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*program(), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("command", "context"), COMMANDS, ids=lambda value: getattr(value, "command_path", ""))
def test_help_says_what_a_command_does_in_lines_that_fit(command: click.Command, context: click.Context) -> None:
    first = command.get_short_help_str(200)
    assert first.endswith(".")
    assert first[0].isupper()
    assert all(len(line) <= 100 for line in command.get_help(context).splitlines())


@pytest.mark.parametrize(("command", "context"), COMMANDS, ids=lambda value: getattr(value, "command_path", ""))
def test_every_option_says_what_it_is_for(command: click.Command, context: click.Context) -> None:
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help or parameter.show_default, (context.command_path, parameter.name)


def test_wrong_usage_is_told_on_stderr_with_exit_status_2() -> None:
    done = run("nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert "No such command 'nothing'" in done.stderr


@pytest.mark.parametrize("command", ["resume", "drain"])
def test_a_gateway_that_is_no_address_is_wrong_usage(command: str) -> None:
    done = run(command, "--to", "gw2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Invalid value for '--to': 'gw2' is not an IP address" in done.stderr


def test_a_missing_configuration_is_one_line_with_exit_status_2(tmp_path: Path) -> None:
    done = run("status", "-c", str(tmp_path / "none.yaml"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ike-sa-sync: {tmp_path}/none.yaml: cannot be read: No such file or directory\n"


def test_a_sidecar_that_does_not_run_is_one_line_with_exit_status_1(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(f"control: {tmp_path}/none.sock\n")
    for command in ("status", "log-level"):
        done = run(command, "-c", str(file), "--json")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"ike-sa-sync: {tmp_path}/none.sock: the sidecar does not answer")
        assert done.stderr.count("\n") == 1


def test_errors_of_the_lab_look_like_all_others() -> None:
    done = run("lab", "shell", "--lab", "nosuchlab", "gw1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "ike-sa-sync: no host gw1 in lab nosuchlab: none\n"


def on_a_terminal(*arguments: str, **environment: str) -> bytes:
    """What a command writes to a terminal."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(environment, TERM="xterm-256color")
        argv = [*program(), *arguments]
        os.execvp(argv[0], argv)
    said = b""
    try:
        while part := os.read(terminal, 65536):
            said += part
    except OSError:
        pass  # its end has been closed
    os.waitpid(child, 0)
    return said


def test_colours_are_for_terminals_that_want_them(tmp_path: Path) -> None:
    file = tmp_path / "client.yaml"
    file.write_text(f"vici: {tmp_path}/none\ngateways: [{{address: 192.0.2.1, connection: home}}]\n")
    check = ("check", "-c", str(file))
    assert b"\x1b[31mFAIL" in on_a_terminal(*check)
    plain = on_a_terminal(*check, NO_COLOR="1")
    assert b"FAIL" in plain
    assert b"\x1b[3" not in plain
    assert "\x1b" not in run(*check).stdout


def test_a_new_key_is_told_to_scripts_without_the_key(tmp_path: Path) -> None:
    file = tmp_path / "bank.key"
    told = json.loads(run("keygen", str(file), "--json").stdout)
    [line] = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert told == {"file": str(file), "key": line.split()[0], "added": False}


def test_a_key_file_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "none/bank.key"
    done = run("keygen", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"ike-sa-sync: {file} cannot be written: No such file or directory\n"
