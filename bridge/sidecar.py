"""The composition root: one charon and the roles that are configured for it, started and stopped in order.

    its rules are set             before anything that a process without privileges could have sent is read
    charon's HA channel is held   what charon sends while the rest is started must not be lost
    each role is opened           its bank and sockets; its parts are built, and none of them lacks another
    each role is started          control socket, metrics, answers to requests
    charon is started             what its SAs do goes to all roles
    each role follows             what needs charon: the bank is compared with it, requests are intercepted
    `ready`

A host may have both roles beside one charon: the IKE_SAs that it initiated in one of its VPNs are the client's, and all
others the gateway's.

They are stopped in the reverse order: charon's news stops before the parts that take it, and the bank's writer ends
after all that writes. A background task that fails stops everything the same way (bridge.service.process).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Protocol

from bridge.charon.charon import Charon
from bridge.charon.ha_channel import ChannelError
from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.charon.sa_listener import Listener
from bridge.charon.status import wait_known
from bridge.charon.vici_types import SaInfo
from bridge.client.role import ClientRole
from bridge.config import ClientConfig, GatewayConfig
from bridge.gateway.role import GatewayRole, load_keyring
from bridge.service.process import retry, run, serve

RoleConfig = GatewayConfig | ClientConfig


class Role(Listener, Protocol):
    """What this host is for its peers."""

    async def start(self, stack: AsyncExitStack) -> None:
        """Begin to serve; what ends it is pushed to `stack`. charon's news is not read yet."""

    async def follow(self, stack: AsyncExitStack) -> None:
        """Begin with what needs charon's news, which is read now."""

    async def recover(self, infos: list[SaInfo]) -> list[IkeSa] | None:
        """Those SAs whose keys the role has from elsewhere; None where that cannot be found out now."""


Open = Callable[[Charon, AsyncExitStack], Awaitable[Role]]


def run_sidecar(configs: Sequence[RoleConfig]) -> None:
    """Run the roles of `configs`, which name the same charon, until a stop signal. Raises ConfigError for a key file
    that cannot be used, StartError, ControlError, TaskFailed."""
    run(lambda: serve(configs[0].log, partial(_start, configs)))


def _opener(config: RoleConfig) -> Open:
    """What opens the role of `config`; its files are read before anything is touched. Raises ConfigError."""
    if isinstance(config, GatewayConfig):
        return partial(GatewayRole.open, config, load_keyring(config.bank.key_file))
    return partial(ClientRole.open, config)


async def _start(configs: Sequence[RoleConfig], stack: AsyncExitStack) -> None:
    openers = [_opener(config) for config in configs]
    charon = Charon(configs[0].vici, configs[0].ha, configs[0].swanctl)
    guarded = await charon.ha_rules.place()
    stack.push_async_callback(charon.ha_rules.close)
    await retry("ha-channel", charon.channel.open, ChannelError)
    if not guarded:
        charon.channel.discard()
    stack.push_async_callback(charon.close)
    roles = [await open_role(charon, stack) for open_role in openers]
    for role in roles:
        await role.start(stack)
    charon.start(*_listeners(roles), recover=partial(_recover, roles))
    stack.push_async_callback(charon.pause)
    for role in roles:
        await role.follow(stack)
    await wait_known(charon)


class _Some:
    """A role that receives the events of some of charon's IKE_SAs only."""

    def __init__(self, role: Role, wanted: Callable[[IkeSa], bool]) -> None:
        self._role = role
        self._wanted = wanted

    def changed(self, sa: IkeSa) -> None:
        if self._wanted(sa):
            self._role.changed(sa)

    def gone(self, sa: IkeSa) -> None:
        if self._wanted(sa):
            self._role.gone(sa)

    def verified(self, ike_id: IkeId) -> None:
        self._role.verified(ike_id)

    def down(self, sa: SaInfo) -> None:
        self._role.down(sa)


def _listeners(roles: Sequence[Role]) -> Sequence[Listener]:
    """What charon reports to: the roles, each with the IKE_SAs that are its own where there are two."""
    clients = [role for role in roles if isinstance(role, ClientRole)]
    if not clients or len(roles) == 1:
        return roles
    [client] = clients
    return [_Some(role, client.initiated if role is client else lambda sa: not client.initiated(sa)) for role in roles]


async def _recover(roles: Sequence[Role], infos: list[SaInfo]) -> list[IkeSa] | None:
    found: list[IkeSa] = []
    for role in roles:
        recovered = await role.recover(infos)
        if recovered is None:
            return None
        found += recovered
    return found
