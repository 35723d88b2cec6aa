"""The registries: every foreign implementation of Kerberos, as initiator and as acceptor."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from ..base import missing_module
from ..dotnet import available as dotnet_available
from . import building
from .process import LineAcceptor, LineContext, LineProcess, StepError, Worker
from .realm import ENCTYPES, Kdc, Layout, Login, Service

RealmName = Literal["mit", "samba"]

# Ticket caches in the memory of a process that has more than one login; no two are the same.
_numbers = itertools.count(1)

_HERE = Path(__file__).parent
_WORKER = [sys.executable, "-P", os.fspath(_HERE / "worker.py")]
_TESTS = os.fspath(_HERE.parents[1])

# A failure that is none happens four times in a row once in 10**8 logins.
_TRIES = 4

_T = TypeVar("_T")

_BOTH_REALMS: frozenset[RealmName] = frozenset(("mit", "samba"))


@dataclass(frozen=True, slots=True, kw_only=True)
class KerberosPeerKind:
    """One foreign implementation in one way of using it, as the initiator.

    Attributes:
        name: The id of parametrised tests.
        spnego: Whether the tokens are SPNEGO's; else they are Kerberos's own.
        realms: The KDCs from which it gets tickets.
        enctypes: The services that it can log in to.
        needs_mutual: Whether it knows no login without mutual authentication: sspi-rs waits for an answer that never
            comes; pyspnego's SPNEGO forgets the AP-REQ and declares itself done, without having authenticated.
        bindings: Whether an acceptor takes its channel bindings. Those of sspi-rs make the AP-REQ's checksum one that
            MIT's library cannot read.
        layouts: What `Login.layout` may be; one alone where it makes no difference. "wrap" opens whatever stands in
            the trailer and the data, "iov" only what EncryptMessage would have made.
        reads_ccache: Whether it can log in with a ticket that is there already. Else it takes the password.
        takes_password: Whether it can log in with a password. Heimdal's SPNEGO cannot.
        falls_back: Whether it goes on with NTLM where Kerberos gives it no ticket.
        wraps: Whether it has gss_wrap beside the sealing, and `info`.
        tells_key: Whether it has `key`.
        counts_without_mutual: Whether it knows the number of an acceptor's first message where no AP-REP has told it.
            Heimdal expects zero, and reports a gap if it looks at the order at all; acceptors begin with the
            initiator's own.
        sees_order: Whether it refuses a message of ours that was repeated, or came before its turn, when told to ask for
            replay and sequence detection. sspi-rs never looks; .NET has no option for it.
        bad_luck: What it says of a login that fails now and then, through no fault of the acceptor's. sspi-rs refuses
            an AP-REP whose sequence number, a random one, is written in fewer than four bytes: one in 128 of MIT's.
        probe: Why it cannot run here, or None. Called anew each time: it must be cheap.
        command: The program and its first arguments.
    """

    name: str
    spnego: bool
    realms: frozenset[RealmName] = _BOTH_REALMS
    enctypes: frozenset[int] = frozenset(ENCTYPES)
    needs_mutual: bool = False
    bindings: bool = True
    layouts: tuple[Layout, ...]
    reads_ccache: bool = True
    takes_password: bool = True
    falls_back: bool = False
    wraps: bool = True
    tells_key: bool = True
    counts_without_mutual: bool = True
    sees_order: bool = True
    bad_luck: str | None = None
    probe: Callable[[], str | None] = field(repr=False)
    command: Callable[[], list[str]] = field(repr=False)

    mechanism: Literal["kerberos"] = "kerberos"
    seals_empty: bool = True

    def available(self) -> str | None:
        """None when it can run here, else the reason, fit for a skipped test."""
        return self.probe()

    def new(self, login: Login) -> LineContext:
        """Start a login attempt. Close it in the end."""
        arguments = ["--mech", "spnego" if self.spnego else "kerberos", "--target", login.principal]
        arguments += ["--flags", ",".join(login.flags), "--layout", login.layout]
        if login.bindings is not None:
            arguments += ["--bindings", login.bindings.hex() or "-"]
        password = None
        if login.ccache is None or not self.reads_ccache:
            assert self.takes_password, f"{self} needs a ticket cache"
            arguments += ["--user", login.user_principal]
            password = login.password
        environment = _environment(login.config, login.directory)
        # Without the second it would be the machine's default cache, which may be somebody's.
        environment["KRB5CCNAME"] = login.ccache or f"MEMORY:peer{next(_numbers)}"
        environment["SSPI_KDC_URL"] = login.kdc_url
        return LineContext(_start(self.command(), arguments, environment, password))

    @contextmanager
    def logged_in(self, login: Login, shake: Callable[[LineContext], _T]) -> Iterator[tuple[LineContext, _T]]:
        """Log in, and again where it was bad luck.

        Args:
            login: See `new`.
            shake: Shakes hands, anew each time; what it returns is passed on.
        """
        for tries_left in reversed(range(_TRIES if self.bad_luck else 1)):
            with closing(self.new(login)) as context:
                try:
                    other = shake(context)
                except StepError as exc:
                    if not tries_left or self.bad_luck is None or self.bad_luck not in str(exc):
                        raise
                    continue
                yield context, other
                return

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class KerberosAcceptorKind:
    """One foreign implementation in one way of using it, as the acceptor. See `KerberosPeerKind` for details."""

    name: str
    spnego: bool
    layouts: tuple[Layout, ...]
    tells_key: bool = True
    probe: Callable[[], str | None] = field(repr=False)
    command: Callable[[], list[str]] = field(repr=False)

    def available(self) -> str | None:
        """None when it can run here, else the reason."""
        return self.probe()

    def new(
        self,
        kdc: Kdc,
        service: str | Service = "aes256",
        *,
        layout: Layout = "wrap",
        bindings: bytes | None = None,
    ) -> LineAcceptor:
        """Wait for a login. Close it in the end.

        Args:
            kdc: Its realm.
            service: Which of the realm's services it is, or another.
            layout: See `Login`.
            bindings: See `Login`.
        """
        if isinstance(service, str):
            service = kdc.services[service]
        arguments = ["--mech", "spnego" if self.spnego else "kerberos", "--layout", layout]
        if bindings is not None:
            arguments += ["--bindings", bindings.hex() or "-"]
        environment = _environment(kdc.config, os.fspath(kdc.directory))
        environment["KRB5_KTNAME"] = service.keytab
        return LineAcceptor(_start(self.command(), arguments, environment))

    def __str__(self) -> str:
        return self.name


def _start(
    command: list[str], arguments: list[str], environment: dict[str, str], password: str | None = None
) -> LineProcess | Worker:
    if command[: len(_WORKER)] == _WORKER:
        # The side is an argument like the others: whoever has initiated may accept the next time.
        package = len(_WORKER) + 1
        return Worker(command[:package], [*command[package:], *arguments], environment, password=password)
    return LineProcess([*command, *arguments], environment, password=password)


def _environment(config: str, directory: str) -> dict[str, str]:
    """All that a peer's process inherits."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": _TESTS,
        "PYTHONUTF8": "1",
        "KRB5_CONFIG": config,
        "KRB5RCACHEDIR": directory,  # not /var/tmp, where that of the machine's own services is
        "TMPDIR": directory,
        "HOME": directory,
    }


