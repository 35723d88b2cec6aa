"""All that can be set of a server: what each option is called, what it may be, and what it is by default."""

# This is the only place where an option is declared. `triosspi serve --help`, the flags, the TRIOSSPI_ variables, the keys
# of the file and what `triosspi check-config` prints follow from here; example.toml is compared with it by a test.
#
# Names are unique over all sections, since a flag and a variable have no section. Values are plain: seconds are a float,
# sizes are bytes, None is off or not given. A section is judged when it is made, by whomever (see `options`).
#
# What a running server can exchange and what it cannot are two types, and code that runs after the start is given either
# the one or the other. Where it was one type, one process had taken over a new value and the other had kept the old one
# more than once: the workers had an hour to finish in, and the supervisor killed them after seconds.

from __future__ import annotations

import functools
import ipaddress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, get_type_hints

import msgspec
from msgspec import Meta, field

from ...impersonation import DEFAULT_MIN_UID
from ...wire import DEFAULT_MAX_MESSAGE_SIZE, LARGEST_MAX_MESSAGE_SIZE
from ..network.addresses import IPNetwork
from . import kinds
from .options import About, LiveSection, Option, OptionError, Section, StartSection, options_of

_DAY: Final = 86400.0
#: The sample's.
DEFAULT_PORT: Final = 2000

# Ten years are for ever; beyond that a clock's arithmetic may end.
Seconds = Annotated[float, Meta(ge=0.001, le=3650 * _DAY)]
# What the kernel takes in whole seconds.
KernelSeconds = Annotated[float, Meta(ge=1, le=32767)]
Grace = Annotated[float, Meta(ge=0, le=3650 * _DAY)]
# Nobody has more of anything; and a number without a bound may be too long to be shown.
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class Serve(StartSection, frozen=True, kw_only=True):
    """What is served."""

    section: ClassVar[str] = "serve"

    app: Annotated[
        str | None, About("'greet', 'echo' or 'module:function'.", argument=True, unset="as the wire format wants it")
    ] = None
    message: Annotated[str | None, About("What greet sends.", unset="the sample's message")] = None
    wire: Annotated[
        Literal["sample", "framed", "negotiate-stream", "auto"],
        About("The wire format; auto: what each client begins with."),
    ] = "sample"
    auto_wire: Annotated[
        Literal["framed", "sample"], About("With auto: which of these two, since they begin alike.")
    ] = "framed"
    protection: Annotated[
        Literal["encrypt", "sign"], About("What negotiate-stream's clients must ask for at least.")
    ] = "encrypt"
    max_message_size: Annotated[
        Annotated[int, Meta(ge=1, le=LARGEST_MAX_MESSAGE_SIZE)],
        About("The longest message of the framed format.", kinds.SIZE),
    ] = DEFAULT_MAX_MESSAGE_SIZE


class Listen(StartSection, frozen=True, kw_only=True):
    """Where."""

    section: ClassVar[str] = "listen"

    hosts: Annotated[
        tuple[str, ...],
        About("Address to bind.", flag="--host", metavar="ADDRESS", unset="all, IPv4 and IPv6"),
    ] = ()
    port: Annotated[Annotated[int, Meta(ge=0, le=65535)], About("0: any free one.")] = DEFAULT_PORT
    unix: Annotated[tuple[Path, ...], About("Unix socket to listen on; without --host, instead of TCP.")] = ()
    unix_mode: Annotated[
        Annotated[int, Meta(ge=0, le=0o777)], About("Who may connect to the unix sockets.", kinds.MODE)
    ] = 0o600
    backlog: Annotated[
        Count | None,
        About("How many connections may wait to be accepted.", none="default", unset="as many as the kernel lets wait"),
    ] = None


