"""The LLM stage: requests in, events out; each step is one pass over many requests.

Legend: n sequences, V vocabulary, N visual tokens, D width.
"""

from __future__ import annotations

import pathlib
import time
from typing import Any

import torch

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import fingerprint
from services.common.errors import InvalidInput
from services.common.types import (
    CompressedVisualTokens,
    DecisionEvent,
    FinishedEvent,
    GenerateRequest,
    ImagePart,
    PromptTurn,
    SampledToken,
    SamplingParams,
    TextPart,
    TokenEvent,
    Usage,
)
from services.compute.dtypes import dtype_of_stored
from services.grammar.grammars import Grammars
from services.llm.engine_config import EngineConfig
from services.llm.engine_stats import EngineStats, Event, StepFailed
from services.llm.intake import Intake
from services.llm.kernels.sampling import sample
from services.llm.kv_cache import KVCache
from services.llm.model import Decoder
from services.llm.model_runner import ModelRunner
from services.llm.scheduler import Scheduler, Step
from services.llm.sequence import Sequence, SequenceState
from services.text.prompt import PromptRenderer


class Engine:
    """Runs requests on one model. One thread calls it, but for `prepare` and `stats`, which any thread may call."""

    def __init__(
        self,
        decoder: Decoder,
        renderer: PromptRenderer,
        config: FocusLlavaConfig,
        model_fingerprint: str,
        engine_config: EngineConfig,
    ):
        """engine_config: one whose sizes are all set (`EngineConfig.sized`)."""
        self.decoder, self.renderer, self.config = decoder, renderer, config
        self.fingerprint = model_fingerprint
        self.prune_layer = config.text_sampler.layer
        self.eos_token_ids = frozenset(config.eos_token_ids)
        self.cache = KVCache(
            engine_config,
            num_layers=decoder.num_layers,
            prune_layer=self.prune_layer,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            hidden_size=decoder.config.hidden_size,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        self.grammars = Grammars(
            renderer.tokenizer, vocabulary=decoder.config.vocab_size, eos_token_ids=config.eos_token_ids
        )
        self.intake = Intake(decoder, renderer, config, model_fingerprint, self.cache, self.grammars)
        self.scheduler = Scheduler(self.cache, engine_config)
        self._sequences: dict[str, Sequence] = {}
        self.runner = ModelRunner(decoder, self.cache, self.prune_layer)
        self._failed_steps = 0
        self._totals = dict.fromkeys(
            ("prompt_tokens", "completion_tokens", "visual_tokens_sampled", "visual_tokens_kept",
             "prompt_tokens_reused", "prefill_passes", "decode_passes"), 0,
        )  # fmt: skip

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | pathlib.Path,
        config: EngineConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **settings: Any,
    ) -> Engine:
        """Loads the LLM's shards and the tokenizer; no encoder weight is read.

        settings: fields of EngineConfig, in place of `config`; dtype None keeps the checkpoint's where `device` is made
        for it. Raises InvalidInput for a setting out of range, and for what the device has no memory for.
        """
        assert config is None or not settings, "either of the two"
        engine_config = config or EngineConfig(**settings)
        model_config = FocusLlavaConfig.load(folder)
        dtype = dtype or dtype_of_stored(model_config.dtype, device)
        engine_config = engine_config.sized(engine_config.sizes(folder, device, dtype))
        decoder = Decoder.from_checkpoint(folder, dtype=dtype, device=device, quantize=engine_config.quantize)
        decoder.context = min(decoder.context, engine_config.max_model_len or decoder.context)
        renderer = PromptRenderer.from_checkpoint(
            folder,
            image_token_id=model_config.image_token_id,
            context=decoder.context,
            instruction=model_config.text_sampler.instruction,
        )
        return cls(decoder, renderer, model_config, fingerprint(folder), engine_config)

    def warm_up(self) -> None:
        """Does what the first requests would wait for: on a GPU, records all its graphs and compiles its kernels.

        Called before any request. Answers two: the second is prefilled while the first decodes.
        """
        self.grammars.start()
        with torch.inference_mode():
            if not self.runner.record_graphs(self.scheduler.max_running):
                return
        image = CompressedVisualTokens(
            tokens_ND=torch.zeros(4, self.decoder.config.hidden_size, dtype=self.decoder.dtype),
            branch_ids_M=torch.empty(0, dtype=torch.uint8),
            map_hw=(2, 2),
            uncompressed_tokens=4,
            content_hash="",
            model_fingerprint=self.fingerprint,
        )
        turn = PromptTurn(role="user", parts=(ImagePart(image=0), TextPart(text="Hello")))
        for name, tokens, temperature in (("first", 3, 0.0), ("second", 2, 1.0)):
            sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=temperature)
            self.submit(GenerateRequest(request_id=name, turns=(turn,), images=(image,), sampling=sampling))
            self.step()
        while self.has_work():
            self.step()
        self._totals = dict.fromkeys(self._totals, 0)

    # Requests in and out.

    def submit(self, request: GenerateRequest) -> None:
        """Queues a request. Raises InvalidInput, WrongFingerprint or TooLarge at once."""
        self.enqueue(self.prepare(request))

    def prepare(self, request: GenerateRequest) -> Sequence:
        """Everything that can be refused of a request, with no change to the engine. Thread-safe."""
        return self.intake.sequence(request)

    def enqueue(self, sequence: Sequence) -> None:
        """Queues what `prepare` made. Raises InvalidInput when its id is in flight already."""
        if sequence.request_id in self._sequences:
            raise InvalidInput(f"{sequence.request_id!r} is in flight already", field="request_id")
        self.scheduler.add(sequence)
        self._sequences[sequence.request_id] = sequence

    def abort(self, request_id: str, *, broken: bool = False) -> FinishedEvent | None:
        """Ends a request in any state and frees its pages at once; None when it is not in flight.

        broken: nobody may find what it computed, for a step was planned and not carried out."""
        sequence = self._sequences.get(request_id)
        return self._finish(sequence, "abort", broken=broken) if sequence else None

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_pages_used=self.cache.num_pages - self.cache.pool.pages_to_have,
            kv_pages_total=self.cache.num_pages,
            kv_pages_cached=self.cache.pool.idle_pages,
            kv_pages_wanted=self.scheduler.pages_wanted(),
            kv_page_bytes=self.cache.page_bytes,
            prefill_tokens_left=self.scheduler.prefill_tokens_left(),
            failed_steps=self._failed_steps,
            preemptions=self.scheduler.preemptions,
            **self._totals,
        )

    def check_integrity(self) -> None:
        """Asserts that every page of the KV cache is accounted for and every request is in one place."""
        self.scheduler.check_integrity()
        assert set(self._sequences.values()) == {*self.scheduler.waiting, *self.scheduler.running}

    # One step.

    @torch.inference_mode()
    def step(self) -> list[tuple[str, Event]]:
        """One packed pass: a token of every answer that runs, and prefill; returns its events. Raises StepFailed."""
        try:
            step = self.scheduler.schedule()
            return self._pass(step) if step.sequences else []
        except Exception as error:
            # Where others got on, the fault is a request's and not the engine's.
            self._failed_steps += not (isinstance(error, StepFailed) and error.events)
            raise

    def _pass(self, step: Step) -> list[tuple[str, Event]]:
        try:
            logits_mV, sequences = self.runner.run(step, self.scheduler.extend)
            self._totals["prefill_passes"] += bool(step.lower or step.upper)
            self._totals["decode_passes"] += bool(step.decode)
            if not sequences:
                return []
            guides = {row: s.guide for row, s in enumerate(sequences) if s.guide}
            tokens = sample(
                logits_mV,
                [s.request.sampling for s in sequences],
                [s.generator for s in sequences],
                [s.prompt.input_ids for s in sequences],
                [s.output_ids for s in sequences],
                guided=tuple(guides),
                masks_mW=self.grammars.masks(tuple(guides.values())) if guides else None,
                forbidden=[s.forbidden_ids(self.eos_token_ids) for s in sequences],
            )
        except Exception as error:
            for sequence in step.sequences:
                self._finish(sequence, "abort", broken=True)
            raise StepFailed(tuple(sequence.request_id for sequence in step.sequences)) from error
        return self._accept_all(sequences, tokens)

    def _accept_all(self, sequences: list[Sequence], tokens: list[SampledToken]) -> list[tuple[str, Event]]:
        """Every sequence's events; raises StepFailed for those that could not take their token, and for no other."""
        events: list[tuple[str, Event]] = []
        failed: dict[str, Exception] = {}
        for sequence, token in zip(sequences, tokens, strict=True):
            try:
                events += [(sequence.request_id, event) for event in self._accept(sequence, token)]
            except Exception as error:
                self._finish(sequence, "abort")
                failed[sequence.request_id] = error
        if failed:
            raise StepFailed(tuple(failed), tuple(events)) from next(iter(failed.values()))
        return events

    def _accept(self, sequence: Sequence, sampled: SampledToken) -> list[Event]:
        """A new token's events, the end of the sequence included."""
        token, sampling, text, reason = sampled.token_id, sequence.request.sampling, sequence.detokenizer, ""
        if sequence.guide and sequence.guide.error:
            self._finish(sequence, "abort")
            self.grammars.forget(sequence.guide.constraint)
            return [InvalidInput(sequence.guide.error, field=f"sampling.constraint.{sequence.guide.constraint.kind}")]
        if sequence.first_token_at is None:
            sequence.first_token_at = time.monotonic()
        sequence.output_ids.append(token)
        if sequence.guide:
            sequence.guide.take(token)
        ends = sequence.ends_at(token, self.eos_token_ids)
        new = "" if ends and not sampling.include_stop_str_in_output else text.push(token)
        if text.stopped or ends:
            reason = "length" if ends and sequence.guide and sequence.guide.closes else "stop"
        elif len(sequence.output_ids) == sequence.max_new_tokens:
            reason = "length"
        if reason and not text.stopped:
            new += text.finish()
            reason = "stop" if text.stopped else reason
        events: list[Event] = [
            TokenEvent(
                text=new,
                token_ids=(token,),
                logprobs=(sampled.logprob,) if sampled.logprob else (),
                prompt_tokens=sequence.prompt_len,
            )
        ]
        if sequence.request.return_decision and len(sequence.output_ids) == 1:
            events.append(DecisionEvent(decision=sequence.decision))
        if reason:
            events.append(self._finish(sequence, reason))
            self._failed_steps = 0
        return events

    def _finish(self, sequence: Sequence, reason: str, *, broken: bool = False) -> FinishedEvent:
        usage = self._usage(sequence)
        if sequence.state is not SequenceState.FINISHED:
            del self._sequences[sequence.request_id]  # first: its id is free even if the rest fails
            if sequence.first_token_at is not None:  # its prefill ended
                for name in ("prompt_tokens", "completion_tokens", "visual_tokens_sampled", "visual_tokens_kept"):
                    self._totals[name] += getattr(usage, name)
                self._totals["prompt_tokens_reused"] += sequence.reused_tokens
            self.scheduler.finish(sequence, broken=broken)
        return FinishedEvent(reason=reason, usage=usage)

    def _usage(self, sequence: Sequence) -> Usage:
        layers, k = self.decoder.num_layers, self.prune_layer
        before, after = sequence.kv_lens
        decision = sequence.decision
        return Usage(
            prompt_tokens=sequence.prompt_len,
            completion_tokens=len(sequence.output_ids),
            visual_tokens_uncompressed=sum(image.uncompressed_tokens for image in sequence.request.images),
            visual_tokens_sampled=sequence.num_visual,
            visual_tokens_kept=len(decision.kept) if decision else sequence.num_visual,
            prune_layer=k if decision else 0,
            num_layers=layers,
            kv_bytes=(before * k + after * (layers - k)) * self.cache.bytes_per_token_layer,
            kv_unpruned_bytes=before * layers * self.cache.bytes_per_token_layer,
            time_to_first_token_s=(sequence.first_token_at or time.monotonic()) - sequence.received_at,
        )
