"""The commands as a stranger meets them: help, errors, colours."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bridge.cli.main import cli
from bridge.lab.sidecar import program
from bridge.service import control
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


def test_wrong_usage_is_reported_on_stderr_with_exit_status_2() -> None:
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


@pytest.mark.parametrize("command", ["status", "check", "gateway", "client", "monitor"])
def test_a_value_that_yaml_cannot_make_is_one_line_with_exit_status_2(tmp_path: Path, command: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("address: 2001-13-01\n")
    done = run(command, "-c", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ike-sa-sync: {file}: holds a value that cannot be read: quote it if it is text\n"


@pytest.mark.parametrize(
    ("command", "text", "key"),
    [("client", "address: 192.0.2.1\n", "address"), ("gateway", "gateways: []\n", "gateways")],
)
def test_the_file_of_the_other_role_is_reported_as_such(tmp_path: Path, command: str, text: str, key: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    done = run(command, "-c", str(file))
    assert done.returncode == 2
    assert (
        done.stderr == f"ike-sa-sync: {file}: {key}: is not an option of a {command}'s file: is this the right one?\n"
    )


def test_a_key_file_that_cannot_be_used_is_bad_configuration(tmp_path: Path) -> None:
    file, key = tmp_path / "gateway.yaml", tmp_path / "bank.key"
    file.write_text(f"bank: {{key_file: {key}}}\n")
    run("keygen", str(key))
    key.chmod(0o644)
    done = run("gateway", "-c", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ike-sa-sync: bank.key_file: {key} is open to other users (mode 0644)")
    assert done.stderr.count("\n") == 1


def test_a_sidecar_that_does_not_run_is_one_line_with_exit_status_1(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(f"control: {tmp_path}/none.sock\n")
    for command in ("status", "log-level"):
        done = run(command, "-c", str(file), "--json")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"ike-sa-sync: {tmp_path}/none.sock: the sidecar does not answer")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("form", [None, "compiled"])
def test_status_of_a_sidecar_that_an_update_has_not_restarted_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str | None
) -> None:
    """One of release 0.1 sends no `code`."""

    async def answer(*_: object) -> control.Answer:
        charon = {"reachable": True, "release": "5.9.8", "ha_version": 5, "ha_plugin": True}
        bank = {"reachable": True, "stubs": 0, "pending": 0, "banks": []}
        told = {"role": "gateway", "time": 0, "charon": charon, "bank": bank, "unconfirmed": 0, "sas": []}
        return told | {"counters": {}} | ({"code": form} if form else {})

    monkeypatch.setattr(control, "call", answer)
    file = tmp_path / "gateway.yaml"
    file.write_text("")
    done = CliRunner().invoke(cli, ["status", "-c", str(file)], catch_exceptions=False)
    assert done.exit_code == 0
    assert [line.split() for line in done.output.splitlines() if line.startswith("code")] == (
        [["code", form]] if form else []
    )
    assert "bank        reachable, 0 stubs, 0 changes waiting" in done.output


def test_errors_of_the_lab_look_like_all_others() -> None:
    done = run("lab", "shell", "--lab", "nosuchlab", "gw1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "ike-sa-sync: no host gw1 in lab nosuchlab: none\n"


@pytest.mark.parametrize("command", ["up", "demo", "clean", "kill gw1", "shell gw1"])
def test_the_lab_is_for_root(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    done = CliRunner().invoke(cli, ["lab", *command.split()], standalone_mode=False)
    assert str(done.exception) == "the lab makes network namespaces: run it as root"


def test_a_plot_that_cannot_be_written_is_reported_before_the_work(tmp_path: Path) -> None:
    done = run("bench", "bank", "--plot", f"{tmp_path}/none/plot.svg")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"'{tmp_path}/none' is not a folder that can be written to" in done.stderr


def test_a_lab_that_is_not_there_is_not_said_to_be_removed() -> None:
    done = run("lab", "clean", "nosuchlab")
    assert (done.returncode, done.stdout) == (0, "no lab nosuchlab here\n")


def test_an_interrupt_while_a_command_starts_shows_no_traceback() -> None:
    code = """
import sys
class Interrupts:
    def find_spec(self, name, *_):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from bridge.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_live_view_leaves_the_terminal_as_it_was(tmp_path: Path, number: signal.Signals, code: int) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(f"bank: {{url: unix://{tmp_path}/none.sock}}\n")
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm-256color"
        argv = [*program(), "monitor", "-c", str(file)]
        os.execvp(argv[0], argv)
    said = b""
    while b"events" not in said:
        said += os.read(terminal, 65536)
    os.kill(child, number)
    try:
        while part := os.read(terminal, 65536):
            said += part
    except OSError:
        pass  # its end has been closed
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == code
    for begin, end in ((b"\x1b[?25l", b"\x1b[?25h"), (b"\x1b[?1049h", b"\x1b[?1049l")):
        assert said.rfind(end) > said.rfind(begin) >= 0


def test_a_view_without_a_terminal_is_printed_again_and_again(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(f"bank: {{url: unix://{tmp_path}/none.sock}}\n")
    with subprocess.Popen([*program(), "monitor", "-c", str(file)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert next(process.stdout).startswith("bank: ")
        process.terminate()
        assert "\x1b" not in process.stdout.read()
    assert process.returncode == 143


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


def test_scripts_get_the_id_of_a_new_key_and_not_the_key(tmp_path: Path) -> None:
    file = tmp_path / "bank.key"
    told = json.loads(run("keygen", str(file), "--json").stdout)
    [line] = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert told == {"file": str(file), "key": line.split()[0], "added": False}


def test_a_key_file_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "none/bank.key"
    done = run("keygen", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"ike-sa-sync: {file} cannot be written: No such file or directory\n"


@pytest.mark.parametrize("more", [("--to", "any"), ("--on-stop",), ("--to", "192.0.2.1", "--share", "0.5")])
def test_until_even_is_about_one_gateway(more: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, ["drain", "--until-even", *more])
    assert done.exit_code == 2
    assert "needs the address of one gateway" in done.output
