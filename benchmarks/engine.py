"""Requests per second and latency of the whole pipeline, from image bytes to the last token, beside its rivals.

    python -m benchmarks.engine FOLDER --cores 0-1 --vllm-env PATH

FOLDER holds `hub` and `focusllava` (benchmarks/random_checkpoint.py). Each request is one 672 x 672 JPEG that nobody
has seen before (2,928 visual tokens) and a question, answered with 32 tokens. Peers: our two stages in one process with
the samplers off, vision, text and both (the paper's ratios), Hugging Face's generate, and vLLM when its environment is
given. All are pinned to the same cores and take turns within every round; a figure is the median over rounds, a ratio
the median of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.device import set_up
from benchmarks.measure import (
    RESULTS,
    add_machine_options,
    median_of,
    print_table,
    ratio_of,
    summary,
    take_turns,
    write_results,
)
from benchmarks.rivals import Rival
from benchmarks.stages import SETTINGS, Stages, mean_usage
from services.checkpoint.config import FocusLlavaConfig
from services.compute.dtypes import dtype_name

FIGURES = ("requests_per_s", "output_tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")


def kv_bytes_per_token(config: FocusLlavaConfig, dtype: torch.dtype) -> int:
    """Bytes of K and V that one token holds in all layers."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_key_value_heads * head_dim * text.num_hidden_layers * dtype.itemsize


class Bench:
    """The peers of one run, and the numbers of pictures that none of them has seen."""

    def __init__(self, stages: Stages, rivals: Sequence[Rival], token_bytes: int, new_tokens: int):
        self.stages, self.rivals = stages, rivals
        self.token_bytes, self.new_tokens = token_bytes, new_tokens
        self._pictures = itertools.count(1000)

    def turns(self, settings: Sequence[str], concurrency: int, requests: int) -> dict[str, Callable[[], Any]]:
        """A peer's name -> its turn: `requests` requests, `concurrency` at a time, fresh pictures each time."""
        ours = {s: functools.partial(self._ours, s, concurrency, requests) for s in settings}
        rivals = {r.kind: functools.partial(self._rival, r, concurrency, requests) for r in self.rivals}
        return {**ours, **rivals}

    def _fresh(self, count: int) -> list[int]:
        return list(itertools.islice(self._pictures, count))

    def _ours(self, setting: str, concurrency: int, requests: int) -> dict[str, float]:
        turn = self.stages.run(
            self._fresh(requests), concurrency=concurrency, new_tokens=self.new_tokens, setting=SETTINGS[setting]
        )
        usage = mean_usage([turn])
        return {**summary(turn.seconds, turn.timelines), "peak_kv_bytes": turn.peak_kv_bytes, **usage}

    def _rival(self, rival: Rival, concurrency: int, requests: int) -> dict[str, float]:
        fresh = self._fresh(requests)
        seconds, timelines = rival.turn(fresh, concurrency=concurrency, new_tokens=self.new_tokens)
        # A rival keeps every token of a request in every layer; computed, not measured.
        prompt = self._prompt_tokens()
        held = min(concurrency, requests) * (prompt + self.new_tokens) * self.token_bytes
        return {**summary(seconds, timelines), "peak_kv_bytes": held, "prompt_tokens": prompt,
                "kv_bytes": (prompt + self.new_tokens) * self.token_bytes}  # fmt: skip

    @functools.cache  # noqa: B019 (one Bench a process)
    def _prompt_tokens(self) -> float:
        turn = self.stages.run(self._fresh(1), concurrency=1, new_tokens=2, setting=SETTINGS["off"])
        return mean_usage([turn])["prompt_tokens"]


