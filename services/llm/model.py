"""The decoder of transformers (Llama, Mistral, Qwen2), its layers used as they are, one range of layers at a time.

Legend: S tokens of a packed pass, D width, V vocabulary, T instruction tokens, N visual tokens, H/G query/key heads.
"""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import check_shapes, load_stage
from services.checkpoint.supported import check_decoder
from services.compute.dtypes import dtype_of_stored
from services.compute.linear import Quantize, linear_parameters, onednn_multiplies, prepare_linears
from services.llm.attention import ATTENTION_NAME, PackedStep
from services.llm.kernels import AttentionStep, choose_elementwise
from services.llm.kernels.fused_layer import FusedLayer, can_fuse, fuse_norms, rms_norm
from services.sampler.text_guided import apply_rotary, text_importance

Rotary = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each [1, S, d]."""
SCORED_QUERIES = 256


class Decoder:
    """A causal language model whose caller owns positions, KV cache and which tokens go on."""

    def __init__(self, causal_lm: nn.Module):
        """causal_lm: transformers' *ForCausalLM, built with attn_implementation="focusllava"."""
        lm: Any = causal_lm.eval().requires_grad_(False)
        self.lm = lm
        self.config = lm.config
        check_decoder(self.config)
        assert self.config._attn_implementation == ATTENTION_NAME
        self.layers = lm.model.layers
        self.num_layers = len(self.layers)
        attention = self.layers[0].self_attn
        self.head_dim: int = attention.head_dim
        self.kv_heads: int = self.config.num_key_value_heads
        self.context: int = self.config.max_position_embeddings
        self.elementwise = choose_elementwise(self.device, self.dtype) if all(map(can_fuse, self.layers)) else None
        self.fused = [FusedLayer(layer, self.elementwise) for layer in self.layers] if self.elementwise else []
        """Our layers in place of transformers'; empty: transformers' own run."""
        self.decodes_whole = bool(self.fused) and all(layer.decodes_whole for layer in self.fused)

    @classmethod
    def from_state(
        cls,
        config: PreTrainedConfig,
        state: dict[str, torch.Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        quantize: Quantize | None = None,
    ) -> Decoder:
        """Builds the decoder around `state` (names of its state dict; emptied) without a second copy in memory.

        quantize: see `prepare_linears`. Raises InvalidInput naming tensors that are missing, unknown or of another
        shape.
        """
        check_decoder(config)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME, dtype=dtype)
        # What oneDNN takes is converted then, one layer at a time: two whole copies would not fit where one just does.
        later = linear_parameters(lm) if onednn_multiplies(torch.device(device), dtype) else set()
        state = {
            name: state.pop(name) if name in later else state.pop(name).to(device=device, dtype=dtype)
            for name in list(state)
        }
        if config.tie_word_embeddings:
            state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight", torch.empty(0)))
        check_shapes(
            {name: tensor.shape for name, tensor in state.items()},
            {name: tensor.shape for name, tensor in lm.state_dict().items()},
        )
        lm.load_state_dict(state, strict=True, assign=True)
        if config.tie_word_embeddings:
            lm.lm_head.weight = lm.model.embed_tokens.weight
        # Rotary frequencies are in no checkpoint and the meta device gave them no value.
        lm.model.rotary_emb = type(lm.model.rotary_emb)(config=config).to(device)
        assert not any(tensor.is_meta for tensor in (*lm.parameters(), *lm.buffers()))
        state.clear()  # or the plain weights would stay beside the prepared ones
        fuse_norms(lm)
        prepare_linears(lm.requires_grad_(False), torch.device(device), dtype, quantize)
        return cls(lm)

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | pathlib.Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        quantize: Quantize | None = None,
    ) -> Decoder:
        """Reads the LLM's shards only. dtype None keeps the checkpoint's where `device` is made for it;
        quantize: see `prepare_linears`."""
        config = FocusLlavaConfig.load(folder)
        prefix = "language_model."
        state = {name.removeprefix(prefix): tensor for name, tensor in dict(load_stage(folder, "llm")).items()}
        dtype = dtype or dtype_of_stored(config.dtype, device)
        return cls.from_state(config.text_config, state, dtype=dtype, device=device, quantize=quantize)

    @property
    def dtype(self) -> torch.dtype:
        return self.lm.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm.model.embed_tokens.weight.device

    def embed(self, ids_S: torch.Tensor) -> torch.Tensor:
        """Token embeddings [S, D]."""
        return self.lm.model.embed_tokens(ids_S)

    def rotary(self, position_S: torch.Tensor) -> Rotary:
        """cos and sin of rotary embedding, each [1, S, d], in the model's dtype."""
        return self.lm.model.rotary_emb(self.lm.model.embed_tokens.weight, position_S[None])

    def run_layers(
        self, hidden_SD: torch.Tensor, rotary: Rotary, first: int, last: int, step: AttentionStep
    ) -> torch.Tensor:
        """Layers first..last-1 on a packed pass; returns hidden [S, D].

        After the model's last layer: the rows of `step.final_rows` only. There are three ways through a layer:

            transformers' own       a layer of another shape than Llama's, or a device without our operators
            FusedLayer              our operators, one after another: prefill, any pass on a GPU, a CPU's large batch
            FusedLayer.decode       one call of compiled code: a CPU's pass that decodes a few sequences and no more
        """
        final_rows = step.final_rows if last == self.num_layers else None
        if not self.fused:
            hidden_1SD = hidden_SD[None]
            for layer in self.layers[first:last]:
                hidden_1SD = layer(
                    hidden_1SD,
                    attention_mask=None,
                    position_ids=None,
                    past_key_values=None,
                    use_cache=False,
                    position_embeddings=rotary,
                    focus_step=step,
                )
            return hidden_1SD[0] if final_rows is None else hidden_1SD[0, final_rows]
        cos_Sd, sin_Sd, hidden_SD = rotary[0][0], rotary[1][0], hidden_SD.clone()  # it is written to
        if self.decodes_whole and isinstance(step, PackedStep) and step.decodes_few:
            for layer in self.fused[first:last]:
                layer.decode(hidden_SD, cos_Sd, sin_Sd, *step.pages(layer.index))
            return hidden_SD if final_rows is None else hidden_SD[final_rows]
        for layer in self.fused[first:last]:
            rows = final_rows if layer is self.fused[-1] else None
            hidden_SD = layer(hidden_SD, cos_Sd, sin_Sd, step, rows)
        return hidden_SD

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Final norm and head: [S, V]."""
        return self.lm.lm_head(self._norm(self.lm.model.norm, hidden_SD))

    def visual_importance(
        self, hidden_SD: torch.Tensor, rotary: Rotary, layer: int, instruction_tokens: int
    ) -> torch.Tensor:
        """Eq. 6-8 on hidden states entering `layer`, with that layer's own norm, q/k projections and rotary.

        The first T = `instruction_tokens` rows are the instruction's, the N after them the visual tokens'. Only T
        queries and N keys are computed. Returns float32 [N].
        """
        block, (cos_Sd, sin_Sd) = self.layers[layer], (table[0] for table in rotary)
        norm_SD = self._norm(block.input_layernorm, hidden_SD)
        first, rest = slice(instruction_tokens), slice(instruction_tokens, None)
        query_THd = self._project(block.self_attn.q_proj, norm_SD[first], cos_Sd[first], sin_Sd[first])
        key_NGd = self._project(block.self_attn.k_proj, norm_SD[rest], cos_Sd[rest], sin_Sd[rest])
        # The mean over instruction tokens, some at a time: a long question must not cost T x N x H floats at once.
        importance_N = torch.zeros(len(key_NGd), device=hidden_SD.device)
        for part_THd in query_THd.split(SCORED_QUERIES):
            share = len(part_THd) / len(query_THd)
            importance_N += text_importance(part_THd, key_NGd, block.self_attn.scaling) * share
        return importance_N

    def _norm(self, norm: nn.Module, hidden_SD: torch.Tensor) -> torch.Tensor:
        return norm(hidden_SD) if self.elementwise is None else rms_norm(norm, hidden_SD, self.elementwise)

    def _project(
        self, projection: nn.Module, norm_SD: torch.Tensor, cos_Sd: torch.Tensor, sin_Sd: torch.Tensor
    ) -> torch.Tensor:
        """Queries or keys with their rotary embedding: [S, heads, d]."""
        x_SHd = projection(norm_SD).unflatten(-1, (-1, self.head_dim))
        if self.elementwise is None:
            return apply_rotary(x_SHd, cos_Sd, sin_Sd)
        self.elementwise.rotate_(x_SHd, cos_Sd, sin_Sd)
        return x_SHd
