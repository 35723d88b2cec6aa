"""The handshake of a session over a stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

from .._errors import AuthenticationError
from ..session import BaseSession
from .farewell import LOST
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


async def shake_hands(
    session: BaseSession,
    stream: trio.abc.Stream,
    run_blocking: RunBlocking,
    refused: Callable[[AuthenticationError], bool] | None,
) -> None:
    """Exchange tokens until both sides know who is there. Has executed a checkpoint when it returns.

    A login that is refused is told to the peer where the wire format can, and so may be followed by another one.

    Args:
      session: which has not begun.
      stream: to its peer.
      run_blocking: runs the steps that may block.
      refused: is asked of each refusal behind which the format lets the peer try again; returns whether it may.

    Raises:
      RemoteProtocolError: the peer's fault.
      Exception: whatever the stream raises, or ``refused``.
    """
    while True:
        try:
            await _exchange_tokens(session, stream, run_blocking)
        except AuthenticationError as exc:
            refusal = session.refuse(exc)
            again = session.try_again(exc) and (refused is None or refused(exc))
            if refusal:
                # Where it cannot be told, the refusal still is what has happened.
                with suppress(*LOST):
                    await stream.send_all(refusal)
            if not again:
                raise
        else:
            return


async def _exchange_tokens(session: BaseSession, stream: trio.abc.Stream, run_blocking: RunBlocking) -> None:
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


async def _receive_token(session: BaseSession, stream: trio.abc.Stream) -> bytes:
    while (token := session.next_token()) is None:
        session.receive_data(await stream.receive_some())
    return token
