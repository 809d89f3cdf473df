"""The example's task functions, which lmms-eval loads from this file by the names in scenes.yaml."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

FOLDER = pathlib.Path(__file__).parent


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(FOLDER / doc["image"]).convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: object = None) -> str:
    return str(doc["question"])


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(results[0].strip() == doc["answer"])}
