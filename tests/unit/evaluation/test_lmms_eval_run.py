"""The plug-in inside lmms-eval itself, which has an environment of its own: run this file with that one's Python."""

import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from evaluation.lmms_eval_plugin.answering import InProcess
from evaluation.lmms_eval_plugin.example import scenes
from evaluation.lmms_eval_plugin.questions import Question, RequestFailed, sampling_settings, turns
from services.common.errors import InvalidInput
from services.local.model import LocalModel

pytest.importorskip("lmms_eval.evaluator", reason="lmms-eval has an environment of its own")

from lmms_eval import models  # noqa: E402

ROOT = pathlib.Path(__file__).parents[3]
CHECKPOINT = ROOT / "checkpoints" / "focusllava-tiny"
EXAMPLE = ROOT / "evaluation" / "lmms_eval_plugin" / "example"
ROWS = [json.loads(line) for line in (EXAMPLE / "questions.jsonl").read_text(encoding="utf8").splitlines()]


def messages(row):
    content = [{"type": "image", "url": image} for image in scenes.doc_to_visual(row)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": scenes.doc_to_text(row)}]}]


def expected(rows) -> list[str]:
    """The stages' own answers."""
    model = LocalModel(CHECKPOINT, "cpu", "float32")
    settings = sampling_settings({"max_new_tokens": 8, "do_sample": False, "until": ["\n\n"]})
    batch = [Question(name="", turns=turns(messages(row)), settings=settings) for row in rows]
    return [answer.text.strip() for answer in InProcess(model, {}).answer(batch)]


def test_the_command_line_scores_the_stages_own_answers(tmp_path):
    options = {"model": "focusllava", "model_args": f"checkpoint={CHECKPOINT},dtype=float32", "batch_size": "8",
               "tasks": "focusllava_scenes", "include_path": str(EXAMPLE), "limit": "24", "verbosity": "DEBUG",
               "output_path": str(tmp_path)}  # fmt: skip
    command = [sys.executable, "-m", "lmms_eval", "--log_samples"]
    command += [word for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (samples,) = tmp_path.rglob("*samples*.jsonl")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf8").splitlines()]
    answers = {line["doc_id"]: line["filtered_resps"] for line in lines}
    wanted = expected(ROWS[:24])
    assert [answers[number] for number in range(24)] == wanted
    right = sum(answer == row["answer"] for answer, row in zip(wanted, ROWS, strict=False)) / 24
    (results,) = tmp_path.rglob("*results.json")
    scored = json.loads(results.read_text(encoding="utf8"))["results"]["focusllava_scenes"]["exact_match,none"]
    assert scored == pytest.approx(right) and right > 0


@pytest.fixture(scope="module")
def model():
    built = models.get_model("focusllava").create_from_arg_string(
        f"checkpoint={CHECKPOINT},keep_ratio=0.5,dtype=float32", {"batch_size": "3", "max_batch_size": None}
    )
    built.task_dict["scenes"] = {"test": ROWS}
    return built


def request(doc_id: int, doc_to_messages=messages, **kwargs):
    kwargs = {"max_new_tokens": 8, **kwargs}
    return SimpleNamespace(args=("", doc_to_messages, kwargs, doc_id, "scenes", "test"), task_name="scenes")


def test_answers_come_in_order_with_their_token_counts(model):
    results = model.generate_until([request(number) for number in range(7)])
    alone = [model.generate_until([request(number)])[0] for number in range(7)]
    assert results == alone and len({result.text for result in results}) > 1
    assert all(result.token_counts.input_tokens > result.token_counts.output_tokens > 0 for result in results)


def test_what_has_no_answer_ends_the_run_by_name(model):
    def broken(row):
        raise KeyError("image")

    for wrong, reason in (
        (request(5, broken), "scenes/test/5: 'image'"),
        (request(6, num_beams=4), "scenes/test/6: generation_kwargs.num_beams: is 4"),
    ):
        with pytest.raises(RequestFailed, match=reason):
            model.generate_until([request(0), wrong])
    for refused in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="scenes asks for"):
            refused([request(0)])


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ("keep_ratio=0.5", "model_args.checkpoint"),
        (f"checkpoint={CHECKPOINT},address=127.0.0.1:1", "model_args.checkpoint"),
        ("address=127.0.0.1:1,threshold=1.5", "model_args.threshold"),
        ("address=127.0.0.1:1,text_sampler=off", "model_args.text_sampler"),
        ("address=127.0.0.1:1,dtype=float32", "model_args.dtype"),
        (f"checkpoint={CHECKPOINT},dtype=int8", "model_args.dtype"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, field):
    with pytest.raises(InvalidInput) as refused:
        models.get_model("focusllava").create_from_arg_string(arguments, {"batch_size": 1})
    assert refused.value.field == field
