"""What a gateway knows of sessions itself, whatever the bank says of them."""

from __future__ import annotations

from typing import NamedTuple

from bridge.gateway.endings import Endings
from bridge.gateway.living import LivingSas
from bridge.gateway.revocation import Revocations


class KnownSessions(NamedTuple):
    """Which ended, which live here, and whose identity is locked out."""

    endings: Endings
    living: LivingSas
    revocations: Revocations
