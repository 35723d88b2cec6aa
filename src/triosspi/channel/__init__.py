"""A session over a Trio stream: what waits for the transport, and nothing else."""

from .channel import SSPIChannel as SSPIChannel
from .channel import StreamT as StreamT
from .options import ChannelKeywords as ChannelKeywords
from .options import ChannelOptions as ChannelOptions
from .options import Impersonator as Impersonator
from .options import RunBlocking as RunBlocking
from .options import run_in_thread as run_in_thread
from .options import takes_channel_options as takes_channel_options