def compare(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Ratios of requests per second within rounds: off against each rival, and every setting against off."""
    rate = {name: [turn["requests_per_s"] for turn in turns] for name, turns in results.items()}
    pairs = [("off", rival) for rival in ("vllm", "hf")] + [(name, "off") for name in ("vision", "text", "both")]
    pairs += [("both", rival) for rival in ("vllm", "hf")]
    ratios = {}
    for ours, theirs in pairs:
        if ours in rate and theirs in rate:
            middle, least, greatest = ratio_of(rate[ours], rate[theirs])
            ratios[f"{ours}/{theirs}"] = {"median": middle, "least": least, "greatest": greatest}
    return ratios


def show(concurrency: int, results: dict[str, list[dict[str, float]]], ratios: dict[str, dict[str, float]]) -> None:
    rows = []
    for name, turns in results.items():
        middle = median_of(turns)
        cells = [f"{middle[figure]:.3g}" if "_per_s" in figure else f"{middle[figure]:.0f}" for figure in FIGURES]
        rows.append([name, *cells, f"{middle['peak_kv_bytes'] / 2**20:.1f}", f"{middle['kv_bytes'] / 2**20:.2f}"])
    print(f"\n{concurrency} in flight")
    header = ("peer", "req/s", "tok/s", "TTFT p50", "p99 ms", "TPOT p50", "p99 ms", "KV peak MiB", "KV/request MiB")
    print_table(header, rows)
    for pair, ratio in ratios.items():
        print(f"requests/s {pair}: {ratio['median']:.2f}x ({ratio['least']:.2f} to {ratio['greatest']:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="holds `hub` and `focusllava`, the same weights")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="requests in flight")
    parser.add_argument("--requests", type=int, help="a turn; default twice the concurrency, 4 to 16")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before those that count")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--no-hf", action="store_true", help="leave Hugging Face out")
    parser.add_argument("--vllm-env", type=pathlib.Path, help="virtual environment, or its python, that has vLLM")
    parser.add_argument("--vllm-eager", action="store_true", help="vLLM without compilation")
    add_machine_options(parser)
    options = parser.parse_args()
    dtype, described = set_up(options)

    config = FocusLlavaConfig.load(options.folder / "focusllava")
    token_bytes = kv_bytes_per_token(config, dtype)
    # A pool in which all fit side by side, the hidden states of their prefill too: nobody is measured running out.
    hidden_bytes = dtype.itemsize * config.text_config.hidden_size
    pool = int(1.2 * max(options.concurrency) * (token_bytes + hidden_bytes) * 3200)
    with contextlib.ExitStack() as stack:
        rivals = []
        for kind in ("hf", "vllm"):
            if (kind == "hf" and options.no_hf) or (kind == "vllm" and not options.vllm_env):
                continue
            print(f"bench: starting {kind}", flush=True)
            eager = ["--eager"] if kind == "vllm" and options.vllm_eager else []
            extra: dict[str, Any] = {"options": [f"--dtype={dtype_name(dtype)}", *eager]}
            if kind == "vllm":
                path = options.vllm_env
                extra["python"] = str(path / "bin" / "python" if path.is_dir() else path)
            log = RESULTS / f"{kind}.log"
            rival = Rival(kind, options.folder / "hub", cores=options.cores, log=log, **extra)
            rivals.append(stack.enter_context(rival))
        print(f"bench: loading {options.folder}", flush=True)
        stages = Stages(options.folder / "focusllava", dtype=dtype, kv_cache_bytes=pool, device=options.device)
        stack.callback(stages.close)
        bench = Bench(stages, rivals, token_bytes, options.new_tokens)
        content: dict[str, Any] = {
            **described,
            "text": {k: config.text[k] for k in ("hidden_size", "num_hidden_layers", "intermediate_size")},
            "prune_layer": config.text_sampler.layer,
            "new_tokens": options.new_tokens,
            "rivals": {rival.kind: rival.versions for rival in rivals},
            "concurrency": {},
        }
        for concurrency in options.concurrency:
            requests = options.requests or min(max(2 * concurrency, 4), 16)
            results = take_turns(bench.turns(options.settings, concurrency, requests), options.rounds, options.warm_up)
            ratios = compare(results)
            show(concurrency, results, ratios)
            content["concurrency"][concurrency] = {"requests": requests, "turns": results, "ratios": ratios}
    write_results("engine", content, options.out or f"engine-{options.folder.name}")


if __name__ == "__main__":
    main()
