"""Models and tokenizers in the Hugging Face layout, loaded without any code that their folder brings or names.

A config.json may name Python files of its folder (`auto_map`) and kernels of other repositories for its attention.
transformers asks on the terminal whether to run the first, and downloads and runs the second.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import MagMaxError


def load_config(place: str | Path, **options: Any) -> Any:
    """Load a configuration. Raises MagMaxError for one that names code, and what transformers raises."""
    from transformers import AutoConfig

    refuse_kernels(place)
    return AutoConfig.from_pretrained(place, trust_remote_code=False, **options)


def load_model(kind: Any, place: str | Path, **options: Any) -> Any:
    """Load a model of this class of transformers; of pickled weights only tensors are read.

    Raises MagMaxError for a configuration that names code, and what transformers raises.
    """
    refuse_kernels(place)
    return kind.from_pretrained(place, trust_remote_code=False, weights_only=True, **options)


def load_tokenizer(place: str | Path, **options: Any) -> Any:
    """Load a tokenizer. Raises what transformers raises."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)


def refuse_kernels(place: str | Path) -> None:
    """Raise MagMaxError where a config.json, of a folder or of the hub, asks for a kernel of a repository."""
    from transformers.utils.hub import cached_file

    try:
        content = json.loads(Path(str(cached_file(place, "config.json"))).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong with it
    for key, value in _implementations(content):
        if "/" in value:
            raise MagMaxError(
                f"{place}: its config.json has {key}: {value!r}, a kernel of another repository, which is code; magmax "
                f"runs none of it: remove {key} from config.json"
            )


def _implementations(content: Any) -> Iterator[tuple[str, str]]:
    """The implementations, such as attn_implementation, that a configuration and the configurations in it name."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if key.endswith(("_implementation", "_implementation_internal")):
            yield from ((key, str(name)) for name in (value.values() if isinstance(value, dict) else [value]))
        else:
            yield from _implementations(value)
