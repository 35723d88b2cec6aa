"""Channels over TCP: a client's one, a server's many."""

from .accepting import CONNECTION_ERRNOS as CONNECTION_ERRNOS
from .accepting import Shortage as Shortage
from .accepting import accept_forever as accept_forever
from .accepting import format_address as format_address
from .accepting import peername as peername
from .accepting import remember as remember
from .client import open_sspi_over_tcp_channel as open_sspi_over_tcp_channel
from .connection import Attempt as Attempt
from .connection import ConnectionServer as ConnectionServer
from .connection import Handler as Handler
from .connection import LiveSession as LiveSession
from .connection import TCPChannel as TCPChannel
from .endings import End as End
from .endings import LoginFailure as LoginFailure
from .endings import Outcome as Outcome
from .endings import is_ordinary_end as is_ordinary_end
from .listener import SSPIListener as SSPIListener
from .server import ServerStatistics as ServerStatistics
from .server import open_sspi_over_tcp_listeners as open_sspi_over_tcp_listeners
from .server import serve_sspi_listeners as serve_sspi_listeners
from .server import serve_sspi_over_tcp as serve_sspi_over_tcp
from .tickets import NOTICE as NOTICE
from .tickets import ticket_end as ticket_end
