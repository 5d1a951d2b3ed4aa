"""What README.md and docs/ name exists: commands, options, keys, files, log events, metrics; and the tutorial runs."""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
import yaml

import deployment_page
from bridge.charon import ha_message
from bridge.config import ClientConfig, GatewayConfig, HaConfig, InterceptConfig
from bridge.lab import space
from bridge.net import owner_rules, queue_rules
from bridge.net.firewall import Family
from bridge.service.config_file import load
from docs_support import missing_tests, names_in
from test_man import builder

ROOT = Path(__file__).parents[1]
TOP = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md"))]
SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "bridge").rglob("*.py")))
PLACEHOLDERS = {"FILE", "NAME", "ADDRESS", "COMMAND", "..."}


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code(text: str) -> Iterator[str]:
    """Lines of code blocks, and what stands between backticks."""
    for line in text.splitlines():
        if line.startswith("    "):
            yield line.strip()
    yield from re.findall(r"`([^`\n]+)`", text)


def said_commands(text: str) -> Iterator[list[str]]:
    """Every `ike-sa-sync ...` that is written as a command, without what the shell does with it."""
    for piece in code(text):
        for match in re.finditer(r"(?:^|[#$]\s|\s|/)ike-sa-sync (?P<rest>[a-z-].*)", piece):
            rest = re.split(r"\s{2,}#|\s[|>&]|;", match["rest"])[0].replace("\\|", "|")
            if "event=" in rest or "is up" in rest:
                continue
            yield rest.split()


COMMANDS = {
    context.command_path.removeprefix("ike-sa-sync").strip(): command for command, context in builder().all_commands()
}


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_commands_and_options_exist(page: Path) -> None:
    for words in said_commands(page.read_text()):
        path, rest = _command(words)
        assert path, words
        known = {option for parameter in COMMANDS[path].params for option in parameter.opts} | {"--help"}
        if path == "lab shell":
            continue  # what follows is another program's
        for word in rest:
            option = word.strip("[].,:")
            if option.startswith("-") and option != "-":
                assert option.split("=")[0] in known, words


def _command(words: list[str]) -> tuple[str, list[str]]:
    """The longest name of a command that `words` begin with; `a|b` is either of them."""
    for alternatives in itertools.product(*(word.split("|") for word in words[:2])):
        two, one = " ".join(alternatives), alternatives[0]
        for name, length in ((two, 2), (one, 1)):
            command = COMMANDS.get(name)
            if command is not None and (length == 2 or not isinstance(command, click.Group) or len(words) == 1):
                return name, words[length:]
    return "", words


def test_commands_are_found_where_they_are_written() -> None:
    """Or the test above would say nothing."""
    said = [" ".join(words) for words in said_commands((ROOT / "docs/deployment.md").read_text())]
    assert {"lab demo", "check", "resume --to 192.168.50.1", "stubs list"} <= set(said)
    assert len(said) > 12


def test_every_block_of_the_deployment_guide_is_run_by_a_test() -> None:
    blocks = deployment_page.blocks((ROOT / deployment_page.PAGE).read_text())
    assert len(blocks) > 12
    run = {
        block
        for file in ("test_vm_deployment.py", "test_deployment_guide.py", "test_dist.py")
        for block in re.findall(r'(?:follow\(\w+, |BLOCKS\[)"([^"]+)"', (ROOT / "tests" / file).read_text())
    }
    assert set(blocks) - run == set()
    assert run - set(blocks) == set()


def test_rules_of_your_own_are_those_that_the_sidecar_sets() -> None:
    block = deployment_page.blocks((ROOT / deployment_page.PAGE).read_text())["Rules of your own 1"]
    shown = "".join(f'{tool}() {{ echo {tool} "$(printf "\'%s\' " "$@")"; }}\n' for tool in IPTABLES.values())
    told = subprocess.run(["sh", "-euc", shown + block], capture_output=True, text=True, check=True).stdout
    said = {tuple(shlex.split(line)) for line in told.splitlines()}
    verdict = ("-j", "NFQUEUE", "--queue-num", str(InterceptConfig().queue), "--queue-bypass")
    queued = {
        (tool, "-t", "security", "-A", "INPUT", *words[2:-2], *verdict)
        for family, tool in IPTABLES.items()
        for words in rules_of(queue_rules.iptables_text(0, "first", family, False))
        if "--u32" in words
    }
    chains = {owner_rules.NAME: "OUTPUT", owner_rules.INPUT_CHAIN: "INPUT"}
    ha = HaConfig()
    owned = {
        (tool, "-t", "security", "-A", chains[words[1]], *words[2:])
        for family, tool in IPTABLES.items()
        for words in rules_of(owner_rules.rules((ha.charon, ha.listen), ha_message.PORT).iptables(family, False))
    }
    assert len(queued) == 12
    assert said == queued | owned


IPTABLES: dict[Family, str] = {"ip": "iptables", "ip6": "ip6tables"}


def rules_of(text: str) -> Iterator[list[str]]:
    """The words of each rule that iptables-restore reads."""
    return map(shlex.split, text.splitlines())


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_files_that_are_named_exist(page: Path) -> None:
    for path in re.findall(r"\b((?:strongswan-conf|redis|monitoring|bridge|fuzz|man)/[\w./-]*\w)", page.read_text()):
        assert (ROOT / path).exists() or path.startswith(("redis/ike", "man/ike")), path