class Connections(LiveSection, frozen=True, kw_only=True):
    """How a connection that was accepted begins."""

    section: ClassVar[str] = "listen"

    keepalive: Annotated[
        KernelSeconds | None,
        About("Ask a silent client's kernel after so long whether it is there.", kinds.DURATION, none="off"),
    ] = 60.0
    proxy_from: Annotated[
        tuple[IPNetwork, ...],
        About("Who may send a PROXY header, and must.", kinds.NETWORK, unset="nobody"),
    ] = ()
    proxy_unix: Annotated[bool, About("Who connects to a unix socket is a proxy, too, and must send that header.")] = (
        False
    )


class Accept(LiveSection, frozen=True, kw_only=True):
    """Who may log in, and how."""

    section: ClassVar[str] = "accept"

    accounts: Annotated[
        Path | None, About("Who may log in by NTLM; see 'triosspi accounts'.", unset="nobody, or a demo account")
    ] = None
    # What other programs of the service look at, too.
    keytab: Annotated[
        str | None,
        About("The service's Kerberos keys.", kinds.KEYTAB, fallback="KRB5_KTNAME", unset="KRB5_KTNAME, or none"),
    ] = None
    spns: Annotated[
        tuple[str, ...],
        About("Refuse tickets for other names.", flag="--spn", metavar="host/server", unset="all in the keytab"),
    ] = ()
    allow_rc4: Annotated[bool, About("Admit Kerberos session keys of RC4-HMAC.")] = False
    mechanisms: Annotated[Literal["negotiate", "kerberos", "ntlm"], About("What clients may use.")] = "negotiate"
    allow_missing_mic: Annotated[bool, About("Admit NTLM clients without a MIC (gss-ntlmssp alone).")] = False
    target_names: Annotated[tuple[str, ...], About("A name of this service.", flag="--target-name", metavar="SPN")] = ()
    require_target: Annotated[Literal["off", "allow", "require"], About("See above.")] = "off"
    allow: Annotated[
        tuple[str, ...] | None, About("Who may come in; see above.", metavar="WHO", unset="all who log in")
    ] = None
    deny: Annotated[tuple[str, ...], About("Who may not; wins over --allow.", metavar="WHO")] = ()
    require_groups: Annotated[
        tuple[str, ...], About("What a client's PAC must have.", flag="--require-group", metavar="SID")
    ] = ()


class Impersonate(StartSection, frozen=True, kw_only=True):
    """Whether the application acts as the client: it is made for that, or not."""

    section: ClassVar[str] = "impersonation"

    impersonate: Annotated[bool, About("Let APP act as the client; greet looks who that is.")] = False


class LocalAccounts(LiveSection, frozen=True, kw_only=True):
    """As whom it then acts."""

    section: ClassVar[str] = "impersonation"

    account_map: Annotated[Path | None, About("Which client is which local account.", unset="none")] = None
    auth_to_local: Annotated[bool, About("Ask krb5.conf about clients that the map does not name.")] = False
    min_uid: Annotated[Annotated[int, Meta(ge=0, le=2**32 - 2)], About("No smaller by a pattern.")] = DEFAULT_MIN_UID


