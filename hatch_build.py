"""hatchling calls this for each build of a wheel. With IKE_SA_SYNC_COMPILE=1 the modules that pyproject.toml lists are
compiled by mypyc, into the wheel of one Python on one machine; without it nothing happens, and nothing is needed.

The modules stay in the wheel as they are too. Which libraries are installed makes no difference to what is compiled,
nor does the directory in which that happens.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ASKED_FOR = "IKE_SA_SYNC_COMPILE"
LIBRARY = "ike_sa_sync"
"""mypyc puts the code of all modules into one library, LIBRARY__mypyc, which the extensions of the modules load"""
MYPY = (
    "--config-file=",
    "--no-site-packages",
    "--ignore-missing-imports",
    "--follow-imports=silent",
    "--explicit-package-bases",
)
"""types are checked elsewhere (`make typecheck`)"""


class Compile(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the extensions to a wheel."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        return ["mypy>=2.4", "setuptools"] if self._is_asked_for() else []

    def _is_asked_for(self) -> bool:
        return os.environ.get(ASKED_FOR) == "1" and self.target_name == "wheel"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or not self._is_asked_for():
            return
        self._directory = tempfile.TemporaryDirectory(prefix="ike-sa-sync-")
        source, made = Path(self._directory.name, "source"), Path(self._directory.name, "made")
        but = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(Path(self.root, "bridge"), source / "bridge", ignore=but)
        subprocess.run(
            [sys.executable, __file__, str(made), *self.config["modules"]],
            cwd=source,
            # the order of sets
            env=os.environ | {"PYTHONHASHSEED": "0"},
            check=True,
        )
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["force_include"] |= {str(file): str(file.relative_to(made)) for file in sorted(made.rglob("*.so"))}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_directory"):
            self._directory.cleanup()


def extensions(output: str, modules: list[str]) -> None:
    """Compile modules of the directory that this runs in; their extensions go below `output`."""
    from mypyc.build import mypycify
    from setuptools import Distribution

    made = mypycify([*MYPY, *modules], group_name=LIBRARY, opt_level="2", debug_level="0")
    command = Distribution({"name": LIBRARY, "ext_modules": made}).get_command_obj("build_ext")
    command.build_lib, command.build_temp = output, "objects"
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    extensions(sys.argv[1], sys.argv[2:])
