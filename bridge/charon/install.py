"""What charon is told of an IKE_SA that it is to have, as data; bridge.charon.ha_commands makes the messages of it.

Apart from that module, since it is compiled: mypyc ignores what a class statement says to msgspec.
"""

from __future__ import annotations

from msgspec import Struct

from bridge.charon.ha_message import IkeId
from bridge.charon.ike_sa import IkeSa
from bridge.ike.transforms import Suite
from bridge.stub.child_sa import NewChild
from bridge.stub.types import Endpoint, Identity

FIRST_MESSAGE_ID = 1
"""of the client's requests on a rebuilt SA; IKE_SA_INIT with IKE_SA_SYNC was message 0"""


class Install(Struct, frozen=True, gc=False):
    """All that charon receives about one rebuilt IKE_SA. `local` is this host, `id.initiator` whether it is the
    client."""

    id: IkeId
    suite: Suite
    sk_d_old: bytes
    nonce_i: bytes
    nonce_r: bytes
    local_id: Identity
    remote_id: Identity
    eap_id: Identity | None
    local: Endpoint
    remote: Endpoint
    connection: str
    conditions: tuple[int, ...]
    extensions: tuple[int, ...]
    local_vips: tuple[str, ...]
    remote_vips: tuple[str, ...]
    children: tuple[NewChild, ...] = ()
    """to be installed with it"""
    replaces: IkeId | None = None
    """the IKE_SA in whose place it comes, removed once the CHILD_SAs are installed: until then its policies keep
    packets from leaving in the clear"""
    message_id: int = FIRST_MESSAGE_ID
    """of the client's next request"""
    g_ir: bytes = b""
    """with forward secrecy, or that of the IKE_SA itself where it is taken over as it is"""
    additional: bytes = b""
    """ADD_SECRET of an IKE_SA that is taken over"""
    prf_old: int = 0
    """prf of the SA before, where it is another than that of the suite"""
    message_ids: tuple[int, int] | None = None
    """of an SA that is taken over: those of this host's and of the peer's next request"""

    def __repr__(self) -> str:
        # keys are in it
        return f"Install({self.id.spi_i.hex()}, {self.id.spi_r.hex()})"

    @classmethod
    def of(
        cls,
        sa: IkeSa,
        *,
        sk_d_old: bytes,
        nonce_i: bytes,
        nonce_r: bytes,
        local_vips: tuple[str, ...],
        remote_vips: tuple[str, ...],
        children: tuple[NewChild, ...] = (),
        replaces: IkeId | None = None,
        message_id: int = FIRST_MESSAGE_ID,
        g_ir: bytes = b"",
    ) -> Install:
        """What makes charon have `sa`, whose peers and their identities are known."""
        assert sa.local_id is not None
        assert sa.remote_id is not None
        assert sa.local is not None
        assert sa.remote is not None
        return cls(
            id=sa.id,
            suite=sa.suite,
            sk_d_old=sk_d_old,
            nonce_i=nonce_i,
            nonce_r=nonce_r,
            local_id=sa.local_id,
            remote_id=sa.remote_id,
            eap_id=sa.eap_id,
            local=sa.local,
            remote=sa.remote,
            connection=sa.connection,
            conditions=sa.conditions,
            extensions=sa.extensions,
            local_vips=local_vips,
            remote_vips=remote_vips,
            children=children,
            replaces=replaces,
            message_id=message_id,
            g_ir=g_ir,
        )
