"""The places and sizes of a local cluster's stages, worked out before anything starts.

What the command line says comes first, then what the Serve configuration says, then what follows from the checkpoint
and the devices.
"""

from __future__ import annotations

import multiprocessing
import pathlib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from focusllava.sizes import size_text
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.sizing import EncoderSizes, LlmSizes, size_encoder
from services.checkpoint.store import stage_elements
from services.checkpoint.supported import check_servable, largest_image
from services.common.errors import InvalidInput
from services.common.settings import build_settings
from services.compute.dtypes import choose_dtype, dtype_name
from services.compute.memory import Memory, device_memory
from services.encoder.settings import EncoderSettings
from services.gateway.stores import CACHE_BYTES
from services.llm.settings import LanguageModelSettings

SYSTEM_BYTES = 3 * 2**29
"""Ray's own processes and the gateway's on this machine."""
START_S, READ_BYTES_A_S = 300.0, 50e6
"""How long a start may take beside reading the weights, and how slow a disk may be."""
ENCODER_GPU, ENCODERS_A_GPU = 0.2, 4
"""The part of a GPU that an encoder gets beside the language model; how many encoders share a GPU of their own."""
ALL_CORES_BYTES = 2**30
"""Weights of a language model whose steps are long enough to be split among all cores of a CPU. Ray has a replica
compute on as many threads as it has `num_cpus`, and on one where these are a fraction."""
OPTIONS = {
    "device": "--device",
    "dtype": "--dtype",
    "kv_cache_bytes": "--kv-cache-memory",
    "max_model_len": "--max-model-len",
    "memory_share": "--gpu-memory-utilization",
}
"""The option of `focusllava serve` for each field of Wishes."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the command line says; None leaves it open."""

    device: str | None = None
    dtype: str | None = None
    kv_cache_bytes: int | None = None
    max_model_len: int | None = None
    memory_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What to lay over the Serve configuration, and what to tell the user."""

    args: Mapping[str, Mapping[str, Any]]
    """Settings of each application."""
    options: Mapping[str, Mapping[str, Any]]
    """Options of each application's deployment."""
    lines: tuple[str, ...]
    load_bytes: int
    """Weights that are read before the first answer."""

    @property
    def cluster_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `cluster.local.LocalCluster`."""
        return {"args": self.args, "options": self.options, "timeout_s": START_S + self.load_bytes / READ_BYTES_A_S}


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What of this machine there is to place on."""

    gpus: tuple[Memory, ...]
    host: Memory

    @classmethod
    def here(cls) -> Devices:
        gpus: tuple[Memory, ...] = ()
        if torch.cuda.is_available():  # GPU only; who asks a GPU holds some of it to its end
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
                gpus = other.submit(_gpus).result()
        return cls(gpus=gpus, host=device_memory("cpu"))


def _gpus() -> tuple[Memory, ...]:  # GPU only
    return tuple(device_memory(f"cuda:{index}") for index in range(torch.cuda.device_count()))


def place(
    checkpoint: pathlib.Path, config_file: pathlib.Path, wishes: Wishes, devices: Devices | None = None
) -> Placement:
    """Where the stages run, and how large. Raises InvalidInput, naming the field, where one full image is too much."""
    try:
        return _place(checkpoint, config_file, wishes, devices or Devices.here())
    except InvalidInput as error:
        if getattr(wishes, error.field, None) is None:
            raise
        raise InvalidInput(str(error).removeprefix(f"{error.field}: "), field=OPTIONS[error.field]) from None