class Limits(LiveSection, frozen=True, kw_only=True):
    """What one client, and what all of them together, may take."""

    section: ClassVar[str] = "limits"

    # Before authentication. The deadline is for the whole handshake, as LoginGraceTime: one byte a second wins nothing.
    handshake_timeout: Annotated[Seconds, About("For connecting and logging in.", kinds.DURATION)] = 30.0
    max_connections: Annotated[Count, About("Of all, logged in or not.")] = 10_000
    max_connections_per_source: Annotated[
        Count | None, About("From one address (IPv6: see below), logged in or not.", none="off")
    ] = None
    ipv6_source_prefix: Annotated[
        Annotated[int, Meta(ge=32, le=128)], About("How many bits of an IPv6 address are one source.")
    ] = 64
    # Each has up to a token (64 KiB) in memory, mostly 10 KiB. Sitting costs little, and being thrown out and coming back
    # costs a handshake: so there are more places than a common attacker has connections.
    max_unauthenticated: Annotated[
        Count, About("How many are read before they have logged in; others wait.", kinds.STARTUPS)
    ] = 2_500
    max_unauthenticated_per_source: Annotated[
        Count | None, About("The same from one address; its others wait.", none="off")
    ] = 50
    max_waiting: Annotated[Count, About("How many wait, unread; beyond, the longest silent one is dropped.")] = 2_500
    penalties: Annotated[bool, About("Shut out addresses whose logins fail, for a while.")] = True
    penalty_exempt: Annotated[
        tuple[IPNetwork, ...], About("Who is never shut out.", kinds.NETWORK, unset="nobody")
    ] = ()
    # A hundred, as NIST SP 800-63B has it. It locks nobody out of where they have logged in before.
    max_failures_per_principal: Annotated[
        Count | None,
        About("After so many failures by NTLM in 10 min, look at an account's own addresses only.", none="off"),
    ] = 100
    max_sessions_per_principal: Annotated[Count | None, About("Of one client's name, at a time.", none="off")] = None
    # After it.
    idle_timeout: Annotated[
        Seconds | None, About("End a session in which nothing is said.", kinds.DURATION, none="off")
    ] = None
    # NTLM's RC4 is never keyed anew, and a disabled account stays logged in until its session ends. A day ends both
    # and no working day. (A Kerberos session ends with its ticket, after ten hours in most realms.)
    max_session_age: Annotated[
        Seconds | None, About("End a session so long after its login.", kinds.DURATION, none="off")
    ] = _DAY
    # RC4's output differs from randomness by what can be seen in some 2^30 bytes (Fluhrer and McGrew, 2000), and to read
    # with it what was sent takes thousands of times that and the same text again and again. SSH wants new keys after 1 GB.
    max_session_bytes: Annotated[
        Annotated[int, Meta(ge=1, le=2**63 - 1)] | None,
        About("End a session in which either side has sent so much.", kinds.SIZE, none="off"),
    ] = 4 * 2**30
    # The sequence number has 32 bits; this is an 85th of them.
    max_session_messages: Annotated[
        Count | None, About("End a session in which either side has sent so many.", none="off")
    ] = 50_000_000
    # AES with a number of its own for each message has none of these worries.
    session_caps: Annotated[
        Literal["ntlm", "all"], About("Whose sessions age, bytes and messages end: NTLM's, or Kerberos's too.")
    ] = "ntlm"


class Workers(StartSection, frozen=True, kw_only=True):
    """How many processes serve, and when one of them has to go."""

    section: ClassVar[str] = "workers"

    workers: Annotated[
        Annotated[int, Meta(ge=1, le=1024)], About("Processes; auto: as many as usable cores.", kinds.WORKERS)
    ] = 1
    heartbeat_timeout: Annotated[Seconds, About("Replace a process that hangs for so long.", kinds.DURATION)] = 30.0
    max_sessions: Annotated[Count | None, About("Replace a process after so many logins.", none="off")] = None


class Stopping(LiveSection, frozen=True, kw_only=True):
    """How they end."""

    section: ClassVar[str] = "workers"

    grace: Annotated[Grace, About("When stopping, let sessions finish for so long.", kinds.DURATION)] = 30.0


class Log(LiveSection, frozen=True, kw_only=True):
    """What is logged, and how."""

    section: ClassVar[str] = "log"

    log_level: Annotated[Literal["debug", "info", "warning", "error"], About("The least that is logged.")] = "info"
    # Not "auto": what is piped to a file or to grep is mostly read by people, and machines have a configuration.
    log_format: Annotated[
        Literal["auto", "console", "json"], About("For people or for machines; auto: for people at a terminal only.")
    ] = "console"


