"""Files of tensors that vouch for themselves: safetensors, named by the SHA-256 of their bytes."""

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

# By name, dtype and sizes of each tensor.
Headers = Mapping[str, tuple[torch.dtype | str, tuple[int, ...]]]

# As the header of a file names the dtypes of ours.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "I64": torch.int64,
    "U8": torch.uint8,
}


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file that `pack` named, each read from disk whenever it is asked for.

    The checksum is compared at the first reading, and again whenever the file looks changed since.
    Reading raises `CorruptFolderError` if the file is missing, or is not what its name says.
    size: in bytes, when it was whole.
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
            # Copies: the tensors themselves are windows into the file, aligned as it happens.
            return {name: file.get_tensor(name).clone() for name in wanted}

    def headers(self) -> Headers:
        """The dtype and the sizes of every tensor, of which none is read."""
        found = {}
        with self._opened() as file:
            for name in self._names:
                header = file.get_slice(name)
                kind = header.get_dtype()
                found[name] = _DTYPES.get(kind, kind), tuple(header.get_shape())
        return found

    def data(self) -> bytes:
        """The whole file, its checksum compared."""
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
    """The sizes of the tensor `name`. Raises `MisshapenError` unless it is there, in this dtype and
    shape, in which None is any size."""
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
    """A file's name and contents. The name carries the contents' SHA-256, so that a name in a
    checked configuration vouches for them."""
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
