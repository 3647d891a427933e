"""Any checkpoint, whole pickled models among them, written as safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..checkpoints import TensorSpec, open_checkpoint
from ..checkpoints.base import WeightLayout
from ..checkpoints.lora.adapted_model import split_base_and_adapter
from ..checkpoints.output_paths import OutputPath
from ..checkpoints.quantized import refuse_quantized
from ..checkpoints.remote.hub import locate_model
from ..checkpoints.renamed import Renaming
from ..checkpoints.torch.pickled_models import PickledModel
from ..errors import MagMaxError
from .job import Job, provenance_file
from .merge_job import base_metadata
from .model_files import copy_notes, model_files
from .model_names import default_names
from .pipeline import InputBlock, Kernel
from .provenance import Provenance
from .reader import cast_units

WRAPPER_PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""
SAFETENSORS_SUFFIXES = (".safetensors", ".json")


@dataclass(frozen=True)
class CopyKernel(Kernel):
    """Every block as it is; a weight that an adapter tunes, in the type of its base."""

    out: Mapping[str, TensorSpec]

    def __call__(self, block: InputBlock) -> list[NDArray[Any]]:
        return [cast_units(block.read(0), block.key, block.spec(0).dtype, self.out[block.key].dtype)]


def convert_job(old: str, out: str, part: str = "", renaming: Renaming | None = None, inert: Sequence[str] = ()) -> Job:
    """The work of writing a checkpoint as safetensors, every tensor byte for byte and tied ones once.

    The weights that an adapter tunes are rounded to the types of its base, whose config and tokenizer go with them.

    Args:
        old: a file of torch's that holds a state dict, a module or any object that holds one: nothing in it is run, see
            `PickledModel`, which `part` and `inert` are for; or whatever `open_checkpoint` opens.
        out: a `.safetensors` file, or a folder.
        renaming: what its tensors are called in the output.

    Raises:
        MagMaxError: what cannot be read; options that are for pickles, given for something else.
    """
    located = None if split_base_and_adapter(old) else locate_model(old)
    if located and located.path.is_file() and located.path.suffix not in SAFETENSORS_SUFFIXES:
        source = PickledModel(located.path, located.label, part, inert=inert)
        source.origin, source.layout = located.origin, WeightLayout.of_file(located.path.name)
        refuse_quantized(source)
    elif part or inert:
        raise MagMaxError(f"{old}: --part and --inert are for pickles, and this is none")
    else:
        source = open_checkpoint(old)
    renaming = renaming or Renaming()
    source = renaming.apply(source)
    for prefix in WRAPPER_PREFIXES:
        if source.specs and all(name.startswith(prefix) for name in source.specs):
            source.notes.append(f"{old}: every name begins with {prefix!r}; --strip {prefix} takes it off")

    choices = {"part": part, "strip": renaming.strip, "rename": dict(renaming.rename)}

    def beside(provenance: Provenance, digests: Mapping[str, str]) -> dict[str, bytes | Path]:
        folder = source.small_files_folder()
        copied = model_files(folder, None, source.layout.modules) if folder else {}
        return {**copied, **provenance_file(provenance, digests)}

    target = OutputPath.parse(out)
    source.notes += copy_notes(source, target)
    return Job(
        target=target,
        inputs=[source],
        names=default_names([source.source]),
        recipe={"convert": {name: value for name, value in choices.items() if value}},
        specs=source.output_specs,
        kernel=CopyKernel(source.output_specs),
        unmerged={},
        metadata=base_metadata(source),
        small_files=beside,
        companions=source,
        stem=source.layout.stem,
        modules=source.layout.modules,
    )
