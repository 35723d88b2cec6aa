"""What `triosspi serve` serves: the two built-in applications, and those of others."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import trio

from .._errors import ConfigurationError
from ..channel import SSPIStream
from ..impersonation import thread_user_name
from ..tcp import AnyHandler, TCPChannel, TCPStream
from .reasons import described
from .transcript import Transcript

#: The sample's message to its client: 28 bytes, without a terminating NUL.
SAMPLE_MESSAGE = b"This is your server speaking"


class Greet:
    """Sends one message and closes, as Microsoft's sample does.

    Args:
      message: the message.
      impersonate: first become the client, and look who that is on this machine, as the sample does.
      listen: before that, wait for a message of the client's: where it can say something, nobody is impersonated who has
          said nothing. (From the client of a stream that is waited for in any case.)
    """

    def __init__(self, message: bytes = SAMPLE_MESSAGE, *, impersonate: bool = False, listen: bool = False) -> None:
        self._message = message
        self.impersonates = impersonate
        self._listen = listen

    async def __call__(self, channel: TCPChannel | TCPStream) -> None:
        """Serve one client."""
        if self.impersonates:
            if isinstance(channel, SSPIStream):
                await channel.receive_some()
            elif self._listen:
                await channel.receive()
            name = await channel.run_as_peer(thread_user_name)
            if isinstance(channel.tracer, Transcript):
                channel.tracer.impersonated(name)
        if isinstance(channel, SSPIStream):
            await channel.send_all(self._message)
        else:
            await channel.send(self._message)


async def echo(channel: TCPChannel | TCPStream) -> None:
    """Sends everything back; messages a whole batch at a time where the client sends without waiting."""
    if isinstance(channel, SSPIStream):
        async for data in channel:
            await channel.send_all(data)
        return
    while True:
        try:
            messages = await channel.receive_many()
        except trio.EndOfChannel:
            return
        await channel.send_many(messages)


def load_app(name: str) -> AnyHandler:
    """Import an application.

    Args:
      name: ``module:function``; the function is async and takes an `SSPIChannel`, or of a NegotiateStream an
          `SSPIStream`. The working directory is searched first.

    Raises:
      ConfigurationError: there is no such thing, or importing it fails.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigurationError(f"{name!r} is no application: write 'greet', 'echo' or 'module:function'")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: object = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as exc:
        raise ConfigurationError(f"cannot load the application {name!r}: {described(exc)}") from exc
    # An object may be an application too, but what a class's call makes is not awaitable.
    call = None if inspect.isclass(found) else getattr(found, "__call__", None)  # noqa: B004
    if not (inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(call)):
        raise ConfigurationError(f"the application {name!r} is not an async function")
    return found  # type: ignore[return-value]  # no more can be known of it
