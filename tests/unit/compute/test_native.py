"""The compiled CPU operators against plain torch, the fused decoder layer against transformers', and the building."""

from __future__ import annotations

import pathlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from services.checkpoint.config import FocusLlavaConfig
from services.compute import native
from services.compute.merged_linear import GateUpLinear, MergedLinear, add_linear
from services.compute.onednn_linear import OneDnnLinear
from services.compute.panel_linear import PanelLinear
from services.llm.kernels.fused_layer import can_fuse
from services.llm.model import Decoder
from tests.attention_oracle import prefill_oracle
from tests.processor import HAS_COMPILER, ONEDNN_DTYPES, needs_compiler
from tests.tiny_llm import checkpoint

TORCH_THREADS = 2
ops = torch.ops.focusllava
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Largest relative error: a rounding or two."""


pytestmark = needs_compiler


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    assert native.load() or not HAS_COMPILER


SUMS = 2e-5
"""Largest error of an fp32 sum of thousands of products, which are added one by one."""


def close(ours: torch.Tensor, exact: torch.Tensor, sums: float = 0) -> None:
    error = max(DTYPES[ours.dtype], sums)
    torch.testing.assert_close(ours.double(), exact, rtol=error, atol=error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, width", [(1, 8), (3, 50), (700, 512)])
def test_rms_norm(tokens: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    hidden, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((tokens, width), (width,)))
    close(ops.rms_norm(hidden, weight, 1e-5), F.rms_norm(hidden.double(), (width,), weight.double(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, heads, width", [(1, 1, 2), (5, 3, 10), (300, 4, 64)])
def test_rotate(tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    x, cos, sin = torch.randn(tokens, heads, width), torch.randn(tokens, width), torch.randn(tokens, width)
    x, cos, sin = x.to(dtype), cos.to(dtype), sin.to(dtype)
    first, second = x.double().chunk(2, dim=-1)
    exact = x.double() * cos[:, None].double() + torch.cat((-second, first), -1) * sin[:, None].double()
    ops.rotate_(x, cos, sin)
    torch.testing.assert_close(x.double(), exact, rtol=DTYPES[dtype], atol=4 * DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul(dtype: torch.dtype) -> None:
    gate = torch.cat((torch.linspace(-200, 200, 4001), torch.zeros(1))).to(dtype)
    up = torch.randn(len(gate)).to(dtype)
    exact = F.silu(gate.double()) * up.double()
    ops.silu_mul_(gate, up)
    close(gate, exact)


def linear(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


def exactly(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())


SHAPES = {"one panel": (64, 64), "narrow": (10, 3), "ragged": (100, 333), "two pieces of inputs": (5000, 70)}
SHAPES["tiles of a matrix unit"] = (4128, 70)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs, outputs", SHAPES.values(), ids=SHAPES)
def test_panel_linears(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    first, second = linear(inputs, outputs, bias, dtype), linear(inputs, outputs, not bias, dtype)
    other = linear(inputs, 2 * outputs + 1, bias, dtype)
    panels = [PanelLinear(layer) for layer in (first, other, second)]
    assert not list(panels[0].parameters()) and not panels[0].state_dict()
    for tokens in (1, 5, 13, 16, 17, 32, 49, 97, 200):  # passes of 12 tokens or 32, tasks of 96
        x, hidden = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
        for layer, out in zip((first, other, second), MergedLinear(*panels)(x), strict=True):
            close(out, exactly(layer, x), SUMS)
        exact = F.silu(exactly(first, x)) * exactly(second, x)
        close(GateUpLinear(panels[0], panels[2]).gated(x, ops.silu_mul_), exact, SUMS)
        exact = hidden.double() + exactly(first, x)
        assert add_linear(hidden, x, panels[0]) is hidden
        close(hidden, exact, SUMS)
    assert panels[1](torch.randn(2, 3, inputs).to(dtype)).shape == (2, 3, 2 * outputs + 1)
    assert panels[1](torch.randn(0, inputs).to(dtype)).shape == (0, 2 * outputs + 1)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", [512, 4128, 5000])
def test_a_tokens_products_are_the_same_bit_for_bit_in_any_batch(inputs: int, dtype: torch.dtype) -> None:
    gate, up = (PanelLinear(linear(inputs, 200, bias, dtype)) for bias in (True, False))
    both = GateUpLinear(gate, up)
    x, hidden = torch.randn(230, inputs).to(dtype), torch.randn(230, 200).to(dtype)
    whole = [*both(x), both.gated(x, ops.silu_mul_), add_linear(hidden.clone(), x, up)]
    for first, last in ((0, 1), (95, 97), (3, 20), (4, 36), (7, 103), (1, 230)):
        part = x[first:last].clone()
        alone = [*both(part), both.gated(part, ops.silu_mul_)]
        alone.append(add_linear(hidden[first:last].clone(), part, up))
        assert all(torch.equal(one, all_[first:last]) for one, all_ in zip(alone, whole, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ONEDNN_DTYPES, ids=str)
def test_layers_of_another_kind_give_what_panels_give(dtype: torch.dtype) -> None:
    gate, up, down = linear(64, 100, True, dtype), linear(64, 100, False, dtype), linear(100, 64, True, dtype)
    x = torch.randn(9, 64).to(dtype)
    results = []
    for made in (OneDnnLinear, PanelLinear):
        both = GateUpLinear(made(gate), made(up))
        gated = both.gated(x, ops.silu_mul_)
        results.append([*both(x), gated, add_linear(x.clone(), gated, made(down))])
    for onednn, panels in zip(*results, strict=True):
        torch.testing.assert_close(onednn, panels, rtol=3 * DTYPES[dtype], atol=3 * DTYPES[dtype])


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.randn(4, 62)},
        {"x": torch.randn(4, 64, dtype=torch.float64)},
        {"x": torch.randn(4, 64).bfloat16()},
        {"x": torch.randn(64, 4).T},
        {"hidden": torch.randn(4, 65)},
        {"hidden": torch.randn(3, 64)},
        {"hidden": torch.randn(4, 64).bfloat16()},
        {"bias": torch.randn(63)},
        {"bias": torch.randn(64).bfloat16()},
    ],
)
def test_products_of_what_does_not_fit_are_refused(change: dict[str, torch.Tensor]) -> None:
    panels = PanelLinear(linear(64, 64, True, torch.float32))
    fitting = {"hidden": torch.randn(4, 64), "x": torch.randn(4, 64), "weight": panels.weight_PKNp, "bias": panels.bias}
    ops.linear_add_(**fitting)
    with pytest.raises(RuntimeError):
        ops.linear_add_(**{**fitting, **change})


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.packed_attention(x, x, x, [3], [3], 1.0, True),
        lambda x: ops.packed_attention(x, x, x, [5], [4], 1.0, True),
        lambda x: ops.packed_attention(x, x, x[:, :, ::2], [4], [4], 1.0, True),
        lambda x: ops.packed_attention(x.double(), x.double(), x.double(), [4], [4], 1.0, True),
        lambda x: ops.rotate_(x, x[:2], x[:2]),
        lambda x: ops.rms_norm(x, x[0, 0, :4], 1e-5),
        lambda x: ops.silu_mul_(x, x.bfloat16()),
    ],
)
def test_what_does_not_fit_is_refused(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RuntimeError):
        call(torch.randn(4, 2, 8))


@pytest.mark.parametrize("slot", [-1, 6])
def test_a_slot_that_the_pools_do_not_have_is_refused(slot: int) -> None:
    attention, mlp = (PanelLinear(linear(8, 8, False, torch.float32)).weight_PKNp for _ in range(2))
    hidden, tables = torch.randn(1, 8), torch.ones(1, 8)
    pools = torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8)
    rows, lengths = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    arguments = (hidden, tables, tables, [torch.ones(8)] * 2, 1e-5, [*[attention] * 4, *[mlp] * 3], [None] * 7, *pools)
    ops.decode_layer_(*arguments, torch.tensor([5]), rows, lengths, 1.0)
    assert pools[0][2, 1].any() and not pools[0][:2].any()
    with pytest.raises(RuntimeError, match=f"slot {slot} of 6"):
        ops.decode_layer_(*arguments, torch.tensor([slot]), rows, lengths, 1.0)


class WholePrompt:
    """One prompt, no cache; the queries of the last layer may be the last ones only."""

    def __init__(self, final_rows: torch.Tensor | None = None):
        self.final_rows = final_rows

    def attend(self, layer: int, query, key, value, scaling):  # type: ignore[no-untyped-def]
        return prefill_oracle(query, key, value, [len(query)], [len(key)], scaling).to(query.dtype)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_fused_layers_are_transformers_own(family: str) -> None:
    config = FocusLlavaConfig.load(checkpoint(family)).text_config
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    for parameter in lm.parameters():  # norms of ones and biases of zeros would hide that they are left out
        nn.init.normal_(parameter, std=0.2)
    state = {name: tensor.detach().clone() for name, tensor in lm.state_dict().items()}
    fused = Decoder.from_state(config, dict(state), dtype=torch.float32, device="cpu")
    plain = Decoder.from_state(config, dict(state), dtype=torch.float64, device="cpu")
    assert fused.elementwise and not plain.elementwise and all(map(can_fuse, fused.layers))
    ids, position = torch.arange(11) + 3, torch.arange(11) * 3
    final_rows = torch.tensor([10])
    results = []
    for decoder in (fused, plain):
        hidden, rotary, last = decoder.embed(ids), decoder.rotary(position), decoder.num_layers
        middle = decoder.run_layers(hidden, rotary, 0, last - 1, WholePrompt())
        kept = middle.clone()
        whole = decoder.run_layers(middle, rotary, last - 1, last, WholePrompt())
        assert torch.equal(middle, kept), "what comes in is not written to"
        end = decoder.run_layers(middle, rotary, last - 1, last, WholePrompt(final_rows))
        assert end.shape == (1, hidden.shape[1])
        torch.testing.assert_close(end, whole[final_rows])
        results.append(decoder.logits(whole))
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-4, atol=1e-4)


def test_the_library_is_built_once_and_anew_for_another_source(tmp_path: pathlib.Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "native.cpp"
    source.write_text("int one() { return 1; }\n")
    monkeypatch.setattr(native, "SOURCES", (source,))
    first = native.build(tmp_path / "cache")
    stamp = first.stat().st_mtime_ns
    assert native.build(tmp_path / "cache") == first and first.stat().st_mtime_ns == stamp
    source.write_text("int two() { return 2; }\n")
    assert native.build(tmp_path / "cache") != first
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".so", ".so"], "no scratch is left"


def test_a_compiler_that_fails_is_named(tmp_path: pathlib.Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "native.cpp"
    source.write_text("int one() { return }\n")
    monkeypatch.setattr(native, "SOURCES", (source,))
    with pytest.raises(native.CannotBuild, match=r"(?s)ended with status 1.*error: "):
        native.build(tmp_path / "cache")
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(native.CannotBuild, match="no-such-compiler"):
        native.build(tmp_path / "cache")


def test_a_compiler_may_be_several_words(tmp_path: pathlib.Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "native.cpp"
    source.write_text("int one() { return ONE; }\n")
    monkeypatch.setattr(native, "SOURCES", (source,))
    monkeypatch.setenv("CXX", f"env {native._compiler()[0]} -DONE=1")
    first = native.build(tmp_path / "cache")
    assert first.exists()
    monkeypatch.setenv("CXX", f"env {native._compiler()[1]} -DONE=2")
    assert native.build(tmp_path / "cache") != first
    monkeypatch.setenv("CXX", 'g++ "-DONE=1')
    with pytest.raises(native.CannotBuild, match="CXX: is 'g\\+\\+ \"-DONE=1'"):
        native.build(tmp_path / "cache")
