"""The file with the keys of the bank, which an operator changes and key epochs rewrite."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from bridge.stub.keyring import Keyring, SealError

log = structlog.get_logger()


class KeyFile:
    """`keyring` as it was loaded from the file at `path`."""

    def __init__(self, keyring: Keyring, path: str | Path) -> None:
        self.keyring = keyring
        self._path = Path(path)
        self._stamp = self._stamp_now()
        self._unkept = False

    async def keep(self) -> None:
        """Everything is sealed with the key that seals now: write the file without the one before it."""
        try:
            if await asyncio.to_thread(self.keyring.keep, self._path):
                self._stamp = self._stamp_now()
                log.info("key-file-rewritten", file=str(self._path), key=self.keyring.sealing.hex())
        except (SealError, OSError) as error:
            if not self._unkept:
                log.error(
                    "key-file-not-rewritten",
                    reason=str(error),
                    fix="let the sidecar write to its folder; until then the file opens what expired in earlier epochs",
                )
            self._unkept = True
        else:
            self._unkept = False

    def reload(self) -> None:
        """Take the file's keys into the keyring, if it has changed."""
        stamp = self._stamp_now()
        if stamp in (None, self._stamp):
            return
        try:
            self.keyring.replace(Keyring.load(self._path))
        except (SealError, OSError) as error:
            log.warning("keys-not-reloaded", reason=str(error), effect="the keys in memory stay in use")
        else:
            log.info("keys-reloaded", keys=[key_id.hex() for key_id in self.keyring.ids])
        self._stamp = stamp

    def _stamp_now(self) -> tuple[int, ...] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
