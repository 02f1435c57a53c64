"""A preparation that is killed and started again leaves the same bytes; and its memory does not grow with its input."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.data_prep.preparations import contents, prepare_apart, run, write_blend, write_rows

UNIT = 20_000
SETTINGS = ("target=dpo", "num_workers=2", "num_shards_per_split=6", "validation_size=0.05", "dedup.near=false")


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 0.6 MB in two files: some thirty units."""
    folder = tmp_path_factory.mktemp("blend")
    for name, first in (("a", 0), ("b", 1900)):
        rows = [
            {"prompt": f"number {i} of many" + " and more" * (i % 9), "chosen": f"yes {i}" * 9, "rejected": f"no {i}"}
            for i in range(first, first + 2000)
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    return write_blend(folder, [{"path": "?.jsonl", "weight": 1.5}])


@pytest.fixture(scope="module")
def expected(blend: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed preparation leaves."""
    output = tmp_path_factory.mktemp("expected")
    run(blend, output, *SETTINGS, "num_workers=1")
    return contents(output)


#: In the order in which a preparation comes to them.
MOMENTS = (
    "reading:1",
    "reading:5",
    "reading:12",
    "comparing:1",
    "comparing:3",
    "writing:2",
    "publishing:1",
    "publishing:4",
)


@pytest.mark.slow
def test_killed_again_and_again_and_started_again_it_leaves_the_same_bytes(
    tmp_path: Path, blend: Path, expected: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    for moment in MOMENTS:
        # Its workers have its pipes too: that this returns says that they are gone as well.
        killed = prepare_apart(tmp_path, blend, output, *SETTINGS, unit=UNIT, at=f"{moment}:{signal.SIGKILL}")
        assert (moment, killed.returncode) == (moment, -signal.SIGKILL)
        assert not (output / "manifest.json").exists()
    again = prepare_apart(tmp_path, blend, output, *SETTINGS, unit=UNIT)
    assert again.returncode == 0, again.stderr
    assert contents(output) == expected
    assert not (output / ".work").exists()


def test_asked_to_stop_it_says_so_and_goes_on_later(tmp_path: Path, blend: Path, expected: dict[str, bytes]) -> None:
    output = tmp_path / "out"
    stopped = prepare_apart(tmp_path, blend, output, *SETTINGS, unit=UNIT, at=f"reading:3:{signal.SIGTERM}")
    assert stopped.returncode == 85
    assert stopped.stderr.splitlines()[-1] == "stopped by SIGTERM: start the same command again to go on"
    again = prepare_apart(tmp_path, blend, output, *SETTINGS, unit=UNIT)
    assert again.returncode == 0 and "going on with what an earlier attempt has done" in again.stderr
    assert contents(output) == expected


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """Twelve times the input, 45 MB more of it, may take what its rows' numbers take, and no more."""
    peaks = []
    for size in (4, 50):
        file = tmp_path / f"{size}.jsonl"
        with file.open("w") as stream:
            for i in range(size * 1000):
                words = " ".join(f"word{(i * 31 + j * j) % 9973}" for j in range(110))
                stream.write(json.dumps({"prompt": f"{i} {words}", "chosen": f"yes {i}", "rejected": "no"}) + "\n")
        assert file.stat().st_size > size * 1_000_000
        blend = write_blend(tmp_path / str(size), [{"path": str(file)}])
        done = prepare_apart(tmp_path, blend, tmp_path / f"out-{size}", "target=dpo", "dedup.near=false", unit=1 << 20)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 15, f"{peaks} MiB"
