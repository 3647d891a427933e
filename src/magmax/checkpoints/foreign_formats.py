"""Files and folders of models that are not read here: recognised, and named with what to give instead."""

from __future__ import annotations

from pathlib import Path

HEAD_BYTES = 64
FILE_STARTS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository, or "
    "download the file",
    b"GGUF": "is a GGUF file, made for inference: merge the safetensors that it was made from, and convert the result",
    b"GGML": "is a GGML file, made for inference: merge the safetensors that it was made from, and convert the result",
    b"\x89HDF": "is an HDF5 file, as Keras writes: load it with transformers (from_tf=True) and save it with "
    "save_pretrained",
    b"PK\x03\x04": "is a zip archive; if torch.save wrote it, name it .pt",
    b"\x80\x02": "is a pickle; if torch.save wrote it, name it .pt",
    b"\x1f\x8b": "is compressed by gzip: unpack it first",
    b"<!DOCTYPE": "is a web page, as a download without access leaves: log in and download it again",
    b"<html": "is a web page, as a download without access leaves: log in and download it again",
    b"{": "is text in JSON: give the weights, not their description",
}
FLAX = "are weights of Flax: load them with transformers (from_flax=True) and save them with save_pretrained"
TENSORFLOW = "are weights of TensorFlow: load them with transformers (from_tf=True) and save them with save_pretrained"
ONNX = "are of ONNX, made for inference: merge the safetensors that they were made from, and export the result"
SUFFIXES = {
    ".gguf": "are GGUF, made for inference: merge the safetensors that they were made from, and convert the result",
    ".msgpack": FLAX,
    ".h5": TENSORFLOW,
    ".ckpt.index": TENSORFLOW,
    ".pb": TENSORFLOW,
    ".onnx": ONNX,
    ".onnx_data": ONNX,
    ".tflite": TENSORFLOW,
    ".npz": "are arrays of numpy: load them, and give magmax.merge the mapping of names to arrays",
}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
ZERO_SCRIPT = "zero_to_fp32.py"


def recognize_bytes(head: bytes) -> str | None:
    """Return what a file that begins so is and what to do, if it is of another format than its name says."""
    text = head.lstrip()
    return next((words for start, words in FILE_STARTS.items() if text[: len(start)].lower() == start.lower()), None)


def recognize_file(path: Path) -> str | None:
    """Return what a file of an unknown suffix is and what to do, as far as its name or its first bytes tell."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        words = recognize_bytes(file.read(HEAD_BYTES))
    by_name = next((words for suffix, words in SUFFIXES.items() if path.name.endswith(suffix)), None)
    return words if words and not by_name else by_name and f"holds weights that {by_name}"


def recognize_folder(path: Path) -> str | None:
    """Return what a folder is and what to give instead, if it holds a model in a form that is not read here."""
    entries = sorted(entry.name for entry in path.iterdir())
    if any(name.endswith("_optim_states.pt") or name.startswith("mp_rank_") for name in entries):
        return _zero_remedy(path.parent if (path.parent / ZERO_SCRIPT).is_file() else path)
    if any(name.endswith(WEIGHT_SUFFIXES) for name in entries):
        return None
    if "model_index.json" in entries:
        parts = [name for name in entries if any((path / name).glob("*.safetensors"))]
        named = ", ".join(str(path / name) for name in parts[:5]) or f"{path / 'unet'}"
        return f"is a pipeline of several models: merge each by itself ({named})"
    if ZERO_SCRIPT in entries or any(name.startswith("global_step") for name in entries):
        return _zero_remedy(path)
    for suffix, words in SUFFIXES.items():
        if files := [name for name in entries if name.endswith(suffix)]:
            return f"holds {', '.join(files[:3])}{', ...' * (len(files) > 3)}, which {words}"
    runs = [name for name in entries if name.startswith("checkpoint-") and (path / name).is_dir()]
    if runs:
        return f"holds no weights, but the folders of a training: give one of them, such as {path / runs[-1]}"
    return None


def _zero_remedy(folder: Path) -> str:
    return (
        "holds the parts that DeepSpeed ZeRO writes, one for each process: put them together with its script "
        f"(python {folder / ZERO_SCRIPT} {folder} OUT) and give OUT"
    )
