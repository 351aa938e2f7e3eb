"""What a checkpoint holds, from its headers alone: names, shapes, types and sizes, no weights. Imports no torch.

Layouts known: one safetensors file, several with an index, one GGUF file; given as the file or as the folder around it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from afd.errors import CheckpointError
from afd.weights.gguf import GgufFile

INDEX = "model.safetensors.index.json"
_TYPES_BY_ITEM_BYTES = {
    8: "F64 I64 U64",
    4: "F32 I32 U32",
    2: "F16 BF16 I16 U16",
    1: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0",
}
_ITEM_BYTES = {dtype: size for size, dtypes in _TYPES_BY_ITEM_BYTES.items() for dtype in dtypes.split()}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_VISION = re.compile(
    r"(^|\.)(vision_model|vision_tower|visual|vit_downsampler2?|vit_large_projector|multi_modal_projector)\."
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor. `dtype` as the file says it (F32, BF16, Q4_1, ...); `nbytes` as stored in `file`."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path


def scan(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint at `path`, under the name it is stored by (GGUF: its Hugging Face name).

    Raises CheckpointError naming the file that is missing, damaged, cut short, or at odds with the index.
    """
    main = find(path)
    if main.suffix == ".gguf":
        tensors = GgufFile(main).hf_tensors
        return {name: TensorInfo(t.shape, t.stored.encoding.name, t.nbytes, main) for name, t in tensors.items()}
    if main.name != INDEX:
        return read_header(main)
    wanted = read_index(main)
    found: dict[str, TensorInfo] = {}
    for file in sorted(set(wanted.values())):
        header = read_header(file)
        for name, info in header.items():
            if wanted.get(name) != file:
                home = wanted[name].name if name in wanted else "no file"
                raise CheckpointError(f"{main} puts tensor {name} into {home}, but {file} holds it")
            found[name] = info
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise CheckpointError(
            f"{main} puts tensor {missing[0]} into {wanted[missing[0]].name}, which does not hold it"
            + (f" ({len(missing)} such tensors)" if len(missing) > 1 else "")
        )
    return found


def find(path: Path) -> Path:
    """The file to open first: the index, the only .safetensors or the only .gguf file. Raises CheckpointError."""
    if path.is_file() and (path.suffix in (".safetensors", ".gguf") or path.name == INDEX):
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a folder nor a .safetensors or .gguf file")
    for name in (INDEX, "model.safetensors"):
        if (path / name).is_file():
            return path / name
    for pattern in ("*.safetensors", "*.gguf"):
        files = sorted(path.glob(pattern))
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(
                f"{path} holds {len(files)} {pattern} files and no {INDEX} to say which are the model"
            )
    raise CheckpointError(f"{path} holds no weights: expected {INDEX}, model.safetensors, or one .gguf file")


def read_index(path: Path) -> dict[str, Path]:
    """Tensor name -> shard file, from a safetensors index. Raises CheckpointError."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files = {str(name): path.parent / str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a safetensors index: {error!r}") from error
    outside = sorted(str(f) for f in set(files.values()) if f.parent != path.parent)
    if outside:
        raise CheckpointError(f"{path} points outside its folder, to {outside[0]}")
    missing = sorted(f.name for f in set(files.values()) if not f.is_file())
    if missing:
        raise CheckpointError(f"{path} names {len(missing)} files that are not there: {', '.join(missing[:3])}")
    return files


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, after checking that its header describes exactly the bytes it has."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is cut short or no safetensors file: its header is {length} bytes, the file {size}"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} has a damaged safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged safetensors header: a {type(header).__name__}, not a mapping")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    infos: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        begin, infos[name] = _entry(path, name, entry)
        spans.append((begin, begin + infos[name].nbytes, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise CheckpointError(f"{path}: tensor {name} begins at byte {begin}, where {position} was expected")
        position = end
    if position != size - 8 - length:
        room = size - 8 - length
        raise CheckpointError(f"{path} is cut short or too long: its tensors take {position} bytes of {room}")
    return infos


def _entry(path: Path, name: str, entry: object) -> tuple[int, TensorInfo]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]  # type: ignore[index]
        nbytes = math.prod(shape) * _ITEM_BYTES[dtype]
        lies = min((*shape, begin), default=0) < 0 or end - begin != nbytes
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of tensor {name} is damaged: {error!r}") from error
    if lies:
        kind = f"{dtype} {list(shape)}"
        raise CheckpointError(f"{path}: tensor {name} is {kind}, {nbytes} bytes, but its header gives it {end - begin}")
    return begin, TensorInfo(shape, dtype, nbytes, path)


def language_model_names(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Names as a plain language model has them -> names as stored, and the stored names of a vision tower.

    A vision-language checkpoint nests the language model under a prefix (model.language_model., language_model.model.,
    ...); it is found by where the token embedding is. Tensors that are neither keep their stored name.
    """
    names = list(names)
    vision = [name for name in names if _VISION.search(name)]
    skipped = set(vision)
    rest = [name for name in names if name not in skipped]
    tail = "embed_tokens.weight"
    stems = sorted((name.removesuffix(tail) for name in rest if name == tail or name.endswith(f".{tail}")), key=len)
    if not stems:
        return {name: name for name in rest}, vision
    stem = stems[0]
    plain: dict[str, str] = {}
    for name in rest:
        if name.endswith("lm_head.weight") and stem.startswith(name.removesuffix("lm_head.weight")):
            plain["lm_head.weight"] = name
        elif name.startswith(stem):
            plain["model." + name.removeprefix(stem)] = name
        else:
            plain[name] = name
    return plain, vision


def total_bytes(infos: Mapping[str, TensorInfo]) -> int:
    """Bytes that the tensors take as stored."""
    return sum(info.nbytes for info in infos.values())
