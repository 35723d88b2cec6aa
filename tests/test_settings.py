"""The settings: what each option may be, and how it is written."""

from __future__ import annotations

import ipaddress
import itertools
import pickle
import random
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from triosspi import ConfigurationError
from triosspi.service.config.options import LiveSection, OptionError, Section, StartSection, options_of
from triosspi.service.config.settings import (
    PARTS,
    SECTIONS,
    Accept,
    Connections,
    Limits,
    Listen,
    LiveSettings,
    Metrics,
    Serve,
    Settings,
    StartSettings,
    Stopping,
    Workers,
    all_options,
    only_by_restart,
)
from triosspi.service.config.system import usable_cores

OPTIONS = all_options()
by_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.name)

UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
SIZES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def network(text: str) -> Any:
    return ipaddress.ip_network(text)


# The declarations


def test_the_parts_are_the_settings_own_and_no_two_options_have_one_name() -> None:
    assert list(PARTS) == list(Settings.__struct_fields__)
    declared = [option.name for part in PARTS.values() for option in options_of(part)]
    assert len(declared) == len(set(declared)) == len(OPTIONS)
    assert len({option.flag for option in OPTIONS.values()}) == len(OPTIONS)
    settings = Settings()
    for place, part in PARTS.items():
        assert isinstance(getattr(settings, place), part)
    # In the file, a section's options stand together.
    sections = [option.section for option in OPTIONS.values()]
    assert list(dict.fromkeys(sections)) == [section for section, _ in itertools.groupby(sections)] == list(SECTIONS)


def test_whatever_can_be_set_either_needs_a_restart_or_is_taken_over_and_the_types_say_which() -> None:
    start, live = set(StartSettings.__struct_fields__), set(LiveSettings.__struct_fields__)
    assert start | live == set(PARTS)
    assert not start & live
    for place, part in PARTS.items():
        assert issubclass(part, StartSection) is (place in start)
        assert issubclass(part, LiveSection) is (place in live)
    settings = Settings(listen=Listen(port=1), stopping=Stopping(grace=7))
    assert settings.start == StartSettings(listen=Listen(port=1))
    assert settings.live == LiveSettings(stopping=Stopping(grace=7))


@by_option
def test_every_option_has_a_help_and_a_default_that_may_be(option: Any) -> None:
    assert option.about.help[0].isupper() or option.about.help[0] in "'0a"
    assert option.about.help.endswith(".")
    option.check(option.default)
    assert Settings().get(option) == option.default


@by_option
def test_what_is_shown_of_a_value_is_toml_that_is_read_as_the_same_value(option: Any) -> None:
    shown = option.show(option.default)
    if shown is None:
        assert option.default is None
    else:
        assert option.read(tomllib.loads(f"x = {shown}")["x"]) == option.default


@by_option
def test_flags_and_variables_follow_from_the_name(option: Any) -> None:
    assert option.variable == f"TRIOSSPI_{option.name.upper()}"
    assert re.fullmatch(r"--[a-z0-9]+(-[a-z0-9]+)*", option.flag)
    # One value each is given on the command line, so a list's flag is in the singular.
    assert option.name.startswith(option.flag.removeprefix("--").replace("-", "_"))


def test_settings_are_values_that_can_go_to_another_process() -> None:
    settings = Settings(
        listen=Listen(unix=(Path("/run/x"),)),
        connections=Connections(proxy_from=(network("10.0.0.0/8"), network("fd00::/8"))),
        limits=Limits(max_unauthenticated=3),
        metrics=Metrics(metrics=("::1", 1)),
    )
    assert pickle.loads(pickle.dumps(settings)) == settings != Settings()
    with pytest.raises(AttributeError):
        settings.listen.port = 3  # type: ignore[misc]


