"""Whether a Lepton workspace has what a job asks for: node groups, a shape, secrets, registry logins."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron_launch.backends.lepton_api import Answer, Api
from nemotron_launch.errors import UserError
from nemotron_launch.frozen import field, frozen

_MOST_NAMES = 30


@frozen
class Found:
    """ids: of the node groups, by the name that the job gives. problems: what is missing. notes: what stays open."""

    ids: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[UserError, ...] = ()
    notes: tuple[str, ...] = ()


def look(
    api: Api, *, groups: Sequence[str] = (), shape: str = "", secrets: Sequence[str] = (), logins: Sequence[str] = ()
) -> Found:
    """Ask the workspace. A list that the token may not read is a note. Unreachable, Answer: as of the API."""
    ids: dict[str, str] = {}
    problems: list[UserError] = []
    notes: list[str] = []
    if groups:
        ids = _groups(groups, api.node_groups(), problems)
    else:
        api.workspace()  # is the token good?
    if shape:
        known = _readable(api.shapes, "shapes", notes)
        names = [name for one in known or [] for name in _names(one)]
        if names and shape not in names:
            problems.append(_unknown(shape, "shape of this workspace", "resource_shape", names))
    if secrets:
        have = _readable(api.secrets, "secrets", notes)
        for name in sorted(set(secrets)) if have is not None else ():
            if name not in have:
                problem = _unknown(name, "secret of this workspace", "secrets", have)
                hint = f"{problem.hint}\nto create it:  lep secret create -n {name} -v …"
                problems.append(UserError(problem.message, where="secrets", hint=hint))
    if logins:
        _logins(api, logins, problems, notes)
    return Found(ids, tuple(problems), tuple(notes))


def look_for_profile(api: Api, data: Mapping[str, Any], secrets: Sequence[str]) -> Found:
    """Ask for all that a profile names; notes say what was found. secrets: its references."""
    groups = data.get("node_group") or ()
    groups = [groups] if isinstance(groups, str) else list(groups)
    logins = list(data.get("image_pull_secrets") or ())
    found = look(api, groups=groups, shape=str(data.get("resource_shape") or ""), secrets=secrets, logins=logins)
    notes = [f"node group {name} is {id_}" for name, id_ in found.ids.items()]
    quota = _readable(api.workspace, "quota", [])
    quota = quota.get("resource_quota") if isinstance(quota, dict) else None
    if isinstance(quota, dict) and isinstance(quota.get("limit"), dict) and isinstance(quota.get("used"), dict):
        limit, used = (quota[key].get("accelerator_num") for key in ("limit", "used"))
        if limit:
            notes.append(f"GPUs of the workspace: {used or 0:g} of {limit:g} in use")
    return Found(found.ids, found.problems, (*notes, *found.notes))


def _groups(wanted: Sequence[str], have: Sequence[Mapping[str, Any]], problems: list[UserError]) -> dict[str, str]:
    ids = [str(_metadata(one).get("id") or "") for one in have]
    found: dict[str, str] = {}
    for name in wanted:
        named = [str(_metadata(one).get("id")) for one in have if _metadata(one).get("name") == name]
        if name in ids:
            found[name] = name
        elif len(named) == 1:
            found[name] = named[0]
        elif named:
            hint = f"name one by its id: {', '.join(named)}"
            problems.append(UserError(f"{len(named)} node groups are called {name}", where="node_group", hint=hint))
        else:
            known = [str(_metadata(one).get("name") or _metadata(one).get("id")) for one in have]
            problems.append(_unknown(name, "node group of this workspace", "node_group", known))
    return found


def _logins(api: Api, wanted: Sequence[str], problems: list[UserError], notes: list[str]) -> None:
    """The API counts the registry logins and does not name them."""
    workspace = _readable(api.workspace, "registry logins", notes)
    workloads = workspace.get("workloads") if isinstance(workspace, dict) else None
    count = workloads.get("num_image_pull_secrets") if isinstance(workloads, dict) else None
    if count == 0:
        hint = "add it in the dashboard: Settings, Registries"
        message = f"{wanted[0]} is no registry login of this workspace: it has none"
        problems.append(UserError(message, where="image_pull_secrets", hint=hint))
    elif count is not None:
        notes.append(
            f"the workspace has {count} registry logins; whether {', '.join(wanted)} is one the API does not say"
        )


def _readable(ask: Any, what: str, notes: list[str]) -> Any:
    try:
        return ask()
    except Answer as error:
        if error.status not in (403, 404, 405):
            raise
        notes.append(f"the workspace's {what} cannot be read with this token")
        return None


def _unknown(name: str, what: str, where: str, known: Sequence[str]) -> UserError:
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]}?  " if close else ""
    shown = ", ".join(names[:_MOST_NAMES]) + (
        f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    )
    return UserError(f"{name} is no {what}", where=where, hint=f"{hint}There are {shown or 'none'}")


def _names(shape: Mapping[str, Any]) -> list[str]:
    spec = shape.get("spec")
    found = [
        _metadata(shape).get("id"),
        _metadata(shape).get("name"),
        spec.get("name") if isinstance(spec, dict) else None,
    ]
    return [str(name) for name in found if name]


def _metadata(one: Mapping[str, Any]) -> Mapping[str, Any]:
    found = one.get("metadata")
    return found if isinstance(found, dict) else {}
