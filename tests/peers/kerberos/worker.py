"""The Kerberos peers that are Python packages, each in a process of its own, which has one login after the other.

    worker.py gssapi|pyspnego|sspi-rs|dotnet

"begin" and a login in JSON, in hex: its environment, its password, and "initiate" or "accept" with options as initiator.c
and acceptor.c have them; then what `lines.h` describes; then "end". Each is answered. Not imported by anything: started by
`process.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

KERBEROS = "1.2.840.113554.1.2.2"
SPNEGO = "1.3.6.1.5.5.2"
PRINCIPAL_NAME = "1.2.840.113554.1.2.2.1"
SESSION_KEY = "1.2.840.113554.1.2.2.5.5"


class Peer(Protocol):
    """One context of one package."""

    def step(self, token: bytes) -> tuple[bytes, bool]: ...

    def seal(self, message: bytes) -> tuple[bytes, bytes]: ...

    def open(self, trailer: bytes, data: bytes) -> bytes: ...

    def wrap(self, message: bytes, confidential: bool) -> bytes: ...

    def unwrap(self, token: bytes) -> tuple[bytes, bool]: ...

    def key(self) -> tuple[int, bytes]: ...

    def info(self) -> tuple[int, int, str, str, str]: ...


class PythonGSSAPI:
    """python-gssapi's raw calls. Its `SecurityContext.step` keeps an error to itself when there is a token to send."""

    def __init__(self, options: argparse.Namespace, password: str | None) -> None:
        import gssapi
        from gssapi.raw import ChannelBindings, acquire_cred_with_password

        flag = gssapi.RequirementFlag
        flags = {
            "delegate": flag.delegate_to_peer,
            "mutual": flag.mutual_authentication,
            "replay": flag.replay_detection,
            "sequence": flag.out_of_sequence_detection,
            "conf": flag.confidentiality,
            "integ": flag.integrity,
            "dce": flag.dce_style,
        }
        self._raw: Any = gssapi.raw  # its annotations disagree on which classes the raw calls take
        self._iov = options.layout == "iov"
        self._flags = [flags[name] for name in options.flags]
        self._mechanism = gssapi.OID.from_int_seq(SPNEGO if options.mech == "spnego" else KERBEROS)
        self._target = self._principal(options.target)
        self._bindings = None
        if options.bindings is not None:
            self._bindings = ChannelBindings(application_data=options.bindings)
        self._accepting = options.side == "accept"
        self._context: Any = None
        self._delegated: Any = None
        mechanisms = [self._mechanism]
        if self._accepting:
            name = self._principal(options.name)
            self._credential: Any = gssapi.Credentials(name=name, usage="accept", mechs=mechanisms)
        elif password is not None:
            user = self._principal(options.user)
            self._credential = acquire_cred_with_password(user, password.encode(), mechs=mechanisms).creds
        else:
            self._credential = gssapi.Credentials(usage="initiate", mechs=mechanisms)

    @staticmethod
    def _principal(text: str | None) -> Any:
        import gssapi

        # As written; a host-based name would be canonicalized.
        return text and gssapi.Name(text.encode(), gssapi.OID.from_int_seq(PRINCIPAL_NAME))

    def step(self, token: bytes) -> tuple[bytes, bool]:
        if self._accepting:
            result = self._raw.accept_sec_context(
                token, acceptor_creds=self._credential, context=self._context, channel_bindings=self._bindings
            )
            self._delegated = result.delegated_creds
        else:
            result = self._raw.init_sec_context(
                self._target,
                creds=self._credential,
                context=self._context,
                mech=self._mechanism,
                flags=self._flags,
                channel_bindings=self._bindings,
                input_token=token or None,
            )
        self._context = result.context
        return result.token or b"", not result.more_steps

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        if not self._iov:
            token = self.wrap(message, True)
            cut = len(token) - len(message)
            return token[:cut], token[cut:]
        kind = self._raw.IOVBufferType
        iov = self._raw.IOV(kind.header, message, kind.padding, std_layout=False)
        self._raw.wrap_iov(self._context, iov)
        return iov[0].value, iov[1].value + (iov[2].value or b"")

    def open(self, trailer: bytes, data: bytes) -> bytes:
        if self._iov:
            kind = self._raw.IOVBufferType
            iov = self._raw.IOV((kind.header, False, trailer), data, kind.padding, std_layout=False)
            encrypted = self._raw.unwrap_iov(self._context, iov).encrypted
            message = iov[1].value
        else:
            message, encrypted = self.unwrap(trailer + data)
        return _sealed(message, encrypted)

    def wrap(self, message: bytes, confidential: bool) -> bytes:
        sealed = self._raw.wrap(self._context, message, confidential, None)
        if sealed.encrypted != confidential:
            raise ValueError("gss_wrap did not do what it was asked for")
        return bytes(sealed.message)

    def unwrap(self, token: bytes) -> tuple[bytes, bool]:
        opened = self._raw.unwrap(self._context, token)
        return opened.message, opened.encrypted

    def key(self) -> tuple[int, bytes]:
        import gssapi

        oid = gssapi.OID.from_int_seq(SESSION_KEY)
        key, enctype = self._raw.inquire_sec_context_by_oid(self._context, oid)[:2]
        return enctype[-1], key

    def info(self) -> tuple[int, int, str, str, str]:
        context = self._raw.inquire_context(self._context)
        flags = sum(int(flag) for flag in context.flags)
        names = [context.initiator_name, context.target_name]
        names.append(self._delegated and self._raw.inquire_cred(self._delegated).name)
        shown = [self._raw.display_name(name).name.decode() if name else "" for name in names]
        return flags, context.lifetime, *shown  # type: ignore[return-value]


