"""What deploy/ ships is accepted by the programs that it is for, agrees with the server, and is as careful as it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import under_systemd
from programs import PATIENCE, environment, running
from steady_load import PASSWORD
from triosspi.service import account_editor
from triosspi.service.config.configuration import Sources
from triosspi.service.config.settings import Settings, all_options

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
GRACE = Settings().stopping.grace
# What closing the last connections takes: see `SSPIChannel.aclose`.
CLOSING = 5.0
# `systemd-analyze security`, in tenths; 20 is what systemd calls good. What is left is the network, unix sockets for the
# service manager, and with impersonation the two capabilities.
EXPOSURE = {"triosspi.service": 12, "with impersonation.conf": 18}


def tool(name: str) -> str:
    """A program's path, or the test is skipped."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        pytest.skip(f"no {name}")
    return found


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return subprocess.run(command, capture_output=True, text=True, env=environment(**more), check=False)


def check_variables(names: Iterable[str]) -> None:
    """Those for triosspi are options of it."""
    known = {option.variable for option in all_options().values()}
    assert {name for name in names if name.startswith("TRIOSSPI_")} <= known


# ---- systemd ----


def unit(name: str) -> dict[str, list[str]]:
    """A unit's settings, whatever section they are in."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / name).read_text().splitlines():
        if line and line[0] not in "#[":
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture(params=EXPOSURE)
def units(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with the units, with and without the drop-in, and with a program that exists."""
    for name in ("triosspi.service", "triosspi.socket"):
        (tmp_path / name).write_text((DEPLOY / name).read_text().replace("/opt/triosspi/bin/triosspi", "/bin/true"))
    if request.param != "triosspi.service":
        (tmp_path / "triosspi.service.d").mkdir()
        shutil.copy(DEPLOY / "impersonation.conf", tmp_path / "triosspi.service.d")
    return tmp_path


def test_systemd_understands_every_line_of_the_units(units: Path) -> None:
    analyze = tool("systemd-analyze")
    done = run(analyze, "verify", "triosspi.service", "triosspi.socket", SYSTEMD_UNIT_PATH=f"{units}:")
    # What it ignores it only says.
    assert (done.returncode, done.stderr) == (0, "")


def test_the_service_exposes_little(units: Path, request: pytest.FixtureRequest) -> None:
    limit = EXPOSURE[request.node.callspec.params["units"]]
    analyze = tool("systemd-analyze")
    options = ["--offline=true", f"--threshold={limit}", "--no-pager"]
    done = run(analyze, "security", *options, units / "triosspi.service", SYSTEMD_UNIT_PATH=f"{units}:")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_service_has_no_capability_but_those_of_the_drop_in() -> None:
    service, drop_in = unit("triosspi.service"), unit("impersonation.conf")
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"] == [""]
    assert drop_in["CapabilityBoundingSet"] == drop_in["AmbientCapabilities"] == ["CAP_SETUID CAP_SETGID"]
    assert set(drop_in) == {"CapabilityBoundingSet", "AmbientCapabilities", "PrivateUsers", "SystemCallFilter"}


def test_the_service_manager_waits_for_longer_than_the_grace() -> None:
    service = unit("triosspi.service")
    (seconds,) = service["TimeoutStopSec"]
    assert float(seconds.removesuffix("s")) >= GRACE + CLOSING
    # Workers are told by the first process, and not cut off by a second SIGTERM.
    assert service["KillMode"] == ["mixed"]


def test_the_service_has_a_descriptor_for_every_connection() -> None:
    assert int(unit("triosspi.service")["LimitNOFILE"][0]) > Settings().limits.max_connections * 1.5


def test_credentials_are_what_the_options_name() -> None:
    service = unit("triosspi.service")
    variables = dict(text.split("=", 1) for text in service["Environment"])
    check_variables(variables)
    names = {credential.split(":")[0] for credential in service["LoadCredential"]}
    assert {variables[name].removeprefix("FILE:") for name in variables if name.startswith("TRIOSSPI_")} == {
        f"%d/{name}" for name in names
    }


