"""One connection without its I/O: a wire format times a security context."""

from .session import Session as Session
from .session import Tracer as Tracer