def _place(checkpoint: pathlib.Path, config_file: pathlib.Path, wishes: Wishes, devices: Devices) -> Placement:
    config = FocusLlavaConfig.load(checkpoint)
    check_servable(config)
    said = _said(config_file)
    settings = _settings(said, wishes)
    placed = {name: _device(settings[name].get("device", "auto"), devices) for name in ("encoder", "llm")}
    encoder_asked = build_settings(EncoderSettings, {"checkpoint": str(checkpoint), **settings["encoder"]})
    llm_asked = build_settings(LanguageModelSettings, {"checkpoint": str(checkpoint), **settings["llm"]})
    asked_dtypes = {"encoder": encoder_asked.dtype, "llm": llm_asked.dtype}
    dtypes = {name: choose_dtype(asked_dtypes[name], device) for name, device in placed.items()}
    on_gpu = {name: device == "cuda" for name, device in placed.items()}
    encoder = size_encoder(
        config,
        stage_elements(checkpoint, "encoder"),
        dtype=dtypes["encoder"],
        on_gpu=on_gpu["encoder"],
        room=min(gpu.free for gpu in devices.gpus) if on_gpu["encoder"] else devices.host.free,
        max_tiles=encoder_asked.max_tiles,
    )
    apart = all(on_gpu.values()) and len(devices.gpus) > 1
    beside = 0 if apart or on_gpu["encoder"] != on_gpu["llm"] else encoder.bytes
    if not on_gpu["llm"]:
        beside += SYSTEM_BYTES + settings["gateway"].get("cache_bytes", CACHE_BYTES)
    budget, where = _budget(devices, llm_asked.memory_share, beside, on_gpu=on_gpu["llm"])
    llm = llm_asked.sizes_within(budget, where, checkpoint, dtypes["llm"], on_gpu=on_gpu["llm"])
    replicas, alone = {"encoder": 1, "llm": 1}, len(devices.gpus) == 1
    if apart:
        fit = min(gpu.free for gpu in devices.gpus) // encoder.bytes
        replicas = {"encoder": max(1, min(ENCODERS_A_GPU, fit)), "llm": len(devices.gpus) - 1}
    elif not any(on_gpu.values()) and budget >= 2 * llm.bytes + encoder.bytes:  # all of it fits twice
        replicas = {"encoder": 2, "llm": 2}
    args: dict[str, dict[str, Any]] = {
        name: {**settings[name], "device": placed[name], "dtype": dtype_name(dtypes[name])} for name in placed
    }
    args["encoder"]["max_tiles"] = encoder.max_tiles
    for name in placed:
        if not on_gpu[name] and llm.weights >= ALL_CORES_BYTES:
            args[name].setdefault("torch_threads", max(1, torch.get_num_threads() // replicas[name]))
    args["llm"] |= llm.settings
    if llm_asked.max_model_len is not None:
        args["gateway"] = {"max_model_len": llm_asked.max_model_len}
    return Placement(
        args=args,
        options={
            name: _options(said[name], name, replicas[name], on_gpu=on_gpu[name], apart=apart, alone=alone)
            for name in placed
        },
        lines=_lines(config, encoder, llm, placed, dtypes, replicas),
        load_bytes=encoder.weights + llm.weights,
    )


def _said(config_file: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The applications of a Serve configuration by name. Raises InvalidInput for a file that is not one."""
    try:
        raw = yaml.safe_load(config_file.read_text(encoding="utf8"))
        found = {application["name"]: application for application in raw["applications"]}
    except OSError as error:
        raise InvalidInput(f"cannot be read: {error.strerror}", field=str(config_file)) from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InvalidInput(f"is no Serve configuration: {reason}", field=str(config_file)) from None
    for name in ("gateway", "encoder", "llm"):
        if name not in found:
            raise InvalidInput(f"has no application {name!r}", field=str(config_file))
    return found


def _settings(said: Mapping[str, Mapping[str, Any]], wishes: Wishes) -> dict[str, dict[str, Any]]:
    """Settings of each application: the file's, and over them the command line's."""
    settings = {name: dict(application.get("args") or {}) for name, application in said.items()}
    both = {"device": wishes.device, "dtype": wishes.dtype, "memory_share": wishes.memory_share}
    own = {"kv_cache_bytes": wishes.kv_cache_bytes, "max_model_len": wishes.max_model_len}
    for name, values in (("encoder", both), ("llm", {**both, **own})):
        settings[name].update({field: value for field, value in values.items() if value is not None})
    return settings


def _device(name: str, devices: Devices) -> str:
    if name == "auto":
        return "cuda" if devices.gpus else "cpu"
    if name not in ("cpu", "cuda"):
        found = f"is {name!r}, expected auto, cpu or cuda; CUDA_VISIBLE_DEVICES says which GPUs"
        raise InvalidInput(found, field="device")
    if name == "cuda" and not devices.gpus:
        raise InvalidInput(f"is {name!r}, and torch sees no GPU here", field="device")
    return name


def _budget(devices: Devices, share: float, beside: int, *, on_gpu: bool) -> tuple[int, str]:
    """Bytes for one replica of the language model, and where they are; beside: bytes that others take there."""
    if on_gpu:
        least = min(devices.gpus, key=lambda gpu: gpu.free)
        budget = min(int(share * least.total), least.free) - beside
        return budget, f"the GPU ({share:.0%} of {size_text(least.total)}, {size_text(least.free)} free)"
    of = f"{share:.0%} of the {size_text(devices.host.free)} that are free, less {size_text(beside)} for the rest"
    return int(share * devices.host.free) - beside, f"this machine ({of})"


def _options(
    application: Mapping[str, Any], name: str, replicas: int, *, on_gpu: bool, apart: bool, alone: bool
) -> dict[str, Any]:
    """Options of a deployment where the file sets none, or asks for a GPU too many; alone: there is one GPU."""
    deployment = next(iter(application.get("deployments") or [{}]))
    options: dict[str, Any] = {}
    if scaling := deployment.get("autoscaling_config"):
        most = replicas if apart else min(replicas, scaling.get("max_replicas", 1))
        least = min(scaling.get("min_replicas", 1), most)
        options["autoscaling_config"] = {**scaling, "min_replicas": least, "max_replicas": most}
    resources = deployment.get("ray_actor_options") or {}
    own = 1 / ENCODERS_A_GPU if name == "encoder" else 1
    beside = ENCODER_GPU if name == "encoder" else 1 - ENCODER_GPU
    if on_gpu and (alone or "num_gpus" not in resources):
        options["ray_actor_options"] = {**resources, "num_gpus": own if apart else beside}
    elif not on_gpu and resources.get("num_gpus"):
        options["ray_actor_options"] = {**resources, "num_gpus": 0}
    return options


def _lines(
    config: FocusLlavaConfig,
    encoder: EncoderSizes,
    llm: LlmSizes,
    placed: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype],
    replicas: Mapping[str, int],
) -> tuple[str, ...]:
    (height, width), visual = largest_image(config)

    def on(name: str) -> str:
        several = f", up to {replicas[name]} replicas" if replicas[name] > 1 else ""
        return f"{placed[name]}, {dtype_name(dtypes[name])}{several}"

    requests = "1 request" if llm.full_images == 1 else f"{llm.full_images} requests"
    return (
        f"encoder: {on('encoder')}, {size_text(encoder.weights)} of weights, {encoder.max_tiles} tiles a batch",
        f"llm: {on('llm')}, {size_text(llm.weights)} of weights, {size_text(llm.kv_cache_bytes)} of KV cache, "
        f"{llm.max_batch_tokens:,} tokens a step, {llm.max_running} requests in work",
        f"fits: {requests} of one {width} x {height} px image at a time ({visual:,} visual tokens, nothing pruned)",
    )
