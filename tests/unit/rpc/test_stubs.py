from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_checked_in_stubs_are_what_the_protos_generate(tmp_path):
    subprocess.run([ROOT / "scripts" / "protos", tmp_path], check=True)
    generated = {file.name: file.read_text() for file in (tmp_path / "afd" / "rpc").iterdir()}
    assert set(generated) == {
        f"{proto.stem}_{kind}"
        for proto in (ROOT / "proto" / "afd" / "rpc").glob("*.proto")
        for kind in ("pb2.py", "pb2.pyi", "pb2_grpc.py")
    }
    for name, text in generated.items():
        assert (ROOT / "afd" / "rpc" / name).read_text() == text, f"afd/rpc/{name} is stale: run scripts/protos"
