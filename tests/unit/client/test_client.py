"""The client against a scripted gateway on a real socket: text, accounting, settings, images, metadata."""

from __future__ import annotations

import io

import pytest
from PIL import Image, ImageCms, ImageOps

from focusllava import (
    FocusClient,
    FocusClientError,
    ImageFile,
    TokenLogprob,
    Turn,
    assistant,
    system,
    user,
)
from focusllava.messages import read_image
from focusllava.v1 import image_pb2, llm_pb2
from tests.fakes.gateway import ScriptedGateway, finished, likely, started, token


def test_streams_text_then_accounting(client: FocusClient) -> None:
    stream = client.ask(b"png", "What is it?")
    assert stream.usage is None
    assert list(stream) == ["a ", "red ", "café"]  # an event without text is no piece
    answer = stream.result()
    assert answer.text == stream.text == "a red café"
    assert answer.finish_reason == "stop"
    assert (answer.usage.visual_tokens_uncompressed, answer.usage.visual_tokens_kept) == (100, 20)
    assert answer.usage.kv_unpruned_bytes == 4096
    assert answer.images[0].notes == ("animated image: first frame used",)
    assert answer.request_id == "r1"


def test_settings_reach_the_wire_and_absent_ones_stay_unset(client: FocusClient, gateway: ScriptedGateway) -> None:
    client.ask(
        b"i", "q", threshold=0.5, vision_sampler=False, text_sampler=False, max_tokens=7, seed=3, stop=["."]
    ).result()
    client.ask(None, "q").result()
    full, bare = gateway.requests
    assert full.vision_sampler_off and full.prune.off and full.prune.threshold == 0.5
    assert (full.sampling.max_tokens, full.sampling.seed, list(full.sampling.stop)) == (7, 3, ["."])
    assert not full.sampling.HasField("temperature")
    assert not bare.vision_sampler_off and not bare.prune.off and not bare.prune.HasField("threshold")
    assert bare.sampling == llm_pb2.SamplingParams() and bare.prune == llm_pb2.PruneParams()
    assert [part.WhichOneof("part") for part in bare.turns[0].parts] == ["text"]


def test_every_setting_reaches_the_wire(client: FocusClient, gateway: ScriptedGateway) -> None:
    sampling = {
        "max_tokens": 9, "temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125, "repetition_penalty": 1.5,
        "presence_penalty": -1.0, "frequency_penalty": 0.5, "seed": 2**64 - 1, "logprobs": 0, "ignore_eos": True,
    }  # fmt: skip
    client.ask(None, "q", keep_ratio=0.5, threshold=None, **sampling).result()
    client.ask(None, "q", **dict.fromkeys(sampling)).result()
    full, none = gateway.requests
    assert full.prune == llm_pb2.PruneParams(keep_ratio=0.5)
    assert {field.name: value for field, value in full.sampling.ListFields()} == sampling
    assert none.sampling == llm_pb2.SamplingParams()
    with pytest.raises(TypeError, match="unknown settings: top_q"):
        client.ask(None, "q", top_q=3)


def test_log_probabilities_come_as_they_are_generated(client: FocusClient, gateway: ScriptedGateway) -> None:
    gateway.script = lambda request, context: iter([started(), *map(likely, ("a", "", "b")), finished()])
    stream = client.ask(None, "q", logprobs=1)
    seen = []
    for _ in stream:
        seen.append(len(stream.logprobs))
    assert seen == [1, 3]
    answer = stream.result()
    assert [entry.chosen.text for entry in answer.logprobs] == ["a", "", "b"] and answer.logprobs == stream.logprobs
    assert answer.logprobs[0].chosen == TokenLogprob(token_id=1, text="a", logprob=-0.25)
    assert answer.logprobs[0].top[1] == TokenLogprob(token_id=2, text="z", logprob=-1.5)
    gateway.script = gateway.answer
    assert client.ask(None, "q").result().logprobs == ()


def test_image_sources_and_chat_turns(client: FocusClient, gateway: ScriptedGateway, tmp_path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"from a file")
    images = [str(path), path, b"bytes", io.BytesIO(b"file-like")]
    history = [system("Be brief."), user("First?"), assistant("Yes.")]
    client.ask(images, "And these?", history=history).result()
    turns = gateway.requests[0].turns
    assert [turn.role for turn in turns] == [
        llm_pb2.ROLE_SYSTEM, llm_pb2.ROLE_USER, llm_pb2.ROLE_ASSISTANT, llm_pb2.ROLE_USER,
    ]  # fmt: skip
    last = turns[-1].parts
    assert [part.image for part in last[:4]] == [b"from a file", b"from a file", b"bytes", b"file-like"]
    assert last[4].text == "And these?"


