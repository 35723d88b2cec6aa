"""Windows-authenticated TCP for Trio: SSPI's Negotiate, then sealed messages.

See `serve_sspi_over_tcp` and `open_sspi_over_tcp_channel`.
"""

from ._errors import AuthenticationError as AuthenticationError
from ._errors import ConfigurationError as ConfigurationError
from ._errors import ForeignProtocolError as ForeignProtocolError
from ._errors import FrameTooLongError as FrameTooLongError
from ._errors import ImpersonationError as ImpersonationError
from ._errors import LocalProtocolError as LocalProtocolError
from ._errors import MessageTooLongError as MessageTooLongError
from ._errors import RemoteProtocolError as RemoteProtocolError
from ._errors import SSPIError as SSPIError
from ._errors import TicketExpiredError as TicketExpiredError
from ._errors import TruncatedError as TruncatedError
from ._errors import UnsealError as UnsealError
from .channel import Impersonator as Impersonator
from .channel import RunBlocking as RunBlocking
from .channel import SSPIChannel as SSPIChannel
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
from .tcp import ServerStatistics as ServerStatistics
from .tcp import SSPIListener as SSPIListener
from .tcp import open_sspi_over_tcp_channel as open_sspi_over_tcp_channel
from .tcp import open_sspi_over_tcp_listeners as open_sspi_over_tcp_listeners
from .tcp import serve_sspi_listeners as serve_sspi_listeners
from .tcp import serve_sspi_over_tcp as serve_sspi_over_tcp
from .wire import WireFormat as WireFormat

__version__ = "0.1.0"