def _python_gssapi() -> str | None:
    return missing_module("gssapi", "python-gssapi (pip gssapi, built with apt gcc, python3-dev and libkrb5-dev)")


def _c_initiator(library: building.Library, *, spnego: bool) -> KerberosPeerKind:
    return KerberosPeerKind(
        name=f"{library}-{'spnego' if spnego else 'raw'}",
        spnego=spnego,
        layouts=("wrap", "iov"),
        takes_password=not (library == "heimdal" and spnego),
        counts_without_mutual=library != "heimdal",
        probe=functools.partial(building.available, library),
        command=lambda: [building.program("initiator", library)],
    )


def _c_acceptor(library: building.Library, *, spnego: bool) -> KerberosAcceptorKind:
    return KerberosAcceptorKind(
        name=f"{library}-{'spnego' if spnego else 'raw'}",
        spnego=spnego,
        layouts=("wrap", "iov"),
        probe=functools.partial(building.available, library),
        command=lambda: [building.program("acceptor", library)],
    )


MIT_RAW = _c_initiator("mit", spnego=False)
MIT_SPNEGO = _c_initiator("mit", spnego=True)
HEIMDAL_RAW = _c_initiator("heimdal", spnego=False)
HEIMDAL_SPNEGO = _c_initiator("heimdal", spnego=True)
PYTHON_GSSAPI_RAW = KerberosPeerKind(
    name="python-gssapi-raw",
    spnego=False,
    layouts=("wrap", "iov"),
    probe=_python_gssapi,
    command=lambda: [*_WORKER, "gssapi", "initiate"],
)
PYTHON_GSSAPI_SPNEGO = KerberosPeerKind(
    name="python-gssapi-spnego",
    spnego=True,
    layouts=("wrap", "iov"),
    probe=_python_gssapi,
    command=lambda: [*_WORKER, "gssapi", "initiate"],
)
PYSPNEGO_KERBEROS = KerberosPeerKind(
    name="pyspnego-kerberos",
    spnego=False,
    layouts=("iov",),
    tells_key=False,
    probe=_python_gssapi,
    command=lambda: [*_WORKER, "pyspnego", "initiate"],
)
PYSPNEGO_KERBEROS_NEGOTIATE = KerberosPeerKind(
    name="pyspnego-kerberos-negotiate",
    spnego=True,
    needs_mutual=True,
    layouts=("iov",),
    tells_key=False,
    probe=_python_gssapi,
    command=lambda: [*_WORKER, "pyspnego", "initiate"],
)


