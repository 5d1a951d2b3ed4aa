"""The commands and files of docs/deployment.md."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path("docs/deployment.md")


def blocks(text: str) -> dict[str, str]:
    """The indented blocks of commands of the page, by heading and number in it: "Install 1"."""
    found: dict[str, str] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, rest = section.split("\n", 1)
        rest = re.sub(r"^```.*?^```", "", rest, flags=re.MULTILINE | re.DOTALL)
        for number, block in enumerate(re.findall(r"(?:^    .*\n)+", rest, re.MULTILINE), 1):
            found[f"{heading} {number}"] = re.sub(r"^    ", "", block, flags=re.MULTILINE)
    return found


def config(text: str, role: str) -> str:
    """The configuration file of a role that the page shows."""
    [found] = re.findall(rf"```yaml {role}\n(.*?)```", text, re.DOTALL)
    return str(found)