@pytest.mark.long("systemd waits for its watchdog to be missed")
@pytest.mark.skipif(under_systemd.missing() is not None, reason=str(under_systemd.missing()))
def test_under_systemd_a_restart_fails_no_request_and_a_hanging_server_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "units"
    (folder / "triosspi.service.d").mkdir(parents=True)
    for name in ("triosspi.service", "triosspi.socket"):
        shutil.copy(DEPLOY / name, folder)
    (folder / "triosspi.service.d" / "test.conf").write_text(under_systemd.DROP_IN)
    account_editor.add(tmp_path / "accounts", "DOM\\alice", PASSWORD)
    seen = under_systemd.run(folder, tmp_path / "accounts")
    assert seen["started"] == {"Type": "notify", "ActiveState": "active", "StatusText": "2 of 2 workers ready"}
    assert len(seen["processes"]) == 3
    for process in seen["processes"].values():
        none = "0" * 16
        # Seccomp 2: system calls are filtered.
        assert process == {"CapEff": none, "CapBnd": none, "NoNewPrivs": "1", "Seccomp": "2"}
    assert seen["failures"] == []
    assert seen["goodbyes"] > 0
    assert seen["stopped"] == {"ActiveState": "inactive", "Result": "success"}
    assert "Traceback" not in seen["log"]


# ---- HAProxy ----


def test_haproxy_accepts_its_configuration_without_a_warning() -> None:
    done = run(tool("haproxy"), "-c", "-dW", "-f", DEPLOY / "haproxy.cfg")
    assert done.returncode == 0, done.stdout + done.stderr


def test_haproxy_lets_the_sessions_of_a_draining_server_finish() -> None:
    # A draining server fails its health check, so it is "down": what is done with the sessions of one that is down is done
    # with those that finish.
    lines = [line.split("#")[0].strip() for line in (DEPLOY / "haproxy.cfg").read_text().splitlines()]
    assert not [line for line in lines if "on-marked-down" in line]
    assert "option httpchk GET /readyz" in lines
    assert [line for line in lines if line.startswith("default-server") and "send-proxy-v2" in line.split()]


# ---- Kubernetes ----


@pytest.fixture(scope="module")
def resources() -> dict[str, Any]:
    """By kind."""
    yaml = pytest.importorskip("yaml", reason="no PyYAML")
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    found = {document["kind"]: document for document in documents}
    assert len(found) == len(documents)
    return found