class Pyspnego:
    """pyspnego's Kerberos (which is python-gssapi's), raw or under its own SPNEGO."""

    def __init__(self, options: argparse.Namespace, password: str | None) -> None:
        import spnego
        from spnego.channel_bindings import GssChannelBindings

        request = spnego.ContextReq
        flags = {
            "delegate": request.delegate,
            "mutual": request.mutual_auth,
            "replay": request.replay_detect,
            "sequence": request.sequence_detect,
            "conf": request.confidentiality,
            "integ": request.integrity,
            "dce": request.dce_style,
        }
        bindings = None
        if options.bindings is not None:
            bindings = GssChannelBindings(application_data=options.bindings)
        wanted = request(0)
        for name in options.flags:
            wanted |= flags[name]
        protocol = "negotiate" if options.mech == "spnego" else "kerberos"
        # Not MIT's SPNEGO, which it prefers for its own when it is there.
        choice = spnego.NegotiateOptions
        arguments: dict[str, Any] = {
            "protocol": protocol,
            "options": choice.use_negotiate if options.mech == "spnego" else choice.use_gssapi,
            "channel_bindings": bindings,
        }
        name = (options.name if options.side == "accept" else options.target) or ""
        service, _, host = name.partition("@")[0].partition("/")
        if host:
            arguments |= {"service": service, "hostname": host}

        class KerberosOnlyPassword(spnego.Password):
            # Its SPNEGO would fall back to NTLM with it.
            @property
            def supported_protocols(self) -> list[str]:
                return ["kerberos"]

        if options.side == "accept":
            self._context = spnego.server(**arguments)
        else:
            user = None if password is None else KerberosOnlyPassword(options.user, password)
            if wanted:
                arguments["context_req"] = wanted
            self._context = spnego.client(user, **arguments)

    def step(self, token: bytes) -> tuple[bytes, bool]:
        answer = self._context.step(token or None) or b""
        return answer, self._context.complete

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        sealed = self._context.wrap_winrm(message)
        return sealed.header, sealed.data

    def open(self, trailer: bytes, data: bytes) -> bytes:
        return self._context.unwrap_winrm(trailer, data)

    def wrap(self, message: bytes, confidential: bool) -> bytes:
        return self._context.wrap(message, encrypt=confidential).data

    def unwrap(self, token: bytes) -> tuple[bytes, bool]:
        opened = self._context.unwrap(token)
        return opened.data, opened.encrypted

    def key(self) -> tuple[int, bytes]:
        raise NotImplementedError("pyspnego does not tell the enctype")

    def info(self) -> tuple[int, int, str, str, str]:
        context = self._context
        if context.negotiated_protocol != "kerberos":
            raise ValueError(f"not Kerberos but {context.negotiated_protocol}")
        return int(context.context_attr), 0, context.client_principal or "", "", ""


