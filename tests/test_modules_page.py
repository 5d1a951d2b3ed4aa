"""docs/modules.md has a line for each module, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_module_has_a_line() -> None:
    listed = re.findall(r"^\| `(bridge/[^`]+)` \| \S", (ROOT / "docs" / "modules.md").read_text(), re.MULTILINE)
    modules = [str(path.relative_to(ROOT)) for path in (ROOT / "bridge").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(listed) == sorted(modules)