# What may be


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (Listen, {"port": 65536}),
        (Listen, {"port": -1}),
        (Listen, {"port": True}),
        (Listen, {"port": "2000"}),
        (Listen, {"port": None}),
        (Listen, {"hosts": "localhost"}),
        (Listen, {"hosts": ["localhost"]}),
        (Listen, {"hosts": (1,)}),
        (Listen, {"unix": ("socket",)}),
        (Listen, {"unix_mode": 0o1777}),
        (Connections, {"keepalive": 0.5}),
        (Connections, {"proxy_from": ("10.0.0.0/8",)}),
        (Connections, {"proxy_from": network("10.0.0.0/8")}),
        (Serve, {"wire": "raw"}),
        (Serve, {"max_message_size": 0}),
        (Serve, {"max_message_size": 2**32}),
        (Accept, {"accounts": "accounts"}),
        (Accept, {"allow": "*@REALM"}),
        (Accept, {"allow_rc4": 1}),
        (Limits, {"handshake_timeout": 0}),
        (Limits, {"handshake_timeout": None}),
        (Limits, {"handshake_timeout": float("nan")}),
        (Limits, {"idle_timeout": float("inf")}),
        (Limits, {"max_connections": 0}),
        (Limits, {"max_unauthenticated": (100, 30, 500)}),
        (Limits, {"max_session_bytes": 0.5}),
        (Workers, {"workers": "auto"}),
        (Workers, {"workers": 0}),
        (Stopping, {"grace": -1}),
        (Metrics, {"metrics": "127.0.0.1:1"}),
        (Metrics, {"metrics": ("127.0.0.1", "1")}),
    ],
)
def test_a_section_refuses_what_cannot_be_when_it_is_made(section: type[Section], values: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        section(**values)
    (name,) = values
    assert caught.value.option == name
    assert str(caught.value).startswith(f"{name} must be ")


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (Limits, {"handshake_timeout": 1, "max_session_bytes": 2**40, "max_connections_per_source": 1}),
        (Connections, {"keepalive": None}),
        (Listen, {"backlog": 1, "port": 0, "unix_mode": 0}),
        (Accept, {"allow": (), "accounts": Path("x"), "keytab": "FILE:x"}),
        (Stopping, {"grace": 0}),
    ],
)
def test_what_may_be_is_kept_as_it_is(section: type[Section], values: dict[str, Any]) -> None:
    made = section(**values)
    assert {name: getattr(made, name) for name in values} == values


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_metrics_are_for_this_machine(host: str) -> None:
    assert Metrics(metrics=(host, 9464)).metrics == (host, 9464)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "localhost.example.com", "server"])
def test_metrics_are_for_other_machines_only_where_that_is_said(host: str) -> None:
    with pytest.raises(OptionError, match="must be a loopback address") as caught:
        Metrics(metrics=(host, 9464))
    assert (caught.value.option, caught.value.mentions) == ("metrics", ("metrics_anywhere",))
    assert Metrics(metrics=(host, 9464), metrics_anywhere=True).metrics == (host, 9464)


