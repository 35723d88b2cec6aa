"""What an error reporter that shows locals would publish of an exception, and whether a secret is in it."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import pytest

from triosspi import Acceptor, AccountFile, Initiator
from triosspi.security.ntlm import accounts, primitives, verification
from triosspi.security.ntlm.accounts import AccountTable

# What a program holds itself: of these, reporters show the repr.
_OWN = (Acceptor, Initiator, AccountFile, AccountTable)
_OPAQUE = (type, ModuleType, FunctionType, MethodType, functools.partial, *_OWN)
_DEPTH = 3


def shapes(secret: bytes) -> list[str]:
    """How a secret may look in a text."""
    return [
        secret.hex(),
        secret.hex().upper(),
        base64.b64encode(secret).decode().rstrip("="),
        repr(secret)[2:-1],
    ]


def errors_of(exc: BaseException) -> Iterator[BaseException]:
    """An exception and all that hangs on it: causes, contexts, the members of groups.

    Not `_errors.without_frames`'s walk, though it looks like it: what that one overlooks has to be found here.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [exc]
    while left:
        current = left.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        left += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            left += current.exceptions


def _inside(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif not isinstance(value, _OPAQUE):
        for kind in type(value).__mro__:
            for name in getattr(kind, "__slots__", ()):
                yield getattr(value, name, None)
        yield from getattr(value, "__dict__", {}).values()


def exposed(exc: BaseException, *, ours: str = "triosspi") -> Iterator[tuple[str, object]]:
    """(where, value) of each local of each frame of ours, and what lies up to three levels within it."""
    for error in errors_of(exc):
        yield f"{error!r}", error.args
        traceback = error.__traceback__
        while traceback is not None:
            frame = traceback.tb_frame
            traceback = traceback.tb_next
            if "tests" in frame.f_code.co_filename and ours not in frame.f_globals.get("__name__", ""):
                # The test itself knows the password.
                continue
            for name, local in frame.f_locals.items():
                where = f"{frame.f_code.co_filename}:{frame.f_code.co_name}: {name}"
                level = [local]
                for _ in range(_DEPTH):
                    for value in level:
                        if not isinstance(value, BaseException):
                            yield where, value
                    level = [inner for value in level for inner in _inside(value)]


class Secrets:
    """What must not be seen; knows, beside what it is told, what logins compute."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *passwords: str) -> None:
        self.raw: set[bytes] = set()
        self.texts = set(passwords)
        for password in passwords:
            self.raw |= {password.encode("utf-16-le"), primitives.nt_hash(password)}
        for module, name in (
            (verification, "ntowf_v2"),
            (verification, "hmac_md5"),
            (verification, "rc4k"),
            (accounts, "nt_hash"),
            (primitives, "nt_hash"),
        ):
            monkeypatch.setattr(module, name, self._recording(getattr(module, name)))
        from spnego import _ntlm

        for name in ("ntowfv2", "kxkey", "rc4k", "hmac_md5"):
            if hasattr(_ntlm, name):
                monkeypatch.setattr(_ntlm, name, self._recording(getattr(_ntlm, name)))

    def _recording(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            self.raw |= set(found if isinstance(found, tuple) else [found])
            return found

        return wrapper

    def assert_unseen(self, exc: BaseException) -> None:
        """No secret in anything that hangs on an exception."""
        texts = self.texts | {shape for secret in self.raw for shape in shapes(secret)}
        for where, value in exposed(exc):
            if isinstance(value, (bytes, bytearray, memoryview)):
                data = bytes(value)
                assert not [secret for secret in self.raw if secret in data], where
            text = value if isinstance(value, str) else repr(value)
            assert not [secret for secret in texts if secret in text], where
