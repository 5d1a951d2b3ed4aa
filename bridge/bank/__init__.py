"""Where stubs live."""

from bridge.bank.interface import StubBank
from bridge.bank.private import PrivateBank
from bridge.bank.redis import RedisBank
from bridge.config import Bank
from bridge.seal import Keyring


def bank_url(config: Bank) -> str:
    """Where the bank that `config` names is, the private one included."""
    return config.url or PrivateBank.url_of(config.runtime)


async def open_bank(config: Bank, keyring: Keyring, *, serve: bool = False) -> StubBank:
    """The bank that `config` names. It need not be reachable yet.

    Without a URL that is the private Redis in `config.runtime`: with `serve` it is started, watched, and stopped by
    `close`, which is the sidecar's part; without, it is only spoken to. Raises ValueError for a URL of no known form.
    """
    if config.url is not None:
        return RedisBank(config.url, keyring, get_timeout=config.get_timeout)
    bank = PrivateBank(config.runtime, keyring, get_timeout=config.get_timeout)
    if serve:
        await bank.start()
    return bank
