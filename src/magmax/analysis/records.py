"""What a study gives: tidy records, what they mean, and the same numbers over seeds."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.output_paths import replace_file

Record = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """One analysis.

    Attributes:
        kind: its name at the command line.
        title: a few words.
        definition: what is counted or measured, exactly.
        records: tidy: one number of interest a record, the same keys in all; NaN where there is none.
        inputs: name -> digest of every checkpoint that the numbers come from.
        findings: what the numbers say, in sentences.
    """

    kind: str
    title: str
    definition: str
    records: Sequence[Record]
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    findings: Sequence[str] = ()

    def as_csv(self) -> str:
        """The records, a line each; empty where there is no number."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.records[0]) if self.records else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: "" if v is None else v for k, v in record.items()} for record in map(json_safe, self.records)
        )
        return text.getvalue()

    def as_json(self) -> str:
        """Everything, the records included; null where there is no number."""
        content = {
            "study": self.kind,
            "title": self.title,
            "definition": self.definition,
            "findings": list(self.findings),
            "inputs": dict(self.inputs),
            "records": [json_safe(record) for record in self.records],
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """KIND.csv and KIND.json, each whole or not at all."""
        files = {folder / f"{self.kind}.csv": self.as_csv(), folder / f"{self.kind}.json": self.as_json()}
        for path, text in files.items():
            replace_file(path, text.encode())
        return list(files)


def json_safe(record: Record) -> Record:
    """Without NaN and infinity, which JSON has not: None instead."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


@dataclass(frozen=True)
class SeedBand:
    """A number over seeds: mean, standard deviation (n - 1; 0 for a single seed) and how many."""

    mean: float
    std: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.std

    @property
    def high(self) -> float:
        return self.mean + self.std

    @classmethod
    def from_values(cls, values: Sequence[float]) -> SeedBand:
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return cls(math.nan, math.nan, 0)
        return cls(float(np.mean(finite)), float(np.std(finite, ddof=1)) if len(finite) > 1 else 0.0, len(finite))


def aggregate(records: Sequence[Record], by: Sequence[str], value: str) -> dict[tuple[Any, ...], SeedBand]:
    """The mean and spread of `value` over all records alike in `by`, in the order they come.

    >>> aggregate([{"k": 1, "v": 0.5}, {"k": 1, "v": 0.7}, {"k": 2, "v": 0.1}], ["k"], "v")[(2,)]
    SeedBand(mean=0.1, std=0.0, n=1)
    """
    groups: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in by), []).append(record[value])
    return {key: SeedBand.from_values(values) for key, values in groups.items()}
