"""The command: answers, --json, exit codes, completion, and what the plain install brings."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest

from focusllava.cli import main
from focusllava.v1 import image_pb2
from tests.certificates import self_signed
from tests.fakes.gateway import ScriptedGateway, failed, finished, likely, started, token
from tests.tiny_checkpoints import make_random_checkpoint

COMMAND = [sys.executable, "-m", "focusllava.cli"]


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedGateway]:
    gateway = ScriptedGateway()
    monkeypatch.setenv("FOCUSLLAVA_ADDRESS", gateway.address)
    yield gateway
    gateway.stop()


@pytest.fixture
def image(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "image.png"
    path.write_bytes(b"png")
    return str(path)


def test_ask_streams_the_answer_and_accounts_on_stderr(gateway: ScriptedGateway, image: str, capsys) -> None:
    assert main(["ask", image, "What is it?", "--threshold", "0.7", "--no-vision-sampler", "--seed", "4"]) == 0
    out, err = capsys.readouterr()
    assert out == "a red café\n"
    for fact in (
        "100 uncompressed",
        "50 after",
        "20 kept from layer 2 of 6",
        "30.0 %",
        "2.0 KiB",
        "12 ms",
        "first frame used",
    ):
        assert fact in err
    (request,) = gateway.requests
    assert request.vision_sampler_off and not request.prune.off and request.sampling.seed == 4
    assert request.prune.threshold == pytest.approx(0.7)
    assert request.turns[0].parts[0].image == b"png" and request.turns[0].parts[1].text == "What is it?"


def test_tls_with_an_authority_of_ones_own(image: str, tmp_path: pathlib.Path, capsys) -> None:
    key, certificate = self_signed()
    (ca := tmp_path / "ca.pem").write_bytes(certificate)
    gateway = ScriptedGateway(grpc.ssl_server_credentials([(key, certificate)]))
    try:
        served = ["--address", gateway.address]
        assert main(["ask", image, "What?", *served, "--tls-ca", str(ca), "--api-key", "secret"]) == 0
        assert capsys.readouterr().out == "a red caf\u00e9\n"
        assert gateway.metadata[0]["authorization"] == "Bearer secret"
        assert main(["info", *served, "--tls-ca", str(ca)]) == 0
        for without in (["--tls", "--timeout", "3"], ["--timeout", "3"]):  # an unknown authority, and no TLS
            assert main(["ask", image, "What?", *served, *without]) == 4
        assert main(["info", *served, "--tls-ca", image]) == 3
        assert "holds no certificate" in capsys.readouterr().err
    finally:
        gateway.stop()


def test_sampling_options_reach_the_server(gateway: ScriptedGateway, capsys) -> None:
    options = {
        "max-tokens": 9, "temperature": 0.5, "top-k": 3, "top-p": 0.25, "min-p": 0.125, "repetition-penalty": 1.5,
        "presence-penalty": -1.0, "frequency-penalty": 0.5, "seed": 7, "logprobs": 2,
    }  # fmt: skip
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["ask", "What?", *arguments, "--stop", "a", "--stop", "b", "--keep-ratio", "0.5"]) == 0
    (request,) = gateway.requests
    sent = {field.name.replace("_", "-"): value for field, value in request.sampling.ListFields()}
    assert sent == {**options, "stop": ["a", "b"]} and request.prune.keep_ratio == 0.5
    assert not request.prune.HasField("threshold")


def test_log_probabilities_are_shown(gateway: ScriptedGateway, capsys) -> None:
    gateway.script = lambda request, context: iter([started(), likely("red"), likely(" 7"), finished()])
    assert main(["ask", "What?", "--logprobs", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == "red 7\n" and err.startswith("'red' 77.9 %  'red' 77.9 %  'z' 22.3 %\n' 7' 77.9 %")
    assert main(["ask", "What?", "--logprobs", "2", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["logprobs"][1]
    assert (
        entry["chosen"] == {"token_id": 1, "text": " 7", "logprob": -0.25, "raw_bytes": []}
        and entry["top"][1]["text"] == "z"
    )


def test_ask_says_how_images_are_read(gateway: ScriptedGateway, image: str) -> None:
    for arguments in (["--detail", "low", "--whole-jpeg"], ["--reduced-jpeg"], []):
        assert main(["ask", image, "What?", *arguments]) == 0
    assert main(["ask", image, "What?", "--detail", "most"]) == 2
    low, reduced, plain = (request.turns[0].parts[0] for request in gateway.requests)
    assert low.image_options == image_pb2.ImageOptions(detail=image_pb2.IMAGE_DETAIL_LOW, reduced_jpeg=False)
    assert reduced.image_options == image_pb2.ImageOptions(reduced_jpeg=True)
    assert not plain.HasField("image_options")


def test_ask_json_is_one_object(gateway: ScriptedGateway, image: str, capsys) -> None:
    assert main(["ask", image, image, "What?", "--json"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert err == "" and answer["text"] == "a red café" and answer["usage"]["visual_tokens_kept"] == 20
    assert answer["images"][0]["cached"] is False
    assert len(gateway.requests[0].turns[0].parts) == 3


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("INVALID_ARGUMENT", 3), ("UNAUTHENTICATED", 3), ("NOT_FOUND", 4), ("UNAVAILABLE", 4), ("DEADLINE_EXCEEDED", 5),
        ("CANCELLED", 5), ("RESOURCE_EXHAUSTED", 6), ("INTERNAL", 1), ("UNKNOWN", 1),
    ],
)  # fmt: skip
def test_exit_code_of_each_status(gateway: ScriptedGateway, capsys, status: str, code: int) -> None:
    gateway.script = gateway.refusing(grpc.StatusCode[status], "the reason")
    assert main(["ask", "q", "--timeout", "5"]) == code
    out, err = capsys.readouterr()
    waited = "focusllava: waiting: the reason\n" if status == "UNAVAILABLE" else ""
    assert (out, err) == ("", f"{waited}focusllava: the reason ({status})\n")


def test_error_after_text_ends_the_line_first(gateway: ScriptedGateway, capsys) -> None:
    gateway.script = lambda request, context: iter([started(), token("half"), failed("RESOURCE_EXHAUSTED", "full")])
    assert main(["ask", "q"]) == 6
    assert capsys.readouterr() == ("half\n", "focusllava: full (RESOURCE_EXHAUSTED)\n")


def test_json_errors_are_json(gateway: ScriptedGateway, capsys) -> None:
    assert main(["ask", "missing.png", "q", "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "INVALID_ARGUMENT" and "missing.png" in error["message"]
    assert gateway.requests == []


def test_wrong_usage(capsys) -> None:
    for arguments in (["ask"], ["nonsense"], ["ask", "q", "--max-tokens", "many"], ["info", "--verify"]):
        assert main(arguments) == 2, arguments
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ask", "explain"])
def test_a_path_is_no_question(gateway: ScriptedGateway, image: str, capsys, command: str) -> None:
    cases = [[image, image], [image, "-"]] + ([[image], ["-"]] if command == "ask" else [])
    for arguments in cases:
        assert main([command, *arguments]) == 2
        err = capsys.readouterr().err
        assert "QUESTION is missing" in err and repr(arguments[-1]) in err
    assert gateway.requests == []


def test_who_waits_for_a_server_is_told_so_once(capsys) -> None:
    assert main(["ask", "docs/assets/sample.png", "what?", "--address", "127.0.0.1:9", "--timeout", "2"]) == 4
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("focusllava: waiting: no server answers at 127.0.0.1:9")
    assert len(rest) == 1 and "waiting" not in rest[0]


def test_nobody_there(capsys) -> None:
    assert main(["info", "--address", "127.0.0.1:9"]) == 4
    err = capsys.readouterr().err
    assert "no server answers at 127.0.0.1:9" in err and "`focusllava serve` starts a server" in err


def test_a_server_that_answers_is_not_told_to_be_missing(gateway: ScriptedGateway, capsys) -> None:
    gateway.script = gateway.refusing(grpc.StatusCode.UNAVAILABLE, "the llm stage is restarting; try again")
    assert main(["ask", "q", "--timeout", "5"]) == 4
    said = "the llm stage is restarting; try again"
    assert capsys.readouterr().err == f"focusllava: waiting: {said}\nfocusllava: {said} (UNAVAILABLE)\n"


@pytest.mark.parametrize(
    ("option", "value", "code", "said"),
    [
        ("--seed", str(2**64), 3, f"seed: is {2**64}"), ("--top-k", "-1", 3, "top_k: is -1"),
        ("--max-tokens", "-5", 3, "max_tokens: is -5"), ("--logprobs", "-1", 3, "logprobs: is -1"),
        ("--timeout", "inf", 2, "--timeout"), ("--timeout", "1e12", 2, "--timeout"), ("--timeout", "0", 2, "--timeout"),
        ("--timeout", "nan", 3, "timeout_s: is nan"), ("--address", "", 3, "address: is ''"),
        ("--address", "http://h:1", 3, "address: is 'http://h:1'"), ("--api-key", "a\nb", 3, "api_key: "),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(
    gateway: ScriptedGateway, capsys, option: str, value: str, code: int, said: str
) -> None:
    assert main(["ask", "q", option, value]) == code
    assert said in capsys.readouterr().err
    assert gateway.requests == []


def test_timeout(gateway: ScriptedGateway, capsys) -> None:
    gateway.script = gateway.endless
    assert main(["ask", "q", "--timeout", "0.3"]) == 5
    assert gateway.cancelled.wait(5)


def test_info_of_a_server(gateway: ScriptedGateway, capsys) -> None:
    assert main(["info"]) == 0
    assert "focusllava-tiny" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_layers"] == 6


def test_info_of_a_checkpoint(tmp_path: pathlib.Path, capsys) -> None:
    folder = tmp_path / "checkpoint"
    make_random_checkpoint(folder)
    assert main(["info", str(folder), "--json", "--verify"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["text_family"] == "llama" and len(facts["fingerprint"]) == 64
    assert facts["encoder_bytes"] > 0 and facts["llm_bytes"] > 0
    shard = next(folder.glob("llm-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert main(["info", str(folder), "--verify"]) == 3
    assert shard.name in capsys.readouterr().err
    assert main(["info", str(tmp_path)]) == 3


def test_interrupt(gateway: ScriptedGateway) -> None:
    gateway.script = gateway.endless
    # A shell's background command inherits that interrupts are ignored.
    process = subprocess.Popen([*COMMAND, "ask", "q"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    assert process.stdout is not None and process.stdout.read(1) == b"x"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
    assert gateway.cancelled.wait(5)


def test_a_reader_that_leaves_ends_it_quietly(gateway: ScriptedGateway) -> None:
    gateway.script = gateway.endless
    process = subprocess.Popen([*COMMAND, "ask", "q"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.read(1) == b"x"
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == b""
    process.wait(timeout=60)
    assert gateway.cancelled.wait(5)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys) -> None:
    assert main(["completion", shell]) == 0
    assert "_FOCUSLLAVA_COMPLETE" in capsys.readouterr().out


def test_completion_completes() -> None:
    variables = {"_FOCUSLLAVA_COMPLETE": "bash_complete", "COMP_WORDS": "focusllava ask --no-", "COMP_CWORD": "2"}
    run = subprocess.run(COMMAND, env=os.environ | variables, capture_output=True, text=True, check=True)
    assert {"plain,--no-vision-sampler", "plain,--no-text-sampler"} <= set(run.stdout.split())


def test_importing_the_client_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'numpy', 'PIL', 'services', 'cluster', 'training'}"
    code = f"import sys, focusllava, focusllava.cli; print(*sorted({heavy} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_help_loads_nothing_slow() -> None:
    command = [sys.executable, "-X", "importtime", *COMMAND[1:], "--help"]
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stderr.splitlines()
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    assert "click" in loaded and not loaded & {"services", "numpy", "torch", "ray", "transformers", "PIL"}


def test_the_plain_install_is_light() -> None:
    requires = importlib.metadata.requires("focusllava") or []
    plain = {line.split(">")[0].split("<")[0].strip() for line in requires if "extra ==" not in line}
    assert plain == {"click", "grpcio", "protobuf"}
    in_serve = " ".join(line for line in requires if 'extra == "serve"' in line)
    assert all(name in in_serve for name in ("torch", "ray", "transformers", "redis", "safetensors"))
    for line in requires:
        assert "==" in line.split(";")[0] or ("<" in line and ">" in line) or line.startswith("focusllava["), line


def test_a_missing_extra_is_said_in_one_line(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from focusllava.cli import main\n"
        f"sys.exit(main(['import', {str(tmp_path)!r}, {str(tmp_path / 'out')!r}]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2 and "pip install '.[serve]'" in run.stderr and run.stderr.count("\n") == 1


def test_explain_draws_and_answers(tmp_path: pathlib.Path, capsys) -> None:
    output, sample = tmp_path / "red.png", pathlib.Path(__file__).parents[3] / "docs" / "assets" / "sample.png"
    question = "What number is on the red card?"
    assert main(["explain", str(sample), question, "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert out == "60\n" and "kept for this question" in err and str(output) in err
    assert output.read_bytes().startswith(b"\x89PNG")
    written = json.loads(output.with_suffix(".json").read_text(encoding="utf8"))
    assert (written["question"], written["answer"], len(written["images"])) == (question, "60", 1)
    options = ["--no-vision-sampler", "--no-text-sampler", "-o", str(output), "--json"]
    assert main(["explain", str(sample), str(sample), "How many cards are there?", *options]) == 0
    tokens = json.loads(capsys.readouterr().out)["visual_tokens"]
    assert tokens["kept"] == tokens["sampled"] == tokens["uncompressed"] == 2 * written["visual_tokens"]["uncompressed"]


def test_explain_refuses_what_it_cannot_use(tmp_path: pathlib.Path, image: str, capsys) -> None:
    sample = str(pathlib.Path(__file__).parents[3] / "docs" / "assets" / "sample.png")
    output = ["-o", str(tmp_path / "focus.png")]
    for arguments, said in (
        (["missing.png", "q", *output], "missing.png"),
        ([image, "q", *output], "not a readable image"),
        ([sample, "q", "-o", str(tmp_path / "focus.jpg")], "focus.jpg"),
        ([sample, "q", *output, "--checkpoint", str(tmp_path)], str(tmp_path)),
        ([sample, "q", *output, "--threshold", "3"], "3.0"),
    ):
        assert main(["explain", *arguments]) == 3, arguments
        assert said in capsys.readouterr().err
    assert main(["explain", "q"]) == 2
    assert not (tmp_path / "focus.png").exists()


def test_explain_without_its_extra_says_what_to_install(image: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from focusllava.cli import main\n"
        f"sys.exit(main(['explain', {image!r}, 'What?']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2 and "pip install '.[serve]'" in run.stderr and run.stderr.count("\n") == 1
