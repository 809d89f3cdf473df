"""What is refused by its size, before anything is copied."""

from __future__ import annotations

import pytest

from focusllava.v1 import encoder_pb2, llm_pb2, tensor_pb2
from services.common.errors import InvalidInput
from services.common.wire import RequestSizes
from services.common.wire.sizes import MAX_REST_BYTES

SIZES = RequestSizes(context=100, width=8)


def request(*texts: str, tokens: int = 0, branch_ids: int = 0, request_id: str = "r") -> llm_pb2.GenerateRequest:
    """`tokens` visual tokens in float32."""
    image = encoder_pb2.CompressedVisualTokens(
        tokens=tensor_pb2.Tensor(data=bytes(tokens * 8 * 4)), branch_ids=bytes(branch_ids)
    )
    turns = [llm_pb2.PromptTurn(parts=[llm_pb2.PromptPart(text=text)]) for text in texts]
    return llm_pb2.GenerateRequest(request_id=request_id, turns=turns, images=[image])


def test_what_may_fit_passes():
    SIZES.check(request("word " * 100, tokens=100))
    SIZES.check(request(*["\u6f22\u5b57" * 4] * 50, tokens=1, branch_ids=1000))


@pytest.mark.parametrize(
    "message, says",
    [
        (request("x", tokens=101), "images: hold 3232 bytes of visual tokens, .* 100 has room for 3200"),
        (request("x" * 1601), "turns: has 1601 bytes of text, .* 100 tokens has room for 1600"),
        (request(*["x" * 100] * 17), "turns: has 1700 bytes"),
        (request("\u6f22" * 600), "turns: has 1800 bytes"),
        (llm_pb2.GenerateRequest(raw_prompt=llm_pb2.RawPrompt(text="x" * 1700)), "raw_prompt: has 17[0-9]+ bytes"),
        (request("x", branch_ids=MAX_REST_BYTES), "request: has [0-9]+ bytes beside"),
        (request("x", request_id="r" * MAX_REST_BYTES), "request: has [0-9]+ bytes beside"),
        (request(*[""] * 500_000), "request: has [0-9]+ bytes beside"),
    ],
)
def test_what_never_fits_is_refused_by_name(message, says):
    with pytest.raises(InvalidInput, match=f"^{says}"):
        SIZES.check(message)
