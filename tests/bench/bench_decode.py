"""Decode and prefill throughput of 1A1F, beside the whole model in one process, transformers and vLLM.

    PYTHONPATH=. python tests/bench/bench_decode.py [--model smollm2] [--streams 1 8 32 64 96 128] [--rounds 3]
        [--microbatches auto 3] [--candidates http engine whole transformers vllm-cpu] [--vllm PYTHON] [-o FILE.json]

`http` is `afd serve` asked over HTTP; `engine` the same two workers asked through the attention worker's gRPC stream;
`whole` both halves in one process with all cores and no wire; `transformers` its generate on one batch; `vllm-cpu` runs
in the environment of --vllm. Every stream has a prompt of random token ids (--prompt, 128) and decodes greedily.

All use the same cores. They are started first and measured in turn, round after round; while one runs, the processes of
the others are stopped. Decode is the tokens of a run of --tokens + 1 less those of a run of 1, over the difference of
their times; prefill, the prompts' tokens over the time of the latter. For ours there is also the rate while all streams
decode, and the pipeline's efficiency, from the timeline of one more run. Tables give medians. The limit is what the
measured GEMM rate and copy bandwidth, all cores, would allow for the model's FLOPs and bytes. The last line is JSON; -o
writes it to a file as well, after every round.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from afd import build
from afd.config import Deployment
from tests.bench.decode import candidates, report
from tests.bench.decode.limit import measure_machine
from tests.bench.decode.ours import Engine, Http
from tests.bench.decode.turns import turn, waiting
from tests.bench.decode.workload import BenchError, Candidate, measure, random_prompts


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every candidate is ended
    plan = build.plan(Deployment().with_flags({"model": options.model, "dtype": options.dtype}))
    try:
        with tempfile.TemporaryDirectory(prefix="bench_decode.") as folder:
            found = _bench(options, plan, Path(folder))
    except BenchError as error:
        sys.exit(f"bench_decode: {error}")
    print(report.tables(found))
    print(json.dumps(report.as_json(found)))


def _bench(options: argparse.Namespace, plan: build.Plan, folder: Path) -> report.Found:
    settings = candidates.Settings(
        model=options.model,
        dtype=options.dtype,
        transport=options.transport,
        microbatches=tuple(dict.fromkeys(options.microbatches)),
        threads=len(os.sched_getaffinity(0)),
        vllm=options.vllm,
        folder=folder,
    )
    names = candidates.chosen(options.candidates, settings, plan)
    found = report.Found(
        settings=settings,
        spec=plan.spec,
        dtype=plan.dtype,
        prompt=options.prompt,
        tokens=options.tokens,
        streams=options.streams,
        load=os.getloadavg()[0],
        machine=measure_machine(plan.torch_dtype, settings.threads),
    )
    with ExitStack() as stack:
        lineup: list[Candidate] = []
        for opening in candidates.openings(names, settings, plan):
            lineup.append(stack.enter_context(opening))
            stack.enter_context(waiting(lineup[-1]))
            _say(f"{lineup[-1].name} is ready")
        for number in range(options.rounds):
            found.machine = found.machine.best(measure_machine(plan.torch_dtype, settings.threads))
            _say(f"round {number + 1} of {options.rounds}")
            _round(lineup, found, options.warmup, watch=number == options.rounds - 1)
            if options.output:
                options.output.write_text(json.dumps(report.as_json(found)) + "\n")
    return found


def _round(lineup: list[Candidate], found: report.Found, warmup: int, watch: bool) -> None:
    """Every candidate once at every number of streams."""
    for streams in found.streams:
        prompts = random_prompts(streams, found.prompt, found.spec.vocab)
        for candidate in lineup:
            key = candidate.name, streams
            with turn(candidate):
                figures = measure(candidate, prompts, found.tokens, warmup)
                if watch and isinstance(candidate, (Http, Engine)):
                    found.summaries[key] = candidate.watch(prompts, 2 * found.tokens)
            found.turns.setdefault(key, []).append(figures)
            decode = "too noisy" if figures.decode is None else f"{figures.decode:.0f} tokens/s"
            _say(f"{streams} streams, {key[0]}: {decode}, prefill {figures.prefill:.0f}")


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="bf16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64, 96, 128])
    parser.add_argument(
        "--microbatches", type=_microbatches, nargs="+", default=["auto"], help="one `http` and one `engine` each"
    )
    parser.add_argument("--candidates", choices=candidates.NAMES, nargs="+", help="default: all that can run here")
    parser.add_argument("--transport", default="auto", help="between the workers: auto, shm or grpc")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=16, help="tokens of the unmeasured run at the start of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm", default="", metavar="PYTHON", help="the Python of an environment that has vLLM")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json")
    return parser.parse_args()


def _microbatches(text: str) -> str:
    if text != "auto" and not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number above 0")
    return text


if __name__ == "__main__":
    main()
