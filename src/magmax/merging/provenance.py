"""What an output says of its own making: recipe, package version and a digest of every input."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from .._version import __version__

METADATA_KEY = "magmax"
DIGEST_CHARACTERS = 32
HUB_ID = re.compile(r"hf://([\w.-]+(?:/[\w.-]+)?)@")
"""The id in the origin of an input, before its commit."""


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
        inputs = [{"name": n, "xxh3_128": d} for n, d in zip(self.names, self.digests, strict=True)]
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
    """The provenance in a header's metadata, or None where there is none."""
    try:
        content: Any = json.loads(metadata[METADATA_KEY])
    except (KeyError, ValueError):
        return None
    return cast("dict[str, Any]", content) if isinstance(content, dict) else None


def adapter_card(provenance: Provenance, dtype: str, report: Sequence[str]) -> str:
    """A README for the folder of a merged adapter."""
    table = "\n".join(report)
    return f"""{_front_matter(provenance, "peft", ["lora", "merge", "magmax"])}
# A merged LoRA adapter

Made by magmax {__version__} ({dtype}): `B A ~ scaling_factor * rule(s_t B_t A_t)`, the nearest product of the rank.

```json
{json.dumps(provenance.recipe, indent=2)}
```

{_inputs_table(provenance)}

## What the rank loses

```text
{table}
```
"""


def _inputs_table(provenance: Provenance) -> str:
    rows = "\n".join(f"| {name} | `{d}` |" for name, d in zip(provenance.names, provenance.digests, strict=True))
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
    unmerged_list = "\n".join(f"* `{key}`" for key in sorted(carried)) or "None: every tensor was merged."
    parts = "\n".join(f"* `{key}`: {part}" for key, part in sorted(partly.items()))
    heading = f"\n## Tensors that were merged in part\n\n{parts}\n" if parts else ""
    recipe = json.dumps(provenance.recipe, indent=2)
    return f"""{_front_matter(provenance, library, ["merge", "magmax"])}
# A merged model

Made by magmax {__version__} ({", ".join(dtypes)}): `base + scaling_factor * rule(task vectors)`.

```json
{recipe}
```

{_inputs_table(provenance)}

## Tensors that were not merged

{unmerged_list}
{heading}"""
