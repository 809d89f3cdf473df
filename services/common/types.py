"""Every dataclass that crosses a stage.

Legend: T tiles, P patches a tile, D LLM width, H and W of the unpadded feature map, M regions, N visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch

from services.common.int8 import from_int8
from services.common.settings import Count, Natural, Range, Share

Detail = Literal["low", "high"]
MAX_LOGPROBS = 20
"""Most likeliest tokens whose log probabilities are reported."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How one image is read."""

    detail: Detail = "high"
    """"high" is the base tile and the grid's tiles, "low" the base tile alone."""
    reduced_jpeg: bool | None = None
    """Whether a large JPEG may be decoded at reduced scale; None follows the checkpoint."""
    map_share: Share | None = None
    """The largest share of the feature map's tokens that the vision-guided sampler leaves; None is its own choice."""


@dataclass(frozen=True, kw_only=True)
class ImageTiles:
    """An image cut for the vision tower; tile 0 is the base tile (the whole image in one tile)."""

    pixels_T3HW: torch.Tensor
    """float32 [1 + rows * cols, 3, tile, tile], normalised."""
    image_size_hw: tuple[int, int]
    """Size of the image before resizing, in pixels."""
    grid_hw: tuple[int, int]
    """Rows and columns of grid tiles; (0, 0) with low detail."""


@dataclass(frozen=True, kw_only=True)
class ProjectedFeatureMap:
    """Projector output of one image: base-tile tokens, and the grid tiles put together and unpadded."""

    base_PD: torch.Tensor
    map_HWD: torch.Tensor
    """[0, 0, D] with low detail."""

    @property
    def low_detail(self) -> bool:
        """Whether there is a base tile alone. A very narrow image's map is empty too, but in one dimension only."""
        return self.map_HWD.shape[:2] == (0, 0)


@dataclass(frozen=True, kw_only=True)
class CompressedVisualTokens:
    """What the encoder stage hands to the LLM stage for one image."""

    tokens_ND: torch.Tensor
    """Base-tile tokens, then those of the map with a newline embedding closing each row: of regions in the vision
    sampler's `token_order` "region", of the map in "row" and with the sampler off. With low detail: the base tile's and
    one newline embedding. Floating point, or int8 with `scales_NG`."""
    branch_ids_M: torch.Tensor
    """uint8 [M]: the branch that each region chose, regions in raster order; empty with the vision sampler off."""
    map_hw: tuple[int, int]
    """Height and width of the unpadded feature map, in tokens; (0, 0) with low detail."""
    uncompressed_tokens: int
    """Visual tokens of this image with the vision sampler off (newlines and base tile included)."""
    content_hash: str
    """SHA-256 (hex) of the image bytes."""
    model_fingerprint: str
    notes: tuple[str, ...] = ()
    """What the user should know of how the image was read, such as "animated image: first frame used"."""
    scales_NG: torch.Tensor | None = None
    """float32 [N, D / 64]: what multiplies each 64 values of int8 tokens (`services/common/int8.py`); None with any
    other dtype."""
    image_size_hw: tuple[int, int] = (0, 0)
    """Height and width of the image in pixels, upright and before any resizing; focus maps alone need it."""
    base_branch_ids_M: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    """uint8: the branch that each region of the base tile chose, where the checkpoint samples it; else empty."""
    digest: bytes | None = None
    """What equal tokens have in common, where a stage of our own vouches for it (`services/common/shelf.py`). None:
    whoever needs one looks at the tokens."""

    def values_ND(self, dtype: torch.dtype) -> torch.Tensor:
        """The tokens in a floating dtype; no copy where they have it."""
        if self.scales_NG is None:
            return self.tokens_ND.to(dtype)
        return from_int8(self.tokens_ND, self.scales_NG, dtype)


