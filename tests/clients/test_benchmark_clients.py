"""The usual load generators, a short run each: guidellm and `vllm bench serve`."""

from __future__ import annotations

import json

from tests.clients.conftest import ENVIRONMENTS

IMAGES = '{"image": 1, "video": 0}'


def test_guidellm(server, run, tmp_path):
    """Its defaults: it asks /health and /v1/models, then streams chat completions with usage in every piece."""
    report = tmp_path / "report.json"
    run(
        ENVIRONMENTS / "guidellm" / "bin" / "guidellm", "run", "--disable-console-interactive",
        "--backend", f"kind=openai_http,target={server.url}",
        "--tokenizer", f"kind=huggingface_auto,model={server.checkpoint}",
        "--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16",
        "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=20",
        "--output", f"kind=json,path={report}",
    )  # fmt: skip
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals, metrics = benchmark["metrics"]["request_totals"], benchmark["metrics"]
    assert (totals["successful"], totals["errored"]) == (20, 0)
    assert metrics["output_token_count"]["successful"]["mean"] == 16
    assert metrics["time_to_first_token_ms"]["successful"]["mean"] > 0
    assert metrics["inter_token_latency_ms"]["successful"]["mean"] > 0


def bench(server, run, tmp_path, *options: str) -> dict:
    run(
        ENVIRONMENTS / "vllm" / "bin" / "vllm", "bench", "serve", "--base-url", server.url, "--model", server.model,
        "--tokenizer", server.checkpoint, "--num-prompts", "20", "--max-concurrency", "4", "--disable-tqdm",
        "--save-result", "--result-dir", tmp_path, "--result-filename", "result.json", *options,
    )  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (20, 0)
    assert result["mean_ttft_ms"] > 0 and result["mean_tpot_ms"] > 0
    return result


def test_vllm_bench_of_chat(server, run, tmp_path):
    options = "--dataset-name random --random-input-len 64 --random-output-len 16 --backend openai-chat"
    result = bench(server, run, tmp_path, *options.split(), "--endpoint", "/v1/chat/completions")
    assert result["total_output_tokens"] == 20 * 16


def test_vllm_bench_of_images(server, run, tmp_path):
    options = "--dataset-name random-mm --random-input-len 16 --random-output-len 16 --backend openai-chat"
    images = ["--random-mm-bucket-config", "{(336, 336, 1): 1.0}", "--random-mm-limit-mm-per-prompt", IMAGES]
    result = bench(server, run, tmp_path, *options.split(), *images, "--endpoint", "/v1/chat/completions")
    assert result["total_output_tokens"] == 20 * 16


def test_vllm_bench_of_completions(server, run, tmp_path):
    options = "--dataset-name random --random-input-len 64 --random-output-len 16 --backend openai"
    assert bench(server, run, tmp_path, *options.split())["total_output_tokens"] == 20 * 16
