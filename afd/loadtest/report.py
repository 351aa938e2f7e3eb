"""The report: one HTML page that needs nothing but itself. Whatever a server said is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from afd.loadtest import series, svg
from afd.loadtest.result import Result
from afd.loadtest.svg import Mark, Series

_MS = 1e3


def page(result: Result, when: str) -> str:
    """The whole page; `when` says when the run was."""
    m = result.outcome.measured
    style = resources.files("afd.loadtest").joinpath("report.css").read_text(encoding="utf-8")
    model = result.setup.get("model", "")
    body = "".join(
        [
            _header(result, when),
            _cards(result),
            _section("Latency", _latency_table(result), "milliseconds; every counted request"),
            _over_time(result),
            _section("How latencies are spread", _cdfs(result), "the share of values at or below x"),
            _cost(result),
            _workers(result),
            _sweep(result),
            _section("Run", _table((), result.figures()), ""),
        ]
    )
    title = f"{escape(model)}: {m.output_tokens_per_s:.0f} tokens/s"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><main>{body}</main></body></html>\n"
    )


def _header(result: Result, when: str) -> str:
    model, server, load, data = (escape(result.setup.get(key, "")) for key in ("model", "server", "load", "data"))
    return f"<header><h1>{model}</h1><p>{load} · {data}<br>{server} · {escape(when)}</p></header>"


def _cards(result: Result) -> str:
    m = result.outcome.measured
    cards = [
        ("output", _short(m.output_tokens_per_s), "tokens/s"),
        ("requests", _short(m.requests_per_s), "per second"),
        ("TTFT p50", _short(_MS * m.ttft_s.p50), "ms"),
        ("TPOT p50", _short(_MS * m.tpot_s.p50), "ms"),
    ]
    if m.goodput is not None:
        cards.append(("goodput", f"{100 * m.goodput.share:.0f} %", f"within {m.goodput.slo}"))
    if result.cost is not None:
        cards.append(("cost", f"${_short(result.cost.total)}", "per million output tokens"))
    if failed := sum(e.count for e in m.errors.values()):
        cards.append(("errors", str(failed), f"of {m.sent} requests"))
    drawn = [f"<div><h3>{escape(n)}</h3><b>{escape(v)}</b><span>{escape(u)}</span></div>" for n, v, u in cards]
    return f'<section class="cards">{"".join(drawn)}</section>'


def _latency_table(result: Result) -> str:
    rows = [
        (name, *(_short(_MS * value) for value in (s.mean, s.p50, s.p90, s.p95, s.p99)), f"{s.count}")
        for name, s in result.latencies().items()
    ]
    return _table(("", "mean", "p50", "p90", "p95", "p99", "values"), rows)


def _over_time(result: Result) -> str:
    m, records = result.outcome.measured, result.outcome.run.records
    shade = (m.window.start_s, m.window.end_s)
    first = [(r.sent_s, _MS * r.ttft_s) for r in records if r.ttft_s is not None]
    charts = [
        (Series("output tokens/s", series.output_rates(records, m.run_s), 0), "output tokens/s"),
        (Series("requests in flight", series.in_flight(records, m.run_s), 1), "requests in flight"),
        (Series("TTFT", series.thinned(first), 2, dots=True), "TTFT, ms, by time of sending"),
    ]
    drawn = [_figure(name, svg.chart([one], "seconds", name, shade=shade)) for one, name in charts]
    note = "shaded: the window that rates are taken over" + ("" if m.window.steady else ", here the whole run")
    return _section("Over time", f'<div class="charts">{"".join(drawn)}</div>', note)


def _cdfs(result: Result) -> str:
    m = result.outcome.measured
    good = [r for r in m.window.counted(result.outcome.run.records) if r.ok]
    values = {
        "TTFT": [r.ttft_s for r in good if r.ttft_s is not None],
        "TPOT": [r.tpot_s for r in good if r.tpot_s is not None],
        "ITL": [itl for r in good for itl in r.itls_s],
        "E2E": [r.e2e_s for r in good],
    }
    drawn = []
    for colour, (name, spread) in enumerate(result.latencies().items()):
        points = [(_MS * x, y) for x, y in series.cdf(values[name])]
        marks = [
            Mark(_MS * at, f"{label} {_short(_MS * at)}")
            for label, at in (("p50", spread.p50), ("p90", spread.p90), ("p99", spread.p99))
            if math.isfinite(at)
        ]
        chart = svg.chart([Series(name, points, colour)], f"{name}, ms", "% of values", marks=marks, y_most=100)
        drawn.append(_figure(name, chart))
    return f'<div class="charts wide">{"".join(drawn)}</div>'


def _cost(result: Result) -> str:
    cost = result.cost
    if cost is None:
        return ""
    parts = [("attention", cost.attention, 0), ("FFN", cost.ffn, 1), ("idle", cost.idle, 4)]
    known = [(name, value, colour) for name, value, colour in parts if value is not None and math.isfinite(value)]
    drawn = f'<div class="bar">{svg.bar(known)}</div>{_legend((n, c) for n, _, c in known)}' if known else ""
    headings = ("USD per million output tokens", "measured", "in theory", "in theory, at this batch")
    note = f"at ${cost.usd_per_hour:g} an hour" + (f"; {cost.note}" if cost.note else "")
    return _section("Cost", drawn + _table(headings, result.costs()), note)


def _workers(result: Result) -> str:
    if not result.shares:
        return ""
    names = list(dict.fromkeys(name for shares in result.shares.values() for name in shares))
    names.sort(key=lambda name: -sum(shares.get(name, 0.0) for shares in result.shares.values()))
    rows = [
        (str(worker), *(f"{100 * shares[name]:.1f}" if name in shares else "" for name in names))
        for worker, shares in result.shares.items()
    ]
    return _section("Where the workers' time went", _table(("", *names), rows), "percent of the window")


def _sweep(result: Result) -> str:
    if result.sweep is None:
        return ""
    rows = [
        (f"{probe.rate:.4g}", f"{100 * probe.share:.1f}", "yes" if probe.met else "no")
        for probe in sorted(result.sweep.probes, key=lambda probe: probe.rate)
    ]
    table = _table(("requests/s", "% within objectives", "met"), rows)
    return _section("Rates tried", table, "the figures above are of the highest rate that meets the objectives")


def _section(title: str, content: str, note: str) -> str:
    noted = f"<small>{escape(note)}</small>" if note else ""
    return f"<section><h2>{escape(title)}{noted}</h2>{content}</section>"


def _figure(name: str, drawing: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(name)}</figcaption></figure>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = f"<thead><tr>{''.join(f'<th>{escape(h)}</th>' for h in headings)}</tr></thead>" if headings else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table{"" if headings else " class=words"}>{head}<tbody>{body}</tbody></table></div>'


def _legend(names: Iterable[tuple[str, int]]) -> str:
    items = "".join(f'<li><i class="k{colour}"></i>{escape(name)}</li>' for name, colour in names)
    return f'<ul class="legend">{items}</ul>'


def _short(value: float) -> str:
    """Three or four digits."""
    if not math.isfinite(value):
        return "none"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"
