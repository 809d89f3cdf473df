"""The model class that lmms-eval drives: `--model focusllava --model_args checkpoint=... | address=...`"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts  # type: ignore[import-not-found]
from lmms_eval.api.model import lmms  # type: ignore[import-not-found]
from lmms_eval.models.model_utils.gen_metrics import log_metrics  # type: ignore[import-not-found]
from lmms_eval.protocol import ChatMessages  # type: ignore[import-not-found]
from tqdm import tqdm  # type: ignore[import-untyped]

from evaluation.lmms_eval_plugin.answering import LOCAL_LIMITS, Answering, InProcess, Served
from evaluation.lmms_eval_plugin.questions import Question, RequestFailed, sampling_settings, turns
from focusllava import Answer
from focusllava.messages import Settings
from services.common.errors import InvalidInput
from services.common.ranges import check_samplers
from services.common.types import SamplerSettings
from services.compute.dtypes import Dtype
from services.local.model import LocalModel


class FocusLlava(lmms):
    """Chat style: each request's messages hold its images and its words, no, one or several images a question."""

    is_simple = False

    def __init__(
        self,
        checkpoint: str | None = None,
        address: str | None = None,
        vision_sampler: bool = True,
        text_sampler: bool = True,
        threshold: float | None = None,
        keep_ratio: float | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        kv_cache_mib: int | None = None,
        timeout_s: float | None = None,
    ):
        """The settings are lmms-eval's `--model_args`, but for the three that have options of their own.

        checkpoint, or address (host:port) of a gateway. FOCUSLLAVA_API_KEY in the environment is sent to it.
        threshold or keep_ratio: of the text-guided sampler; the checkpoint's threshold when both are left out.
        batch_size: questions at a time. max_batch_size is lmms-eval's, for batch_size "auto", and is refused.
        device, dtype ("auto" when left out), kv_cache_mib (MiB of KV cache; as in serving when left out): in
        process only.
        timeout_s: served only.

        Raises InvalidInput naming the setting and its value.
        """
        super().__init__()
        if (checkpoint is None) == (address is None):
            raise InvalidInput(
                f"is {checkpoint!r} with address {address!r}, expected one of the two", field="model_args.checkpoint"
            )
        if max_batch_size is not None:
            raise InvalidInput(f"is {max_batch_size}: batches have the size of --batch_size", field="max_batch_size")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InvalidInput(f"is {batch_size!r}, expected a number of questions", field="batch_size")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InvalidInput("is above 1: run one process; for several GPUs evaluate a gateway", field="WORLD_SIZE")
        check_samplers(SamplerSettings(threshold=threshold, keep_ratio=keep_ratio), field="model_args")
        self.batch_size = int(batch_size)
        samplers = Settings(
            vision_sampler=_flag("vision_sampler", vision_sampler),
            text_sampler=_flag("text_sampler", text_sampler),
            threshold=threshold,
            keep_ratio=keep_ratio,
        )
        local = checkpoint is not None
        misplaced: dict[str, Any] = (
            {"timeout_s": timeout_s} if local else {"dtype": dtype, "kv_cache_mib": kv_cache_mib}
        )
        for name, value in misplaced.items():
            if value is not None:
                needed = "an address" if local else "a checkpoint"
                raise InvalidInput(f"is {value!r}, which needs {needed}", field=f"model_args.{name}")
        self._answering: Answering
        if checkpoint is not None:
            model = _local(str(checkpoint), device or "cpu", dtype, kv_cache_mib, self.batch_size)
            self._answering = InProcess(model, samplers)
        else:
            api_key = os.environ.get("FOCUSLLAVA_API_KEY")
            self._answering = Served(str(address), samplers, timeout_s=timeout_s, api_key=api_key)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """One answer a request, in their order. Raises RequestFailed naming the first that has none."""
        began = time.perf_counter()
        answers: list[Answer] = []
        with tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0) as progress:
            for first in range(0, len(requests), self.batch_size):
                batch = [self._question(request) for request in requests[first : first + self.batch_size]]
                answers += self._answering.answer(batch)
                progress.update(len(batch))
        _report(answers, time.perf_counter() - began)
        return [
            GenerationResult(
                text=answer.text,
                token_counts=TokenCounts(
                    input_tokens=answer.usage.prompt_tokens, output_tokens=answer.usage.completion_tokens
                ),
            )
            for answer in answers
        ]

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        _refuse("loglikelihood", requests)

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        _refuse("generate_until_multi_round", requests)

    def clean(self) -> None:
        """lmms-eval is done with the model: a judge may need its memory."""
        self._answering.close()
        del self._answering
        super().clean()

    def _question(self, request: Instance) -> Question:
        _, doc_to_messages, generation_kwargs, doc_id, task, split = request.args
        name = f"{task}/{split}/{doc_id}"
        try:
            messages = doc_to_messages(self.task_dict[task][split][doc_id])
            checked = ChatMessages(messages=messages).model_dump()["messages"]
            return Question(name=name, turns=turns(checked), settings=sampling_settings(generation_kwargs))
        except Exception as error:  # the task's own code runs here
            raise RequestFailed(name, error) from error


def _local(checkpoint: str, device: str, dtype: str | None, kv_cache_mib: int | None, batch_size: int) -> LocalModel:
    if dtype is not None and dtype not in get_args(Dtype):
        raise InvalidInput(f"is {dtype!r}, expected one of {', '.join(get_args(Dtype))}", field="model_args.dtype")
    kv_cache_bytes = None if kv_cache_mib is None else kv_cache_mib * 2**20
    return LocalModel(
        checkpoint,
        device,
        dtype or "auto",
        media=LOCAL_LIMITS,
        kv_cache_bytes=kv_cache_bytes,
        max_running=batch_size,
    )


def _flag(name: str, value: object) -> bool:
    """ "off" or 0 in the arguments must not count as true."""
    if not isinstance(value, bool):
        raise InvalidInput(f"is {value!r}, expected True or False", field=f"model_args.{name}")
    return value


def _refuse(kind: str, requests: Sequence[Instance]) -> NoReturn:
    tasks = ", ".join(sorted({request.task_name for request in requests})) or "a task"
    raise NotImplementedError(f"{tasks} asks for {kind}; focusllava answers generate_until requests only")


def _report(answers: Sequence[Answer], seconds: float) -> None:
    """Throughput and visual tokens, beside lmms-eval's scores."""
    usages = [answer.usage for answer in answers]
    tokens = sum(usage.completion_tokens for usage in usages)
    uncompressed = sum(usage.visual_tokens_uncompressed for usage in usages)
    additional: dict[str, float] = {"num_requests": len(answers)}
    if uncompressed:
        converted = sum(usage.converted_visual_tokens for usage in usages)
        additional["converted_visual_tokens_percent"] = 100 * converted / uncompressed
    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=tokens,
        avg_speed=tokens / seconds if seconds else 0.0,
        additional_metrics=additional,
    )
