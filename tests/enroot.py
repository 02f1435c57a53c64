"""A stand-in for enroot, which Debian does not have: records how it is called and makes a real squash file."""

from __future__ import annotations

from pathlib import Path

SCRIPT = """#!/bin/bash
here=$(dirname "$0")
printf '%s\\n' "$*" >> "$here/calls"
if [[ $1 == digest ]]; then
    cat "$here/digest" 2> /dev/null
    exit
fi
if [[ -e $here/refuses ]]; then
    echo "[INFO] Querying registry for permission grant" >&2
    echo "[ERROR] URL https://nvcr.io/proxy_auth returned error code: 401 Unauthorized" >&2
    exit 1
fi
mkdir "$here/busy" || { echo "[ERROR] two at a time" >&2; exit 1; }
trap 'rmdir "$here/busy"' EXIT
sleep "$(cat "$here/slow" 2> /dev/null || echo 0)"
[[ $2 == --output && ! -e $3 ]] || exit 1
mksquashfs "$here" "$3" -quiet -no-progress -all-root > /dev/null
"""


class Enroot:
    """Its folder, to be put in front of PATH, and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "enroot").write_text(SCRIPT)
        (folder / "enroot").chmod(0o755)
        self.means("sha256:" + "1" * 64)

    def means(self, digest: str) -> None:
        """What every tag means from now on."""
        (self.folder / "digest").write_text(f"{digest}\n")

    def refuses(self) -> None:
        (self.folder / "refuses").touch()

    def takes(self, seconds: float) -> None:
        (self.folder / "slow").write_text(str(seconds))

    @property
    def imports(self) -> list[list[str]]:
        """The arguments of each import."""
        calls = self.folder / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [line.split() for line in lines if line.startswith("import ")]