@dataclass(frozen=True, kw_only=True)
class PruneDecision:
    """The text-guided sampler's choice for one prompt (Eq. 6-9)."""

    kept: torch.Tensor
    """int64 [K], ascending indices into the prompt's visual tokens."""
    importance: torch.Tensor
    """float32 [N]: S_j of Eq. 8."""
    layer: int
    threshold: float | None
    """gamma of Eq. 9; None when the request set a keep ratio instead."""
    keep_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class FocusRegions:
    """The vision-guided sampler's regions, in pixels of the image."""

    x: np.ndarray
    """float64: edges of the grid's columns, from left to right."""
    y: np.ndarray
    """float64: edges of the grid's rows, from top to bottom."""
    kernels: tuple[tuple[int, int], ...]
    """Height and width, in tokens of the feature map, that a token of each branch stands for; zeros drop a region."""
    branch_ids_M: np.ndarray
    """uint8 [M]: the branch that each region chose, in raster order."""


@dataclass(frozen=True, kw_only=True)
class FocusMap:
    """What both samplers chose of one image, in its own pixels (`services/focus_maps`)."""

    image_size_hw: tuple[int, int]
    regions: FocusRegions | None
    """None where there are none: with the vision-guided sampler off, or no feature map."""
    boxes_N4: np.ndarray
    """float32 [N, 4]: x0, y0, x1, y1 of each visual token, in the language model's order; zeros for a newline."""
    base_tokens: int
    """The number of tokens, all at the beginning, that are the base tile's."""
    kept_N: np.ndarray
    """bool [N]: the tokens that the layers from the prune layer on saw."""
    importance_N: np.ndarray | None
    """float32 [N]: S_j of Eq. 8; None where nothing was pruned."""


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What the text of an answer must match; equal ones are compiled once."""

    kind: Literal["json_object", "json_schema", "choice", "regex", "grammar"]
    text: str = ""
    """The JSON Schema (JSON text), the regular expression, or the grammar (Lark, or GBNF with its "::=")."""
    choices: tuple[str, ...] = ()
    """The texts of kind "choice"."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn; the defaults are greedy decoding.

    In this order: logit_bias, penalties, constraint and min_tokens, temperature, top_k, top_p, min_p
    (`services/llm/kernels/sampling.py`). `services/common/ranges.py` checks what no single type can say.
    """

    max_tokens: Count = 256
    min_tokens: Natural = 0
    """No end-of-sequence token, stop token or stop string ends the answer before so many tokens; the constraint does,
    where it leaves nothing but the end."""
    temperature: Annotated[float, Range(0, 2)] = 0.0
    """0 takes the likeliest token; the other limits on a draw have no effect then."""
    top_k: Natural = 0
    """Draws from so many of the likeliest tokens; 0 from all."""
    top_p: Share = 1.0
    """Nucleus: the fewest likeliest tokens whose probability reaches this share of what top_k left."""
    min_p: Annotated[float, Range(0, 1)] = 0.0
    """Leaves out tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Range(0, 2, above=True)] = 1.0
    """Logits of tokens in the prompt or the answer are divided by it where positive, multiplied where negative."""
    presence_penalty: Annotated[float, Range(-2, 2)] = 0.0
    """Subtracted once from the logit of each token that the answer holds."""
    frequency_penalty: Annotated[float, Range(-2, 2)] = 0.0
    """Subtracted from a token's logit for each time that the answer holds it."""
    seed: Annotated[int, Range(0, 2**64 - 1)] | None = None
    """Makes draws repeatable, whatever else is served beside; None is a random one."""
    logprobs: Annotated[int, Range(0, MAX_LOGPROBS)] | None = None
    """Reports the log probability of each chosen token and of so many likeliest ones beside it; None reports none."""
    stop: tuple[str, ...] = ()
    """The answer ends before any of these."""
    stop_token_ids: tuple[int, ...] = ()
    """The answer ends at any of these tokens, beside the model's own end-of-sequence tokens."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id, each at most once, and what is added to its logit."""
    include_stop_str_in_output: bool = False
    """The stop string, or the text of the stop token, is part of the answer."""
    ignore_eos: bool = False
    """Generates exactly `max_tokens`, for benchmarks. A constraint that leaves nothing else still ends the answer."""
    constraint: Constraint | None = None
    """What the answer must match; None is anything."""
    keep_special_tokens: bool = False
    """Special tokens, but for the one that ends the answer, are part of the text."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Natural logarithm of a token's probability under the model itself: before penalties, temperature and limits."""

    token_id: int
    logprob: float
    text: str = ""
    """The token by itself; empty inside the LLM stage, filled in at its edge."""
    raw_bytes: bytes = b""
    """The bytes that the token stands for, which may be a part of a character; filled in with the text."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """The chosen token and the likeliest ones at its place, the chosen one perhaps among them."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()
    """Most likely first; of equals the smaller id."""


