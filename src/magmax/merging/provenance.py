"""What an output says of its own making: recipe, package version and a digest of every input."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from .._version import __version__
from ..checkpoints.output_paths import METADATA_KEY
from ..errors import escape_controls

DIGEST_CHARACTERS = 32
HUB_ID = re.compile(r"hf://([\w.-]+(?:/[\w.-]+)?)@")
"""The id in the origin of an input, before its commit."""
MAX_DEPTH = 20
"""Lists and maps in one another in a recipe."""


@dataclass(frozen=True)
class Provenance:
    """The origin of an output. The same work on the same inputs always gives the same provenance.

    Attributes:
        recipe: what was done, without paths, times or anything of this machine.
        names: what the inputs are called, in order.
        digests: an xxh3-128 of each input's tensors, in hexadecimal.
        origins: the id and commit of each input that came from the hub, "" for others; or nothing at all.
    """

    recipe: Mapping[str, Any]
    names: Sequence[str]
    digests: Sequence[str]
    origins: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        inputs = [
            {"name": escape_controls(n), "xxh3_128": d} for n, d in zip(self.names, self.digests, strict=True)
        ]  # a path's bytes need not be text, but a header must be
        for entry, origin in zip(inputs, self.origins, strict=False):
            if origin:
                entry["origin"] = origin
        return {"package": f"magmax {__version__}", "recipe": dict(self.recipe), "inputs": inputs}

    def metadata(self) -> dict[str, str]:
        """As it stands in a safetensors header; its length does not depend on the digests."""
        return {METADATA_KEY: json.dumps(self.as_dict(), separators=(",", ":"))}

    def with_blank_digests(self) -> Provenance:
        """Return the provenance with zeros for digests that are not computed yet."""
        return Provenance(self.recipe, self.names, ["0" * DIGEST_CHARACTERS] * len(self.names), self.origins)


def read_provenance(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The provenance in a header's metadata, or None where there is none that `Provenance` may have written."""
    try:
        content: Any = json.loads(metadata[METADATA_KEY])
        inputs = [(entry["name"], entry["xxh3_128"], entry.get("origin", "")) for entry in content["inputs"]]
        texts = [content["package"], *(text for entry in inputs for text in entry)]
        whole = isinstance(content["recipe"], dict) and all(isinstance(text, str) for text in texts)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return cast("dict[str, Any]", content) if whole and _is_shallow(content, MAX_DEPTH) else None


def _is_shallow(content: Any, depth: int) -> bool:
    """Return whether JSON has at most so many lists and maps in one another."""
    if not isinstance(content, dict | list):
        return True
    values = cast("dict[str, Any]", content).values() if isinstance(content, dict) else cast("list[Any]", content)
    return depth > 0 and all(_is_shallow(value, depth - 1) for value in values)


def _as_text(text: str) -> str:
    """Return text that Markdown shows as it is, in one line, with no HTML in it."""
    return re.sub(r"([\\`*\[\]<>&|~])", r"\\\1", escape_controls(text))


def _as_code(text: str) -> str:
    """Return text as code within a line of Markdown; backticks in it do not end it."""
    text = escape_controls(text)
    fence = "`" * _fence_length(text, 1)
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _as_block(text: str, language: str) -> str:
    """Return lines as a block of code in Markdown; backticks in it do not end it."""
    text = "\n".join(map(escape_controls, text.split("\n")))
    fence = "`" * _fence_length(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _fence_length(text: str, least: int) -> int:
    return max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def adapter_card(provenance: Provenance, dtype: str, report: Sequence[str]) -> str:
    """A README for the folder of a merged adapter."""
    return f"""{_front_matter(provenance, "peft", ["lora", "merge", "magmax"])}
# A merged LoRA adapter

Made by magmax {__version__} ({dtype}): `B A ~ scaling_factor * rule(s_t B_t A_t)`, the nearest product of the rank.

{_as_block(json.dumps(provenance.recipe, indent=2), "json")}

{_inputs_table(provenance)}

## What the rank loses

{_as_block(chr(10).join(report), "text")}
"""


def _inputs_table(provenance: Provenance) -> str:
    rows = "\n".join(
        f"| {_as_text(name)} | {_as_code(d)} |" for name, d in zip(provenance.names, provenance.digests, strict=True)
    )
    return f"| input | xxh3-128 of its tensors |\n|---|---|\n{rows}"


def _front_matter(provenance: Provenance, library: str, tags: Sequence[str]) -> str:
    """The head of a card, which the hub reads: the models of the hub that were merged, the library that loads it.

    Only ids of the hub are named, since the hub takes every name in it for one.
    """
    ids = [match[1] for origin in provenance.origins for match in HUB_ID.finditer(origin)]
    lines = ["base_model:", *(f"- {name}" for name in dict.fromkeys(ids)), "base_model_relation: merge"] if ids else []
    lines += [f"library_name: {library}"] if library else []
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def model_card(
    provenance: Provenance, dtypes: Sequence[str], carried: Iterable[str], partly: Mapping[str, str], library: str = ""
) -> str:
    """A README for a merged model's folder; `partly` says of which tensors what part was merged."""
    unmerged_list = "\n".join(f"* {_as_code(key)}" for key in sorted(carried)) or "None: every tensor was merged."
    parts = "\n".join(f"* {_as_code(key)}: {_as_text(part)}" for key, part in sorted(partly.items()))
    heading = f"\n## Tensors that were merged in part\n\n{parts}\n" if parts else ""
    return f"""{_front_matter(provenance, library, ["merge", "magmax"])}
# A merged model

Made by magmax {__version__} ({", ".join(dtypes)}): `base + scaling_factor * rule(task vectors)`.

{_as_block(json.dumps(provenance.recipe, indent=2), "json")}

{_inputs_table(provenance)}

## Tensors that were not merged

{unmerged_list}
{heading}"""
