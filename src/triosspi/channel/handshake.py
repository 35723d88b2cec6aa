"""The handshake of a session over a stream."""

from __future__ import annotations

from typing import Final

import trio

from ..session import Session
from .options import RunBlocking

_turn: Final[trio.lowlevel.RunVar[trio.Lock]] = trio.lowlevel.RunVar("triosspi login turn")


def _login_turn() -> trio.Lock:
    """One step of one login for each turn of the event loop.

    A step takes a quarter of a millisecond. A hundred that arrive together would all be taken in one turn,
    and connections that are logged in would wait for all of them.
    """
    try:
        return _turn.get()
    except LookupError:
        lock = trio.Lock()
        _turn.set(lock)
        return lock


async def shake_hands(session: Session, stream: trio.abc.Stream, run_blocking: RunBlocking) -> None:
    """Exchange tokens until both sides know who is there. Has executed a checkpoint when it returns.

    Args:
      session: which has not begun.
      stream: to its peer.
      run_blocking: runs the steps that may block.

    Raises:
      RemoteProtocolError: the peer's fault.
      Exception: whatever the stream raises.
    """
    token = await _receive_token(session, stream) if session.accepts else None
    while True:
        if session.may_block:
            data = await run_blocking(session.step, token)
            if not isinstance(data, bytes):
                # Else the handshake would wait for the answer to a token that was never sent.
                raise TypeError(f"run_blocking must return what the step returns, not {type(data).__name__}")
        elif session.accepts:
            async with _login_turn():
                data = session.step(token)
        else:
            data = session.step(token)
        if data:
            await stream.send_all(data)
        if session.established:
            break
        token = await _receive_token(session, stream)
    if not data:
        await trio.lowlevel.checkpoint()


async def _receive_token(session: Session, stream: trio.abc.Stream) -> bytes:
    while (token := session.next_token()) is None:
        session.receive_data(await stream.receive_some())
    return token