class Metrics(StartSection, frozen=True, kw_only=True):
    """Where metrics and health are shown."""

    section: ClassVar[str] = "metrics"

    metrics: Annotated[
        tuple[str, int] | None,
        About("Serve /metrics, /healthz and /readyz here, over plain HTTP.", kinds.ADDRESS, none="off"),
    ] = None
    metrics_anywhere: Annotated[bool, About("Let --metrics be an address that other machines can reach.")] = False

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.metrics is not None and not self.metrics_anywhere and not _is_loopback(self.metrics[0]):
            # How many are logged in, and how often logins fail, must not be shown to the whole network by default.
            raise OptionError(
                "metrics",
                "must be a loopback address, such as 127.0.0.1:9464, unless metrics_anywhere is given",
                mentions=("metrics_anywhere",),
            )


class Reload(LiveSection, frozen=True, kw_only=True):
    """When the configuration is read again; SIGHUP does so always."""

    section: ClassVar[str] = "reload"

    watch_files: Annotated[bool, About("Reload when the configuration, the keytab or the account map has changed.")] = (
        False
    )


class StartSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a server is started with."""

    serve: Serve = field(default_factory=Serve)
    listen: Listen = field(default_factory=Listen)
    impersonation: Impersonate = field(default_factory=Impersonate)
    workers: Workers = field(default_factory=Workers)
    metrics: Metrics = field(default_factory=Metrics)


class LiveSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a running server takes over."""

    connections: Connections = field(default_factory=Connections)
    accept: Accept = field(default_factory=Accept)
    local_accounts: LocalAccounts = field(default_factory=LocalAccounts)
    limits: Limits = field(default_factory=Limits)
    stopping: Stopping = field(default_factory=Stopping)
    log: Log = field(default_factory=Log)
    reload: Reload = field(default_factory=Reload)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, as it was read. Each section's fields are declared in its class."""

    serve: Serve = field(default_factory=Serve)
    listen: Listen = field(default_factory=Listen)
    connections: Connections = field(default_factory=Connections)
    accept: Accept = field(default_factory=Accept)
    impersonation: Impersonate = field(default_factory=Impersonate)
    local_accounts: LocalAccounts = field(default_factory=LocalAccounts)
    limits: Limits = field(default_factory=Limits)
    workers: Workers = field(default_factory=Workers)
    stopping: Stopping = field(default_factory=Stopping)
    log: Log = field(default_factory=Log)
    metrics: Metrics = field(default_factory=Metrics)
    reload: Reload = field(default_factory=Reload)

    @property
    def start(self) -> StartSettings:
        """The part that only a restart changes."""
        return StartSettings(**{name: getattr(self, name) for name in StartSettings.__struct_fields__})

    @property
    def live(self) -> LiveSettings:
        """The other part."""
        return LiveSettings(**{name: getattr(self, name) for name in LiveSettings.__struct_fields__})

    def get(self, option: Option) -> Any:
        """An option's value."""
        return getattr(getattr(self, _place_of(option.name)), option.name)


#: The parts by their names in `Settings`, and in the order in which people read them.
PARTS: Final[dict[str, type[Section]]] = get_type_hints(Settings)
#: Options that there were once, and what to do where one is still written somewhere.
REMOVED: Final = {"reuse_port": "all workers accept from the same sockets now: leave it out"}
#: The file's sections.
SECTIONS: Final[tuple[str, ...]] = tuple(dict.fromkeys(part.section for part in PARTS.values()))


@functools.cache
def all_options() -> dict[str, Option]:
    """Every option by its name, section by section."""
    return {option.name: option for part in PARTS.values() for option in options_of(part)}


@functools.cache
def _place_of(name: str) -> str:
    return next(place for place, part in PARTS.items() if name in part.__struct_fields__)


def only_by_restart(old: StartSettings, new: StartSettings) -> list[str]:
    """The options that differ and that a running server cannot take over."""
    return [
        option
        for place in StartSettings.__struct_fields__
        for option in PARTS[place].__struct_fields__
        if getattr(getattr(old, place), option) != getattr(getattr(new, place), option)
    ]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # Any other name may be anybody's tomorrow.
        return host == "localhost"
