"""A session over a Trio stream: what waits for the transport, and nothing else."""

from .channel import SSPIChannel as SSPIChannel
from .endpoint import Endpoint as Endpoint
from .endpoint import StreamT as StreamT
from .options import ChannelKeywords as ChannelKeywords
from .options import ChannelOptions as ChannelOptions
from .options import ConnectionOptions as ConnectionOptions
from .options import Impersonator as Impersonator
from .options import RunBlocking as RunBlocking
from .options import StreamKeywords as StreamKeywords
from .options import StreamOptions as StreamOptions
from .options import run_in_thread as run_in_thread
from .options import takes_options as takes_options
from .stream import SSPIStream as SSPIStream
