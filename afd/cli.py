"""The command line: `afd serve`, `router`, `chat`, `status`, `top`, `trace`, `bench`, `cost`, `plan`, `simulate`,
`hardware` and `model`.

Commands import what they need when they run: the line must answer at once, and torch alone takes two seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from afd.errors import AfdError

app = typer.Typer(
    help="Serves language models with their attention and FFN halves on different workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(help="Prepares and describes models.", no_args_is_help=True)
app.add_typer(model_app, name="model")
hardware_app = typer.Typer(help="Cards that the planner knows, and this machine.", no_args_is_help=True)
app.add_typer(hardware_app, name="hardware")

USER_ERROR = 2  # the exit code that typer gives a wrong flag, too
DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option(help="Where the router listens.")]
Text = str | None


def main() -> None:
    """Entry point of `afd`. What a person can mend is told in one sentence, without a traceback; exit code 2."""
    try:
        app()
    except AfdError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", style="red", markup=False)
        sys.exit(USER_ERROR)


@app.command()
def serve(
    deployment: Annotated[Path | None, typer.Argument(help="A deployment file; see deploy/local.yaml.")] = None,
    model: Annotated[Text, typer.Option(help="A named model (afd model list), a folder, or a .gguf file.")] = None,
    topology: Annotated[Text, typer.Option(help="Attention and FFN workers, like 2A1F.")] = None,
    ffn_sharding: Annotated[Text, typer.Option(help="ep, tp or hybrid.")] = None,
    microbatches: Annotated[str | None, typer.Option(help="In flight per attention worker; auto: by trying.")] = None,
    transport: Annotated[Text, typer.Option(help="auto, shm, grpc, or inproc: all in one process, no Ray.")] = None,
    dtype: Annotated[Text, typer.Option(help="auto, fp32 or bf16.")] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu or cuda.")] = None,
    backend: Annotated[Text, typer.Option(help="ray, or local: plain processes on this machine.")] = None,
    host: Annotated[Text, typer.Option(help="Address the router listens on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port the router listens on; 0 picks one.")] = None,
    tool_parser: Annotated[Text, typer.Option(help="How the model writes tool calls: hermes or step3.")] = None,
    reasoning_parser: Annotated[
        Text, typer.Option(help="How it tells reasoning from its answer: none, step3 or deepseek_r1.")
    ] = None,
) -> None:
    """Serves a model until Ctrl-C. Flags override the deployment file."""
    from afd import config, env
    from afd.cluster import launch

    env.read()
    flags = {
        "model": model,
        "topology": topology,
        "ffn.sharding": ffn_sharding,
        "attention.microbatches": int(microbatches) if microbatches and microbatches.isdigit() else microbatches,
        "transport.kind": transport,
        "dtype": dtype,
        "device": device,
        "cluster.backend": backend,
        "router.host": host,
        "router.port": port,
        "router.tool_parser": tool_parser,
        "router.reasoning_parser": reasoning_parser,
    }
    launch.serve(config.load(deployment).with_flags(flags))


@app.command()
def router(
    deployment: Annotated[Path | None, typer.Argument(help="As for serve; its router section counts.")] = None,
    host: Annotated[Text, typer.Option(help="Address the router listens on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port the router listens on; 0 picks one.")] = None,
    epoch: Annotated[int | None, typer.Option(help="Which run, where RAY_ADDRESS has several (afd status).")] = None,
) -> None:
    """Serves a further router in front of the workers of `afd serve` on the same Ray cluster, until Ctrl-C."""
    from afd import env
    from afd.cluster import replica

    env.read()
    replica.serve(deployment, {"router.host": host, "router.port": port}, epoch)


@app.command()
def chat(
    prompt: Annotated[Text, typer.Argument(help="Asks this and ends; without it, talks until Ctrl-D.")] = None,
    url: Url = DEFAULT_URL,
    temperature: Annotated[float, typer.Option(help="0 is greedy; small models ramble above.")] = 0.0,
) -> None:
    """Talks to a running server; answers stream to the terminal."""
    from afd.commands import chat as command

    command.chat(prompt, url, temperature)


@app.command()
def status(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False, url: Url = DEFAULT_URL) -> None:
    """Shows every worker of a running server."""
    from afd.commands import status as command

    command.status(url, json)


@app.command()
def top(
    url: Url = DEFAULT_URL,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print what one interval gave, and end.")] = False,
) -> None:
    """Watches a running server: its workers, how busy each side is, and what it waits for."""
    from afd.commands import top as command

    command.top(url, interval, once)


@app.command()
def trace(
    seconds: Annotated[float, typer.Option(help="How far to look back; the workers keep some seconds.")] = 5.0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the trace.")] = Path("trace.json"),
    summary: Annotated[bool, typer.Option("--summary", help="Print what it adds up to instead.")] = False,
    json: Annotated[bool, typer.Option("--json", help="With --summary: as JSON.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Shows where the workers' time has just gone: a trace for ui.perfetto.dev, or a summary."""
    from afd.commands import trace as command

    if summary:
        command.summary(url, seconds, json)
    else:
        command.write(url, seconds, output)


