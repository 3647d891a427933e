"""Experiments read from YAML files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import missing_extra
from ..yaml_documents import assign, read_document, validate

if TYPE_CHECKING:
    from .experiment import Experiment


def read_experiment(file: str, assignments: Sequence[str] = (), allow_code: bool = False) -> Experiment:
    """An experiment from its file, with assignments such as fit.steps=20 put in.

    With `allow_code`, its names may mean functions in Python files beside it.

    Raises MagMaxError for YAML that cannot be read, unknown keys (with line and nearest key) and unfit values.
    """
    try:
        import safetensors  # noqa: F401
        import torch  # noqa: F401

        from .experiment import Experiment, FitOptions
    except ImportError as error:
        raise missing_extra(f"learning needs {error.name}", "train") from error
    document = read_document(file)
    for word in assignments:
        document = document._replace(content=assign(document.content, word))

    def known(parts: Sequence[str]) -> list[str]:
        return list((Experiment if len(parts) == 1 else FitOptions).model_fields)

    experiment = validate(Experiment, document, "an experiment", known)
    return (experiment.allow_code(Path(file).parent) if allow_code else experiment).check()
