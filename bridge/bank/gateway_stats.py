"""What a gateway counts, as it posts it into the bank: for `monitor`, and for a drain that evens sessions out."""

from __future__ import annotations

import json
import math

OCTETS_MAX = 100_000
"""of a gateway's counters; more are not read"""
SESSIONS = "ike_sas"
"""the counter of its IKE_SAs"""


def decode(raw: object) -> dict[str, float]:
    """A gateway's counters; none where they are not what a gateway writes."""
    if not isinstance(raw, bytes) or len(raw) > OCTETS_MAX:
        return {}
    try:
        counters = {str(key): float(value) for key, value in json.loads(raw).items()}
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}
    return counters if all(map(math.isfinite, counters.values())) else {}
