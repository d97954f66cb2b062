"""Safetensors checkpoints: which files, what is in them, and reading any part of a tensor.

The safetensors library validates each file. The data are read through a mapping of our own, because
that library returns copies, and what it has read of a file counts as memory of this process until
the file is closed: here pages are given back as soon as they have been copied to their place.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxllm.errors import CheckpointError
from jaxllm.models.parameters import Region

INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_SHARD_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# How much of a file is mapped in before its pages are given back.
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: `dtype` as safetensors calls it, `offset` in bytes from the file's start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsCheckpoint:
    """The tensors of a model directory, read part by part.

    Args:
        folders: of the directory, with more of them; their names begin with that of the folder.

    Raises:
        CheckpointError: no weights, weights in another format, an index that is malformed or does
            not fit its files, a missing shard, a truncated or corrupt file, a duplicate tensor.
    """

    def __init__(self, directory: Path, folders: Sequence[str] = ()) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        self._mappings: dict[Path, mmap.mmap] = {}
        index = _read_index(directory)
        files = sorted({directory / name for name in index.values()}) if index else _find_files(directory)
        for file in files:
            for name, tensor in _read_header(file).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"tensor {name!r} is in both {self.tensors[name].file.name} and {file.name} of "
                        f"{directory}; delete the file that does not belong to this checkpoint"
                    )
                self.tensors[name] = tensor
        for folder in folders:
            for file in _find_files(directory / folder):
                self.tensors |= {f"{folder}/{name}": t for name, t in _read_header(file).items()}
        for name, file_name in index.items():
            stored = self.tensors.get(name)
            if stored is None or stored.file.name != file_name:
                where = "in none of its files" if stored is None else f"in {stored.file.name}"
                raise CheckpointError(
                    f"{INDEX_FILE} of {directory} says that tensor {name!r} is in {file_name}, but it is "
                    f"{where}; the index belongs to another version of the files: download both again"
                )

    def copy(
        self,
        tensor: str,
        factors: tuple[int, ...],
        order: tuple[int, ...],
        region: Region,
        out: np.ndarray,
    ) -> None:
        """Copies part of a tensor, with its axes reordered, into an array of any float type.

        Args:
            factors: shape to see the tensor in; the product is its size.
            order: permutation of those axes.
            region: of the permuted tensor.
            out: of the shape of that region.
        """
        stored = self.tensors[tensor]
        mapping = self._mapping(stored.file)
        dtype = _DTYPES[stored.dtype]
        # Chunks run along the first axis on disk, so that each is one stretch of the file.
        first = order.index(0)
        row_size = int(np.prod(factors[1:], dtype=np.int64))
        row_bytes = row_size * dtype.itemsize
        rows = max(1, _CHUNK_BYTES // max(1, row_bytes))
        target = np.moveaxis(out, first, 0)
        start, stop = region[first]
        index = tuple(slice(None) if axis == first else slice(*bounds) for axis, bounds in enumerate(region))
        for low in range(start, stop, rows):
            high = min(stop, low + rows)
            offset = stored.offset + low * row_bytes
            flat = np.frombuffer(mapping, dtype, (high - low) * row_size, offset)
            chunk = flat.reshape(high - low, *factors[1:]).transpose(order)
            target[low - start : high - start] = np.moveaxis(chunk[index], first, 0)
            del flat, chunk
            _give_back(mapping, offset, (high - low) * row_bytes)

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same values."""
        one, other = self.tensors[first], self.tensors[second]
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        nbytes = int(np.prod(one.shape, dtype=np.int64)) * _DTYPES[one.dtype].itemsize
        for low in range(0, nbytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, nbytes - low)
            views = [memoryview(self._mapping(t.file))[t.offset + low :][:size] for t in (one, other)]
            if views[0] != views[1]:
                return False
            del views
            for t in (one, other):
                _give_back(self._mapping(t.file), t.offset + low, size)
        return True

    def _mapping(self, file: Path) -> mmap.mmap:
        if file not in self._mappings:
            with file.open("rb") as opened:
                self._mappings[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mappings[file]


def is_float(dtype: str) -> bool:
    """Whether a safetensors dtype is one that weights may be stored in."""
    return dtype in _DTYPES


def item_size(dtype: str) -> int:
    """Bytes of an element of a safetensors dtype that `is_float`."""
    return _DTYPES[dtype].itemsize


def _give_back(mapping: mmap.mmap, offset: int, size: int) -> None:
    """Drops whole pages of a stretch from this process; they stay in the system's file cache."""
    if hasattr(mapping, "madvise"):
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, start, offset + size - start)


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor -> file, of the index; empty where there is none."""
    path = directory / INDEX_FILE
    if not path.exists():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise TypeError("'weight_map' is not an object with entries")
        names = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is malformed ({error!r}); download it again") from error
    outside = sorted({file for file in names.values() if Path(file).name != file})
    if outside:
        raise CheckpointError(f"{path} names files outside its directory: {', '.join(outside)}")
    missing = sorted({file for file in names.values() if not (directory / file).is_file()})
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of the {len(set(names.values()))} files that "
            f"{INDEX_FILE} names: "
            f"{', '.join(missing)}; download them again"
        )
    return names


def _find_files(directory: Path) -> list[Path]:
    """The weight files of a directory without index."""
    if (directory / _SINGLE_FILE).is_file():
        return [directory / _SINGLE_FILE]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise _no_safetensors(directory)
    present: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := _SHARD_NAME.fullmatch(file.name):
            present.setdefault((match["stem"], int(match["total"])), set()).add(int(match["number"]))
    for (stem, total), numbers in present.items():
        missing = sorted(set(range(1, total + 1)) - numbers)
        if missing:
            names = ", ".join(f"{stem}-{number:05d}-of-{total:05d}.safetensors" for number in missing)
            raise CheckpointError(
                f"{directory} lacks {len(missing)} of {total} shards: {names}; download them again"
            )
    return files


def _no_safetensors(directory: Path) -> CheckpointError:
    other = sorted(
        file.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")
        for file in directory.glob(pattern)
    )
    if not other:
        return CheckpointError(
            f"{directory} holds no *.safetensors file; download the weights, or load_format='dummy' runs "
            "the architecture on random ones"
        )
    return CheckpointError(
        f"{directory} holds weights as {', '.join(other[:3])} only; these may run code when read and are not "
        "loaded. Convert them once, where torch and transformers are installed:\n"
        "    from transformers import AutoModelForCausalLM\n"
        f"    AutoModelForCausalLM.from_pretrained({str(directory)!r}, dtype='auto')"
        f".save_pretrained({str(directory) + '-safetensors'!r})\n"
        "then copy the tokenizer's files there and load that directory"
    )


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        # Checks the header, that tensors neither overlap nor leave holes, and the file's length.
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(
                opened.read(size), object_pairs_hook=lambda pairs: _no_duplicates(pairs, file)
            )
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file} is truncated or corrupt ({file.stat().st_size} bytes; {error}); download it again"
        ) from error
    return {
        name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _no_duplicates(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    names: Iterator[str] = (name for name, _ in pairs)
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise CheckpointError(f"{file} names {name!r} twice; download it again")
        seen.add(name)
    return dict(pairs)
