"""Places of a local cluster's stages: devices and sizes that a machine gives, what a file and the command line say."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
import yaml

from cluster import local, placing
from cluster.placing import Devices, Wishes, place
from focusllava.cli import main
from services.checkpoint.sizing import full_image
from services.checkpoint.store import stage_elements
from services.common.errors import InvalidInput
from services.compute.dtypes import choose_dtype, dtype_name
from services.compute.memory import Memory
from services.llm import engine_config
from services.llm.settings import LanguageModelSettings
from tests import tiny_llm
from tests.unit.cluster.test_local import PORTS

GIB = 2**30
LAPTOP, A100 = local.SERVE_CONFIG, local.SERVE_CONFIG.with_name("serve-a100.yaml")


def machine(free_gib: float = 16, gpus: int = 0, gpu_gib: int = 80) -> Devices:
    gpu = Memory(total=gpu_gib * GIB, free=gpu_gib * GIB - GIB // 2)
    return Devices(gpus=(gpu,) * gpus, host=Memory(total=64 * GIB, free=int(free_gib * GIB)))


def placed(devices: Devices, config: pathlib.Path = LAPTOP, **wishes: Any) -> placing.Placement:
    return place(tiny_llm.checkpoint(), config, Wishes(**wishes), devices)


def test_a_cpu_with_room() -> None:
    found = placed(machine())
    dtype = choose_dtype("auto", "cpu")
    config = placing.FocusLlavaConfig.load(tiny_llm.checkpoint())
    llm = found.args["llm"]
    assert (llm["device"], llm["dtype"], llm["max_running"]) == ("cpu", dtype_name(dtype), 16)
    assert llm["kv_cache_bytes"] == 2 * 16 * full_image(config, dtype)[1]
    assert found.options["llm"]["autoscaling_config"]["max_replicas"] == 2
    assert "ray_actor_options" not in found.options["llm"]
    assert found.lines[2].startswith("fits: 16 requests of one 56 x 56 px image at a time (88 visual tokens")
    settings = LanguageModelSettings(checkpoint=str(tiny_llm.checkpoint()), **llm)  # every one is known and allowed
    assert settings.replica_sizes("cpu", dtype).kv_cache_bytes == llm["kv_cache_bytes"]


def test_a_large_model_on_a_cpu_has_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "torch_threads" not in placed(machine()).args["llm"]
    monkeypatch.setattr(placing, "ALL_CORES_BYTES", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 48)
    for free_gib, threads in ((16, 24), (4, 48)):  # two replicas, one
        found = placed(machine(free_gib))
        assert [found.args[name]["torch_threads"] for name in ("encoder", "llm")] == [threads] * 2
        LanguageModelSettings(checkpoint=str(tiny_llm.checkpoint()), **found.args["llm"])
    assert "torch_threads" not in placed(machine(gpus=1)).args["llm"]


def test_less_memory_is_one_replica_and_then_none() -> None:
    assert placed(machine(4.0)).options["llm"]["autoscaling_config"]["max_replicas"] == 1
    with pytest.raises(InvalidInput) as refused:
        placed(machine(2.5))
    message = str(refused.value)
    assert message.startswith("memory: this machine (90% of the 2.5 GiB that are free, less 2.")
    assert "are needed to answer one image of 56 x 56 px: " in message


def test_one_gpu_is_shared_and_of_several_one_is_the_encoders() -> None:
    one = placed(machine(gpus=1, gpu_gib=24))
    assert one.options["encoder"]["ray_actor_options"]["num_gpus"] == 0.2
    assert one.options["llm"]["ray_actor_options"] == {"num_cpus": 0.2, "num_gpus": 0.8}
    assert one.options["llm"]["autoscaling_config"]["max_replicas"] == 1
    assert one.args["encoder"]["device"] == one.args["llm"]["device"] == "cuda"
    assert one.args["llm"]["dtype"] == "bfloat16" and one.args["llm"]["max_running"] == 128
    eight = placed(machine(gpus=8))
    assert eight.options["llm"]["autoscaling_config"]["max_replicas"] == 7
    assert eight.options["llm"]["ray_actor_options"]["num_gpus"] == 1
    assert eight.options["encoder"]["ray_actor_options"]["num_gpus"] == 0.25
    assert eight.args["llm"]["kv_cache_bytes"] > 3 * one.args["llm"]["kv_cache_bytes"]
    beside = placed(machine(gpus=1), device="cpu")
    assert beside.args["llm"]["device"] == "cpu" and "ray_actor_options" not in beside.options["llm"]


def test_the_command_line_goes_before_the_file_and_the_file_before_the_rest(tmp_path: pathlib.Path) -> None:
    raw = yaml.safe_load(LAPTOP.read_text())
    llm = next(application for application in raw["applications"] if application["name"] == "llm")
    llm["args"] = {"kv_cache_bytes": 2**24, "max_running": 5, "dtype": "float32"}
    llm["deployments"][0]["autoscaling_config"]["max_replicas"] = 1
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(raw))
    found = placed(machine(), file)
    assert {name: found.args["llm"][name] for name in llm["args"]} == llm["args"]
    assert found.options["llm"]["autoscaling_config"]["max_replicas"] == 1
    found = placed(machine(), file, kv_cache_bytes=2**25, dtype="bfloat16", max_model_len=1024)
    assert (found.args["llm"]["kv_cache_bytes"], found.args["llm"]["dtype"]) == (2**25, "bfloat16")
    assert found.args["llm"]["max_model_len"] == found.args["gateway"]["max_model_len"] == 1024
    assert found.args["encoder"]["dtype"] == "bfloat16"
    a100 = placed(machine(gpus=8), A100)
    assert "ray_actor_options" not in a100.options["llm"], "the file's stand"


def test_a_files_gpus_are_those_that_there_are() -> None:
    one = placed(machine(gpus=1), A100).options
    assert [one[name]["ray_actor_options"]["num_gpus"] for name in ("encoder", "llm")] == [0.2, 0.8]
    none = placed(machine(), A100, device="cpu").options
    assert [none[name]["ray_actor_options"]["num_gpus"] for name in ("encoder", "llm")] == [0, 0]
    for gib, encoders in ((80, 4), (3, 2)):  # as many as a GPU holds
        several = placed(machine(gpus=2, gpu_gib=gib)).options
        assert several["encoder"]["autoscaling_config"]["max_replicas"] == encoders


def test_a_file_without_deployments_gets_its_gpus_too(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("applications: [{name: gateway}, {name: encoder}, {name: llm, args: {max_model_len: 1024}}]")
    found = placed(machine(gpus=1), file)
    assert found.args["gateway"] == {"max_model_len": 1024}
    laid = local.serve_config(file, PORTS, "/some/where", found.args, found.options)["applications"]
    assert [application.get("deployments") for application in laid] == [
        None,
        [{"name": "Encoder", "ray_actor_options": {"num_gpus": 0.2}}],
        [{"name": "LanguageModel", "ray_actor_options": {"num_gpus": 0.8}}],
    ]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"kv_cache_bytes": 2**16}, "--kv-cache-memory: is 64 KiB, expected "),
        ({"kv_cache_bytes": 2**40}, "memory: this machine (90% of the 16 GiB that are free"),
        ({"max_model_len": 100}, "--max-model-len: is 100, expected 216 or more: an image of 56 x 56 px alone is 88"),
        ({"max_model_len": 4096}, "--max-model-len: is 4096, expected 2048 or less: the model's own"),
        ({"device": "cuda"}, "--device: is 'cuda', and torch sees no GPU here"),
        ({"device": "gpu"}, "--device: is 'gpu', expected auto, cpu or cuda"),
        ({"device": "cuda:1"}, "--device: is 'cuda:1', expected auto, cpu or cuda; CUDA_VISIBLE_DEVICES says which"),
    ],
)
def test_what_can_never_answer_is_refused_by_the_options_name(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        placed(machine(), **wishes)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("applications: [", "is no Serve configuration"),
        ("[1]", "is no Serve configuration"),
        ("applications: [{name: llm}]", "has no application 'gateway'"),
        ("applications: [{name: gateway}, {name: encoder}, {name: llm, args: {kv_cache_bytes: 4G}}]",
         "kv_cache_bytes: is '4G', expected int"),
        ("applications: [{name: gateway}, {name: encoder}, {name: llm, args: {dtype: bf16}}]", "dtype: is 'bf16'"),
        ("applications: [{name: gateway}, {name: encoder}, {name: llm, args: {memory_share: 2}}]",
         "memory_share: is 2"),
    ],
)  # fmt: skip
def test_files_that_are_none_are_refused(text: str, message: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InvalidInput) as refused:
        placed(machine(), tmp_path / "x.yaml")
    assert message in str(refused.value)


def test_options_are_laid_over_the_deployments() -> None:
    found = placed(machine(gpus=1))
    config = local.serve_config(LAPTOP, PORTS, "/some/where", found.args, found.options)
    for application in config["applications"]:
        deployment = application["deployments"][0]
        if application["name"] == "gateway":
            assert "num_gpus" not in deployment["ray_actor_options"]
        else:
            assert deployment["ray_actor_options"]["num_gpus"] > 0 and deployment["max_ongoing_requests"] > 1
            assert application["args"]["device"] == "cuda" and application["args"]["checkpoint"] == "/some/where"


def test_the_command_refuses_before_it_starts_anything(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(local, "LocalCluster", None)
    monkeypatch.setattr(placing.Devices, "here", lambda: machine())
    folder = str(tiny_llm.checkpoint())
    for option, value, message in (
        ("--kv-cache-memory", "64KiB", "--kv-cache-memory: is 64 KiB, expected"),
        ("--max-model-len", "8K", "--max-model-len: is 8192, expected 2048 or less"),
        ("--device", "cuda", "torch sees no GPU here"),
    ):
        assert main(["serve", folder, option, value]) == 3
        assert message in capsys.readouterr().err
    for option, value in (("--kv-cache-memory", "lots"), ("--max-model-len", "0"), ("--gpu-memory-utilization", "1.1"),
                          ("--dtype", "int4"), ("--config", "/no/such.yaml")):  # fmt: skip
        assert main(["serve", folder, option, value]) == 2
        assert option in capsys.readouterr().err


def test_a_large_checkpoint_is_placed_by_make_serve_too(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    folder = str(tiny_llm.checkpoint())
    assert local.placed(folder, said.append) == {} and not said
    monkeypatch.setattr(local, "LARGE_BYTES", 0)
    monkeypatch.setattr(placing.Devices, "here", lambda: machine())
    found = local.placed(folder, said.append)
    assert found["args"]["llm"]["max_running"] == 16 and found["timeout_s"] > 300
    assert len(said) == 3 and said[2].startswith("fits: 16 requests")


def test_a_replica_that_is_told_no_size_finds_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llm.checkpoint()
    settings = LanguageModelSettings(checkpoint=str(folder))
    dtype = torch.bfloat16  # another than that of the file, in which the embeddings would stay
    sizes = settings.replica_sizes("cpu", dtype)
    assert sizes.full_images == 16 and sizes.weights == stage_elements(folder, "llm") * dtype.itemsize
    monkeypatch.setattr(engine_config, "device_memory", lambda device: Memory(total=GIB, free=GIB))
    with pytest.raises(InvalidInput, match="memory: cpu of .* has .* for the language model"):
        settings.replica_sizes("cpu", dtype)
