"""Turns the JSON files of benchmarks/results into the tables of docs/performance.md, so that no figure is typed.

    python -m benchmarks.report [--check]

In the document, everything between `<!-- table: NAME -->` and `<!-- end -->` is replaced by the table that
`TABLES[NAME]` makes of the newest result of its kind for each checkpoint. A table without a result stays as it is.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.measure import RESULTS, ROOT, median_of
from benchmarks.replica_tables import affinity, autoscaling, markdown

DOCUMENT = ROOT / "docs" / "performance.md"
MARKER = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
PEERS = {"hf": "Hugging Face generate", "vllm": "vLLM"}


def caption(result: dict[str, Any]) -> str:
    """What the figures below were taken on."""
    machine = result["machine"]
    device = f", device {result['device']}" if result.get("device", "cpu") != "cpu" else ""
    load = f"{machine['load_average_1min']:.1f} to {result['load_average_1min_at_end']:.1f}"
    return (
        f"{result['checkpoint']}: {machine['processor']}, {len(machine['cores_used'])} core(s){device}, "
        f"{result.get('dtype', 'bfloat16')}, torch {machine['torch']}, load average {load}\n\n"
    )


def unit(flops_per_s: float) -> tuple[float, str]:
    """What to divide rates like this one by, and its name."""
    return (1e12, "TFLOP/s") if flops_per_s > 1e13 else (1e9, "GFLOP/s")


def engine(result: dict[str, Any]) -> str:
    rows, ratios = [], []
    for concurrency, point in result["concurrency"].items():
        for name, turns in point["turns"].items():
            middle = median_of(turns)
            rows.append([
                concurrency, PEERS.get(name, f"samplers {name}"), f"{middle['requests_per_s']:.2f}",
                f"{middle['output_tokens_per_s']:.1f}", f"{middle['ttft_p50_ms']:.0f} / {middle['ttft_p99_ms']:.0f}",
                f"{middle['tpot_p50_ms']:.1f} / {middle['tpot_p99_ms']:.1f}", f"{middle['peak_kv_bytes'] / 2**20:.1f}",
            ])  # fmt: skip
        for pair, ratio in point["ratios"].items():
            ours, theirs = (PEERS.get(name, name) for name in pair.split("/"))
            spread = f"{ratio['least']:.2f} to {ratio['greatest']:.2f}"
            ratios.append([concurrency, f"{ours} against {theirs}", f"{ratio['median']:.2f}x", spread])
    header = ("in flight", "peer", "requests/s", "tokens/s", "TTFT p50 / p99, ms", "TPOT p50 / p99, ms", "KV peak, MiB")
    table = markdown(header, rows)
    return f"{table}\n{markdown(('in flight', 'requests/s', 'median', 'over the rounds'), ratios)}"


def prefill(result: dict[str, Any]) -> str:
    by, name_of_unit = unit(result["linear_flops_per_s"])
    rates = (result["linear_flops_per_s"] / by, result["attention_flops_per_s"] / by)
    rows = [
        [
            name, f"{s['visual_tokens_sampled']} > {s['visual_tokens_kept']}", f"{1e3 * s['seconds']:.1f}",
            f"{s['speedup']:.2f}x", f"{s['allowed_speedup']:.2f}x", f"{s['share_of_allowed']:.0%}",
            f"{s['kv_share_of_off']:.3f}",
        ]
        for name, s in result["settings"].items()
    ]  # fmt: skip
    header = ("samplers", "visual tokens", "prefill, ms", "speed-up", "allowed", "share", "KV bytes against off")
    head = f"Linear layers {rates[0]:.0f} {name_of_unit}, attention {rates[1]:.0f} {name_of_unit}."
    return f"{head}\n\n{markdown(header, rows)}"


def samplers(result: dict[str, Any]) -> str:
    rows = [
        [name, f"{1e3 * c['seconds']:.2f}", f"{c['share_of_prefill_off']:.2%}",
         f"{c['share_of_own_prefill']:.2%}" if "share_of_own_prefill" in c else ""]
        for name, c in result["samplers"].items()
    ]  # fmt: skip
    header = ("sampler", "ms", "of the prefill with samplers off", "of its own prefill")
    return markdown(header, rows)


def roofline(result: dict[str, Any]) -> str:
    by, name_of_unit = unit(result["peak_flops_per_s"])
    rates = result["peak_flops_per_s"] / by, result["read_bytes_per_s"] / 1e9
    prefill = [
        [tokens, f"{r['linear_flops_per_s'] / by:.0f}", f"{r['linear_share_of_peak']:.0%}",
         f"{r['attention_flops_per_s'] / by:.0f}", f"{r['attention_share_of_peak']:.0%}"]
        for tokens, r in result["prefill"].items()
    ]  # fmt: skip
    decode = [
        [sequences, f"{1e3 * r['seconds_per_step']:.2f}", f"{r['bytes_per_step'] / 2**20:.0f}",
         f"{r['bytes_per_s'] / 1e9:.1f}", f"{r['share_of_read_rate']:.0%}"]
        for sequences, r in result["decode"].items()
    ]  # fmt: skip
    return (
        f"Peak: matrix product {rates[0]:.0f} {name_of_unit}, reading {rates[1]:.1f} GB/s.\n\n"
        + markdown(
            ("prompt tokens", f"linear, {name_of_unit}", "of peak", f"attention, {name_of_unit}", "of peak"), prefill
        )
        + "\n"
        + markdown(("sequences", "ms a decode step", "MiB a step", "GB/s", "of reading"), decode)
    )


def arrival(result: dict[str, Any]) -> str:
    rows = [
        [name, *(f"{point[c]:.1f}" for c in ("usual_gap_ms", "longest_gap_ms", "ttft_ms"))]
        for name, point in result["budgets"].items()
    ]
    header = ("budget, tokens a step", "gap before, ms", "longest gap, ms", "TTFT of the prompt, ms")
    return markdown(header, rows)


def scaling(result: dict[str, Any]) -> str:
    rows = []
    for point in result["points"]:
        off, both = point["medians"]["off"], point["medians"]["both"]
        height, width = point["size_hw"]
        rows.append([
            point["axis"], f"{height} x {width}", f"{off['visual_tokens_uncompressed']:.0f}", point["new_tokens"],
            point["concurrency"], f"{off['requests_per_s']:.2f}", f"{both['requests_per_s']:.2f}",
            f"{point['both_over_off']:.2f}x",
        ])  # fmt: skip
    header = (
        "axis",
        "image",
        "visual tokens",
        "new tokens",
        "in flight",
        "off, requests/s",
        "both",
        "both against off",
    )
    return markdown(header, rows)


def encoder(result: dict[str, Any]) -> str:
    rows = [
        [concurrency, name, f"{m['images_per_s']:.1f}", f"{m['tiles_per_s']:.0f}", f"{m['tiles_per_batch']:.1f}",
         f"{m['latency_p50_ms']:.0f} / {m['latency_p99_ms']:.0f}"]
        for concurrency, point in result["concurrency"].items()
        for name, m in point["medians"].items()
    ]  # fmt: skip
    header = ("in flight", "JPEG", "images/s", "tiles/s", "tiles a batch", "p50 / p99, ms")
    parts = [[name, f"{ms:.1f}"] for name, ms in result["parts_ms"].items()]
    return f"{markdown(header, rows)}\n{markdown(('part', 'ms'), parts)}"


def served(result: dict[str, Any]) -> str:
    rows = [
        [name, f"{m['output_tokens_per_s']:.0f}", f"{m['ttft_p50_ms']:.0f}", f"{m['tpot_p50_ms']:.1f}",
         f"{median_of(_plain(result['idle'][name]))['ttft_p50_ms']:.1f}"]
        for name, m in ((name, median_of(_plain(turns))) for name, turns in result["turns"].items())
    ]  # fmt: skip
    ratio, turns = result["ratio"], result["turns"]["served"]
    tokens = result["tokens"] * result["requests"]
    used = median_of([turn["processor_s"] for turn in turns])
    costs = [[part, f"{1e3 * seconds / tokens:.3f}"] for part, seconds in used.items()]
    in_flight = result["in_flight"]
    header = ("peer", f"tokens/s, {in_flight} in flight", "TTFT p50, ms", "TPOT p50, ms", "TTFT p50 of one, ms")
    said = (
        f"Served over engine {ratio['median']:.2f}x ({ratio['least']:.2f} to {ratio['greatest']:.2f}), "
        f"{tokens / median_of(_plain(turns))['messages']:.1f} tokens a message."
    )
    return f"{markdown(header, rows)}\n{said}\n\n{markdown(('processor time of', 'ms a token'), costs)}"


def _plain(turns: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The turns' figures that are numbers."""
    return [{name: value for name, value in turn.items() if not isinstance(value, dict)} for turn in turns]


