"""Fills a new domain: run by the interpreter that has Samba's modules, with smb.conf as its argument.

Reads from stdin, as JSON, what `samba.py` wants; prints the SIDs of all that it created.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import ldb  # type: ignore[import-not-found, unused-ignore]
import samba.dckeytab  # type: ignore[import-not-found, unused-ignore]  # noqa: F401 - gives Net its export_keytab
from samba.auth import system_session  # type: ignore[import-not-found, unused-ignore]
from samba.dcerpc import security  # type: ignore[import-not-found, unused-ignore]
from samba.ndr import ndr_unpack  # type: ignore[import-not-found, unused-ignore]
from samba.net import Net  # type: ignore[import-not-found, unused-ignore]
from samba.param import LoadParm  # type: ignore[import-not-found, unused-ignore]
from samba.samdb import SamDB  # type: ignore[import-not-found, unused-ignore]


def main(smb_conf: str, wanted: dict[str, Any]) -> dict[str, str]:
    settings = LoadParm()
    settings.load(smb_conf)
    directory = SamDB(session_info=system_session(), lp=settings)

    for user, password in wanted["users"].items():
        directory.newuser(user, password)
    for group, kind in wanted["groups"].items():
        directory.newgroup(group, grouptype=kind - (1 << 32))  # a signed number
    for group, members in wanted["members"].items():
        directory.add_remove_group_members(group, members, add_members_operation=True)
    for name, service in wanted["services"].items():
        account = f"service-{name}"
        directory.newuser(account, f"Service-secret-{name}")
        change = ldb.Message(find(directory, account, "objectSid").dn)
        # An account without the second attribute gets no tickets but RC4 ones.
        for attribute, value in (
            ("servicePrincipalName", service["spn"]),
            ("msDS-SupportedEncryptionTypes", str(service["supported"])),
        ):
            change[attribute] = ldb.MessageElement(value, ldb.FLAG_MOD_REPLACE, attribute)
        directory.modify(change)
        # After that: it exports the keys of the enctypes that are supported now.
        with contextlib.redirect_stdout(sys.stderr):
            Net(None, settings).export_keytab(keytab=service["keytab"], principal=service["spn"])

    sids = {
        name: str(ndr_unpack(security.dom_sid, find(directory, name, "objectSid")["objectSid"][0]))
        for name in (*wanted["users"], *wanted["groups"])
    }
    return {**sids, "domain": str(directory.get_domain_sid())}


def find(directory: Any, account: str, attribute: str) -> Any:
    (found,) = directory.search(expression=f"(sAMAccountName={account})", attrs=[attribute])
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.load(sys.stdin))))