def test_kubernetes_has_a_schema_for_every_field(resources: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate")
    for resource in resources.values():
        for version in ("1.25", validator.latest_version()):
            # A field that the schema has not is an error, too.
            validator.validate(resource, version, strict=True)


def pod(resources: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod and its container."""
    spec = resources["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


def test_the_configuration_in_the_config_map_is_one(resources: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "triosspi.toml"
    file.write_text(resources["ConfigMap"]["data"]["triosspi.toml"])
    _, container = pod(resources)
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    check_variables(variables)
    settings = Sources(file=file, environ=variables).load().settings
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert settings.metrics.metrics is not None
    assert ports == {"triosspi": settings.listen.port, "status": settings.metrics.metrics[1]}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    for path in (settings.accept.keytab, f"FILE:{settings.accept.accounts}"):
        assert str(path).startswith(f"FILE:{mounted['secret']}/")
    # Only there can anything be written.
    assert variables["KRB5RCACHENAME"].removeprefix("file2:").startswith(mounted["run"])
    assert variables["RUNTIME_DIRECTORY"] == mounted["run"]


def test_kubernetes_waits_for_longer_than_pre_stop_and_the_grace(resources: dict[str, Any], tmp_path: Path) -> None:
    spec, container = pod(resources)
    program, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    file = tmp_path / "triosspi.toml"
    file.write_text(resources["ConfigMap"]["data"]["triosspi.toml"])
    grace = Sources(file=file, environ={}).load().settings.stopping.grace
    assert spec["terminationGracePeriodSeconds"] >= int(seconds) + grace + CLOSING


def test_kubernetes_probes_ask_what_they_are_for(resources: dict[str, Any]) -> None:
    _, container = pod(resources)
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/readyz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    assert {probe["port"] for probe in probes.values()} == {"status"}


def test_the_pod_meets_the_restricted_pod_security_standard(resources: dict[str, Any]) -> None:
    spec, container = pod(resources)
    context = container["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["readOnlyRootFilesystem"] is True
    assert set(spec["volumes"][0]) | set(spec["volumes"][1]) <= {"name", "configMap", "secret"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert spec["automountServiceAccountToken"] is False
    assert {"requests", "limits"} <= set(container["resources"])


def test_no_secret_stands_in_what_is_applied(resources: dict[str, Any]) -> None:
    # Applied, it would replace the real one.
    assert "Secret" not in resources


def test_selectors_select_the_pods(resources: dict[str, Any]) -> None:
    labels = resources["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert resources["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert resources["Service"]["spec"]["selector"] == labels
    assert resources["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert resources["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert len({resource["metadata"]["namespace"] for resource in resources.values()}) == 1


# ---- the image ----


def instructions() -> list[tuple[str, str]]:
    """Those of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, rest in lines]


def test_hadolint_has_nothing_against_the_dockerfile() -> None:
    done = run(tool("hadolint"), DEPLOY / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_built_of_what_is_there_and_runs_as_nobody_special() -> None:
    found = instructions()
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for name, rest in found:
        if name == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                # All else is left out.
                assert f"!{source.removeprefix('./')}" in ignored
    users = [rest for name, rest in found if name == "USER"]
    assert re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", users[-1])
    assert max(i for i, (name, _) in enumerate(found) if name == "FROM") < found.index(("USER", users[-1]))
    variables = [word.split("=", 1)[0] for name, rest in found if name == "ENV" for word in shlex.split(rest)]
    check_variables(variables)


def test_the_images_health_check_tells_a_server_that_is_there_from_one_that_is_not(tmp_path: Path) -> None:
    (check,) = [rest for name, rest in instructions() if name == "HEALTHCHECK"]
    program, *arguments = json.loads(check.partition("CMD ")[2])
    assert program == "python"
    account_editor.add(tmp_path / "accounts", "DOM\\alice", PASSWORD)
    options = ["--host", "127.0.0.1", "--port", "0", "--metrics", "127.0.0.1:0"]
    with running("serve", "echo", "--wire", "framed", "--accounts", tmp_path / "accounts", *options) as server:
        port = server.expect(r"http://127\.0\.0\.1:(\d+)", "err")[1]
        command = [sys.executable, *(argument.replace("9464", port) for argument in arguments)]
        server.expect_port()
        assert subprocess.run(command, timeout=PATIENCE, check=False).returncode == 0
    gone = subprocess.run(command, timeout=PATIENCE, capture_output=True, check=False)
    assert gone.returncode == 1


# ---- docs/deployment.md ----


def test_the_metrics_options_and_files_that_the_documentation_names_exist() -> None:
    pytest.importorskip("prometheus_client", reason="no prometheus-client")
    from triosspi.service.observe.metrics import Metrics
    from triosspi.service.observe.worker_files import WorkerMetrics

    text = (ROOT / "docs" / "deployment.md").read_text()
    with WorkerMetrics() as of_workers:
        shown = (Metrics().exposition() + of_workers.exposition()).decode()
    for name in set(re.findall(r"`(triosspi_\w+)", text)):
        # A histogram is `name_bucket`, and what follows.
        assert re.search(rf"^{name}(_total|_bucket)?\b", shown, re.MULTILINE), name
    for name, value in set(re.findall(r'`triosspi_\w+\{(\w+)="(\w+)"\}', text)):
        assert f'{name}="{value}"' in shown
    options = {option.name for option in all_options().values()}
    limits = text[text.index("## Limits") : text.index("## Metrics")]
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", limits))
    assert named <= options
    assert named
    for name in set(re.findall(r"`((?:deploy|tests|bench)/[\w./-]+)`", text)):
        assert (ROOT / name).exists(), name
    # The table of files at the top.
    for name in set(re.findall(r"`([\w.]+)`", text[: text.index("## One machine")])) - {"Dockerfile"}:
        assert (DEPLOY / name).exists(), name
