"""What docs/performance.md says of compiled code, and which form of the code its other figures are of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Report = Mapping[str, Any]

_TEXT = """\
## Compiled

`make dist` makes two wheels, one of pure Python and one for this machine's Python, in which mypyc has compiled what a
packet passes on its way to the answer (the list: pyproject.toml). The Debian package has the second; `pip install .`
compiles nothing unless `IKE_SA_SYNC_COMPILE=1` is set. `ike-sa-sync status` says which one runs (`code`). Storms of
3,000, both forms in turn, three times each on a machine with other work (load 14): the sidecar's CPU each was 344, 358
and 361 µs compiled, and 391, 390 and 407 µs in pure Python: 11 % less; resumptions a second 1,515 to 1,735, and 1,258
to 1,437. One alone gains nothing, since cold caches rule there. {others}

With all 34 modules of the path compiled, `HaChannel`, `Installer`, `Unconfirmed`, `StubLookup` and `IkeSa` too, it was
11 % as well: these stay as they are, so that tests can put others in their place, and an IKE_SA small. The classes of
msgspec stay too: mypyc ignores what a class statement says to it, so that a compiled one has no hash.
"""

_PURE = "pure Python"
"""as `status` says it; also the form of results from before it was recorded"""
_OF = {_PURE: _PURE, "compiled": "compiled code"}


def section(reports: Mapping[str, Report]) -> str:
    """The section of the page."""
    names: dict[str, list[str]] = {}
    for name, report in reports.items():
        names.setdefault(report["machine"].get("code", _PURE), []).append(name)
    most, *rest = sorted(names, key=lambda form: len(names[form]), reverse=True)
    but = "".join(f", but for those of {', '.join(names[form])}, which are of {_OF[form]}" for form in rest)
    return _TEXT.format(others=f"All other figures on this page are of {_OF[most]}{but}.")


def machine_alone(report: Report) -> dict[str, Any]:
    """The machine of a result, without the form of the code, which the section names for all results."""
    return {key: value for key, value in report["machine"].items() if key != "code"}
