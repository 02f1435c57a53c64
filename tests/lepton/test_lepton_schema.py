"""Every job that is rendered for Lepton is one for the official SDK too; its schema lies beside this file."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

RENDERINGS = Path(__file__).resolve().parents[1] / "renderings"
SCHEMA = json.loads(Path(__file__).with_name("sdk_job.schema.json").read_text())  # of the SDK's LeptonJob
JOBS = sorted(RENDERINGS.glob("*lepton*/job.json"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.parent.name)
def test_a_rendered_job_is_one_of_the_sdks(path: Path) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(path.read_text()))


def test_the_schema_can_say_no() -> None:
    job = json.loads(JOBS[0].read_text())
    job["spec"]["completions"] = "many"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(job)