@dataclass(frozen=True, kw_only=True)
class SampledToken:
    """One sequence's next token."""

    token_id: int
    logprob: TokenLogprobs | None = None
    """None unless the request asked for it."""


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Both samplers' settings of one request. What is None or True is as the checkpoint has it.

    Each has one name from the command line to the kernel. At most one of `threshold` and `keep_ratio` is set.
    """

    vision_sampler: bool = True
    """False leaves the vision-guided sampler out. The encoder stage alone is told."""
    text_sampler: bool = True
    """False leaves the text-guided sampler out."""
    threshold: Share | None = None
    """gamma of Eq. 9: the kept tokens' share of the summed importance."""
    keep_ratio: Share | None = None
    """Keeps this share of a prompt's visual tokens, rounded up, whatever their importance adds up to."""


@dataclass(frozen=True, kw_only=True)
class TextPart:
    text: str


@dataclass(frozen=True, kw_only=True)
class ImagePart:
    """Index into the request's list of images."""

    image: int


@dataclass(frozen=True, kw_only=True)
class PromptTurn:
    """One message of a conversation. role is "system", "user" or "assistant"; images only in user turns."""

    role: str
    parts: tuple[TextPart | ImagePart, ...]


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What the LLM stage is asked: turns, or a raw prompt."""

    request_id: str
    turns: tuple[PromptTurn, ...] = ()
    images: tuple[CompressedVisualTokens, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    samplers: SamplerSettings = SamplerSettings()
    continue_final_message: bool = False
    """The last turn is the assistant's, and the answer goes on from its text."""
    raw_prompt: str | tuple[int, ...] | None = None
    """Stands in place of turns, with no chat template: text whose special tokens count as such, or token ids."""
    return_decision: bool = False
    """The text-guided sampler's decision comes after the first token."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Accounting of one request (method: Sec. 4.4, converted remaining tokens)."""

    prompt_tokens: int = 0
    """Text and visual tokens entering layer 0."""
    completion_tokens: int = 0
    visual_tokens_uncompressed: int = 0
    visual_tokens_sampled: int = 0
    """Visual tokens after the vision-guided sampler: what layers 0..k-1 see."""
    visual_tokens_kept: int = 0
    """Visual tokens after the text-guided sampler: what layers k..L-1 see."""
    prune_layer: int = 0
    """k, zero-based; 0 when nothing was pruned."""
    num_layers: int = 0
    kv_bytes: int = 0
    """Bytes of KV cache that the request's tokens held at its end."""
    kv_unpruned_bytes: int = 0
    """What the same tokens would have held with no text-guided pruning."""
    time_to_first_token_s: float = 0.0

    @property
    def converted_visual_tokens(self) -> float:
        """Sec. 4.4: N - n * (L - i) / L, where n of N tokens leave at layer i of L."""
        removed = self.visual_tokens_sampled - self.visual_tokens_kept
        if not self.num_layers:
            return float(self.visual_tokens_sampled)
        return self.visual_tokens_sampled - removed * (self.num_layers - self.prune_layer) / self.num_layers

    @property
    def converted_share(self) -> float:
        """Converted tokens as a share (0..1) of the uncompressed count; 1.0 without an image."""
        if not self.visual_tokens_uncompressed:
            return 1.0
        return self.converted_visual_tokens / self.visual_tokens_uncompressed


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """New text of the answer. `text` may be empty while a character is incomplete."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One entry a token id when the request asked for them, otherwise empty."""
    prompt_tokens: int = 0
    """Text and visual tokens that entered layer 0: the same in every event."""


@dataclass(frozen=True, kw_only=True)
class DecisionEvent:
    """What the text-guided sampler chose; it follows the first token, for who asked for it."""

    decision: PruneDecision | None
    """None where nothing was pruned."""


@dataclass(frozen=True, kw_only=True)
class FinishedEvent:
    """The last event of a stream. reason is "stop", "length" or "abort"."""

    reason: str
    usage: Usage