# How it is written


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("idle_timeout", "500ms", 0.5),
        ("idle_timeout", "30s", 30.0),
        ("idle_timeout", "1.5m", 90.0),
        ("idle_timeout", "12 h", 43200.0),
        ("idle_timeout", "7d", 604800.0),
        ("idle_timeout", "off", None),
        ("grace", "0s", 0.0),
        ("max_message_size", "1B", 1),
        ("max_message_size", "64KiB", 65536),
        ("max_message_size", "1.5MiB", 1572864),
        ("max_session_bytes", "4GiB", 2**32),
        ("max_session_bytes", "1TiB", 2**40),
        ("unix_mode", "0660", 0o660),
        ("unix_mode", "777", 0o777),
        ("max_unauthenticated", "10:50:20", 20),
        ("max_unauthenticated", "7", 7),
        ("max_unauthenticated", 7, 7),
        ("proxy_from", ["10.0.0.0/8", "::1"], (network("10.0.0.0/8"), network("::1/128"))),
        ("proxy_from", [], ()),
        ("metrics", "127.0.0.1:0", ("127.0.0.1", 0)),
        ("metrics", "[::1]:9464", ("::1", 9464)),
        ("metrics", "off", None),
        ("backlog", "default", None),
        ("backlog", 7, 7),
        ("unix", ["a", "/b"], (Path("a"), Path("/b"))),
        ("allow", [], ()),
        ("workers", 3, 3),
        ("accounts", "accounts", Path("accounts")),
    ],
)
def test_values_are_read_as_they_are_meant(name: str, raw: object, value: object) -> None:
    found = OPTIONS[name].read(raw)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "raw", "problem"),
    [
        ("port", "2000", 'must be an integer, 0<=x<=65535, not "2000"'),
        ("port", 2000.0, "must be an integer, 0<=x<=65535, not 2000.0"),
        ("port", True, "must be an integer, 0<=x<=65535, not true"),
        ("port", 65536, "must be an integer, 0<=x<=65535, not 65536"),
        ("allow_rc4", "true", 'must be true or false, not "true"'),
        ("allow_rc4", 1, "must be true or false, not 1"),
        ("wire", "raw", 'must be one of "sample", "framed", "negotiate-stream", "auto", not "raw"'),
        ("wire", 1, 'must be one of "sample", "framed", "negotiate-stream", "auto", not 1'),
        ("hosts", "localhost", 'must be a list, each a string, not "localhost"'),
        ("hosts", [1], "must be a string, not 1"),
        ("hosts", [""], "is empty"),
        ("allow", "*@REALM", 'must be a list, each a string, not "*@REALM"'),
        ("message", "", "is empty"),
        ("accounts", "a\0b", 'must be a path, not "a\\u0000b": it has a NUL in it'),
        ("idle_timeout", 30, "not 30: it has no unit"),
        ("idle_timeout", 1.5, "not 1.5: it has no unit"),
        ("idle_timeout", "30", 'not "30": it has no unit'),
        ("idle_timeout", "30sec", 'must be a duration with its unit (ms, s, m, h or d), such as "30s"'),
        ("idle_timeout", "30S", "duration"),
        ("idle_timeout", "-30s", "duration"),
        ("idle_timeout", "1e3s", "duration"),
        ("idle_timeout", "٣s", "duration"),
        ("idle_timeout", f"{'9' * 400}d", "duration"),
        ("idle_timeout", f"{'9' * 5000}d", "duration"),
        ("idle_timeout", "0s", 'from "1ms" to "3650d", or "off", not "0s"'),
        ("idle_timeout", True, "duration"),
        ("handshake_timeout", "off", "duration"),
        ("max_message_size", 65536, "not 65536: it has no unit"),
        ("max_message_size", "64KB", 'must be a size with its unit (B, KiB, MiB, GiB or TiB), such as "64KiB"'),
        ("max_message_size", "64k", "size"),
        ("max_message_size", "0.5B", "size"),
        ("max_message_size", "4GiB", 'from "1B" to '),
        ("unix_mode", 0o600, 'in octal digits, such as "0660", not 384'),
        ("unix_mode", "0999", "octal"),
        ("unix_mode", "1777", "octal"),
        (
            "max_unauthenticated",
            "30:100",
            'must be an integer, or "start:rate:full", of which only full counts, not "30:100"',
        ),
        ("max_unauthenticated", "10:30:60\n", "start:rate:full"),
        ("max_unauthenticated", "1:1:" + "9" * 5000, "start:rate:full"),
        ("max_unauthenticated", "10:30:0", "start:rate:full"),
        ("max_unauthenticated", 0, "start:rate:full"),
        ("max_unauthenticated", 1.5, "start:rate:full"),
        ("proxy_from", ["10.0.0.1/8"], "it names a host; the network is 10.0.0.0/8"),
        ("proxy_from", ["proxy.example"], 'must be an address or a network, such as "10.0.0.0/8", not "proxy.example"'),
        ("proxy_from", [167772160], "must be an address or a network"),
        ("metrics", "9464", "must be an address and a port"),
        ("metrics", "::1:9464", "must be an address and a port"),
        ("metrics", "127.0.0.1:65536", "must be an address and a port"),
        ("metrics", 9464, "must be an address and a port"),
        ("workers", "many", 'must be "auto" or an integer, 1<=x<=1024, not "many"'),
    ],
)
def test_what_cannot_be_is_told_with_what_could(name: str, raw: object, problem: str) -> None:
    with pytest.raises(OptionError) as caught:
        OPTIONS[name].read(raw)
    assert caught.value.option == name
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_value_is_not_repeated_in_full() -> None:
    with pytest.raises(OptionError) as caught:
        OPTIONS["port"].read("9" * 10_000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "0", 0),
        ("max_session_messages", "50_000_000", 50_000_000),
        ("max_session_messages", "off", None),
        ("workers", "2", 2),
        ("idle_timeout", "5m", 300.0),
        ("allow_rc4", "yes", True),
        ("allow_rc4", "On", True),
        ("allow_rc4", "1", True),
        ("allow_rc4", "false", False),
        ("hosts", "127.0.0.1, ::1", ("127.0.0.1", "::1")),
        ("proxy_from", "10.0.0.0/8,::1", (network("10.0.0.0/8"), network("::1"))),
        ("accounts", "a,b", Path("a,b")),
    ],
)
def test_variables_are_text_and_mean_the_same(name: str, text: str, value: object) -> None:
    assert OPTIONS[name].read_variable(text) == value


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("allow", "", "is empty: leave it out, or give it a value"),
        ("port", "", "is empty"),
        ("hosts", "a,,b", "is empty"),
        ("port", "2000.0", "must be an integer"),
        ("port", " 2000", "must be an integer"),
        ("port", "9" * 5000, "must be an integer"),
        ("workers", "auto2", 'must be "auto" or an integer'),
        ("allow_rc4", "maybe", "must be true or false"),
        ("proxy_from", "10.0.0.0/8 ::1", "must be an address or a network"),
    ],
)
def test_variables_that_cannot_be_are_told(name: str, text: str, problem: str) -> None:
    with pytest.raises(OptionError, match=re.escape(problem)):
        OPTIONS[name].read_variable(text)


