#!/bin/sh
# Sees to the operating system's packages: as root on Debian or Ubuntu it installs what is missing, elsewhere it says
# what to install and fails.
#
#   scripts/os-packages.sh serve    what building and running need
#   scripts/os-packages.sh test     that, and what only the tests need
#
# Whether something is missing is decided by trying the thing itself, not by asking the package database: a compiler or
# a Python that did not come from a package is as good. To add a need, write a probe and name it, with its Debian
# package, in one of the two lists: as a `need`, or as a `want`, without which some tests are skipped or sealing is slow, or
# as an `offer`, which is a want that this script leaves alone where installing it would start servers. In CI (the
# variable CI is set) what is wanted or offered is needed.
set -eu

python=${PYTHON:-python3}

# ---- the probes: succeed when the thing is there; quiet ----

have() { command -v "$1" >/dev/null 2>&1; }
python_prints() { "$python" -c "$1" 2>/dev/null; }

probe_python() { have "$python"; }
# ensurepip is what Debian leaves out of python3: without it `python3 -m venv` fails half-way.
probe_venv() { "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; }
# The compiler that Python's own build settings name, which is the one that builds the extension.
compiler() {
    [ -z "${CC:-}" ] || { echo "$CC"; return; }
    python_prints 'import sysconfig; print(sysconfig.get_config_var("CC") or "gcc")' || echo gcc
}
probe_compiler() { have "$(compiler | cut -d' ' -f1)"; }
probe_libc_headers() {
    echo '#include <stdio.h>' | $(compiler) -E - >/dev/null 2>&1
}
probe_python_headers() {
    headers=$(python_prints 'import sysconfig; print(sysconfig.get_path("include"))') && [ -f "$headers/Python.h" ]
}
# For the sealing extension, which is left out otherwise.
probe_openssl_headers() {
    printf '#include <openssl/evp.h>\n#if OPENSSL_VERSION_NUMBER < 0x30000000L\n#error\n#endif\n' |
        $(compiler) -E - >/dev/null 2>&1
}
# Programs of the tests' peers; some are installed where only root looks.
have_daemon() { (PATH="$PATH:/usr/sbin:/usr/local/sbin" && have "$1"); }
probe_ntlm_auth() { have ntlm_auth; }
probe_kdc() { have_daemon krb5kdc && have_daemon kdb5_util; }
probe_kadmin() { have_daemon kadmin.local; }
probe_kinit() { have kinit; }
probe_gssapi_headers() {
    have krb5-config && cflags=$(krb5-config --cflags gssapi) &&
        # shellcheck disable=SC2086  # a list of words is what it is
        echo '#include <gssapi/gssapi_ext.h>' | $(compiler) $cflags -E - >/dev/null 2>&1
}
probe_heimdal_headers() {
    have krb5-config.heimdal && cflags=$(krb5-config.heimdal --cflags gssapi) &&
        # shellcheck disable=SC2086  # a list of words is what it is
        echo '#include <gssapi/gssapi_krb5.h>' | $(compiler) $cflags -E - >/dev/null 2>&1
}
probe_samba() { have_daemon samba && have samba-tool; }
probe_samba_provision() { [ -f /usr/share/samba/setup/provision.ldif ] || [ -f /usr/local/share/samba/setup/provision.ldif ]; }
probe_haproxy() { have_daemon haproxy; }
probe_mcs() { have mcs; }
probe_gss_ntlmssp() { grep -qs '1\.3\.6\.1\.4\.1\.311\.2\.2\.10' /etc/gss/mech /etc/gss/mech.d/*.conf; }

# ---- the lists: probe, Debian package ----

version=$(python_prints 'import sys; print("%d.%d" % sys.version_info[:2])') || version=3

serve_needs() {
    need probe_python python3
    need probe_venv "python$version-venv"
    need probe_compiler gcc
    need probe_libc_headers libc6-dev
    need probe_python_headers "python$version-dev"
    # Sealing is many times slower without.
    want probe_openssl_headers libssl-dev
}

test_needs() {
    serve_needs
    # Peers that the tests meet. krb5-config would ask for a realm; what it writes without is used by no test.
    want probe_gssapi_headers libkrb5-dev
    want probe_gss_ntlmssp gss-ntlmssp
    want probe_ntlm_auth winbind
    want probe_kdc krb5-kdc
    want probe_kadmin krb5-admin-server
    want probe_kinit krb5-user
    want probe_heimdal_headers heimdal-multidev
    # For programs of .NET's, whose runtime comes from PyPI.
    want probe_mcs mono-mcs
    # A load balancer, for its PROXY headers and health checks.
    want probe_haproxy haproxy
    offer probe_samba samba-ad-dc
    offer probe_samba_provision samba-ad-provision
}

# ---- the work ----

if [ "$python" != python3 ] && ! probe_python; then
    echo "no such Python: $python (it was chosen with PYTHON=...)" >&2
    exit 1
fi

missing=
wanted=
offered=
need() { "$1" || missing="$missing $2"; }
want() { "$1" || wanted="$wanted $2"; }
offer() { "$1" || offered="$offered $2"; }
# Without systemd no package starts a service.
[ -d /run/systemd/system ] || offer() { want "$@"; }
case "${CI:-}" in
    '' | 0 | false | no) ;;
    *)
        want() { need "$@"; }
        offer() { need "$@"; }
        ;;
esac

case "${1:-}" in
    serve | test) needs="$1_needs" ;;
    *) echo "usage: $0 serve|test" >&2; exit 2 ;;
esac

"$needs"
[ -z "$offered" ] || {
    echo "some tests will be skipped, for want of:$offered" >&2
    echo "(not installed by itself: the package starts a file server, and the tests need only the program)" >&2
}
[ -n "$missing$wanted" ] || exit 0

if have apt-get && [ "$(id -u)" -eq 0 ]; then
    echo "installing what is missing:$missing$wanted"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086  # a list of words is what it is
    if ! { apt-get update -q && apt-get install -q -y --no-install-recommends $missing$wanted; }; then
        echo "apt-get could not install:$missing$wanted" >&2
        [ -z "$missing" ] || exit 1
    fi
    missing=
    wanted=
    offered=
    "$needs"
    [ -z "$wanted" ] || echo "some tests will be skipped, or sealing is slow, for want of:$wanted" >&2
    [ -n "$missing" ] || exit 0
    echo "still missing after apt-get installed them:$missing" >&2
    echo "($python is perhaps not the system's own: give it its headers and venv, or choose another with PYTHON=...)" >&2
    exit 1
fi

[ -z "$missing" ] || echo "missing on this system:$missing" >&2
[ -z "$wanted" ] || echo "some tests will be skipped, or sealing is slow, for want of:$wanted" >&2
if have apt-get; then
    echo "install them with:" >&2
    echo "    sudo apt-get update && sudo apt-get install --no-install-recommends$missing$wanted" >&2
else
    echo "these are Debian's names; install what your system calls them, then run make again" >&2
fi
[ -z "$missing" ] || exit 1
