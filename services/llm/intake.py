"""The way from a request to a sequence that can run: everything that can be refused of a request is refused here.

Legend: N visual tokens, D width.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import dataclass

import torch

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput, TooLarge, WrongFingerprint
from services.common.ranges import check_samplers, check_sampling
from services.common.types import CompressedVisualTokens, GenerateRequest, SamplerSettings
from services.compute.dtypes import all_finite, dtype_name
from services.grammar.grammars import Grammars
from services.llm.kernels.sampling import new_generator
from services.llm.kv_cache import KVCache
from services.llm.model import Decoder
from services.llm.prefix import block_keys
from services.llm.sequence import Sequence
from services.sampler.text_guided import keeps_all
from services.text.detokenizer import Detokenizer
from services.text.prompt import Prompt, PromptRenderer


class RecentSet:
    """The latest of what was added, so many at most. Thread-safe."""

    def __init__(self, most: int = 4096):
        self._most, self._found, self._lock = most, dict[bytes, None](), threading.Lock()

    def __contains__(self, item: bytes | None) -> bool:
        return item in self._found

    def add(self, item: bytes) -> None:
        with self._lock:
            self._found[item] = None
            if len(self._found) > self._most:
                del self._found[next(iter(self._found))]


@dataclass(frozen=True)
class Intake:
    """Checks requests for one engine and changes nothing of it. Thread-safe."""

    decoder: Decoder
    renderer: PromptRenderer
    config: FocusLlavaConfig
    fingerprint: str
    cache: KVCache
    grammars: Grammars
    known_finite: RecentSet = dataclasses.field(default_factory=RecentSet, init=False)
    """Digests of visual tokens that were looked at: 24 MB of a known image need not be read again."""

    def sequence(self, request: GenerateRequest) -> Sequence:
        """Raises InvalidInput naming the field, WrongFingerprint for another checkpoint's tokens, or TooLarge."""
        received_at = time.monotonic()
        check_sampling(request.sampling)
        check_samplers(request.samplers)
        self._check_token_ids(request)
        visual_ND = self._visual_tokens(request)
        prompt = self._prompt(request)
        sequence = Sequence(
            request=request,
            prompt=prompt,
            visual_ND=visual_ND,
            pruning=self._pruning(request, prompt),
            max_new_tokens=min(request.sampling.max_tokens, self.decoder.context - len(prompt.input_ids)),
            generator=new_generator(request.sampling),
            detokenizer=Detokenizer(self.renderer.tokenizer, request.sampling),
            block_keys=block_keys(prompt, request.images, self.cache.block_size) if self.cache.prefix_reuse else (),
            received_at=received_at,
        )
        self._check_room(sequence)
        sequence.guide = self.grammars.guide(request.sampling, sequence.max_new_tokens)  # last: it may cost most
        return sequence

    def _prompt(self, request: GenerateRequest) -> Prompt:
        if request.raw_prompt is not None:
            return self.renderer.render_raw(request.raw_prompt)
        counts = [len(image.tokens_ND) for image in request.images]
        return self.renderer.render(request.turns, counts, continue_final=request.continue_final_message)

    def _check_token_ids(self, request: GenerateRequest) -> None:
        """Raises InvalidInput for an id that the vocabulary does not have."""
        vocabulary, sampling = self.decoder.config.vocab_size, request.sampling
        ids = [(f"sampling.stop_token_ids[{i}]", token) for i, token in enumerate(sampling.stop_token_ids)]
        ids += [(f"sampling.logit_bias[{token}]", token) for token, _ in sampling.logit_bias]
        if isinstance(request.raw_prompt, tuple):
            ids += [(f"raw_prompt.token_ids[{i}]", token) for i, token in enumerate(request.raw_prompt)]
        for field, token in ids:
            if not 0 <= token < vocabulary:
                raise InvalidInput(f"names token {token} of a vocabulary of {vocabulary}", field=field)

    def _pruning(self, request: GenerateRequest, prompt: Prompt) -> SamplerSettings | None:
        """The request's settings, with the checkpoint's threshold if they name none; None when every token goes on."""
        asked, ours = request.samplers, self.config.text_sampler
        if not (asked.text_sampler and ours.enabled and prompt.visual_spans and prompt.instruction_positions):
            return None
        if asked.keep_ratio is None and asked.threshold is None:
            asked = dataclasses.replace(asked, threshold=ours.threshold)
        return None if keeps_all(asked) else asked

    def _check_room(self, sequence: Sequence) -> None:
        """Raises TooLarge for what could not run even if it had the whole KV cache."""
        cache, (lower, upper) = self.cache, sequence.max_kv_lens
        if cache.pages_needed(lower, upper) > cache.num_pages or cache.blocks(lower) > cache.num_buffers:
            needed = max(cache.blocks(lower) * cache.block_bytes, cache.pages_needed(lower, upper) * cache.page_bytes)
            raise TooLarge(
                f"a prompt of {sequence.prompt_len} tokens and up to {sequence.max_new_tokens} new ones need "
                f"{needed} bytes of KV cache, this server has {cache.num_buffers * cache.block_bytes}, "
                f"{cache.num_buffers * cache.block_size} tokens; "
                "ask for fewer max_tokens or send smaller images",
                field="request",
            )

    def _visual_tokens(self, request: GenerateRequest) -> torch.Tensor | None:
        width, parts = self.decoder.config.hidden_size, []
        for index, image in enumerate(request.images):
            if image.model_fingerprint != self.fingerprint:
                raise WrongFingerprint(
                    f"is {image.model_fingerprint!r}, this stage runs {self.fingerprint!r}",
                    field=f"images[{index}].model_fingerprint",
                )
            tokens, field = image.tokens_ND, f"images[{index}].tokens"
            if tokens.ndim != 2 or tokens.shape[1] != width or not len(tokens) or not _has_values(image):
                found = f"is {tokens.dtype} {list(tokens.shape)}"
                raise InvalidInput(f"{found}, expected floating point or scaled int8 [1 or more, {width}]", field=field)
            parts.append(image.values_ND(self.decoder.dtype))
            if image.digest in self.known_finite:
                continue
            if not all_finite(parts[-1]):
                raise InvalidInput(
                    f"holds NaN, infinity, or values beyond the range of {dtype_name(self.decoder.dtype)}", field=field
                )
            if image.digest is not None:
                self.known_finite.add(image.digest)
        if not parts:
            return None
        visual_ND = torch.cat(parts) if len(parts) > 1 else parts[0]
        # Pinned here, on any thread, the engine's own need not wait for the copy to a GPU.
        return visual_ND.pin_memory() if self.decoder.device.type == "cuda" else visual_ND


def _has_values(image: CompressedVisualTokens) -> bool:
    return image.tokens_ND.is_floating_point() or (image.tokens_ND.dtype is torch.int8 and image.scales_NG is not None)
