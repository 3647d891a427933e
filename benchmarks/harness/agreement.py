"""Do two merged models hold the same bits?"""

import json
from pathlib import Path

import numpy as np

from harness.workloads import weight_files

READ_BYTES = 1 << 22
INTEGER_DTYPES = {"F32": np.uint32, "BF16": np.uint16}


def tensor_locations(path: Path) -> dict[str, tuple[Path, int, int, str]]:
    """name -> (file, first byte, bytes, dtype)"""
    found = {}
    for file in weight_files(path):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = (file, 8 + length + begin, end - begin, entry["dtype"])
    return found


def describe_missing(base: Path, merged: Path) -> str:
    """Empty if `merged` holds every tensor of the base at its size: exit status 0 is no proof of that."""
    wanted, found = ({name: entry[2] for name, entry in tensor_locations(path).items()} for path in (base, merged))
    whole = sum(found.get(name) == size for name, size in wanted.items())
    return "" if whole == len(wanted) else f"wrote {whole} of {len(wanted)} tensors"


def differing_share(one: Path, other: Path) -> float | str:
    """The share of elements whose bits differ, or what is not comparable: 0.0 is the same model."""
    ours, theirs = tensor_locations(one), tensor_locations(other)
    if ours.keys() != theirs.keys():
        return f"{len(ours.keys() ^ theirs.keys())} tensor names differ"
    different = elements = 0
    for name, (file, start, size, dtype) in ours.items():
        their_file, their_start, their_size, their_dtype = theirs[name]
        if (size, dtype) != (their_size, their_dtype):
            return f"{name}: {size} bytes of {dtype} against {their_size} of {their_dtype}"
        with file.open("rb") as a, their_file.open("rb") as b:
            a.seek(start)
            b.seek(their_start)
            for left in range(size, 0, -READ_BYTES):
                pair = [
                    np.frombuffer(opened.read(min(READ_BYTES, left)), dtype=INTEGER_DTYPES[dtype]) for opened in (a, b)
                ]
                different += int(np.count_nonzero(pair[0] != pair[1]))
                elements += pair[0].size
    return different / elements