def test_how_images_are_read_reaches_the_wire(client: FocusClient, gateway: ScriptedGateway) -> None:
    client.ask([b"a", b"b"], "q", detail="low", reduced_jpeg=False).result()
    client.ask(b"a", "q").result()
    mixed = Turn(role="user", parts=(ImageFile(data=b"a", detail="low"), b"b", ImageFile(data=b"c"), "q"))
    client.chat([mixed, user("and?", images=b"d", detail="high"), user("q", images=b"e", detail="auto")]).result()
    both, bare, each = gateway.requests
    asked = image_pb2.ImageOptions(detail=image_pb2.IMAGE_DETAIL_LOW, reduced_jpeg=False)
    assert [part.image_options for part in both.turns[0].parts[:2]] == [asked, asked]
    assert not bare.turns[0].parts[0].HasField("image_options")
    parts = [part for turn in each.turns for part in turn.parts if part.WhichOneof("part") == "image"]
    assert [part.image for part in parts] == [b"a", b"b", b"c", b"d", b"e"]
    details = [part.image_options.detail for part in parts]
    assert details == [image_pb2.IMAGE_DETAIL_LOW, 0, 0, image_pb2.IMAGE_DETAIL_HIGH, 0]
    assert not any(part.image_options.HasField("reduced_jpeg") for part in parts)
    with pytest.raises(FocusClientError, match=r"parts\[0\]\.detail: is 'most', expected low, high or auto"):
        client.ask(b"a", "q", detail="most")
    with pytest.raises(FocusClientError, match="reduced_jpeg: is 'yes', expected True or False"):
        client.ask(b"a", "q", reduced_jpeg="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "F", "I", "I;16"])
def test_a_pillow_image_keeps_its_orientation_and_its_pixels_in_every_mode(mode: str) -> None:
    picture = Image.linear_gradient("L").resize((8, 4))
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        picture = ImageCms.applyTransform(picture.convert("RGB"), ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        picture = picture.convert(mode)
    picture.getexif()[0x0112] = 6
    sent, shown = (ImageOps.exif_transpose(i) for i in (Image.open(io.BytesIO(read_image(picture))), picture))
    assert sent.size == shown.size == (4, 8)
    if mode not in ("F", "I"):  # these two with their values: Pillow's RGB of them is clipped
        sent, shown = sent.convert("RGB"), shown.convert("RGB")
    assert sent.tobytes() == shown.tobytes()


def test_messages_larger_than_grpc_s_default_limit_pass(client: FocusClient, gateway: ScriptedGateway) -> None:
    client.ask(b"\0" * (9 * 2**20), "q").result()
    assert len(gateway.requests[0].turns[0].parts[0].image) == 9 * 2**20
    gateway.script = lambda request, context: iter([started(), token("y" * (5 * 2**20)), finished()])
    assert len(client.ask(None, "q").result().text) == 5 * 2**20


def test_metadata_names_application_token_and_deadline(gateway: ScriptedGateway) -> None:
    with FocusClient(gateway.address, api_key="secret", application="other", timeout_s=9) as client:
        client.ask(None, "q").result()
    with FocusClient(gateway.address) as client:
        client.ask(None, "q").result()
    first, second = gateway.metadata
    assert first["application"] == "other" and first["authorization"] == "Bearer secret"
    assert 8000 < int(first["focusllava-timeout-ms"]) <= 9000
    assert second["application"] == "gateway"
    assert "authorization" not in second and "focusllava-timeout-ms" not in second


def test_what_the_wire_cannot_carry_is_refused(client: FocusClient, gateway: ScriptedGateway) -> None:
    with pytest.raises(TypeError, match="treshold"):
        client.ask(None, "q", treshold=0.5)  # type: ignore[call-arg]
    assert gateway.requests == []


def test_model_info(client: FocusClient) -> None:
    info = client.model_info()
    assert (info.name, info.num_layers, info.max_images) == ("focusllava-tiny", 6, 4)
