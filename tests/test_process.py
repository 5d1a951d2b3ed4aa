"""What a sidecar is as a process (bridge.service.process)."""

from __future__ import annotations

import subprocess
import sys

PROCESS = """
import ctypes, resource
from bridge.service.process import run

async def main():
    PR_GET_DUMPABLE = 3
    print(ctypes.CDLL(None).prctl(PR_GET_DUMPABLE, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE))

run(main)
"""


def test_it_leaves_no_core_dump_and_no_other_process_of_its_user_reads_its_memory() -> None:
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=True)
    assert done.stdout == "0 (0, 0)\n"
