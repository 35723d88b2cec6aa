"""A session over a Trio stream: what waits for the transport, and nothing else."""

from .channel import Impersonator as Impersonator
from .channel import RunBlocking as RunBlocking
from .channel import SSPIChannel as SSPIChannel
from .channel import StreamT as StreamT
from .channel import run_in_thread as run_in_thread
