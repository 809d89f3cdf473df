"""Where a replica runs and in which dtype, by its settings and its processor."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import ray
import torch

from services.common.errors import InvalidInput
from services.common.settings import build_settings
from services.compute import dtypes
from services.compute.replica import ModelSettings, gpu_part
from services.encoder.deployment import Encoder, EncoderSettings
from services.llm.deployment import LanguageModel, LanguageModelSettings


def settings(**values: object) -> ModelSettings:
    return build_settings(ModelSettings, {"checkpoint": "/c", "device": "cpu", **values})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_is_named_is_taken(dtype):
    assert settings(dtype=dtype).place() == ("cpu", getattr(torch, dtype))


@pytest.mark.parametrize("native", [False, True])
def test_auto_is_bfloat16_where_the_processor_multiplies_in_it(native, monkeypatch):
    monkeypatch.setattr(dtypes, "cpu_has_bfloat16", lambda: native)
    assert settings().place() == ("cpu", torch.bfloat16 if native else torch.float32)
    assert settings(device="cuda").place() == ("cuda", torch.bfloat16)
    assert settings(device="cuda", dtype="float32").place() == ("cuda", torch.float32)


def test_the_processor_is_asked():
    flags = open("/proc/cpuinfo").read() if torch.backends.mkldnn.is_available() else ""
    # Both switches take instructions away from one part of what multiplies.
    limited = os.environ.keys() & {"ONEDNN_MAX_CPU_ISA", "FOCUSLLAVA_MARCH"}
    assert dtypes.cpu_has_bfloat16() == ("avx512_bf16" in flags) or (limited and not dtypes.cpu_has_bfloat16())


@pytest.mark.parametrize(
    ("stored", "device", "native", "expected"),
    [
        ("bfloat16", "cpu", True, torch.bfloat16),
        ("bfloat16", "cpu", False, torch.float32),
        ("float16", "cpu", True, torch.float32),
        ("float32", "cpu", True, torch.float32),
        ("float16", "cuda", False, torch.float16),
        ("bfloat16", "cuda:1", False, torch.bfloat16),
    ],
)
def test_stored_weights_keep_their_dtype_where_the_device_is_made_for_it(stored, device, native, expected, monkeypatch):
    monkeypatch.setattr(dtypes, "cpu_has_bfloat16", lambda: native)
    assert dtypes.dtype_of_stored(stored, device) == expected
    assert getattr(torch, dtypes.dtype_name(expected)) == expected


def test_a_strange_setting_is_refused_by_name():
    with pytest.raises(InvalidInput, match="dtype.*'int8'"):
        settings(dtype="int8")
    with pytest.raises(InvalidInput, match="torch_threads: is 0"):
        settings(torch_threads=0)
    with pytest.raises(InvalidInput, match="device: is 'gpu', expected auto, cpu, cuda or another device of torch"):
        settings(device="gpu")


@pytest.mark.parametrize(
    ("device", "given", "part"),
    [("cuda", {"GPU": 0.25}, 0.25), ("cuda:0", {"GPU": 2.0}, 1.0), ("cpu", {"CPU": 1.0}, 1.0)],
)
def test_a_replica_knows_its_part_of_a_gpu(device, given, part):
    assert gpu_part(device, lambda: given) == part


@pytest.mark.parametrize(
    ("deployment", "settings"), [(Encoder, EncoderSettings), (LanguageModel, LanguageModelSettings)]
)
def test_no_stage_takes_a_gpu_that_ray_did_not_give(deployment, settings, monkeypatch):
    """Only what Ray says of a replica's resources is made up: there may be no GPU here."""
    resources = SimpleNamespace(get_assigned_resources=lambda: {"CPU": 1.0})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: resources)
    with pytest.raises(InvalidInput, match="device: is 'cuda', expected cpu, or a GPU .*num_gpus"):
        deployment.func_or_class(settings(checkpoint="/not/read", device="cuda"))
