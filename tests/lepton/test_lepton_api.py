"""The client of Lepton's API: credentials, refusals, redirects, and a token that nothing tells."""

from __future__ import annotations

import http.server
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemotron_launch.backends.lepton_access import access, contact_of
from nemotron_launch.backends.lepton_api import Answer, Api
from nemotron_launch.errors import UserError
from nemotron_launch.hosts import Unreachable
from nemotron_launch.jobs.ledger import Ledger
from nemotron_launch.jobs.submission import submit
from tests.conftest import Nemotron
from tests.lepton.lepton_runs import client, planned
from tests.lepton.service import ROOT, TOKEN, Fault, Service
from tests.step_trees import REPOSITORY

RECORD = """\
current_workspace: mine
workspaces:
  mine: {{id: mine, url: "{url}/", auth_token: {token}, workspace_origin_url: null}}
"""


def reached(env: dict[str, str], **options: object) -> Api:
    return Api(access(contact_of(options, env), env), retry_for=5.0, deadline=10.0)


# Credentials ---------------------------------------------------------------------------------------------------------


def test_variables_come_before_the_login_and_the_profile_before_both(tmp_path: Path) -> None:
    (tmp_path / "workspace_info.yaml").write_text(RECORD.format(url="https://one.example/w", token="a"))
    env = {"LEPTON_CACHE_DIR": str(tmp_path)}
    found = access(contact_of({}, env), env)
    assert (found.workspace, found.url, found.token) == ("mine", "https://one.example/w", "a")
    env |= {"LEPTON_WORKSPACE_ID": "space", "LEPTON_WORKSPACE_TOKEN": "space:b"}
    found = access(contact_of({}, env), env)
    url = "https://gateway.dgxc-lepton.nvidia.com/api/v2/workspaces/space"
    assert (found.url, found.token, found.origin) == (url, "b", "https://gateway.dgxc-lepton.nvidia.com")
    env |= {"MINE": "c"}
    options = {"workspace": "w", "workspace_url": "https://two.example/w", "token_env": "MINE"}
    found = access(contact_of(options, env), env)
    assert (found.workspace, found.url, found.token, found.origin) == ("w", "https://two.example/w", "c", "")
    assert "'c'" not in repr(found)


def test_a_login_that_others_can_read_is_reported(tmp_path: Path) -> None:
    record = tmp_path / "workspace_info.yaml"
    record.write_text(RECORD.format(url="https://one.example", token="a"))
    record.chmod(0o644)
    env = {"LEPTON_CACHE_DIR": str(tmp_path)}
    [warning] = access(contact_of({}, env), env).warnings
    assert warning == f"{record} holds a token and others can read it (mode 644):  chmod 600 {record}"
    record.chmod(0o600)
    assert access(contact_of({}, env), env).warnings == ()


def test_a_login_never_gets_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "workspace_info.yaml").write_text(RECORD.format(url="https://one.example", token="secret-word"))
    env = {"LEPTON_CACHE_DIR": str(tmp_path)}
    access(contact_of({}, env), env)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ({}, {}, "workspace: which Lepton workspace? None is named"),
        ({"LEPTON_WORKSPACE_ID": "w"}, {}, "LEPTON_WORKSPACE_TOKEN: no token for the Lepton workspace w"),
        ({"LEPTON_WORKSPACE_ID": "w"}, {"token_env": "MINE"}, "MINE: no token for the Lepton workspace w"),
        ({"LEPTON_WORKSPACE_ID": "w", "LEPTON_WORKSPACE_TOKEN": "a\tb"}, {}, "LEPTON_WORKSPACE_TOKEN: is no token"),
        ({"LEPTON_WORKSPACE_ID": "w"}, {"workspace_url": "ftp://x"}, "workspace_url: ftp://x is no address"),
        ({"LEPTON_WORKSPACE_ID": "w"}, {"workspace_url": "https://me:pw@x"}, "workspace_url: https://…@x is no addr"),
        (
            {"LEPTON_WORKSPACE_ID": "w"},
            {"workspace_url": "http://far.example"},
            "workspace_url: http://far.example: a t",
        ),
    ],
)
def test_credentials_that_cannot_be_are_said(env: dict[str, str], options: dict[str, str], message: str) -> None:
    env = {**env, "LEPTON_CACHE_DIR": "/nowhere"}
    with pytest.raises(UserError, match=re.escape(f"error: {message}")):
        access(contact_of(options, env), env)


# The wire ------------------------------------------------------------------------------------------------------------