def test_durations_and_sizes_survive_being_shown() -> None:
    rng = random.Random(5)
    for name, units in (("idle_timeout", UNITS), ("max_session_bytes", SIZES)):
        option = OPTIONS[name]
        for _ in range(300):
            number, unit = rng.randrange(1, 1000), rng.choice(list(units))
            value = option.read(f"{number}{unit}")
            assert value == pytest.approx(number * units[unit])
            shown = tomllib.loads(f"x = {option.show(value)}")["x"]
            assert option.read(shown) == value
            assert re.fullmatch(r"[0-9]+[A-Za-z]+", shown)
    assert OPTIONS["idle_timeout"].show(0.0015) == '"1.5ms"'
    assert OPTIONS["grace"].show(0.0) == '"0s"'


@pytest.mark.parametrize("text", ['a"b\\c', "tab\there", "\x1b[2J\x7f\x9b", "größe 日本 \U0001f600", "\U000e0001", ""])
def test_strings_are_shown_as_toml_that_commands_no_terminal(text: str) -> None:
    shown = OPTIONS["message"].show(text)
    assert shown.isprintable()
    assert tomllib.loads(f"x = {shown}") == {"x": text}


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("accounts", "accounts", Path("/etc/t/accounts")),
        ("accounts", "/accounts", Path("/accounts")),
        ("unix", ["run/a"], (Path("/etc/t/run/a"),)),
        ("keytab", "krb5.keytab", "/etc/t/krb5.keytab"),
        ("keytab", "FILE:krb5.keytab", "FILE:/etc/t/krb5.keytab"),
        ("keytab", "WRFILE:k", "WRFILE:/etc/t/k"),
        ("keytab", "FILE:/k", "FILE:/k"),
        ("keytab", "/k", "/k"),
        ("keytab", "MEMORY:k", "MEMORY:k"),
        # Not a path that is opened here.
        ("app", "server:handler", "server:handler"),
    ],
)
def test_relative_paths_of_the_file_are_relative_to_it(name: str, raw: object, value: object) -> None:
    assert OPTIONS[name].read(raw, Path("/etc/t")) == value


def test_an_option_error_is_a_configuration_error() -> None:
    assert issubclass(OptionError, ConfigurationError)


# What a reload takes over


def test_what_only_a_restart_can_change_is_known() -> None:
    old = Settings().start
    new = Settings(
        listen=Listen(port=1), limits=Limits(idle_timeout=1), accept=Accept(deny=("x",)), serve=Serve(wire="framed")
    )
    assert only_by_restart(old, new.start) == ["wire", "port"]
    assert only_by_restart(old, Settings().start) == []


# Cores


def test_auto_is_as_many_workers_as_usable_cores() -> None:
    expected = usable_cores()
    assert OPTIONS["workers"].read("auto") == OPTIONS["workers"].read_variable("auto") == expected >= 1
