"""Which Lepton workspace is meant, and with which token: profile, LEPTON_… variables, or the Lepton client's login."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nemotron_launch.errors import UserError
from nemotron_launch.frozen import field, frozen

_GATEWAY = "https://gateway.dgxc-lepton.nvidia.com/api/v2/workspaces/"
_TOKEN = "LEPTON_WORKSPACE_TOKEN"
_HOW = """\
export LEPTON_WORKSPACE_ID=… and LEPTON_WORKSPACE_TOKEN=…, or sign in with Lepton's own client:  lep login
the dashboard's Settings, Tokens has both"""


@frozen
class Access:
    """A workspace, reached. token_env: the variable of its token. origin: a header that NVIDIA's gateway wants."""

    workspace: str
    url: str
    token: str = field(repr=False)
    token_env: str = _TOKEN
    origin: str = ""
    warnings: tuple[str, ...] = ()


def contact_of(options: Mapping[str, Any], env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """How the workspace of a profile is reached later, whoever is signed in then: no secret. UserError: none is known.

    options: the job's. token_env: the variable that holds the token. folder: where runs lie, if it is seen from here.
    """
    login = _login(env)
    workspace = options.get("workspace") or env.get("LEPTON_WORKSPACE_ID") or (login.get("current_workspace") or "")
    if not workspace:
        raise UserError("which Lepton workspace? None is named", where="workspace", hint=_HOW)
    known = _of(login, workspace)
    url = options.get("workspace_url") or env.get("LEPTON_WORKSPACE_URL") or known.get("url") or _GATEWAY + workspace
    token_env = str(options.get("token_env") or _TOKEN)
    return {
        "workspace": workspace,
        "url": _checked(str(url)),
        "token_env": token_env,
        "folder": str(options.get("remote_job_dir") or ""),
    }


def access(contact: Mapping[str, Any], env: Mapping[str, str] = os.environ) -> Access:
    """Workspace and token, by a contact. UserError: no token; one that cannot be one."""
    workspace, token_env = str(contact["workspace"]), str(contact.get("token_env") or _TOKEN)
    login = _login(env)
    known = _of(login, workspace)
    token = env.get(token_env, "").strip()
    warnings: tuple[str, ...] = ()
    if not token:
        token, warnings = str(known.get("auth_token") or "").strip(), _readable(env)
    if not token:
        hint = f"export {token_env}=…" + ("" if token_env != _TOKEN else f"\n{_HOW}")
        raise UserError(f"no token for the Lepton workspace {workspace}", where=token_env, hint=hint)
    token = token.removeprefix(f"{workspace}:")  # as the dashboard shows it: <workspace>:<token>
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError("is no token: it has spaces or letters that a header cannot carry", where=token_env)
    url = _checked(str(contact["url"]))
    origin = env.get("LEPTON_WORKSPACE_ORIGIN_URL") or known.get("workspace_origin_url") or ""
    if not origin and "dgxc" in url:
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
    return Access(workspace, url, token, token_env, str(origin), warnings)


def _checked(url: str) -> str:
    parts = urlsplit(url)
    loopback = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme not in ("https", "http") or not parts.hostname or parts.username or parts.query or parts.fragment:
        hint = f"for example {_GATEWAY}my-workspace"
        raise UserError(f"{_without_user(url)} is no address of a workspace", where="workspace_url", hint=hint)
    if parts.scheme == "http" and not loopback:
        raise UserError(f"{url}: a token is not sent without encryption", where="workspace_url", hint="https://…")
    return url.rstrip("/")  # a slash at the end would give //jobs


def _without_user(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//…@", url)


# The record that Lepton's own client keeps --------------------------------------------------------------------------


def _record(env: Mapping[str, str]) -> Path:
    folder = env.get("LEPTON_CACHE_DIR")
    return (Path(folder) if folder else Path(env.get("HOME") or "~").expanduser() / ".cache/lepton") / (
        "workspace_info.yaml"
    )


def _login(env: Mapping[str, str]) -> dict[str, Any]:
    path = _record(env)
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise UserError(f"cannot be read: {reason}", where=str(path), hint="lep login  writes it anew") from None
    from nemotron_launch.config.yaml_reader import parse_plain  # never through the cache: it holds a token

    try:
        read = parse_plain(text, str(path))
    except UserError:
        raise UserError("is no record of Lepton's client", where=str(path), hint="lep login  writes it anew") from None
    return read if isinstance(read, dict) else {}


def _of(login: Mapping[str, Any], workspace: str) -> dict[str, Any]:
    known = login.get("workspaces")
    one = known.get(workspace) if isinstance(known, dict) else None
    return one if isinstance(one, dict) else {}


def _readable(env: Mapping[str, str]) -> tuple[str, ...]:
    path = _record(env)
    try:
        mode = path.stat().st_mode
    except OSError:
        return ()
    if not mode & 0o077:
        return ()
    return (f"{path} holds a token and others can read it (mode {mode & 0o777:o}):  chmod 600 {path}",)
