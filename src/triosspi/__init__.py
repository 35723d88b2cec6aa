"""Windows-authenticated TCP for Trio: SSPI's Negotiate, then sealed messages.

See `serve_sspi_over_tcp` and `open_sspi_over_tcp_channel`; and for .NET's NegotiateStream
`serve_negotiate_stream_over_tcp` and `open_negotiate_stream`.
"""

# Each name is imported when it is first asked for (PEP 562): a program that only reads an account file need not wait for
# pyspnego, python-gssapi and Trio. Type checkers and editors read the lines under TYPE_CHECKING, and Python reads the
# table below them; a test holds that both say the same.

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from ._errors import AuthenticationError as AuthenticationError
    from ._errors import ConfigurationError as ConfigurationError
    from ._errors import ForeignProtocolError as ForeignProtocolError
    from ._errors import FrameTooLongError as FrameTooLongError
    from ._errors import ImpersonationError as ImpersonationError
    from ._errors import LocalProtocolError as LocalProtocolError
    from ._errors import MessageTooLongError as MessageTooLongError
    from ._errors import PeerRefusalError as PeerRefusalError
    from ._errors import RemoteProtocolError as RemoteProtocolError
    from ._errors import SSPIError as SSPIError
    from ._errors import TicketExpiredError as TicketExpiredError
    from ._errors import TruncatedError as TruncatedError
    from ._errors import UnsealError as UnsealError
    from .channel import ChannelOptions as ChannelOptions
    from .channel import Impersonator as Impersonator
    from .channel import RunBlocking as RunBlocking
    from .channel import SSPIChannel as SSPIChannel
    from .channel import SSPIStream as SSPIStream
    from .channel import StreamOptions as StreamOptions
    from .impersonation import AccountMap as AccountMap
    from .impersonation import Impersonation as Impersonation
    from .impersonation import LocalAccount as LocalAccount
    from .security.credentials import Acceptor as Acceptor
    from .security.credentials import Initiator as Initiator
    from .security.identity import ContextFlag as ContextFlag
    from .security.identity import ContextSizes as ContextSizes
    from .security.identity import PeerIdentity as PeerIdentity
    from .security.identity import Traffic as Traffic
    from .security.ntlm.accounts import Account as Account
    from .security.ntlm.accounts import AccountFile as AccountFile
    from .security.ntlm.accounts import AccountSource as AccountSource
    from .session import Tracer as Tracer
    from .tcp import NegotiateStreamListener as NegotiateStreamListener
    from .tcp import ServerStatistics as ServerStatistics
    from .tcp import SSPIListener as SSPIListener
    from .tcp import open_negotiate_stream as open_negotiate_stream
    from .tcp import open_negotiate_stream_listeners as open_negotiate_stream_listeners
    from .tcp import open_sspi_over_tcp_channel as open_sspi_over_tcp_channel
    from .tcp import open_sspi_over_tcp_listeners as open_sspi_over_tcp_listeners
    from .tcp import serve_negotiate_stream_over_tcp as serve_negotiate_stream_over_tcp
    from .tcp import serve_sspi_listeners as serve_sspi_listeners
    from .tcp import serve_sspi_over_tcp as serve_sspi_over_tcp
    from .wire import WireFormat as WireFormat

__version__ = "0.1.0"

_HOMES: Final = {
    "AuthenticationError": "_errors",
    "ConfigurationError": "_errors",
    "ForeignProtocolError": "_errors",
    "FrameTooLongError": "_errors",
    "ImpersonationError": "_errors",
    "LocalProtocolError": "_errors",
    "MessageTooLongError": "_errors",
    "PeerRefusalError": "_errors",
    "RemoteProtocolError": "_errors",
    "SSPIError": "_errors",
    "TicketExpiredError": "_errors",
    "TruncatedError": "_errors",
    "UnsealError": "_errors",
    "ChannelOptions": "channel",
    "Impersonator": "channel",
    "RunBlocking": "channel",
    "SSPIChannel": "channel",
    "SSPIStream": "channel",
    "StreamOptions": "channel",
    "AccountMap": "impersonation",
    "Impersonation": "impersonation",
    "LocalAccount": "impersonation",
    "Acceptor": "security.credentials",
    "Initiator": "security.credentials",
    "ContextFlag": "security.identity",
    "ContextSizes": "security.identity",
    "PeerIdentity": "security.identity",
    "Traffic": "security.identity",
    "Account": "security.ntlm.accounts",
    "AccountFile": "security.ntlm.accounts",
    "AccountSource": "security.ntlm.accounts",
    "Tracer": "session",
    "NegotiateStreamListener": "tcp",
    "ServerStatistics": "tcp",
    "SSPIListener": "tcp",
    "open_negotiate_stream": "tcp",
    "open_negotiate_stream_listeners": "tcp",
    "open_sspi_over_tcp_channel": "tcp",
    "open_sspi_over_tcp_listeners": "tcp",
    "serve_negotiate_stream_over_tcp": "tcp",
    "serve_sspi_listeners": "tcp",
    "serve_sspi_over_tcp": "tcp",
    "WireFormat": "wire",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604 - they are strings


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Not for type checkers, to whom it would say that any name is there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{home}", __name__), name)
        # The next time Python finds it by itself.
        globals()[name] = value
        return value
