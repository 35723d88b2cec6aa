"""Samba's NTLM and SPNEGO through its `ntlm_auth` helper: the code in winbind and smbclient, and behind Wine's secur32.

A line protocol over stdin and stdout, made for Squid and Cyrus: one process is one login, no daemon runs. The helper
steps a context and gives out the session key; sealing stays inside Samba, so here it is done by `ntlm_crypto`. That is
the helper's own limit: of a message it proves that Samba's key is ours, and not that Samba would have numbered it so.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import shutil
import subprocess
from functools import partial

from .base import PeerError, PeerKind
from .ntlm_crypto import NTLMSealing

# Without this line the helper asks for no session security: its AUTHENTICATE then has no SIGN and no SEAL, and
# there is no session key.
_FEATURES = "SF NTLMSSP_FEATURE_SESSION_KEY NTLMSSP_FEATURE_SIGN NTLMSSP_FEATURE_SEAL"


class _Helper:
    """One process. `arguments` are bytes: Samba reads them as UTF-8 (its "unix charset") whatever the locale is."""

    def __init__(self, protocol: str, arguments: list[bytes], features: str | None = _FEATURES) -> None:
        self._process = subprocess.Popen(
            [b"ntlm_auth", b"--configfile=/dev/null", f"--helper-protocol={protocol}".encode(), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",  # all is base64, but for the name of who has logged in
        )
        if features is not None:
            try:
                self.command(features, "OK")
            except BaseException:
                self.close()
                raise

    def command(self, line: str, *expected: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline().rstrip("\n")
        except (OSError, ValueError) as exc:
            raise PeerError(f"ntlm_auth has ended: {exc}") from exc
        if answer[:2] not in expected:
            raise PeerError(f"ntlm_auth: {answer or 'closed its output'}")
        return answer

    def session_key(self) -> bytes:
        key = blob(self.command("GK", "GK"))
        if key is None or len(key) != 16:
            raise PeerError("ntlm_auth gave no session key")
        return key

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.kill()
        self._process.wait()


def blob(line: str) -> bytes | None:
    """The token in an answer, if it has one."""
    word = line[3:].strip()
    # The helper pads an answer without a token with a lone asterisk, or with nothing, by mode and version.
    if word in ("", "*"):
        return None
    try:
        return base64.b64decode(word, validate=True)
    except binascii.Error as exc:
        raise PeerError(f"ntlm_auth: {line}") from exc


class NtlmAuthInitiator:
    """A login by `ntlm_auth`. `protocol` is the name of its helper mode.

    Args:
        secure: False leaves session security unasked for: no SIGN, no SEAL, no session key. What an acceptor that
            means to seal must refuse.
    """

    def __init__(self, protocol: str, username: str, password: str, domain: str, *, secure: bool = True) -> None:
        self._spnego = protocol == "gss-spnego-client"
        self._secure = secure
        self._complete = False
        self._sealing: NTLMSealing | None = None
        names = [b"--username=" + username.encode(), b"--domain=" + domain.encode()]
        self._helper = _Helper(protocol, names, _FEATURES if secure else None)
        try:
            # Over the pipe and not by --password: a command line is for everybody to read.
            self._helper.command("PW " + base64.b64encode(password.encode()).decode(), "OK")
        except BaseException:
            self.close()
            raise

    @property
    def complete(self) -> bool:
        return self._complete

    def step(self, token: bytes | None) -> bytes | None:
        if token is None:
            return blob(self._helper.command("YR", "YR"))
        line = self._helper.command("TT " + base64.b64encode(token).decode(), "KK", "AF")
        self._complete = line.startswith("AF")
        if self._complete and self._secure:
            self._sealing = NTLMSealing(self._helper.session_key(), first=1 if self._spnego else 0)
        return blob(line)

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        return self._established().seal(message)

    def open(self, trailer: bytes, data: bytes) -> bytes:
        return self._established().open(trailer, data)

    def close(self) -> None:
        self._helper.close()

    def _established(self) -> NTLMSealing:
        if self._sealing is None:
            raise PeerError("not established")
        return self._sealing


class NtlmAuthAcceptor:
    """The other side, with the helper's own check of one password: no winbindd is asked.

    It is for Samba's own tests, and takes any user name with that password.
    """

    def __init__(self, protocol: str, username: str, password: str, domain: str) -> None:
        self._spnego = protocol == "gss-spnego"
        self._sealing: NTLMSealing | None = None
        self._command = "YR "
        self.client: str | None = None
        # This check knows no other way to a password than the command line.
        words = {"username": username, "domain": domain, "password": password}
        self._helper = _Helper(protocol, [f"--{option}={word}".encode() for option, word in words.items()])

    @property
    def complete(self) -> bool:
        return self._sealing is not None

    def step(self, token: bytes) -> bytes | None:
        line = self._helper.command(self._command + base64.b64encode(token).decode(), "TT", "AF")
        self._command = "KK "
        # "TT token", "AF DOM\\user", or with SPNEGO "AF token DOM\\user".
        verb, _, rest = line.partition(" ")
        if verb == "TT":
            # SPNEGO's has an asterisk behind it.
            return blob("TT " + rest.split(" ")[0])
        self._sealing = NTLMSealing(self._helper.session_key(), first=1 if self._spnego else 0, usage="accept")
        answer, _, self.client = rest.rpartition(" ")
        return blob("AF " + answer)

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        assert self._sealing is not None
        return self._sealing.seal(message)

    def open(self, trailer: bytes, data: bytes) -> bytes:
        assert self._sealing is not None
        return self._sealing.open(trailer, data)

    def close(self) -> None:
        self._helper.close()


def available() -> str | None:
    """Whether the helper is there."""
    return None if shutil.which("ntlm_auth") else "Samba's ntlm_auth is not installed (apt winbind)"


NTLM_AUTH_NTLM = PeerKind(
    name="samba-ntlm",
    mechanism="ntlm",
    spnego=False,
    sends_mic=True,
    sets_seal=True,
    eszett="ß",
    blob_tail=False,
    seals_empty=True,
    probe=available,
    make=partial(NtlmAuthInitiator, "ntlmssp-client-1"),
)
NTLM_AUTH_SPNEGO = PeerKind(
    name="samba-spnego",
    mechanism="ntlm",
    spnego=True,
    sends_mic=True,
    sets_seal=True,
    eszett="ß",
    blob_tail=False,
    seals_empty=True,
    probe=available,
    make=partial(NtlmAuthInitiator, "gss-spnego-client"),
)