def test_the_questions_of_a_newcomer_are_answered_in_one_line_with_a_path() -> None:
    rows = re.findall(r"^\| (.*\?) \| (.*) \|$", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    answers = dict(rows)
    for words in (
        "a SYN parsed",
        "a bank backend added",
        "the client's state machine",
        "cookies demanded",
        "when Redis is lost",
        "a CHILD attribute added",
        "a new HA version supported",
        "a drained session move",
        "a gateway's failure announced",
        "SKEYSEED computed",
    ):
        [answer] = [answer for question, answer in answers.items() if words in question]
        paths = re.findall(r"`(bridge/[^`]+)`", answer)
        assert paths, words
        assert all((ROOT / path).exists() for path in paths), words


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_targets_of_make_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for piece in code(page.read_text()):
        for target in re.findall(r"(?:^|# )make ([a-z-]+)", piece):
            assert target in targets, piece


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_keys_of_the_configuration_exist(page: Path) -> None:
    build = builder()
    keys = {option.key for _, _, kind in build.FILES for option in build.options(kind)}
    tops = {key.split(".")[0] for key in keys if "." in key}
    for piece in re.findall(r"`([a-z_]+\.[a-z_.]+)`", page.read_text()):
        if piece.split(".")[0] in tops and not piece.endswith((".conf", ".yaml", ".acl", ".key", ".sock")):
            assert piece in keys, piece


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_configurations_that_are_shown_are_valid(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```yaml (gateway|client)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for role, text in blocks:
        file = tmp_path / f"{role}.yaml"
        file.write_text(text)
        assert yaml.safe_load(text)
        if role == "gateway":
            load(file, GatewayConfig)
        else:
            load(file, ClientConfig)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_metrics_exist(page: Path) -> None:
    # the Ansible role has variables of the same kind
    defaults = (ROOT / "ansible/roles/ike_sa_sync/defaults/main.yml").read_text()
    variables = set(re.findall(r"^ike_sa_sync_(\w+):", defaults, re.MULTILINE))
    for metric in set(re.findall(r"\bike_sa_sync_(\w+)", page.read_text())) - variables:
        name = re.sub(r"_(total|bucket|sum|count)$", "", metric)
        assert f'"{name}"' in SOURCE, metric


def test_log_events_and_reasons_in_the_troubleshooting_page_exist() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text() + (ROOT / "docs/failures.md").read_text()
    retried = {f"{name}-unavailable" for name in re.findall(r'retry\(\s*"([a-z-]+)"', SOURCE)}
    for piece in re.findall(r"`([a-z]+(?:-[a-z]+)+)`", text):
        if piece != "ike-sa-sync":
            assert f'"{piece}"' in SOURCE or piece in retried, piece


def test_every_alert_has_its_line_in_the_troubleshooting_page() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    rules = yaml.safe_load((ROOT / "monitoring/ike-sa-sync.rules.yml").read_text())
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    assert [alert for alert in alerts if alert not in text] == []


def test_tests_that_are_named_exist() -> None:
    files = [path.name for path in (ROOT / "tests").glob("test_*.py")]
    known = {file.removesuffix(".py") for file in files}.union(*(names_in(file) for file in files))
    for page in PAGES:
        for name in re.findall(r"\b(test_[a-z_]+)\b", page.read_text()):
            assert any(each.startswith(name) for each in known), (page.name, name)
        assert missing_tests(page) == []
    failures = (ROOT / "docs/failures.md").read_text()
    for file, tests in re.findall(r"(test_\w+): ((?:\w+(?:, )?)+)", failures):
        source = (ROOT / "tests" / f"{file}.py").read_text()
        for test in tests.split(", "):
            assert re.search(rf"def test_{test}", source) or (ROOT / "tests" / f"{test}.py").exists(), test


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    assert [page.name for page in PAGES[len(TOP) :] if page.name != "README.md" and f"({page.name})" not in index] == []


@pytest.mark.lab
def test_every_command_of_the_tutorial_does_what_it_says() -> None:
    lab = f"doc{secrets.token_hex(3)}"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    try:
        for command, expected in tutorial():
            if command.startswith(("make ", "export ")):
                continue  # done, where this test runs
            done = subprocess.run(
                _in_lab(command, lab),
                shell=True,
                capture_output=True,
                text=True,
                env=environment,
                timeout=300,
                check=False,
            )
            output = done.stdout + done.stderr
            assert done.returncode == 0, f"{command}\n{output}"
            for line in expected:
                assert " ".join(line.replace("lab lab", f"lab {lab}").split()) in " ".join(output.split()), command
    finally:
        space.remove(lab)


def tutorial() -> list[tuple[str, list[str]]]:
    """Its commands, each with the lines that are shown under it."""
    found: list[tuple[str, list[str]]] = []
    for line in (ROOT / "docs/tutorial.md").read_text().splitlines():
        if line.startswith("    # "):
            found.append((line[6:], []))
        elif line.startswith("    ") and found:
            found[-1][1].append(line.strip())
    return found


def _in_lab(command: str, lab: str) -> str:
    """The same in a lab of its own: others may be there."""
    name = shlex.quote(lab)
    command = re.sub(r"ike-sa-sync lab up", f"ike-sa-sync lab up --name {name}", command)
    command = re.sub(r"ike-sa-sync lab clean", f"ike-sa-sync lab clean {name}", command)
    return re.sub(r"ike-sa-sync lab (shell|kill)", rf"ike-sa-sync lab \1 --lab {name}", command)


def test_the_recording_is_of_a_run_that_resumed_and_small() -> None:
    picture = (ROOT / "docs/demo.svg").read_text()
    assert len(picture) < 10_000
    text = "\n".join(
        "".join(line.itertext()) for line in ElementTree.fromstring(picture).iter() if line.tag.endswith("}text")
    )
    assert text.startswith("# make demo\n")
    assert "resumed at 192.168.50.2" in text
    assert re.search(r"resumed with \d+ of \d+ packets lost; the lab is gone again$", text)


def test_the_version_is_the_same_wherever_it_stands() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf"^## {re.escape(version)}( |$)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
