"""Rows that only name a row of a public dataset, as NVIDIA's blends carry what they may not copy, filled in.

Such a row has `_hf_placeholder: {"row": 17, "question_template": …}`, and its column `dataset` names the dataset. The
question comes back with its template around it: `{"prefix": …, "suffix": …}`, or a text with `{question}` in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron_launch.data_prep.blend import Reference
from nemotron_launch.data_prep.rows import value_at
from nemotron_launch.trainer.data.prompt_rows import GYM_KEY
from nemotron_launch.trainer.data.sources import BadRow


class Unresolved(Exception):
    """A row names a dataset whose files nobody has given yet."""

    def __init__(self, dataset: str) -> None:
        super().__init__(dataset)
        self.dataset = dataset


class Placeholders:
    """Fills rows in. datasets: for a reference's name the Arrow files of its rows, which are mapped, not read."""

    def __init__(self, references: Mapping[str, Reference], datasets: Mapping[str, Sequence[str]]) -> None:
        self._references = references
        self._files = datasets
        self._tables: dict[str, Any] = {}

    def filled(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with question, right answer and request. Raises BadRow, and Unresolved where the dataset is open."""
        named = row["_hf_placeholder"]
        name = row.get("dataset")
        if not isinstance(named, Mapping) or not isinstance(named.get("row"), int):
            raise BadRow("_hf_placeholder names no row")
        if not isinstance(name, str) or name not in self._references:
            raise BadRow(f"_hf_placeholder: the blend's placeholders do not say what dataset {name} is")
        reference, table = self._references[name], self._table(name)
        if not 0 <= named["row"] < len(table):
            raise BadRow(f"_hf_placeholder: {reference.path} has no row {named['row']}, only {len(table)}")
        (found,) = table.slice(named["row"], 1).to_pylist()
        question = value_at(found, reference.question.split("."))
        if not isinstance(question, str):
            raise BadRow(f"_hf_placeholder: a row of {reference.path} has no text at {reference.question}")
        question = _templated(question, named.get("question_template"))
        answer = _unpacked(value_at(found, reference.answer.split(".")))
        rest = {key: value for key, value in row.items() if key != "_hf_placeholder"}
        params = row.get(GYM_KEY) if isinstance(row.get(GYM_KEY), Mapping) else {}
        request = {**(params or {}), "input": [{"role": "user", "content": question}]}
        return {**rest, "question": question, "expected_answer": answer, GYM_KEY: request}

    def _table(self, name: str) -> Any:
        if name not in self._files:
            raise Unresolved(name)
        if name not in self._tables:
            import pyarrow

            tables = [pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all() for path in self._files[name]]
            self._tables[name] = pyarrow.concat_tables(tables)
        return self._tables[name]


def _templated(question: str, template: Any) -> str:
    if isinstance(template, Mapping):
        return f"{template.get('prefix') or ''}{question}{template.get('suffix') or ''}"
    if isinstance(template, str) and "{question}" in template:
        return template.replace("{question}", question)
    return question


def _unpacked(answer: Any) -> Any:
    """Skywork's answers are lists written as JSON; of one answer, that."""
    if isinstance(answer, str) and answer.startswith("["):
        try:
            listed = json.loads(answer)
        except ValueError:
            return answer
        return listed[0] if isinstance(listed, list) and len(listed) == 1 else listed
    return answer
