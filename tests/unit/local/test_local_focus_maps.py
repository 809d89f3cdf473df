"""Focus maps of LocalModel: alone, batched and preempted, and the drawing of `focusllava ask --map`."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

from focusllava import LocalModel, user
from focusllava.cli import main
from services.common import wire
from services.common.errors import InvalidInput
from services.common.types import DecisionEvent

ROOT = pathlib.Path(__file__).parents[3]
CHECKPOINT, SAMPLE = ROOT / "checkpoints" / "focusllava-tiny", ROOT / "docs" / "assets" / "sample.png"
QUESTIONS = ("What number is on the red card?", "What word is on the yellow card?", "What shape is green?")


def test_a_preempted_answer_and_a_batched_one_keep_their_maps() -> None:
    turns = [[user(question, images=SAMPLE)] for question in QUESTIONS]
    asked = {"max_tokens": 120, "ignore_eos": True, "return_map": True}
    with LocalModel(CHECKPOINT, "cpu", "float32", prefix_reuse=False) as model:
        alone = [model.chat(one, **asked) for one in turns]
        batched = model.generate(turns, **asked)
    room = int(1.3 * alone[0].usage.kv_unpruned_bytes)
    with LocalModel(CHECKPOINT, "cpu", "float32", prefix_reuse=False, kv_cache_bytes=room) as model:
        narrow = model.generate(turns, **asked)
        assert model.engine.stats().preemptions > 0
    for answers in (batched, narrow):
        for expected, answer in zip(alone, answers, strict=True):
            assert answer.text == expected.text
            (found,), (own,) = answer.focus.maps, expected.focus.maps
            np.testing.assert_allclose(found.importance, own.importance, rtol=1e-3, atol=1e-6)
            assert dataclasses.replace(found, importance=()) == dataclasses.replace(own, importance=())


def test_a_stream_has_its_map_after_the_first_token_and_not_before() -> None:
    with LocalModel(CHECKPOINT) as model:
        stream = model.stream([user(QUESTIONS[0], images=SAMPLE)], return_map=True)
        assert stream.focus is None
        next(iter(stream))
        assert stream.focus is not None and stream.usage is None
        assert stream.result().focus == stream.focus
        assert model.ask(SAMPLE, QUESTIONS[0]).focus is None


def test_a_decision_crosses_the_wire_and_a_wrong_one_is_refused() -> None:
    with LocalModel(CHECKPOINT) as model:
        decision = model.ask(SAMPLE, QUESTIONS[0]).decision
    message = wire.event_to_proto(DecisionEvent(decision=decision))
    back = wire.event_from_proto(message).decision
    assert back.kept.tolist() == decision.kept.tolist() and back.importance.tolist() == decision.importance.tolist()
    assert (back.layer, back.threshold, back.keep_ratio) == (decision.layer, decision.threshold, decision.keep_ratio)
    assert wire.event_from_proto(wire.event_to_proto(DecisionEvent(decision=None))).decision is None
    message.decision.kept.append(0)
    with pytest.raises(InvalidInput, match="decision.kept"):
        wire.event_from_proto(message)


def test_ask_draws_the_map(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing, local = tmp_path / "map.png", ["--local", str(CHECKPOINT)]
    asked = ["ask", str(SAMPLE), str(SAMPLE), QUESTIONS[0], *local, "--map", str(drawing)]
    assert main(asked) == 0
    told = capsys.readouterr()
    assert "visual tokens" in told.err and f"wrote {drawing}" in told.err
    assert main([*asked, "--json"]) == 0
    assert '"focus"' not in capsys.readouterr().out, "it is drawn, not printed"
    with Image.open(drawing) as sheet:
        assert sheet.format == "PNG" and sheet.width > 5 * 400 and sheet.height > 2 * 250
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    # Dropped parts are grey and dark; the red card, which was asked about, is not.
    assert (np.ptp(pixels, axis=-1) == 0).mean() > 0.2
    assert ((pixels[..., 0] > 180) & (pixels[..., 1] < 80) & (pixels[..., 2] < 90)).sum() > 500
    for wrong, said in (
        (["ask", "Hello", *local, "--map", str(drawing)], "needs an IMAGE"),
        (["ask", str(SAMPLE), "What?", *local, "--map", str(tmp_path / "map.jpg")], "ends in .png"),
        (["ask", str(SAMPLE), "What?", *local, "--map", str(tmp_path / "no" / "map.png")], "no folder"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err
