"""An MIT realm with a service for every enctype, for the length of a test session.

One KDC has them all. Each service has a key of one enctype, and its clients a krb5.conf that knows only that one, so
ticket, session key and subkeys all have it.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ..base import missing_module
from ..mit_realm import free_port
from ..requirements import require
from . import keytabs
from .realm import ENCTYPES, Kdc, RealmError, Service, find_program, missing_program, run

if TYPE_CHECKING:
    from k5test.realm import MITRealm  # type: ignore[import-untyped, unused-ignore]

REALM = "MIT.TEST"

SERVICES = {
    "aes128": 17,
    "aes256": 18,
    "aes128-sha2": 19,
    "aes256-sha2": 20,
    "rc4": 23,
    "other": 18,
    "rotated": 18,
    "brief": 18,
}

_PROGRAMS = {
    "krb5kdc": "krb5-kdc",
    "kdb5_util": "krb5-kdc",
    "kadmin.local": "krb5-admin-server",
    "kinit": "krb5-user",
}


def available() -> str | None:
    """None when the realm can run here, else the reason."""
    return missing_module("k5test", "k5test (pip k5test)") or missing_program(_PROGRAMS)


@functools.cache
def _realm_class() -> type[MITRealm]:
    from k5test.realm import MITRealm

    class Realm(MITRealm):  # type: ignore[misc, unused-ignore]
        # k5test's own asks the DNS, for every line that it writes.
        hostname = "localhost"

    return Realm


class MitKdc(Kdc):
    """The realm.

    Its services, beside one for each enctype, which have their keys together in `all_keytab`, too:

    - `other`, which has a key like `aes256`;
    - `rotated`, whose key was changed: tickets are for version 2, and `stale_keytab` has version 1;
    - `brief`, for which tickets last half an hour. (A ticket of a few seconds: `login(lifetime="3s")`.)

    Its users: alice and bob.
    """

    def __init__(self) -> None:
        enctypes = " ".join(f"{name}:normal" for name in ENCTYPES.values())
        self._mit: Any = _realm_class()(
            realm=REALM,
            # By default all KDCs of a machine take port 61000, and those of two test runs answer for each other.
            portbase=free_port(),
            krb5_conf={
                "libdefaults": {
                    "dns_lookup_realm": "false",
                    "dns_canonicalize_hostname": "false",
                    "rdns": "false",
                    "allow_rc4": "true",
                },
                # By address: the name may stand for the IPv6 one.
                "realms": {"$realm": {"kdc": "127.0.0.1:$port0"}},
            },
            kdc_conf={
                "realms": {
                    "$realm": {
                        "supported_enctypes": enctypes,
                        "kdc_ports": None,
                        "kdc_tcp_ports": None,
                        "kdc_listen": "127.0.0.1:$port0",
                        "kdc_tcp_listen": "127.0.0.1:$port0",
                    }
                }
            },
            create_user=False,
            create_host=False,
            # With these two an exception in the constructor leaves a KDC running that nobody can stop. (And its own
            # start_kdc leaves one whenever the test run is killed.)
            start_kdc=False,
            get_creds=False,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._past: MitPast | None = None
        try:
            super().__init__(REALM, self._mit.portbase, Path(self._mit.tmpdir))
            self.users = {"alice": "alice-secret", "bob": "bob-secret"}
            self.services = {name: self._service(name, enctype) for name, enctype in SERVICES.items()}
            self.all_keytab = f"FILE:{self.directory}/all.keytab"
            self.stale_keytab = f"FILE:{self.directory}/rotated-stale.keytab"
            self._fill()
            self._process = _start_kdc([self._mit.krb5kdc, "-n"], self._mit.env)
        except BaseException:
            self.stop()
            raise

    def _service(self, name: str, enctype: int) -> Service:
        return Service(
            principal=f"host/{name}.{self.realm.lower()}@{self.realm}",
            enctype=enctype,
            keytab=f"FILE:{self.directory}/{name}.keytab",
            config=self.write_config(ENCTYPES[enctype], [enctype]),
        )

    def _fill(self) -> None:
        """Put everything into the database, by one run of kadmin.local."""
        commands = [f"addprinc -pw {password} {user}" for user, password in self.users.items()]
        for name, service in self.services.items():
            enctype = f"-e {ENCTYPES[service.enctype]}:normal"
            lifetime = '-maxlife "30 minutes"' if name == "brief" else ""
            commands.append(f"addprinc -randkey {lifetime} {enctype} {service.principal}")
            if name == "rotated":
                commands.append(f"ktadd -norandkey -k {self.stale_keytab} {service.principal}")
                commands.append(f"cpw -randkey {enctype} {service.principal}")
            commands.append(f"ktadd -norandkey -k {service.keytab} {service.principal}")
        output = run([self._mit.kadmin_local], environment=self._mit.env, stdin="\n".join(commands) + "\n")
        try:
            everything = [
                key
                for name, service in self.services.items()
                for key in keytabs.read_keytab(service.keytab)
                if name not in ("other", "rotated", "brief")
            ]
        except OSError as exc:
            # kadmin.local ends well whatever happened.
            raise RealmError(output) from exc
        keytabs.write_keytab(keytabs.path_of(self.all_keytab), everything)

    def an_hour_ago(self) -> MitPast:
        """The same realm with a KDC whose clock is an hour slow, and with it those of its clients.

        A ticket for `brief` from there has expired by now. One for another service is still good, and it is the
        client's clock that is wrong.
        """
        if self._past is None:
            self._past = MitPast(self, self._mit)
        return self._past

    def stop(self) -> None:
        """End the KDC and delete the realm."""
        if self._past is not None:
            self._past.stop()
            self._past = None
        if self._process is not None:
            _stop_kdc(self._process)
            self._process = None
        if self._mit is not None:
            realm, self._mit = self._mit, None
            realm.stop()


class MitPast(Kdc):
    """See `MitKdc.an_hour_ago`."""

    _OFFSET = -3600

    def __init__(self, now: MitKdc, mit: Any) -> None:
        super().__init__(now.realm, free_port(), now.directory)
        self.users = now.users
        self.services = {
            name: Service(
                principal=service.principal,
                enctype=service.enctype,
                keytab=service.keytab,
                config=self.write_config(ENCTYPES[service.enctype], [service.enctype]),
            )
            for name, service in now.services.items()
        }
        listen = f"127.0.0.1:{self.port}"
        realm = {"kdc_ports": None, "kdc_tcp_ports": None, "kdc_listen": listen, "kdc_tcp_listen": listen}
        environment = mit.special_env("past", True, kdc_conf={"realms": {"$realm": realm}})
        environment["KRB5_CONFIG"] = self.config
        self._process = _start_kdc([mit.krb5kdc, "-n", "-T", str(self._OFFSET)], environment)

    def stop(self) -> None:
        """End the KDC; the files are the realm's."""
        _stop_kdc(self._process)


def _start_kdc(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # Else a KDC outlives a test run that is killed.
    setpriv = find_program("setpriv")
    guard = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
    process = subprocess.Popen(
        [*guard, *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    said = line = b""
    while b"starting..." not in line:
        line = process.stdout.readline()
        if not line:
            _stop_kdc(process)
            raise RealmError(f"krb5kdc did not start: {said.decode(errors='replace')}")
        said += line
    return process


def _stop_kdc(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


@pytest.fixture(scope="session")
def mit_kdc() -> Iterator[MitKdc]:
    """The realm, for the whole session."""
    require(SimpleNamespace(available=available))
    kdc = MitKdc()
    try:
        yield kdc
    finally:
        kdc.stop()
