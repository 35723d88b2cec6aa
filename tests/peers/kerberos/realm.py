"""What the two KDCs here have in common: users, services with their keytabs, and tickets.

Nothing in here asks the DNS for anything: every krb5.conf names its one KDC by address, and no name is canonicalized.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# Names that MIT's and Heimdal's krb5.conf both know, by number (RFC 3962, 4757, 8009).
ENCTYPES = {
    17: "aes128-cts-hmac-sha1-96",
    18: "aes256-cts-hmac-sha1-96",
    19: "aes128-cts-hmac-sha256-128",
    20: "aes256-cts-hmac-sha384-192",
    23: "arcfour-hmac-md5",
}

# GSS-API's context flags, and what a client asks for unless a test wants something else.
Flag = Literal["delegate", "mutual", "replay", "sequence", "conf", "integ", "dce"]
USUAL_FLAGS: tuple[Flag, ...] = ("mutual", "replay", "sequence", "conf", "integ")

# How a GSS-API library is made to seal. "wrap": gss_wrap, whose token is cut as long as the message is from its end.
# "iov": gss_wrap_iov with a header and data, which is what EncryptMessage is on Windows.
Layout = Literal["wrap", "iov"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A service, and who may know what of it.

    Attributes:
        principal: Its name with the realm, `host/aes256.mit.test@MIT.TEST`.
        enctype: The one that its keys, its tickets and their session keys have.
        keytab: The name of a keytab with its key, and no other service's.
        config: The krb5.conf of a client that knows no other enctype. With more, the two sides may agree on a better
            one for the messages than the ticket has (RFC 4537).
    """

    principal: str
    enctype: int
    keytab: str
    config: str

    @property
    def target(self) -> str:
        """The name without the realm."""
        return self.principal.partition("@")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """All that an initiator is told. Use `dataclasses.replace` for what `Kdc.login` has no argument for.

    Attributes:
        principal: The service wanted, with its realm.
        realm: The user's realm (and the KDC's).
        username: Without the realm.
        password: For peers that cannot read a ticket cache, and when there is none.
        ccache: The name of a cache with tickets, or None: log in by password.
        flags: Context flags to ask for; with none of them the library asks for what it does by itself.
        bindings: The application data of channel bindings.
        layout: How to seal, where a library has two ways.
        config: krb5.conf.
        kdc_url: The KDC, for sspi-rs.
        directory: A place for the peer's temporary files.
    """

    principal: str
    realm: str
    username: str
    password: str = field(repr=False)
    ccache: str | None
    flags: tuple[Flag, ...] = USUAL_FLAGS
    bindings: bytes | None = None
    layout: Layout = "wrap"
    config: str
    kdc_url: str
    directory: str

    @property
    def user_principal(self) -> str:
        """The user's name with the realm."""
        return f"{self.username}@{self.realm}"


class RealmError(Exception):
    """A program of the realm failed: what it said."""