def images(result: dict[str, Any]) -> str:
    rows = [
        [name, f"{m['processor_ms']:.1f}", f"{m['clock_ms']:.1f}"]
        for name, m in ((name, median_of(turns)) for name, turns in result["turns"].items())
    ]
    return markdown((f"way of {result['megabytes']:.0f} MB", "processor time, ms", "clock, ms"), rows)


def wire_dtypes(result: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{row['kilobytes_an_image']:.1f}",
            f"{row['relative_error_percent']:.2f} %",
            f"{row['exact_percent']:.1f} %",
            f"{row['as_float32_percent']:.1f} %",
        ]
        for name, row in result["rows"].items()
    ]
    header = ("`wire_dtype`", "kB an image", "error of the values", "answers right", "answers as with float32")
    return markdown(header, rows)


def serving(result: dict[str, Any]) -> str:
    def row(cells: Sequence[str], m: dict[str, float]) -> list[str]:
        return [
            *cells, f"{m['goodput_per_s']:.1f}", f"{m['answered_per_s']:.1f}", f"{m['score']:.1f}",
            f"{m['ttft_p50_ms']:.0f} / {m['ttft_p99_ms']:.0f}", f"{m['tpot_p50_ms']:.0f} / {m['tpot_p99_ms']:.0f}",
            f"{m['refused']:.0f}", f"{m['cache_hits']:.0f}", f"{m['visual_tokens']:.0f}", f"{m['level']:.1f}",
        ]  # fmt: skip

    figures = ("goodput/s", "answers/s", "score, %", "TTFT p50 / p99, ms", "TPOT p50 / p99, ms", "refused",
               "cache hits, %", "visual tokens", "level")  # fmt: skip
    closed = [row((n, name), m) for n, point in result["closed"].items() for name, m in point.items()]
    opened, ratios = [], []
    for point in result["points"]:
        load = f"{point['arrivals']}, {point['rate'] / result['capacity']:.2g}x"
        opened += [row((load, name), median_of(turns)) for name, turns in point["turns"].items()]
        for pair, (middle, least, greatest) in point["ratios"].items():
            ratios.append([load, pair.replace("/", " / "), f"{middle:.2f}x", f"{least:.2f} to {greatest:.2f}"])
    goal = result["goal"]
    said = (
        f"Good is a first token within {goal['ttft_s']:g} s and {1e3 * goal['tpot_s']:.0f} ms a token after it. "
        f"Capacity {result['capacity']:.1f} requests/s."
    )
    return (
        f"{said}\n\n{markdown(('in flight', 'setting', *figures), closed)}\n"
        f"{markdown(('arrivals', 'setting', *figures), opened)}\n"
        f"{markdown(('arrivals', 'goodput', 'median', 'over the rounds'), ratios)}"
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "engine": engine,
    "prefill": prefill,
    "samplers": samplers,
    "roofline": roofline,
    "arrival": arrival,
    "scaling": scaling,
    "encoder": encoder,
    "served": served,
    "images": images,
    "wire_dtypes": wire_dtypes,
    "affinity": lambda result: affinity(result["turns"]),
    "autoscaling": lambda result: autoscaling(result["points"]),
    "serving": serving,
}


def fill(document: str, results: Iterable[dict[str, Any]]) -> str:
    """The document with every table rewritten of which there is a result. Raises KeyError for an unknown table."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_name.setdefault(result["benchmark"], []).append(result)

    def table(match: re.Match[str]) -> str:
        make, found = TABLES[match["name"]], by_name.get(match["name"], [])
        body = "\n".join(caption(result) + make(result) for result in found) if found else match["body"]
        return f"{match[1]}{body}{match[4]}"

    return MARKER.sub(table, document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--document", type=pathlib.Path, default=DOCUMENT)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the document is not current")
    options = parser.parse_args()
    results = [json.loads(path.read_text("utf8")) for path in sorted(options.results.glob("*.json"))]
    before = options.document.read_text("utf8")
    after = fill(before, [result for result in results if result.get("benchmark") in TABLES])
    if options.check:
        sys.exit(0 if after == before else f"{options.document} is not what the results say: run benchmarks.report")
    options.document.write_text(after, "utf8")
    print(f"{options.document} holds the tables of {len(results)} result(s)")


if __name__ == "__main__":
    main()
