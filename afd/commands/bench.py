"""`afd bench`: loads a server of OpenAI's API and says how it did, what it cost, and what it could have cost."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import httpx
import orjson
import uvloop
from rich.console import Console

from afd.commands import bench_screen
from afd.commands.http import check, client
from afd.errors import ConfigError, ModelError, RequestError, Unavailable
from afd.loadtest import cost, report, result
from afd.loadtest import plan as planning
from afd.loadtest.plan import Options, Plan
from afd.loadtest.prices import Price, Worker
from afd.loadtest.result import Result
from afd.loadtest.session import Outcome, once, search
from afd.loadtest.sweep import Found
from afd.spec import ModelSpec, from_config
from afd.weights import library

_FOREIGN = (
    "this server does not say which workers it has and what they do, as `afd serve` does; so its cost cannot be split, "
    "and only the whole server's price is of use: --prices total=…"
)


def bench(options: Options, output: Path | None, as_json: bool) -> None:
    """Runs it. Raises ConfigError for flags that cannot be, Unavailable or RequestError when the server does not
    answer or refuses everything."""
    plan = planning.plan(options)
    model, workers = _ask(plan)
    spec = _spec(options.model_path or model, asked=options.model_path is not None)
    vocab = options.vocab or (spec.vocab if spec else plan.vocab)
    plan = replace(plan, target=replace(plan.target, model=model), vocab=vocab)
    _check_prices(plan, workers)
    console = Console(stderr=True, highlight=False)
    found, outcome = uvloop.run(_run(plan, bool(workers), console))
    done = _result(plan, spec, workers, found, outcome)
    if output is not None:
        when = time.strftime("%Y-%m-%d %H:%M")
        result.write(output, done, report.page(done, when))
    bench_screen.show(done)
    if output is not None:
        print(f"{output / 'report.html'}, summary.json and requests.jsonl are written")
    if as_json:
        print(orjson.dumps(done.as_json()).decode())
    if not outcome.measured.answered:
        errors = "; ".join(f"{status} ({e.count} times): {e.example}" for status, e in outcome.measured.errors.items())
        raise Unavailable(f"no request was answered: {errors or 'none was sent to its end'}")


async def _run(plan: Plan, watch: bool, console: Console) -> tuple[Found | None, Outcome]:
    with bench_screen.Progress(console) as progress:
        if plan.options.sweep:
            return await search(plan, watch=watch, tell=progress.tell, tried=progress.tried)
        return None, await once(plan, plan.load(), watch=watch, tell=progress.tell)


def _ask(plan: Plan) -> tuple[str, list[Worker]]:
    """The model to ask for, and a server of ours' workers (none of another's)."""
    wanted, target = plan.target.model, plan.target
    with client(target.url, api_key=target.api_key) as session:
        served = _models(session, target.url, wanted)
        if wanted and served and wanted not in served:
            raise ConfigError(f"model {wanted!r} is not served at {target.url}; it has {', '.join(served)} (--model)")
        try:
            answer = session.get("/status").json()
            workers = [Worker(str(w["role"]), int(w["rank"])) for w in answer["workers"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            workers = []
    return wanted or served[0], sorted(workers)


def _models(session: httpx.Client, url: str, wanted: str) -> list[str]:
    """Names of the models served; may be none where one is wanted by name."""
    answer = session.get("/v1/models")
    try:
        served = [str(card["id"]) for card in check(answer).json()["data"]]
    except RequestError as error:
        if wanted and error.status == httpx.codes.NOT_FOUND:
            return []
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"{url} answers, but not as OpenAI's API does; say with --url where a server is") from error
    if not served and not wanted:
        raise Unavailable(f"{url} serves no model")
    return served


def _spec(name_or_path: str, *, asked: bool) -> ModelSpec | None:
    """The served model's description, where its files are here: named models are found by name."""
    try:
        return from_config(library.resolve(name_or_path).config)
    except ModelError:
        if asked:
            raise
        return None


def _check_prices(plan: Plan, workers: list[Worker]) -> None:
    """Before anything is sent."""
    if plan.prices is None or plan.prices.total is not None:
        return
    if not workers:
        raise ConfigError(f"--prices is {plan.options.prices!r}, but {_FOREIGN}")
    plan.prices.of(workers)


def _result(plan: Plan, spec: ModelSpec | None, workers: list[Worker], found: Found | None, outcome: Outcome) -> Result:
    window = outcome.measured.window
    shares = outcome.samples.shares(window.start_s, window.end_s)
    return Result(plan.describe(), outcome, shares, _cost(plan, spec, workers, outcome), found)


def _cost(plan: Plan, spec: ModelSpec | None, workers: list[Worker], outcome: Outcome) -> cost.Cost | None:
    prices, measured = plan.prices, outcome.measured
    if prices is None:
        return None
    if prices.total is not None:
        note = "a total has no parts; price the roles (--prices attention=…,ffn=…) to split it" if workers else _FOREIGN
        return cost.whole(prices.total, measured.output_tokens_per_s, note)
    served, note = None, ""
    if spec is None:
        note = "in theory: unknown, for this model's config.json is not here; --model-path says where it is"
    elif measured.answered:
        served = cost.Served(spec, plan.cost_dtype, measured.context, measured.in_flight)
        note = f"in theory: decoding in {plan.options.cost_dtype} at a context of {measured.context:.0f} tokens"
    busy = outcome.samples.busy(measured.window.start_s, measured.window.end_s)
    if busy.keys() != set(workers):
        rest = sum(price.usd_per_hour for price in prices.of(workers).values())
        note = "the run was too short to learn what the workers did; so this is the whole cost, not split"
        return cost.whole(Price(rest), measured.output_tokens_per_s, note)
    return cost.split(prices, busy, measured.output_tokens_per_s, served, note)
