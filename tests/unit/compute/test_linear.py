"""oneDNN's, panel and quantised linear layers against plain ones, and a whole engine on either."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from services.common.errors import InvalidInput
from services.compute.linear import fastest_linear, prepare_linears
from services.compute.onednn_linear import Int8Linear, OneDnnLinear
from services.compute.panel_linear import FEW_TOKENS, PanelLinear, lies_in_panels
from services.llm.kernels.reference_attention import ReferenceKernels
from services.llm.model import Decoder
from tests import tiny_llm
from tests.processor import ONEDNN_DTYPES, needs_bf16, needs_vnni

TORCH_THREADS = 2
CPU = torch.device("cpu")


def linear(inputs: int, outputs: int, bias: bool, dtype: torch.dtype, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ONEDNN_DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs, outputs", [(64, 128), (100, 33), (512, 96)])
def test_onednns_linear_is_linear(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    plain = linear(inputs, outputs, bias, dtype)
    onednn = OneDnnLinear(plain)
    assert not list(onednn.parameters()) and not onednn.state_dict()
    for tokens in (1, 2, 16, 300):
        x = torch.randn(1, tokens, inputs).to(dtype)
        exact = F.linear(x.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double())
        out = onednn(x)
        assert out.dtype == dtype and out.shape == (1, tokens, outputs)
        rounding = 2**-8 if dtype == torch.bfloat16 else 2**-20
        torch.testing.assert_close(out.double(), exact, rtol=rounding, atol=rounding)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ONEDNN_DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_several_linears_of_one_input_are_one(bias: bool, dtype: torch.dtype) -> None:
    parts = [linear(100, outputs, bias, dtype, seed=outputs) for outputs in (48, 16, 33)]
    joined = OneDnnLinear(*parts)
    assert (joined.in_features, joined.out_features) == (100, 97)
    x = torch.randn(2, 30, 100).to(dtype)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-20
    for part, out in zip(parts, joined(x).split((48, 16, 33), dim=-1), strict=True):
        torch.testing.assert_close(out, part(x), rtol=rounding, atol=rounding)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ONEDNN_DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs, outputs", [(64, 128), (100, 33), (512, 96)])
def test_the_fastest_form_is_linear(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    plain = linear(inputs, outputs, bias, dtype)
    layer = fastest_linear(plain)
    for tokens in (1, 17, FEW_TOKENS, FEW_TOKENS + 1, 300):
        x = torch.randn(tokens, inputs).to(dtype)
        exact = F.linear(x.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double())
        rounding = 2**-8 if dtype == torch.bfloat16 else 2**-18
        torch.testing.assert_close(layer(x).double(), exact, rtol=rounding, atol=rounding)


@needs_bf16
@pytest.mark.parametrize("inputs, outputs", [(64, 128), (512, 96), (64, 100)])
def test_what_two_kernels_multiply_from_is_in_memory_once(inputs: int, outputs: int) -> None:
    plain = linear(inputs, outputs, True, torch.bfloat16)
    onednn = OneDnnLinear(plain)
    if not lies_in_panels(onednn, plain):
        assert not getattr(fastest_linear(plain), "onednn", None)
        return
    panels, own = PanelLinear(plain, onednn), PanelLinear(plain)
    assert torch.equal(panels.weight_PKNp, own.weight_PKNp)
    assert panels.weight_PKNp.data_ptr() == onednn.memory().data_ptr() != own.weight_PKNp.data_ptr()
    plain.weight[-1, -1] += 1
    assert not lies_in_panels(onednn, plain), "one weight elsewhere is another layout"


@needs_vnni
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_int8_linear_is_within_a_hundredth(bias: bool, dtype: torch.dtype) -> None:
    plain = linear(256, 96, bias, dtype)
    quantised = Int8Linear(plain)
    # Tokens of very different size: each has a scale of its own.
    x = (torch.randn(300, 256) * torch.logspace(-3, 3, 300)[:, None]).to(dtype)
    exact = F.linear(x.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double())
    out = quantised(x)
    assert out.dtype == dtype
    error = (out.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(error.max()) < 0.03 and float(error.mean()) < 0.015


@torch.inference_mode()
def test_int8_result_of_a_token_does_not_depend_on_its_batch() -> None:
    quantised = Int8Linear(linear(256, 96, False, torch.float32))
    x = torch.randn(40, 256)
    x[7] *= 1000  # would flatten the others if they shared a scale
    whole = quantised(x)
    for index in (0, 7, 39):
        torch.testing.assert_close(quantised(x[index : index + 1])[0], whole[index], rtol=0, atol=0)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_takes_zeros_and_the_largest_values(dtype: torch.dtype) -> None:
    quantised = Int8Linear(linear(64, 32, False, dtype))
    assert torch.equal(quantised(torch.zeros(2, 64, dtype=dtype)), torch.zeros(2, 32, dtype=dtype))
    for value in (1e-30, 1e30):
        assert quantised(torch.full((1, 64), value, dtype=dtype)).isfinite().all()
    still = Int8Linear(nn.Linear(64, 32, bias=False).requires_grad_(False))
    still_zero = nn.Linear(64, 32, bias=False).requires_grad_(False)
    still_zero.weight.zero_()
    assert Int8Linear(still_zero)(torch.ones(1, 64)).abs().sum() == 0
    assert still(torch.ones(1, 64)).isfinite().all()


def test_every_linear_of_a_loaded_decoder_has_its_fastest_form() -> None:
    decoder = Decoder.from_checkpoint(tiny_llm.checkpoint(), dtype=torch.float32)
    kinds = {type(module) for module in decoder.lm.modules()}
    assert kinds & {OneDnnLinear, PanelLinear} and nn.Linear not in kinds and nn.RMSNorm in kinds


@needs_vnni
def test_every_linear_of_a_quantised_layer_is_int8() -> None:
    quantised = Decoder.from_checkpoint(tiny_llm.checkpoint(), dtype=torch.float32, quantize="int8")
    assert isinstance(quantised.lm.lm_head, OneDnnLinear | PanelLinear), "the head keeps its precision"
    kinds = {type(module) for module in quantised.layers.modules()}
    assert Int8Linear in kinds and not kinds & {OneDnnLinear, PanelLinear}


@needs_vnni
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_engine_on_int8_answers_nearly_alike(family: str) -> None:
    plain = tiny_llm.engine(family, dtype=torch.float32)
    quantised = tiny_llm.engine(family, dtype=torch.float32, quantize="int8")
    ids = torch.arange(40) % plain.decoder.config.vocab_size

    def last_logits(decoder: Decoder) -> torch.Tensor:
        kernels = ReferenceKernels()

        class WholePrompt:
            final_rows = None

            def attend(self, layer, query_SHd, key_SGd, value_SGd, scaling):  # type: ignore[no-untyped-def]
                return kernels.prefill(query_SHd, key_SGd, value_SGd, [len(ids)], [len(ids)], scaling)

        with torch.inference_mode():
            rotary = decoder.rotary(torch.arange(len(ids)))
            return decoder.logits(decoder.run_layers(decoder.embed(ids), rotary, 0, decoder.num_layers, WholePrompt()))

    exact, rounded = last_logits(plain.decoder), last_logits(quantised.decoder)
    assert float((exact - rounded).norm() / exact.norm()) < 0.1
    request = tiny_llm.request(quantised)
    answers = tiny_llm.run(quantised, [request])
    assert len(answers["r"][0]) == 8


def test_int8_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="quantize.*'int4'"):
        prepare_linears(nn.Module(), CPU, torch.float32, "int4")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="quantize.*float64"):
        prepare_linears(nn.Module(), CPU, torch.float64, "int8")
    with pytest.raises(InvalidInput, match="quantize.*cuda"):
        prepare_linears(nn.Module(), torch.device("cuda"), torch.bfloat16, "int8")
    monkeypatch.setattr("services.compute.linear.has_int8_linear", lambda: False)
    with pytest.raises(InvalidInput, match="quantize.*'int8'.*AVX-512 VNNI"):
        prepare_linears(nn.Module(), CPU, torch.float32, "int8")
