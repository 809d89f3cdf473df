"""What every client's script shares: the sample image, its question, and one line of JSON for each thing tried."""

from __future__ import annotations

import base64
import inspect
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Literal

import pydantic

BASE_URL, MODEL = sys.argv[1:3]
"""The server's URL, with /v1, and its model's name."""
SAMPLE = pathlib.Path(__file__).parents[3] / "docs" / "assets" / "sample.png"
IMAGE = SAMPLE.read_bytes()
IMAGE_URL = "data:image/png;base64," + base64.b64encode(IMAGE).decode()
QUESTION = "What number is on the red card?"


class Card(pydantic.BaseModel):
    """A card of the image."""

    number: int = pydantic.Field(ge=0, le=99)
    colour: Literal["red", "yellow", "pink"]


class Story(pydantic.BaseModel):
    """A type without a bound: a small model would write on until its tokens are spent."""

    title: str
    cards: list[Card]


def question(**image: Any) -> list[dict[str, Any]]:
    """The message that asks about the sample; `image` is laid over the fields of its image_url."""
    picture = {"type": "image_url", "image_url": {"url": IMAGE_URL, **image}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}]


def tell(*cases: Callable[[], Any]) -> None:
    """Prints {"case": the function's name, "said": what it returned}, or "failed" with the exception, for each."""
    for case in cases:
        try:
            said = {"said": case()}
        except Exception as error:
            said = {"failed": f"{type(error).__name__}: {error}"[:1000]}
        print(json.dumps({"case": case.__name__, **said}), flush=True)


def functions(module: str) -> list[Callable[[], Any]]:
    """The public functions that a module defines, in their order."""
    here = sys.modules[module]
    return [f for name, f in vars(here).items() if inspect.isfunction(f) and f.__module__ == module and name[0] != "_"]
