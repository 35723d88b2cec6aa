"""Foreign initiators: clients that this project did not write, behind one small blocking interface.

`NTLM_PEERS` lists those that log in with NTLM. Parametrise a test over it, call `requirements.require(peer)` first,
then drive `peer.new(user, password, domain)` through `wire`:

    @pytest.mark.parametrize("peer", NTLM_PEERS, ids=str)
    def test_peer_reads_the_sample(peer: PeerKind) -> None:
        require(peer)
        with closing(peer.new("alice", "secret", "DOM")) as initiator, wire.connect(host, port) as sock:
            wire.login(sock, initiator)
            assert wire.read_sample(sock, initiator).plaintext == b"This is your server speaking"
"""

from __future__ import annotations

from . import wire as wire
from .base import Initiator as Initiator
from .base import PeerError as PeerError
from .base import PeerKind as PeerKind
from .dotnet import DOTNET_NEGOTIATE, DOTNET_NTLM
from .gssapi_peer import GSS_NTLMSSP, MIT_SPNEGO_NTLM
from .ntlm_auth_peer import NTLM_AUTH_NTLM, NTLM_AUTH_SPNEGO
from .pyspnego_peer import PYSPNEGO_NEGOTIATE, PYSPNEGO_NTLM
from .sspi_rs_peer import SSPI_RS_NEGOTIATE, SSPI_RS_NTLM

NTLM_PEERS: list[PeerKind] = [
    PYSPNEGO_NTLM,
    PYSPNEGO_NEGOTIATE,
    SSPI_RS_NTLM,
    SSPI_RS_NEGOTIATE,
    GSS_NTLMSSP,
    MIT_SPNEGO_NTLM,
    NTLM_AUTH_NTLM,
    NTLM_AUTH_SPNEGO,
    DOTNET_NTLM,
    DOTNET_NEGOTIATE,
]
