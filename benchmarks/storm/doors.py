"""One request at either public door, and how it ended: an answer, a refusal that says when to come back, or a fault."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import Any

import httpx2

from benchmarks.open_loop import Client, Target
from benchmarks.questions import Question
from cluster.local import LocalCluster

LEAKS = re.compile(
    r"Traceback|File \"|\.py\b|/tmp/|/home/|/root/|site-packages|ray\.exceptions|ray::|\bpid[ =]\d|\bactor_id|\n"
)
"""What no message to a client may hold."""
ANSWER, REFUSAL = "answer", "refusal"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a request ended."""

    kind: str
    """`ANSWER`, `REFUSAL` with a time to come back, or what was wrong."""
    message: str = ""


class Doors:
    """Both doors of a cluster; belongs into one event loop."""

    def __init__(self, cluster: LocalCluster, timeout_s: float = 120, api_key: str | None = None):
        target = Target(address=cluster.grpc_address, api_key=api_key)
        self._grpc = Client(target, timeout_s)
        limits = httpx2.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx2.AsyncClient(
            base_url=cluster.openai_url, timeout=timeout_s, trust_env=False, limits=limits, headers=headers
        )
        self._model = ""

    async def close(self) -> None:
        await self._grpc.close()
        await self._http.aclose()

    async def grpc(self, question: Question) -> Ending:
        outcome = await self._grpc.ask(question)
        if outcome.code == "OK":
            return Ending(kind=ANSWER)
        return _judged(outcome.code, outcome.message, outcome.retry_after_s is not None, outcome.code)

    async def http(self, question: Question) -> Ending:
        """Over OpenAI's API, whole. An error must be JSON as OpenAI's clients know it."""
        try:
            self._model = self._model or (await self._http.get("/models")).json()["data"][0]["id"]
            answer = await self._http.post("/chat/completions", json=self._body(question))
        except httpx2.HTTPError as error:
            return Ending(kind=f"lost ({type(error).__name__})", message=str(error))
        if answer.status_code == 200:
            return Ending(kind=ANSWER if answer.json()["choices"] else "no choices")
        try:
            message = str(answer.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return Ending(kind=f"{answer.status_code} that is no JSON of OpenAI's", message=answer.text[:200])
        code = {429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}.get(answer.status_code, str(answer.status_code))
        return _judged(code, message, "retry-after" in answer.headers, str(answer.status_code))

    def _body(self, question: Question) -> dict[str, Any]:
        url = f"data:image/png;base64,{base64.b64encode(question.image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]
        settings = json.loads(json.dumps(question.settings))
        return {"model": self._model, "messages": [{"role": "user", "content": content}], **settings}


def _judged(code: str, message: str, says_when: bool, shown: str) -> Ending:
    if LEAKS.search(message):
        return Ending(kind=f"{shown} that tells internals", message=message)
    if code != "RESOURCE_EXHAUSTED":
        return Ending(kind=shown, message=message)
    return Ending(kind=REFUSAL if says_when else f"{shown} without a time", message=message)