class SspiRs:
    """sspi-rs, by password. Under Negotiate and with raw Kerberos; it finds its KDC by SSPI_KDC_URL."""

    def __init__(self, options: argparse.Namespace, password: str | None) -> None:
        import sspilib

        from peers import sspi_rs_peer

        request = sspilib.IscReq
        flags = {
            "delegate": request.ISC_REQ_DELEGATE,
            "mutual": request.ISC_REQ_MUTUAL_AUTH,
            "replay": request.ISC_REQ_REPLAY_DETECT,
            "sequence": request.ISC_REQ_SEQUENCE_DETECT,
            "conf": request.ISC_REQ_CONFIDENTIALITY,
            "integ": request.ISC_REQ_INTEGRITY,
            "dce": request.ISC_REQ_USE_DCE_STYLE,
        }
        wanted = request(0)
        for name in options.flags:
            wanted |= flags[name]
        bindings = None
        if options.bindings is not None:
            bindings = sspilib.SecChannelBindings(application_data=options.bindings)
        username, _, domain = options.user.partition("@")
        protocol = "Negotiate" if options.mech == "spnego" else "Kerberos"
        credential = sspilib.UserCredential(username, password or "", domain, protocol=protocol)
        target = options.target.partition("@")[0]
        self._context = sspi_rs_peer._Context(
            sspilib.ClientSecurityContext(credential, target, flags=wanted or None, channel_bindings=bindings)
        )

    def step(self, token: bytes) -> tuple[bytes, bool]:
        answer = self._context.step(token or None) or b""
        return answer, self._context.complete

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        return self._context.seal(message)

    def open(self, trailer: bytes, data: bytes) -> bytes:
        return self._context.open(trailer, data)

    def wrap(self, message: bytes, confidential: bool) -> bytes:
        raise NotImplementedError("SSPI has no wrap")

    def unwrap(self, token: bytes) -> tuple[bytes, bool]:
        raise NotImplementedError("SSPI has no unwrap")

    def key(self) -> tuple[int, bytes]:
        raise NotImplementedError("sspi-rs does not tell the enctype")

    def info(self) -> tuple[int, int, str, str, str]:
        raise NotImplementedError("sspi-rs does not tell")


class Dotnet:
    """.NET's NegotiateAuthentication. Its Kerberos is the machine's libgssapi, which is asked for less than by others.

    Under SPNEGO, which here is .NET's own; where NTLM is not .NET's own, SPNEGO is libgssapi's too.
    """

    def __init__(self, options: argparse.Namespace, password: str | None) -> None:
        from peers import dotnet_peer

        self._logins = dotnet_peer.Logins()
        package = "Negotiate" if options.mech == "spnego" else "Kerberos"
        if options.side == "accept":
            self._logins.accept(1, package)
            return
        credential = None
        if password is not None:
            username, _, domain = options.user.partition("@")
            credential = [username, password, domain]
        self._logins.new(1, package, credential, options.target.partition("@")[0], options.flags)

    def close(self) -> None:
        self._logins.close(1)

    def step(self, token: bytes) -> tuple[bytes, bool]:
        answer = self._logins.step(1, token.hex() or None)
        return bytes.fromhex(answer["token"] or ""), answer["complete"]

    def seal(self, message: bytes) -> tuple[bytes, bytes]:
        token = bytes.fromhex(self._logins.seal(1, message.hex())["data"])
        cut = len(token) - len(message)
        return token[:cut], token[cut:]

    def open(self, trailer: bytes, data: bytes) -> bytes:
        return bytes.fromhex(self._logins.open(1, (trailer + data).hex())["data"])

    def wrap(self, message: bytes, confidential: bool) -> bytes:
        raise NotImplementedError("see seal")

    def unwrap(self, token: bytes) -> tuple[bytes, bool]:
        raise NotImplementedError("see open")

    def key(self) -> tuple[int, bytes]:
        raise NotImplementedError(".NET does not tell the enctype")

    def info(self) -> tuple[int, int, str, str, str]:
        flags, client = self._logins.describe(1)
        return flags, 0, client, "", ""


