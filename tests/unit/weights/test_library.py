from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from afd.errors import CheckpointError, ModelError
from afd.types import TensorSpec
from afd.weights import dummy, library
from tests.unit.weights.tiny_gguf import TinyGguf


@pytest.fixture
def folder(tmp_path: Path, specs: list[TensorSpec]) -> Path:
    return dummy.write_checkpoint(tmp_path / "my-model", {"model_type": "test", "n": 1}, specs, seed=1, shards=2)


def test_no_torch_is_imported_by_what_the_router_uses() -> None:
    code = "import sys, afd.weights.library, afd.weights.ownership; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_model_is_named_with_the_known_ones_and_the_way_out(cache: Path) -> None:
    with pytest.raises(ModelError) as caught:
        library.resolve("gpt-9")
    for part in ("'gpt-9'", "smollm2, smollm2-step3", "a folder", "by its path"):
        assert part in str(caught.value)


def test_a_known_model_that_is_not_prepared_says_how_to(cache: Path) -> None:
    with pytest.raises(ModelError, match="run `afd model prepare smollm2`"):
        library.resolve("smollm2")
    assert [(m.name, m.prepared, m.nbytes) for m in library.known()] == [
        ("smollm2", False, 0),
        ("smollm2-step3", False, 0),
    ]


def test_a_folder_gives_its_files_with_tokens_and_template_in_one_form(folder: Path) -> None:
    bare = library.resolve(str(folder))
    assert (bare.name, bare.path, bare.config["n"]) == ("my-model", folder, 1)
    assert (bare.tokenizer_json, bare.tokenizer_config, bare.generation_config) == (None, {}, {})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    templates = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    spelled = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "<s>", "chat_template": templates}
    (folder / "tokenizer_config.json").write_text(json.dumps(spelled))
    full = library.resolve(str(folder))
    assert full.tokenizer_json == folder / "tokenizer.json"
    assert full.tokenizer_config == {"eos_token": "</s>", "bos_token": "<s>", "chat_template": "yes"}
    assert full.generation_config == {"eos_token_id": [2, 3]}
    (folder / "chat_template.jinja").write_text("from its own file")
    assert library.resolve(str(folder)).tokenizer_config["chat_template"] == "from its own file"


def test_a_folder_without_config_or_with_a_broken_one_is_refused_by_name(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not readable JSON"):
        library.resolve(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json holds a list, not an object"):
        library.resolve(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        library.resolve(str(folder))


def test_a_bare_gguf_brings_its_own_config_and_tokenizer(cache: Path, tiny_llama: TinyGguf) -> None:
    writer = tiny_llama.writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", "<eos>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    writer.add_chat_template("{{ messages }}")
    path = tiny_llama.write()
    files = library.resolve(str(path))
    assert (files.name, files.path, files.config["hidden_size"]) == ("llama", path, 32)
    assert files.tokenizer_json is not None
    assert Tokenizer.from_file(str(files.tokenizer_json)).encode("abb<eos>").ids == [2, 1, 3]
    assert files.tokenizer_config["eos_token"] == "<eos>"
    assert files.tokenizer_config["chat_template"] == "{{ messages }}"
    assert files.generation_config == {"eos_token_id": 3}
    assert library.resolve(str(path)).tokenizer_json == files.tokenizer_json
    assert len(list((cache / "tokenizers").iterdir())) == 1
    assert len(library.fingerprint(files)) == 64


def test_a_fingerprint_is_the_same_wherever_the_model_lies_and_changes_with_config_shape_or_size(
    folder: Path, tmp_path: Path, specs: list[TensorSpec]
) -> None:
    def fingerprint(
        name: str, config: dict[str, object], specs: list[TensorSpec], seed: int = 1, shards: int = 2
    ) -> str:
        path = dummy.write_checkpoint(tmp_path / name, config, specs, seed, shards)
        return library.fingerprint(library.resolve(str(path)))

    config: dict[str, object] = {"n": 1, "model_type": "test"}
    first = library.fingerprint(library.resolve(str(folder)))
    assert fingerprint("elsewhere", config, specs) == first
    assert fingerprint("other numbers", config, specs, seed=2) == first  # headers only: weights are not read
    others = {
        fingerprint("config", {"n": 2, "model_type": "test"}, specs),
        fingerprint("fewer", config, specs[1:]),
        fingerprint("one file", config, specs, shards=1),
    }
    assert len(others | {first}) == 4
