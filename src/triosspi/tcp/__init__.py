"""Channels over TCP: a client's one, a server's many."""

from .accepting import Shortage as Shortage
from .accepting import accept_forever as accept_forever
from .accepting import peername as peername
from .accepting import remember as remember
from .listener import SSPIListener as SSPIListener
from .server import NOTICE as NOTICE
from .server import Handler as Handler
from .server import ServerStatistics as ServerStatistics
from .server import TCPChannel as TCPChannel
from .server import connection_end as connection_end
from .server import format_address as format_address
from .server import impersonation_refused as impersonation_refused
from .server import is_ordinary_end as is_ordinary_end
from .server import open_sspi_over_tcp_channel as open_sspi_over_tcp_channel
from .server import open_sspi_over_tcp_listeners as open_sspi_over_tcp_listeners
from .server import said_nothing as said_nothing
from .server import serve_sspi_listeners as serve_sspi_listeners
from .server import serve_sspi_over_tcp as serve_sspi_over_tcp
from .server import tampering as tampering
