"""Self-checking tensor files: safetensors with the SHA-256 of their bytes in the file name."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from coachhook.errors import CorruptFolderError, SaveError
from coachhook.system import files
from coachhook.system.json_shapes import MisshapenError, MissingError

# By tensor name: dtype and shape.
Headers = Mapping[str, tuple[torch.dtype | str, tuple[int, ...]]]

# The dtypes that our files use, by their names in safetensors headers.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
}


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file named by `pack`, read from disk at each access.

    The checksum is verified at the first access, and again whenever the file looks changed. Reading
    raises `CorruptFolderError` if the file cannot be read or its checksum differs from its name.
    size: of the intact file, in bytes.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._checked: tuple[int, int, int] | None = None
        self._names: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return self.path.name

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors at once. Raises `KeyError` for one that the file does not hold."""
        wanted = list(names)
        with self._opened() as file:
            for name in wanted:
                if name not in self._names:
                    raise KeyError(name)
            # Copies: the tensors themselves are views into the file, with arbitrary alignment.
            return {name: file.get_tensor(name).clone() for name in wanted}

    def headers(self) -> Headers:
        """The dtype and shape of every tensor, without reading any."""
        found = {}
        with self._opened() as file:
            for name in self._names:
                header = file.get_slice(name)
                kind = header.get_dtype()
                found[name] = _DTYPES.get(kind, kind), tuple(header.get_shape())
        return found

    def data(self) -> bytes:
        """The bytes of the whole file, after verifying its checksum."""
        with self._opened():
            return self.path.read_bytes()

    def __getitem__(self, name: str) -> Tensor:
        return self.read([name])[name]

    def __iter__(self) -> Iterator[str]:
        with self._opened():
            return iter(self._names)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            stat = self.path.stat()
            looks = stat.st_ino, stat.st_size, stat.st_mtime_ns
            if looks != self._checked:
                self._check()
            with safe_open(self.path, framework="pt") as file:
                if looks != self._checked:
                    self._names, self._checked = frozenset(file.keys()), looks
                yield file
        except SafetensorError as error:
            raise CorruptFolderError(f"{self.path} is not a safetensors file: {error}") from error
        except OSError as error:
            raise CorruptFolderError(
                f"{self.path} cannot be read ({error.strerror}); restore it from a copy, or load "
                "the folder again if another process has compacted or rolled it back"
            ) from error

    def _check(self) -> None:
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not self.name.endswith(f"-{digest}.safetensors"):
            raise CorruptFolderError(
                f"{self.path} is truncated or was changed after it was written; "
                "restore it from a copy"
            )


def check(headers: Headers, name: str, dtype: torch.dtype, *shape: int | None) -> tuple[int, ...]:
    """The shape of the tensor `name`. Raises `MissingError` if it is missing, `MisshapenError` if
    it has another dtype or shape. None in `shape` matches any size."""
    if name not in headers:
        raise MissingError(f"tensor {name} is missing")
    stored, sizes = headers[name]
    alike = len(sizes) == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, sizes, strict=True)
    )
    if stored is not dtype or not alike:
        wanted_sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise MisshapenError(
            f"tensor {name}: expected {dtype} of shape ({wanted_sizes}), found {stored} of {sizes}"
        )
    return sizes


def pack(stem: str, tensors: Mapping[str, Tensor]) -> tuple[str, bytes]:
    """A file's name and contents. The name includes the contents' SHA-256, so that a configuration
    that lists the name also fixes the contents."""
    data = tensors_to_bytes({name: tensor.contiguous() for name, tensor in tensors.items()})
    return f"{stem}-{hashlib.sha256(data).hexdigest()}.safetensors", data


def write(target: Path, data: bytes) -> None:
    """Write `target` whole or not at all. Raises `SaveError`."""
    try:
        files.write(target, data)
    except OSError as error:
        raise SaveError(
            f"cannot write {target}: {error.strerror}; what the folder held before is intact"
        ) from error
