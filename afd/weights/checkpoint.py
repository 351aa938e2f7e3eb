"""One way to read any checkpoint: which tensors it has, and any slice of one, as torch tensors.

Reading is lazy and exact: opening reads headers, `read` touches only the bytes of the slice. A Checkpoint belongs to
one thread. `read_names` records what was read, so that a test can show that a role kept to its own tensors.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from afd.errors import CheckpointError
from afd.weights.gguf import GgufFile, Index
from afd.weights.headers import TensorInfo, find, language_model_names, scan, total_bytes

log = logging.getLogger(__name__)


class Checkpoint(ABC):
    """An open checkpoint; a `with` block closes it."""

    def __init__(self, path: Path, stored: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.read_names: set[str] = set()
        self._stored_names, vision = language_model_names(stored)
        self._infos = {name: stored[kept] for name, kept in self._stored_names.items()}
        if vision:
            skipped = total_bytes({name: stored[name] for name in vision})
            log.info("%s: skipped %d vision tensors (%.1f MiB)", path, len(vision), skipped / 2**20)

    def names(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the language model, by the name that a plain text checkpoint gives it."""
        return self._infos

    def read(self, name: str, index: Index | None = None) -> Tensor:
        """The tensor `name`, or its part at `index` (one step-1 slice per axis), on the CPU in its stored dtype.

        The result may be a view of the mapped file: copy it before the checkpoint closes. Raises CheckpointError when
        the checkpoint has no such tensor or the file can no longer be read.
        """
        if name not in self._infos:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        self.read_names.add(name)
        shape = self._infos[name].shape
        return self._read(self._stored_names[name], index or tuple(slice(0, n) for n in shape))

    @abstractmethod
    def _read(self, stored_name: str, index: Index) -> Tensor: ...

    @abstractmethod
    def close(self) -> None:
        """Lets go of the files. Idempotent."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SafetensorsCheckpoint(Checkpoint):
    """One safetensors file, or several behind an index."""

    def __init__(self, path: Path, stored: Mapping[str, TensorInfo]) -> None:
        super().__init__(path, stored)
        self._files = {name: info.file for name, info in stored.items()}
        self._open: dict[Path, Any] = {}

    def _read(self, stored_name: str, index: Index) -> Tensor:
        file = self._files[stored_name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            if not index:  # a scalar has nothing to slice
                return torch.as_tensor(self._open[file].get_tensor(stored_name))
            return torch.as_tensor(self._open[file].get_slice(stored_name)[index])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read tensor {stored_name} from {file}: {error}") from error

    def close(self) -> None:
        self._open.clear()


class GgufCheckpoint(Checkpoint):
    """One GGUF file; tensors come out in float32."""

    def __init__(self, path: Path, stored: Mapping[str, TensorInfo]) -> None:
        super().__init__(path, stored)
        self._gguf = GgufFile(path)

    def _read(self, stored_name: str, index: Index) -> Tensor:
        values = self._gguf.read(stored_name, index)
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def close(self) -> None:
        """Nothing to do: the mapping goes with the last reference to it."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens the checkpoint at `path`: a .safetensors, index or .gguf file, or the folder around one.

    Raises CheckpointError, naming the file and what is wrong, when a file is missing, damaged or cut short.
    """
    main = find(path)
    stored = scan(main)
    return GgufCheckpoint(main, stored) if main.suffix == ".gguf" else SafetensorsCheckpoint(main, stored)
