"""The models that are merged: seeded, synthetic, in realistic shapes, made once under `.work/data`."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from harness.places import DATA
from harness.safetensors_stream import Shapes, StreamWriter, tensor_bytes
from harness.shapes import Llama, ViT

SEED = 20240707
CHUNK_ELEMENTS = 1 << 21
BASE_SPREAD = 0.02
TASK_SPREAD = 0.0005
SPARE_BYTES = 8 << 30


@dataclass(frozen=True)
class Workload:
    """`tasks` models fine-tuned from one base, in float32 ("F32") or bfloat16 ("BF16")."""

    name: str
    architecture: ViT | Llama
    dtype: str
    tasks: int
    shards: int = 1

    @property
    def folder(self) -> Path:
        return DATA / self.name

    def shapes(self) -> Shapes:
        return self.architecture.shapes()

    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes().values())

    def model_bytes(self) -> int:
        return sum(tensor_bytes(shape, self.dtype) for shape in self.shapes().values())

    def model_folders(self) -> list[Path]:
        return [self.folder / name for name in ("base", *(f"m{i + 1}" for i in range(self.tasks)))]

    def inputs(self) -> list[Path]:
        """Base first: the files of one-file models, the folders of sharded ones."""
        if self.shards > 1:
            return self.model_folders()
        return [folder / "model.safetensors" for folder in self.model_folders()]

    def output_name(self) -> str:
        return "merged" if self.shards > 1 else "merged.safetensors"


def weight_files(path: Path) -> list[Path]:
    """The .safetensors files of a model given as a file or as a folder."""
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to the upper 16 bits, rounded to nearest even (finite values only)."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def generate_chunks(w: Workload, tensor: int, size: int) -> Iterator[list[np.ndarray]]:
    """Chunks of one tensor, base first, then every task: base + small noise, so that ties occur."""
    sources = [np.random.default_rng((SEED, model, tensor)) for model in range(w.tasks + 1)]
    encode = to_bfloat16 if w.dtype == "BF16" else np.asarray
    for start in range(0, size, CHUNK_ELEMENTS):
        count = min(CHUNK_ELEMENTS, size - start)
        base = sources[0].standard_normal(count, dtype=np.float32) * np.float32(BASE_SPREAD)
        noises = (source.standard_normal(count, dtype=np.float32) for source in sources[1:])
        yield [encode(base), *(encode(base + noise * np.float32(TASK_SPREAD)) for noise in noises)]


def split_shards(w: Workload) -> dict[str, Shapes]:
    """The tensors in order, cut into files of about the same number of bytes."""
    shards: list[Shapes] = [{} for _ in range(w.shards)]
    done, total = 0, w.model_bytes()
    for name, shape in w.shapes().items():
        shards[done * w.shards // total][name] = shape
        done += tensor_bytes(shape, w.dtype)
    if w.shards == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05}-of-{w.shards:05}.safetensors": shapes for number, shapes in enumerate(shards, 1)}


def write_indices(w: Workload) -> None:
    """Says in each model's folder which file has which tensor."""
    where = {tensor: file for file, shapes in split_shards(w).items() for tensor in shapes}
    index = json.dumps({"metadata": {"total_size": w.model_bytes()}, "weight_map": where}, indent=2)
    for folder in w.model_folders():
        (folder / "model.safetensors.index.json").write_text(index)


def create_workload(w: Workload, spare_bytes: int = SPARE_BYTES) -> None:
    """Writes the workload unless it is there already; refuses where the disk is too small."""
    marker = w.folder / "made.json"
    made = json.dumps(asdict(w))
    if marker.exists() and marker.read_text() == made:
        return
    shutil.rmtree(w.folder, ignore_errors=True)
    DATA.mkdir(parents=True, exist_ok=True)
    need, free = w.model_bytes() * (w.tasks + 1), shutil.disk_usage(DATA).free
    if free < need + spare_bytes:
        spare = f"{spare_bytes / 1e9:.0f} to spare"
        raise SystemExit(f"({w.name}) needs {need / 1e9:.1f} GB and {spare}; {free / 1e9:.1f} GB are free")
    dtype = {"F32": "float32", "BF16": "bfloat16"}[w.dtype]
    for folder in w.model_folders():
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(w.architecture.config() | {"dtype": dtype}, indent=2))
    _write_weights(w)
    marker.write_text(made)


def _write_weights(w: Workload) -> None:
    tensor = 0
    for file, shapes in split_shards(w).items():
        with ExitStack() as stack:
            opened = [StreamWriter(folder / file, shapes, w.dtype) for folder in w.model_folders()]
            writers = [stack.enter_context(writer) for writer in opened]
            for shape in shapes.values():
                for chunks in generate_chunks(w, tensor, int(np.prod(shape))):
                    for writer, chunk in zip(writers, chunks, strict=True):
                        writer.write(chunk)
                tensor += 1
    if w.shards > 1:
        write_indices(w)


VIT_SMALL = ViT(hidden=256, layers=12, heads=4, patch=32)
VIT_BASE = ViT(hidden=768, layers=12, heads=12, patch=32)
VIT_LARGE = ViT(hidden=1024, layers=24, heads=16, patch=16)
LLAMA = Llama(hidden=2048, layers=22, heads=32, key_heads=4, inner=5632, vocabulary=32000)
LLAMA_LARGE = Llama(hidden=2560, layers=28, heads=32, key_heads=4, inner=6912, vocabulary=32000)

VIT_10M = Workload("10m", VIT_SMALL, "F32", tasks=8)
VIT_88M = Workload("a", VIT_BASE, "F32", tasks=8)
VIT_300M = Workload("300m", VIT_LARGE, "BF16", tasks=8)
LLAMA_1100M = Workload("b", LLAMA, "BF16", tasks=4, shards=2)
MEMORY_SERIES = ((VIT_10M, (2, 8)), (VIT_88M, (2, 8)), (VIT_300M, (2, 8)), (LLAMA_1100M, (2, 4)))