def test_netrc_and_proxies_for_others_change_nothing(
    workspace: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login x password y\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert reached(workspace.env).workspace()["workspace_name"] == "space"


def test_a_slash_at_the_end_of_the_address_changes_nothing(workspace: Service) -> None:
    assert reached(workspace.env, workspace_url=f"{workspace.url}/").shapes()


def test_a_redirect_elsewhere_does_not_get_the_token(workspace: Service) -> None:
    got: list[str | None] = []

    class Thief(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append(self.headers.get("Authorization"))

    server = http.server.HTTPServer(("127.0.0.1", 0), Thief)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        for status in (301, 302, 307):
            to = {"Location": f"http://127.0.0.1:{server.server_port}/shapes"}
            workspace.faults = [Fault("GET shapes", status, 1, to)]
            with pytest.raises(Answer, match=r"sends on to http://127\.0\.0\.1; the token does not follow"):
                reached(workspace.env).shapes()
    finally:
        server.shutdown()
        server.server_close()
    assert got == []
    workspace.faults = [Fault("GET shapes", 307, 1, {"Location": f"{ROOT}/shapes"})]
    assert reached(workspace.env).shapes()  # the same place


def test_the_service_says_how_long_to_wait(workspace: Service) -> None:
    workspace.faults = [Fault("GET shapes", 429, 1, {"Retry-After": "1"})]
    start = time.monotonic()
    assert reached(workspace.env).shapes()
    assert time.monotonic() - start >= 1.0


@pytest.mark.parametrize("kind", ["drip", "reset", "cut", "garbage", 503])
def test_a_service_that_does_not_answer_is_unreachable_soon(workspace: Service, kind: int | str) -> None:
    workspace.faults = [Fault("GET shapes", kind, 100)]
    start = time.monotonic()
    api = Api(access(contact_of({}, workspace.env), workspace.env), retry_for=0.3, deadline=0.5)
    with pytest.raises(Unreachable) as said:
        api.shapes()
    assert time.monotonic() - start < 10
    assert TOKEN not in str(said.value)


def test_a_token_that_the_service_repeats_is_not_told(workspace: Service) -> None:
    env = {**workspace.env, "LEPTON_WORKSPACE_TOKEN": "wrong-token"}
    with pytest.raises(Answer, match="the Lepton workspace space does not take the token: bad token Bearer …") as said:
        reached(env).shapes()
    assert "wrong-token" not in str(said.value)


# Bad input, before anything is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "env", "message"),
    [
        (
            {"node_group": "my-grup"},
            {},
            "node_group: my-grup is no node group of this workspace\n       did you mean my-g",
        ),
        (
            {"resource_shape": "gpu.big"},
            {},
            "resource_shape: gpu.big is no shape of this workspace\n       There are cpu",
        ),
        ({}, {"LEPTON_WORKSPACE_TOKEN": "wrong"}, "the Lepton workspace space does not take the token"),
        ({}, {"LEPTON_WORKSPACE_TOKEN": ""}, "LEPTON_WORKSPACE_TOKEN: no token for the Lepton workspace space"),
        ({"workspace": "other"}, {}, "there is no Lepton workspace other"),
    ],
)
def test_what_the_workspace_lacks_is_said_and_nothing_is_written(
    workspace: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, str],
    env: dict[str, str],
    message: str,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if "workspace" in options:
        monkeypatch.setenv("LEPTON_WORKSPACE_URL", workspace.url.replace("/space", "/other"))
    with Ledger(tmp_path / "state") as ledger:
        run, files = planned(tmp_path / "remote", options=options)
        with pytest.raises(UserError, match=re.escape(f"error: {message}")):
            submit(ledger, run, files, backend=client(run))
        assert ledger.runs() == [] and not workspace.jobs


def test_profiles_are_checked_online(
    workspace: Service, tmp_path: Path, nemotron: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").mkdir()
    profile = tmp_path / "profiles/cloud.yaml"
    text = "executor: lepton\nremote_job_dir: /r\nresource_shape: cpu.small\nsecrets: {HF_TOKEN: {reference: hub}}\n"
    profile.write_text(f"{text}node_group: my-group\n")
    done = nemotron("profiles", "check", "cloud", "--online")
    assert (done.returncode, done.stderr) == (0, "")
    assert "node group my-group is ng-1" in done.stdout and "8 of 16 in use" in done.stdout
    profile.write_text(f"{text.replace('hub', 'hug')}node_group: mine\nimage_pull_secrets: [ngc]\n")
    done = nemotron("profiles", "check", "cloud", "--online")
    assert done.returncode == 1
    assert "error: profile cloud: node_group: mine is no node group of this workspace" in done.stderr
    assert "error: profile cloud: secrets: hug is no secret of this workspace\n       did you mean hub?" in done.stderr
    assert "error: profile cloud: image_pull_secrets: ngc is no registry login of this workspace" in done.stderr


# Cost ----------------------------------------------------------------------------------------------------------------


def test_the_compilers_side_imports_no_http() -> None:
    code = "import sys, nemotron_launch.backends.lepton, nemotron_launch.jobs.submission\nprint(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert not {"httpx", "ssl", "nemotron_launch.backends.lepton_api"} & set(done.stdout.split())
