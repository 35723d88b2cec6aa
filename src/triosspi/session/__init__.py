"""One connection without its I/O: a wire format times a security context."""

from .base import BaseSession as BaseSession
from .base import Tracer as Tracer
from .session import Session as Session
from .stream import Protection as Protection
from .stream import StreamSession as StreamSession
from .stream import check_protection as check_protection