def run(
    command: Iterable[str], *, environment: dict[str, str] | None = None, stdin: str = "", timeout: float = 60
) -> str:
    """Run a program of the realm to its end; return what it printed.

    Raises:
        RealmError: it failed.
    """
    arguments = list(command)
    done = subprocess.run(
        arguments,
        input=stdin,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=timeout,
    )
    if done.returncode:
        raise RealmError(f"{' '.join(arguments)}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def find_program(name: str) -> str | None:
    """The path of a program, also where only root looks."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def missing_program(programs: dict[str, str]) -> str | None:
    """The reason to give when one of these (program: its Debian package) is not installed, or None."""
    for name, package in programs.items():
        if find_program(name) is None:
            return f"{name} is not installed (apt {package})"
    return None


class Kdc:
    """A realm, as its users see it.

    Attributes:
        realm: Its name.
        port: Where its KDC listens, UDP and TCP, on 127.0.0.1.
        directory: All its files.
        config: A krb5.conf with every enctype: an acceptor's.
        users: Passwords by name.
        services: By a name that says what is special about each.
    """

    def __init__(self, realm: str, port: int, directory: Path) -> None:
        self.realm = realm
        self.port = port
        self.directory = directory
        self.users: dict[str, str] = {}
        self.services: dict[str, Service] = {}
        self.config = self.write_config("all")
        self._ccaches: dict[tuple[object, ...], str] = {}

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which an acceptor in this process belongs to the realm."""
        return {"KRB5_CONFIG": self.config, "KRB5RCACHEDIR": os.fspath(self.directory)}

    def write_config(
        self, name: str, enctypes: Iterable[int] = tuple(ENCTYPES), libdefaults: dict[str, str] | None = None
    ) -> str:
        """Write a krb5.conf for this realm; return its path.

        Args:
            name: Distinguishes it from the realm's others.
            enctypes: The only ones to know.
            libdefaults: More settings.
        """
        names = " ".join(ENCTYPES[enctype] for enctype in enctypes)
        settings = {
            "default_realm": self.realm,
            "dns_lookup_kdc": "false",
            "dns_lookup_realm": "false",
            "dns_uri_lookup": "false",
            "dns_canonicalize_hostname": "false",
            "rdns": "false",
            # A lost datagram costs a second.
            "udp_preference_limit": "1",
            "permitted_enctypes": names,
            "default_etypes": names,  # Heimdal's name for it
            "allow_rc4": "true",  # MIT's libraries since 1.21 need to be told
            **(libdefaults or {}),
        }
        domain = self.realm.lower()
        path = self.directory / f"krb5-{name}-{self.port}.conf"
        # Another process may be reading the same.
        written = path.with_suffix(f".{os.getpid()}")
        written.write_text(
            "[libdefaults]\n"
            + "".join(f"    {key} = {value}\n" for key, value in settings.items())
            + f"[realms]\n    {self.realm} = {{\n        kdc = 127.0.0.1:{self.port}\n    }}\n"
            + f"[domain_realm]\n    .{domain} = {self.realm}\n    {domain} = {self.realm}\n"
        )
        written.replace(path)
        return os.fspath(path)

    def ccache(
        self,
        user: str = "alice",
        *,
        config: str | None = None,
        lifetime: str | None = None,
        forwardable: bool = False,
        pac: bool = True,
    ) -> str:
        """Return the name of a ticket cache with the user's ticket-granting ticket; the same for the same arguments.

        Args:
            user: Whose.
            config: The krb5.conf to get it with.
            lifetime: As kinit has it, `30m`.
            forwardable: Whether it may be delegated.
            pac: Whether it has a PAC, where the KDC has one to give. A client may decline it.
        """
        config = config or self.config
        key = (user, config, lifetime, forwardable, pac)
        if key not in self._ccaches:
            name = f"FILE:{self.directory}/ccache-{self.port}-{os.getpid()}-{len(self._ccaches)}"
            kinit = find_program("kinit")
            assert kinit is not None, "required with the KDC"
            options = ["-c", name]
            options += ["-l", lifetime] if lifetime else []
            options += ["-f"] if forwardable else []
            options += [] if pac else ["--no-request-pac"]
            run(
                [kinit, *options, f"{user}@{self.realm}"],
                environment={"KRB5_CONFIG": config},
                stdin=self.users[user] + "\n",
            )
            self._ccaches[key] = name
        return self._ccaches[key]

    def login(
        self,
        service: str = "aes256",
        *,
        user: str = "alice",
        flags: tuple[Flag, ...] = USUAL_FLAGS,
        layout: Layout = "wrap",
        bindings: bytes | None = None,
        lifetime: str | None = None,
        pac: bool = True,
        password: bool = False,
    ) -> Login:
        """What an initiator needs for a login at one of `services`.

        Args:
            service: Which.
            user: Which of `users`.
            flags: See `Login`. With `delegate` the ticket is a forwardable one.
            layout: See `Login`.
            bindings: See `Login`.
            lifetime: See `ccache`.
            pac: See `ccache`.
            password: Leave the ticket to the initiator; else the user already has one.
        """
        wanted = self.services[service]
        ccache = None
        if not password:
            ccache = self.ccache(
                user, config=wanted.config, lifetime=lifetime, forwardable="delegate" in flags, pac=pac
            )
        return Login(
            principal=wanted.principal,
            realm=self.realm,
            username=user,
            password=self.users[user],
            ccache=ccache,
            flags=flags,
            bindings=bindings,
            layout=layout,
            config=wanted.config,
            kdc_url=f"tcp://127.0.0.1:{self.port}",
            directory=os.fspath(self.directory),
        )

    def stop(self) -> None:
        """End it and delete its files. May be called twice."""
        raise NotImplementedError
