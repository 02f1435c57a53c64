"""What the tests of environments share: environments of a composed config, closed in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron_launch.config.compose import compose
from nemotron_launch.trainer.environments import Rollout, Score, open_environments
from nemotron_launch.trainer.environments.router import Environments

STEP = Path(__file__).parents[3] / "steps/rl/nemo_rl/rlvr"

Open = Callable[..., Environments]
Scores = Callable[..., list[Score]]


@pytest.fixture(scope="session")
def defaults() -> dict[str, Any]:
    """What the step's schema and its config say where nothing else does."""
    composed = compose(STEP / "config/default.yaml", ["data.default.env_name=math"], schema=STEP / "schema.json")
    return composed.data


@pytest.fixture
def opened(defaults: dict[str, Any], tmp_path: Path) -> Iterator[Open]:
    """Opens environments; keywords are sections of `env` to set: opened(math={"timeout": 1})."""
    made: list[Environments] = []

    def opened(**env: Any) -> Environments:
        sections = {
            name: {**defaults["env"][name], **value} if isinstance(value, dict) else value
            for name, value in env.items()
        }
        config = {**defaults, "output_dir": str(tmp_path), "env": {**defaults["env"], **sections}}
        made.append(open_environments(config))
        return made[-1]

    yield opened
    for environments in made:
        environments.close()


@pytest.fixture
def scored(opened: Open) -> Scores:
    """The scores of texts, as answers to one row."""

    def scored(row: dict[str, Any], *texts: str) -> list[Score]:
        return opened().score([[Rollout([], text, row) for text in texts]])[0]

    return scored