def _sealed(message: bytes, encrypted: bool) -> bytes:
    if not encrypted:
        raise ValueError("the message was signed and not sealed")
    return message


def _to_hex(data: bytes) -> str:
    return data.hex() or "-"


def _from_hex(word: str) -> bytes:
    return b"" if word == "-" else bytes.fromhex(word)


def _say(*words: str) -> None:
    print(*words, flush=True)


def _try(action: Callable[[], str]) -> None:
    try:
        answer = action()
    except Exception as exc:
        token = getattr(exc, "token", None) or b""
        _say("error", _to_hex(token), " ".join(f"{type(exc).__name__}: {exc}".split()))
    else:
        _say(answer)


def _do(peer: Peer, verb: str, words: list[str]) -> str:
    if verb == "step":
        answer, complete = peer.step(_from_hex(words[0]))
        return f"{'done' if complete else 'more'} {_to_hex(answer)}"
    if verb == "seal":
        return "ok " + " ".join(map(_to_hex, peer.seal(_from_hex(words[0]))))
    if verb == "open":
        return "ok " + _to_hex(peer.open(*map(_from_hex, words)))
    if verb == "wrap":
        return "ok " + _to_hex(peer.wrap(_from_hex(words[1]), words[0] == "1"))
    if verb == "unwrap":
        message, encrypted = peer.unwrap(_from_hex(words[0]))
        return f"ok {int(encrypted)} {_to_hex(message)}"
    if verb == "key":
        enctype, key = peer.key()
        return f"ok {enctype} {_to_hex(key)}"
    if verb == "info":
        flags, lifetime, *names = peer.info()
        return " ".join(["ok", str(flags), str(lifetime), *(_to_hex(name.encode()) for name in names)])
    raise ValueError(f"unknown command: {verb}")


PACKAGES: dict[str, Callable[[argparse.Namespace, str | None], Peer]] = {
    "gssapi": PythonGSSAPI,
    "pyspnego": Pyspnego,
    "sspi-rs": SspiRs,
    "dotnet": Dotnet,
}


def _begin(package: str, login: dict[str, Any]) -> Peer:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("side", choices=["initiate", "accept"])
    parser.add_argument("--mech", choices=["kerberos", "spnego"], default="kerberos")
    parser.add_argument("--layout", choices=["wrap", "iov"], default="wrap")
    parser.add_argument("--flags", type=lambda text: [flag for flag in text.split(",") if flag], default=[])
    parser.add_argument("--bindings", type=_from_hex)
    for option in ("--target", "--name", "--user"):
        parser.add_argument(option)
    # The libraries look whenever they make a context, and by C's getenv, which sees what is set here.
    os.environ.clear()
    os.environ.update(login["environment"])
    return PACKAGES[package](parser.parse_args(login["arguments"]), login["password"])


def main() -> None:
    package = sys.argv[1]
    made: list[Peer] = []

    def obey(verb: str, words: list[str]) -> str:
        if verb == "begin":
            made.append(_begin(package, json.loads(_from_hex(words[0]))))
            return "ok"
        if verb == "end":
            for peer in made:
                if isinstance(peer, Dotnet):
                    peer.close()
            made.clear()
            return "ok"
        return _do(made[0], verb, words)

    _say("ok")
    for line in sys.stdin:
        verb, *words = line.split()
        _try(functools.partial(obey, verb, words))


if __name__ == "__main__":
    main()