@app.command()
def bench(
    url: Annotated[str, typer.Option(help="Any server of OpenAI's API, with or without /v1.")] = DEFAULT_URL,
    model: Annotated[Text, typer.Option(help="The first one of /v1/models unless said.")] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    api_key: Annotated[Text, typer.Option(help="Or OPENAI_API_KEY in the environment.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests in flight at a time (8 unless said).")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second; with --sweep, the first one tried.")] = None,
    arrivals: Annotated[Text, typer.Option(help="constant, poisson or gamma.")] = None,
    burstiness: Annotated[float, typer.Option(help="Of gamma: 1 is poisson, below it bursts.")] = 1.0,
    ramp: Annotated[Text, typer.Option(help="FROM:TO:SECONDS, requests per second.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Find the highest rate that meets --slo.")] = False,
    requests: Annotated[int | None, typer.Option(help="Send so many (100 unless said).")] = None,
    duration: Annotated[float | None, typer.Option(help="Send for so many seconds.")] = None,
    data: Annotated[str, typer.Option(help="random, prefix, sharegpt:FILE or trace:FILE.jsonl.")] = "random",
    input_tokens: Annotated[str, typer.Option(help="128, or MIN:MAX.")] = "128",
    output_tokens: Annotated[Text, typer.Option(help="128 unless said, or MIN:MAX; sharegpt: as on file.")] = None,
    prefix_tokens: Annotated[int, typer.Option(help="Of each beginning that --data prefix shares.")] = 512,
    prefixes: Annotated[int, typer.Option(help="How many of them.")] = 1,
    vocab: Annotated[int | None, typer.Option(help="Random token ids lie below it.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Answers have exactly the length asked for.")] = True,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    warmup: Annotated[str, typer.Option(help="10s, or so many requests.")] = "0",
    slo: Annotated[Text, typer.Option(help="Like ttft=500ms,tpot=50ms,e2e=10s.")] = None,
    slo_share: Annotated[float, typer.Option(help="Of requests that must meet it, for --sweep.")] = 0.9,
    prices: Annotated[Text, typer.Option(help="attention=0.8,ffn=2.0 (USD/h), cards (H20), or total=4.")] = None,
    cost_dtype: Annotated[str, typer.Option(help="bf16 or fp8, for the cost in theory.")] = "bf16",
    model_path: Annotated[Text, typer.Option(help="The served model's files, for the cost in theory.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 600.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A folder for the report.")] = None,
    json: Annotated[bool, typer.Option("--json", help="A last line of JSON.")] = False,
) -> None:
    """Loads a server and measures it: latencies, throughput, goodput, and what a token costs."""
    from afd.commands import bench as command
    from afd.loadtest.plan import Options

    options = Options(
        url=url,
        model=model,
        endpoint=endpoint,
        api_key=api_key,
        rate=rate,
        arrivals=arrivals,
        burstiness=burstiness,
        concurrency=concurrency,
        ramp=ramp,
        sweep=sweep,
        requests=requests,
        duration=duration,
        data=data,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        prefix_tokens=prefix_tokens,
        prefixes=prefixes,
        vocab=vocab,
        ignore_eos=ignore_eos,
        temperature=temperature,
        seed=seed,
        warmup=warmup,
        slo=slo,
        slo_share=slo_share,
        prices=prices,
        cost_dtype=cost_dtype,
        model_path=model_path,
        timeout=timeout,
    )
    command.bench(options, output, json)


Hardware = Annotated[str, typer.Option(help="Cards (afd hardware list), or a measured machine's file; or all.")]
PlannedModel = Annotated[str, typer.Option(help="Like step3 or deepseek-v3; or a config.json, its folder, a .gguf.")]
Precision = Annotated[
    Text, typer.Option(help="fp8, bf16, fp32 or fp8-bf16kv; unless said, fp8 but for hybrids' full layers.")
]


@app.command()
def cost(
    model: PlannedModel,
    context: Annotated[int, typer.Option(help="Tokens that a decoded one sees.")] = 8192,
    hardware: Hardware = "H800,H20,A800,910B",
    dtype: Precision = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Costs a decoded token in theory: each half on each card at its peak, and the cheapest pair."""
    from afd.commands import cost as command

    command.cost(model, context, hardware, dtype, json)


@app.command()
def plan(
    model: PlannedModel,
    hardware: Annotated[str, typer.Option(help="A:CARD,F:CARD, or one card for both (afd hardware list).")],
    context: Annotated[int, typer.Option(help="Tokens that a decoded one sees.")] = 8192,
    tpot: Annotated[str, typer.Option(help="The longest time per output token, like 50ms.")] = "50ms",
    batch: Annotated[int | None, typer.Option(help="Requests at a time; unless said, as many as pay.")] = None,
    dtype: Precision = None,
    cards_per_worker: Annotated[int, typer.Option(help="Cards of one server that act as one worker.")] = 8,
    max_workers: Annotated[int, typer.Option(help="Of each role, at most.")] = 32,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the deployment file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the front as SVG.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Finds what to deploy: workers, sharding, microbatches and batch; what binds it; and whether AFD pays."""
    from afd.commands import plan as command

    options = command.Options(model, hardware, context, tpot, batch, dtype, cards_per_worker, max_workers)
    command.plan(options, output, plot, json)


@app.command()
def simulate(
    deployment: Annotated[Path | None, typer.Option(help="A deployment file, as of afd plan -o.")] = None,
    model: Annotated[Text, typer.Option(help="As for afd plan; unless said, the deployment's.")] = None,
    hardware: Annotated[str, typer.Option(help="A:CARD,F:CARD, or one card for both (afd hardware list).")] = "H800",
    topology: Annotated[Text, typer.Option(help="Attention and FFN workers, like 2A2F.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of each request at the beginning.")] = 8192,
    batch: Annotated[
        int | None, typer.Option(help="Requests on all workers; unless said, max_running of each.")
    ] = None,
    microbatches: Annotated[Text, typer.Option(help="In flight per attention worker; auto: by trying.")] = None,
    ffn_sharding: Annotated[Text, typer.Option(help="ep, tp or hybrid.")] = None,
    dtype: Precision = None,
    cards_per_worker: Annotated[int | None, typer.Option(help="Unless said, the deployment's num_gpus.")] = None,
    steps: Annotated[int, typer.Option(help="Tokens that each request wants.")] = 100,
    context_spread: Annotated[float, typer.Option(help="Contexts differ by up to this share, both ways.")] = 0.0,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second that arrive with their prompt to be computed.")
    ] = None,
    jitter: Annotated[float, typer.Option(help="How much longer things take on average: 0.1 is a tenth.")] = 0.0,
    skew: Annotated[float | None, typer.Option(help="The busiest EP group's load over an even share.")] = None,
    straggler: Annotated[list[str] | None, typer.Option(help="Like attention:3x2, a worker twice as slow.")] = None,
    fault: Annotated[list[str] | None, typer.Option(help="Like ffn:1@0.5+0.2, away at 0.5 s for 0.2 s.")] = None,
    seed: Annotated[int, typer.Option(help="Of jitter, contexts and arrivals.")] = 0,
    trace_from: Annotated[float | None, typer.Option(help="Simulated second at which the timeline begins.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a trace for ui.perfetto.dev.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Plays a deployment out in simulated time, with the workers' own policies and the planner's stage times."""
    from afd.commands import simulate as command

    options = command.Options(
        deployment=deployment,
        model=model,
        hardware=hardware,
        topology=topology,
        context=context,
        batch=batch,
        microbatches=microbatches,
        ffn_sharding=ffn_sharding,
        dtype=dtype,
        cards_per_worker=cards_per_worker,
        steps=steps,
        spread=context_spread,
        rate=rate,
        jitter=jitter,
        skew=skew,
        straggler=straggler or (),
        fault=fault or (),
        seed=seed,
        trace_from=trace_from,
    )
    command.simulate(options, output, json)


@hardware_app.command("list")
def hardware_list() -> None:
    """Lists the cards with their figures and where these are from."""
    from afd.commands import hardware as command

    command.list_known()


@hardware_app.command("measure")
def hardware_measure(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path("hardware.json"),
    usd_per_hour: Annotated[float, typer.Option(help="What an hour of this machine costs.")] = 1.0,
    name: Annotated[Text, typer.Option(help="Unless said, the host's.")] = None,
) -> None:
    """Measures this machine's memory and products, as a card for `--hardware`."""
    from afd.commands import hardware as command

    command.measure(output, usd_per_hour, name)


@model_app.command("prepare")
def model_prepare(
    name: Annotated[str, typer.Argument(help="A name from `afd model list`.")],
    force: Annotated[bool, typer.Option("--force", help="Again, even if it is there.")] = False,
) -> None:
    """Makes a named model ready to be served."""
    from afd.commands import model as command

    command.prepare(name, force)


@model_app.command("list")
def model_list() -> None:
    """Lists the named models and whether they are prepared."""
    from afd.commands import model as command

    command.list_known()


@model_app.command("info")
def model_info(
    name_or_path: Annotated[str, typer.Argument(help="A named model, a folder, or a .gguf file.")],
    topology: Annotated[Text, typer.Option(help="Attention and FFN workers, like 1A4F.")] = None,
    ffn_sharding: Annotated[Text, typer.Option(help="ep, tp or hybrid.")] = None,
    dtype: Annotated[Text, typer.Option(help="auto, fp32 or bf16.")] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Shows what of a model lands on which worker."""
    from afd.commands import model as command
    from afd.config import Deployment

    flags = {"model": name_or_path, "topology": topology, "ffn.sharding": ffn_sharding, "dtype": dtype}
    command.info(Deployment().with_flags(flags), json)