def _sspi_rs(*, spnego: bool) -> KerberosPeerKind:
    return KerberosPeerKind(
        name=f"sspi-rs-kerberos-{'negotiate' if spnego else 'raw'}",
        spnego=spnego,
        # From MIT's KDC it gets none (SEC_E_INVALID_TOKEN).
        realms=frozenset(("samba",)),
        enctypes=frozenset((18,)),
        needs_mutual=True,
        bindings=False,
        layouts=("iov",),
        reads_ccache=False,
        wraps=False,
        tells_key=False,
        sees_order=False,
        bad_luck="SEC_E_INVALID_TOKEN",
        probe=functools.partial(missing_module, "sspilib", "sspilib"),
        command=lambda: [*_WORKER, "sspi-rs", "initiate"],
    )


SSPI_RS_KERBEROS_RAW = _sspi_rs(spnego=False)
SSPI_RS_KERBEROS_NEGOTIATE = _sspi_rs(spnego=True)


def _dotnet(*, spnego: bool) -> KerberosPeerKind:
    return KerberosPeerKind(
        name=f"dotnet-kerberos-{'negotiate' if spnego else 'raw'}",
        spnego=spnego,
        # A ChannelBinding is the runtime's handle of a TLS connection, and not to be made of bytes.
        bindings=False,
        layouts=("wrap",),
        falls_back=spnego,
        wraps=False,
        tells_key=False,
        sees_order=False,
        probe=dotnet_available,
        command=lambda: [*_WORKER, "dotnet", "initiate"],
    )


DOTNET_KERBEROS_RAW = _dotnet(spnego=False)
DOTNET_KERBEROS_NEGOTIATE = _dotnet(spnego=True)

KERBEROS_PEERS: list[KerberosPeerKind] = [
    MIT_RAW,
    MIT_SPNEGO,
    HEIMDAL_RAW,
    HEIMDAL_SPNEGO,
    PYTHON_GSSAPI_RAW,
    PYTHON_GSSAPI_SPNEGO,
    PYSPNEGO_KERBEROS,
    PYSPNEGO_KERBEROS_NEGOTIATE,
    SSPI_RS_KERBEROS_RAW,
    SSPI_RS_KERBEROS_NEGOTIATE,
    DOTNET_KERBEROS_RAW,
    DOTNET_KERBEROS_NEGOTIATE,
]

KERBEROS_ACCEPTORS: list[KerberosAcceptorKind] = [
    _c_acceptor("mit", spnego=False),
    _c_acceptor("mit", spnego=True),
    _c_acceptor("heimdal", spnego=False),
    _c_acceptor("heimdal", spnego=True),
    KerberosAcceptorKind(
        name="python-gssapi-raw",
        spnego=False,
        layouts=("wrap", "iov"),
        probe=_python_gssapi,
        command=lambda: [*_WORKER, "gssapi", "accept"],
    ),
    KerberosAcceptorKind(
        name="python-gssapi-spnego",
        spnego=True,
        layouts=("wrap", "iov"),
        probe=_python_gssapi,
        command=lambda: [*_WORKER, "gssapi", "accept"],
    ),
    KerberosAcceptorKind(
        name="pyspnego-kerberos",
        spnego=False,
        layouts=("iov",),
        tells_key=False,
        probe=_python_gssapi,
        command=lambda: [*_WORKER, "pyspnego", "accept"],
    ),
    KerberosAcceptorKind(
        name="pyspnego-kerberos-negotiate",
        spnego=True,
        layouts=("iov",),
        tells_key=False,
        probe=_python_gssapi,
        command=lambda: [*_WORKER, "pyspnego", "accept"],
    ),
    *(
        KerberosAcceptorKind(
            name=f"dotnet-{'spnego' if spnego else 'raw'}",
            spnego=spnego,
            layouts=("wrap",),
            tells_key=False,
            probe=dotnet_available,
            command=lambda: [*_WORKER, "dotnet", "accept"],
        )
        for spnego in (False, True)
    ),
]
