"""The plan of a run's configuration, on a number of GPUs."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from services.checkpoint.config import FocusLlavaConfig
from services.common.errors import InvalidInput
from services.common.settings import build_settings
from training.config import RunConfig
from training.conversation_settings import ConversationStage
from training.data.mixture import load_mixture
from training.global_batch import accumulation
from training.plan.parameters import Lora, count_parameters
from training.plan.report import Plan
from training.plan.workload import PAPER_TEXT, PAPER_VISION

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
MODELS = CONFIGS / "models"
"""Configurations of models that a plan can be made for without a checkpoint."""


def find_config(name: str) -> pathlib.Path:
    """The run's configuration file of that name, here or among those that come with the package."""
    here = pathlib.Path(name).expanduser()
    shipped = CONFIGS / here.name
    if here.exists() or not shipped.exists():
        return here
    return shipped


def find_model(name: str, run: RunConfig) -> tuple[FocusLlavaConfig, str]:
    """A model's configuration, and where it is from.

    name: a checkpoint's folder, a config.json, or the name of a shipped one; empty is the run's `init_from`, and where
    that is not there yet, the shipped model that its folder is named after.
    Raises InvalidInput where there is none.
    """
    path = pathlib.Path(name or run.init_from).expanduser()
    if (path / "config.json").is_file():
        return FocusLlavaConfig.load(path), str(path)
    if path.is_file():
        return _read(path), str(path)
    shipped = sorted(MODELS.glob("*.json"), key=lambda file: len(file.stem), reverse=True)
    for file in shipped:
        if path.name == file.stem or (not name and path.name.startswith(f"{file.stem}-")):
            return _read(file), f"{file.stem}, as {path} is not there" if not name else file.stem
    known = ", ".join(file.stem for file in shipped)
    wrong = f"is {str(path)!r}, expected a checkpoint's folder, its config.json, or one of {known}"
    raise InvalidInput(wrong, field="--model" if name else "init_from")


def count_samples(stage: ConversationStage) -> tuple[int, tuple[str, ...]]:
    """(samples of an epoch as the mixture states them, the sources that it states no count of)."""
    sources = load_mixture(stage.data, root=stage.root, images=stage.images, stage=stage.part).sources
    unknown = tuple(source.name or source.path for source in sources if source.count is None)
    return round(sum((source.count or 0) * source.weight for source in sources)), unknown


def _read(file: pathlib.Path) -> FocusLlavaConfig:
    try:
        return FocusLlavaConfig.from_dict(json.loads(file.read_text(encoding="utf8")))
    except ValueError as error:
        raise InvalidInput(f"{file} is not JSON: {error}", field="--model") from None


def plan_run(
    run: RunConfig,
    model: FocusLlavaConfig,
    *,
    gpus: int,
    gpu_memory: int,
    samples: int | None = None,
    vision_share: float = PAPER_VISION,
    text_share: float = PAPER_TEXT,
    **settings: Any,
) -> Plan:
    """The plan of a run that trains on conversations.

    gpu_memory: bytes of each; samples: of the whole run, by default as its steps or epochs say; the shares are for
    samplers that are on; settings: further fields of `Plan`.
    Raises InvalidInput for a run that its model or its data cannot have.
    """
    stage = build_settings(ConversationStage, run.stage, "stage.")
    model = build_settings(FocusLlavaConfig, stage.model, "stage.model.", over=model)
    stage.check_model(model)
    batch = run.samples_per_worker * gpus * accumulation(run, gpus)
    uncounted: tuple[str, ...] = ()
    samples = samples or run.steps * batch
    if not samples:
        counted, uncounted = count_samples(stage)
        samples = round(run.epochs * counted)
    lora = Lora(rank=stage.lora.rank, targets=stage.lora.targets) if stage.lora else None
    parameters, trained = count_parameters(model, run, lora)
    return Plan(
        name=run.name,
        model=model,
        trained=trained,
        parameters=parameters,
        global_batch=batch,
        max_length=stage.longest(model),
        zero=run.cluster.zero_stage,
        micro_batch=run.samples_per_worker,
        checkpointing=stage.gradient_checkpointing,
        gpus=gpus,
        gpu_memory=gpu_memory,
        samples=samples,
        uncounted=uncounted,
        itemsize=4 if run.cluster.dtype == "float32" else 2,
        offload=run.cluster.offload,
        cuts=stage.prune.layers if stage.prune else None,
        vision_share=vision_share if stage.vision_sampler else 1.0,
        text_share=text_share if stage.prune else 1.0,
        **settings,
    )
