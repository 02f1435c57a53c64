"""References to container images, as a person writes them and as enroot wants them, and where their files lie."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Mapping
from typing import Any

from nemotron_launch.errors import UserError
from nemotron_launch.frozen import frozen
from nemotron_launch.quoting import path

_SCHEME = re.compile(r"(docker|dockerd|podman|docker-archive|oci-archive|oci):(?://)?(.+)", re.DOTALL)
_ARCHIVES = ("docker-archive", "oci-archive", "oci")
_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@#+-]*")
_LONGEST = 200  # characters of a file name; file systems stop at 255


@frozen
class Image:
    """A container image. uri: what enroot imports; empty for one that is a file or a folder already: then path."""

    uri: str = ""
    path: str = ""

    @property
    def squash_name(self) -> str:
        """The name of the squash file that an import makes: nvcr.io+nvidia+nemo-rl+v0.6.0.sqsh."""
        scheme, _, rest = self.uri.partition("://")
        stem = re.sub(r"[^A-Za-z0-9._-]+", "+", rest if scheme == "docker" else f"{scheme}+{rest}").strip("+")
        if len(stem) > _LONGEST:
            stem = f"{stem[: _LONGEST - 9]}-{hashlib.sha256(self.uri.encode()).hexdigest()[:8]}"
        return f"{stem}.sqsh"


def parse(reference: str, key: str = "image") -> Image:
    """The image that a reference names.

    `nvcr.io/nvidia/nemo-rl:v0.6.0` → docker://nvcr.io#nvidia/nemo-rl:v0.6.0 (enroot sets the registry apart with `#`);
    `ubuntu:24.04` → docker://ubuntu:24.04; dockerd:// and podman:// stay; docker-archive:, oci-archive: and oci: name a
    path on the cluster; an absolute path is a squash file or a folder as it is.
    """
    if reference.startswith("/"):
        return Image(path=path(reference, key))
    scheme, rest = "docker", reference
    if found := _SCHEME.fullmatch(reference):
        scheme, rest = found.groups()
    elif "://" in reference:
        raise UserError(
            f"{reference}: enroot does not know this scheme",
            where=key,
            hint="docker://, dockerd://, podman://, docker-archive:/path, oci-archive:/path, or a .sqsh file",
        )
    if scheme in _ARCHIVES:
        return Image(uri=f"{scheme}://{path(rest, key)}")
    if rest.endswith(".sqsh"):
        hint = "give its whole path on the cluster: /lustre/images/nemo-rl.sqsh"
        raise UserError(f"{reference}: a squash file needs an absolute path", where=key, hint=hint)
    if not _REFERENCE.fullmatch(rest):
        raise UserError(f"{reference!r} is no image reference", where=key, hint="like nvcr.io/nvidia/nemo-rl:v0.6.0")
    if scheme == "docker" and "#" not in rest:
        registry, slash, name = rest.partition("/")
        if slash and ("." in registry or ":" in registry or registry == "localhost"):
            rest = f"{registry}#{name}"
    return Image(uri=f"{scheme}://{rest}")


def folder(options: Mapping[str, Any], home: str) -> str:
    """Where a profile keeps imported images. options: its keys; home: its remote_job_dir."""
    return path(options.get("image_dir") or posixpath.join(home, "images"), "image_dir")
