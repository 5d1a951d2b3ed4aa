"""Files that the package ships beside its code."""

from pathlib import Path


def path(name: str) -> Path:
    """Where a shipped file is, in the wheel or in the source tree (`redis/store.lua`)."""
    package = Path(__file__).parent.parent
    packaged = package / "_data" / name
    return packaged if packaged.exists() else package.parent / name
