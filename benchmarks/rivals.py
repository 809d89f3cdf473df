"""The rivals, each a process of its own that waits for its turns: Hugging Face's generate, and vLLM.

    python -m benchmarks.rivals hf|vllm CHECKPOINT     reads turns from standard input, one JSON object a line

`Rival` starts such a process with any Python that has the rival's packages; of this repository it needs `measure.py`
and `workload.py` only. A rival gets the same JPEG files, the same question and the same cores as our own engine, keeps
its weights in the same dtype, and answers exactly `new_tokens` tokens.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image

from benchmarks.measure import ROOT, Progress, Timeline, closed_loop
from benchmarks.workload import PROMPT, jpeg

MARK = "RIVAL "
"""Begins the lines of standard output that are ours; libraries write the others."""


class Rival:
    """The parent's side of one rival. Use as a context manager: leaving it ends the process."""

    def __init__(self, kind: str, checkpoint: pathlib.Path, *, python: str = sys.executable, cores: Sequence[int],
                 log: pathlib.Path, options: Sequence[str] = ()):  # fmt: skip
        """log: file that gets the rival's own output. Raises RuntimeError when it does not start."""
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(len(cores)),
            # vLLM leaves a core free unless told which to take.
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": "4",
        }
        self.kind, self._log = kind, log
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [python, "-m", "benchmarks.rivals", kind, str(checkpoint), *options]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.versions: dict[str, str] = self._answer()

    def turn(self, requests: Sequence[int], *, concurrency: int, new_tokens: int) -> tuple[float, list[Timeline]]:
        """Seconds in all, and each request's timeline on the rival's own clock."""
        assert self._process.stdin
        turn = {"requests": list(requests), "concurrency": concurrency, "new_tokens": new_tokens}
        self._process.stdin.write(json.dumps(turn) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        lines = [Timeline(**{**line, "token_times": tuple(line["token_times"])}) for line in answer["timelines"]]
        return answer["seconds"], lines

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        with self._log.open("a", encoding="utf8") as log:
            for line in self._process.stdout:
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
                log.write(line)
        raise RuntimeError(f"{self.kind} ended with status {self._process.wait()}: see {self._log}")

    def __enter__(self) -> Rival:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def picture(request: int) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(request))).convert("RGB")


class HuggingFace:
    """LlavaNextForConditionalGeneration.generate on batches of `concurrency` requests."""

    packages = ("torch", "transformers")

    def __init__(self, checkpoint: str, options: argparse.Namespace):
        import torch
        from transformers import AutoProcessor, LlavaNextForConditionalGeneration

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self.torch, self.dtype = torch, getattr(torch, options.dtype)
        self.model = LlavaNextForConditionalGeneration.from_pretrained(
            checkpoint, dtype=self.dtype, attn_implementation="sdpa"
        ).eval()
        if torch.cuda.is_available():
            self.model.cuda()
        self.processor = AutoProcessor.from_pretrained(checkpoint)

    def run(self, requests: Sequence[int], concurrency: int, new_tokens: int) -> tuple[float, list[Timeline]]:
        began = time.perf_counter()
        timelines: list[Timeline] = []
        for first in range(0, len(requests), concurrency):
            timelines += self._batch(requests[first : first + concurrency], new_tokens)
        return time.perf_counter() - began, timelines

    def _batch(self, requests: Sequence[int], new_tokens: int) -> list[Timeline]:
        torch, added, stamps = self.torch, time.perf_counter(), _Stamps()
        inputs = self.processor(text=[PROMPT] * len(requests), images=list(map(picture, requests)), return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        with torch.inference_mode():
            self.model.generate(
                **inputs.to(self.model.device),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                streamer=stamps,
            )
        times = tuple(stamps.times[1:])  # the first is the prompt
        assert len(times) == new_tokens
        return [Timeline(request=request, added=added, token_times=times) for request in requests]


class _Stamps:
    """What generate calls with the prompt and with each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Vllm:
    """vLLM's engine, driven request by request; no prefix cache, as every image is new."""

    packages = ("torch", "vllm-cpu", "vllm", "transformers")

    def __init__(self, checkpoint: str, options: argparse.Namespace):
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

        self.engine = LLM(
            model=checkpoint,
            dtype=options.dtype,
            max_model_len=4096,
            max_num_seqs=16,
            limit_mm_per_prompt={"image": 1},
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            enforce_eager=options.eager,
        ).llm_engine
        self.sampling = SamplingParams
        self.turns = 0
        self.new_tokens = 0
        self.seen: dict[int, int] = {}

    def run(self, requests: Sequence[int], concurrency: int, new_tokens: int) -> tuple[float, list[Timeline]]:
        self.new_tokens, self.seen = new_tokens, dict.fromkeys(requests, 0)
        self.turns += 1
        return closed_loop(self, requests, concurrency)

    def add(self, request: int) -> None:
        prompt: Any = {"prompt": PROMPT, "multi_modal_data": {"image": picture(request)}}
        sampling = self.sampling(max_tokens=self.new_tokens, temperature=0, ignore_eos=True)
        self.engine.add_request(f"{self.turns}-{request}", prompt, sampling)

    def step(self) -> Iterator[Progress]:
        for output in self.engine.step():
            request, tokens = int(output.request_id.split("-")[1]), len(output.outputs[0].token_ids)
            new, self.seen[request] = tokens - self.seen[request], tokens
            yield Progress(request=request, new_tokens=new, finished=output.finished)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("hf", "vllm"))
    parser.add_argument("checkpoint", help="in the hub's format")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="vllm: no compilation, which is slower and starts sooner")
    options = parser.parse_args()
    peer: HuggingFace | Vllm = (HuggingFace if options.kind == "hf" else Vllm)(options.checkpoint, options)
    _say({name: version for name in peer.packages if (version := _version(name))})
    for line in sys.stdin:
        turn = json.loads(line)
        for request in turn["requests"]:
            jpeg(request)  # made before the clock starts
        seconds, timelines = peer.run(turn["requests"], turn["concurrency"], turn["new_tokens"])
        _say({"seconds": seconds, "timelines": [asdict(timeline) for timeline in timelines]})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _say(content: object) -> None:
    print(f"{MARK}{json.dumps(content)}", flush=True)


if __name__ == "__main__":
    main()
