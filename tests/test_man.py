"""Manual pages and completions, as mandoc, man and the shells themselves see them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("ike-sa-sync.8", "ike-sa-sync.yaml.5")


def builder() -> Any:
    spec = importlib.util.spec_from_file_location("man_build", ROOT / "man/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man")
    builder().write(directory)
    return directory


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "LC_ALL": "C.UTF-8", "PATH": path, **environment}
    return subprocess.run(argv, capture_output=True, text=True, check=False, env=env, timeout=120)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_clean(built: Path, page: str) -> None:
    lint = run("mandoc", "-T", "lint", "-W", "warning", str(built / page))
    assert (lint.returncode, lint.stdout) == (0, "")
    assert run("man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(built / page)).stderr == ""


def test_the_page_has_every_command_and_option(built: Path) -> None:
    text = run("mandoc", "-T", "ascii", "-O", "width=500", str(built / PAGES[0])).stdout
    plain = subprocess.run(["col", "-b"], input=text, capture_output=True, text=True, check=True).stdout
    build = builder()
    for command, context in build.all_commands():
        assert context.command_path.removeprefix("ike-sa-sync").strip() in plain
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert option in plain, (context.command_path, option)


def test_every_option_of_the_configuration_is_explained() -> None:
    build = builder()
    for _, _, kind in build.FILES:
        assert [option.key for option in build.options(kind) if not option.text] == []


def test_bash_completes_commands_and_options(built: Path) -> None:
    script = built / "bash/ike-sa-sync"
    complete = """
        source "$1"; COMP_WORDS=($2); COMP_CWORD=$3; _ike_sa_sync_completion ike-sa-sync; echo "${COMPREPLY[@]}"
    """
    done = run("bash", "-c", complete, "bash", str(script), "ike-sa-sync res", "1")
    assert (done.stdout.split(), done.stderr) == (["resume"], "")
    done = run("bash", "-c", complete, "bash", str(script), "ike-sa-sync stubs list --", "3")
    assert {"--gateway", "--json", "--config"} <= set(done.stdout.split())


def test_zsh_and_fish_take_their_scripts_and_complete(built: Path) -> None:
    assert run("zsh", "-n", str(built / "zsh/_ike-sa-sync")).stderr == ""
    fish = built / "fish/ike-sa-sync.fish"
    done = run("fish", "-c", f"source {fish}; complete -C 'ike-sa-sync log'", HOME=str(built))
    assert done.stdout.split("\t")[0].strip() == "log-level"
