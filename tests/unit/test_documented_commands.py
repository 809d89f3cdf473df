"""Each shell command of the documentation runs as it is written, here or in the test that is named, or says why not."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shlex
import subprocess

import click
import pytest

from focusllava.cli import cli
from tests.documented import ROOT, Command, commands, here, workplace

SERVED = "tests/integration/serving/test_documented_commands.py"
SECONDS = 300

HERE = (
    r"\.venv/bin/focusllava ask .* --local checkpoints/focusllava-tiny",
    r"(\.venv/bin/)?focusllava explain docs/assets/sample\.png .*",
    r"eval \"\$\(\.venv/bin/focusllava completion bash\)\"",
    r"focusllava key new alice .*",
    r"python -m evaluation\.scenes --split \w+ --images 3 --out posters",
    r"python - docs/study/longer-training\.jsonl <<'EOF'.*",
    r"\.venv/bin/python -c \"\nfrom training\.data\.rendering.*",
    r"(sed|cp) .*cluster/serve\.yaml.*",
    r"sed .* v1\.yaml > v2\.yaml",
    r"focusllava plan .*",
)
"""Run by this file, in a copy of what they read."""

TESTED = {
    r"\.venv/bin/focusllava (ask docs/\S+ |info$).*": SERVED,
    r"printf .* \| curl .*/v1/chat/completions .*": SERVED,
    r"FOCUSLLAVA_API_KEY=fl-\.\.\. focusllava ask .*": SERVED,
    r"\.venv/bin/python -m pytest tests/(unit|contract)/.*": "",  # they are tests
    r"focusllava serve.*": "tests/unit/cluster/test_serve_command.py",
    r"focusllava import (LLAVA|SRC) .*": "tests/unit/cluster/test_dry_run.py",
    r"focusllava info ~/focusllava/mine": "tests/unit/local/test_local_model.py",
    r"focusllava assemble .*": "tests/unit/checkpoint/test_assemble.py",
    r"focusllava export SRC DST .*": "tests/contract/test_trained_exports.py",
    r"focusllava data check data/.*": "tests/unit/training/data/test_check.py",
    r"focusllava explain a\.png b\.png .*": "tests/unit/evaluation/test_focus_maps.py",
    r"python -m evaluation\.regions .*": "tests/unit/evaluation/test_regions.py",
    r"python -m evaluation\.score .*": "tests/unit/evaluation/test_score_command.py",
    r"python -m evaluation\.scenes .* --images 100 .*": "tests/unit/evaluation/test_scenes.py",
    r"python training/(finetune|pretrain)\.py .*": "tests/integration/test_training.py",
    r"python -m training\.calibrate .*": "tests/unit/sampler/test_calibration.py",
    r"python -m evaluation\.easy_vqa_score .*": "tests/unit/evaluation/test_easy_vqa.py",
    r"python -m evaluation\.study .*": "tests/integration/test_study.py",
    r"redis-server .*": "tests/unit/gateway/test_cache.py",
    r"lmms-env/bin/lmms-eval .* --tasks focusllava_scenes .*": "tests/unit/evaluation/test_lmms_eval_run.py",
}
"""Run by the test that is named, with other files or with the command's own function."""

NOT_RUN = {
    r"make (setup|lint|test|format)": "what every run of the tests, and CI, begins with",
    r"make (processors|clients|smollm|docs|wheel|trackers|compat)": "a suite of its own: minutes, or downloads",
    r"make (demo|serve|stop)": "a Ray at the public ports; tests/integration/serving runs cluster/local.py at others",
    r"python training/vision_pretrain\.py .*": "an hour; tests/unit/training/test_dense_labels.py takes its steps",
    r"make bench": "minutes on a quiet machine; benchmarks are never tests",
    r"python -m benchmarks\..*": "minutes on a quiet machine; benchmarks are never tests",
    r"\.venv/bin/python -m benchmarks\.dashboard .*": "draws a picture of the documentation from a cluster under load",
    r"\.venv/bin/python scripts/screenshots\.py .*": "draws pictures of a page that tests/integration/page drives",
    r"\.venv/bin/python -m pytest tests -k deadline": "runs tests of several files, which run anyway",
    r"(python3\.11 -m venv|lmms-env/bin/pip) .*": "downloads a gigabyte; `test_lmms_eval_run.py` asks for the result",
    r"lmms-env/bin/lmms-eval .* checkpoint=FOLDER .*": "needs an 8B checkpoint and the public data sets",
    r"printf .* \| buf curl .*": "`make clients` runs it (tests/clients/test_clients.py: test_buf_curl)",
    r"pip install .*": "what `make setup` does",
    r"(guidellm|vllm) .*": "needs 5 GB of others' packages: `make clients` runs it (tests/clients)",
    r"focusllava ask (data/a|photo)\.jpg .*": "stands for the reader's own picture",
    r"focusllava data check training/data/mixtures/.*": "needs the public data sets, hundreds of gigabytes",
    r"ray job submit .*": "needs a Ray cluster; tests/smollm/train.sh runs such jobs (`make smollm`)",
    r"kubectl .*": "needs Kubernetes; tests/unit/cluster/test_kuberay.py holds the files to its schemas",
    r"HEAD=\$\(kubectl .*": "needs Kubernetes",
    r"export .*": "sets the reader's environment",
    r"ray (start|get-auth-token) .*": "would start a second Ray on the ports of the tests' own",
    r"REDIS_URL=\S+ ray start .*": "would start a second Ray on the ports of the tests' own",
    r"OTEL_\S+ focusllava serve": "needs a collector; tests/unit/gateway/test_traces.py has one and reads its spans",
    r"(\.venv/bin/)?serve (deploy|status).*": "a part of the rehearsal, by hand: minutes, and a Ray of its own",
    r"(status|answer)(\(\)| |$).*": "a part of the rehearsal, by hand: minutes, and a Ray of its own",
    r"for i in \$\(seq 40\).*": "a part of the rehearsal; tests/integration/serving/test_under_load.py does the like",
}
"""Commands that no test runs, and why."""

ALL = commands()


def kinds_of(command: Command) -> list[str]:
    patterns = (*HERE, *TESTED, *NOT_RUN)
    return [pattern for pattern in patterns if re.fullmatch(pattern, command.text, re.DOTALL)]


def first_kind(command: Command) -> str:
    """HERE goes before TESTED: a local question is one to a sample image too."""
    return kinds_of(command)[0]


def test_every_command_is_run_or_says_why_not() -> None:
    assert len(ALL) > 120
    assert not [str(command) for command in ALL if not kinds_of(command)]
    unused = {*HERE, *TESTED, *NOT_RUN} - {first_kind(command) for command in ALL}
    assert not unused, "these say something of no command"
    for path in filter(None, TESTED.values()):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("command", {one.text: one for one in ALL if first_kind(one) in HERE}.values(), ids=str)
def test_it_runs_as_written(command: Command, tmp_path: pathlib.Path) -> None:
    folder = workplace(tmp_path)
    if "v1.yaml > v2" in command.text:
        (folder / "v1.yaml").write_text((ROOT / "cluster" / "serve.yaml").read_text("utf8"), "utf8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", f"set -euo pipefail\n{here(command.text)}"], cwd=folder, env=environment,
                          text=True, capture_output=True, timeout=SECONDS)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if " ask " in command.text:
        assert done.stdout.strip() in ("60", "hen", "hat", "star"), done.stdout
    for made in re.findall(r"(?:> |--map |-o |--out |--file )(\S+)", command.text):
        assert (folder / made).exists(), made


@pytest.mark.parametrize("command", {one.text: one for one in ALL}.values(), ids=str)
def test_what_it_names_is_there(command: Command) -> None:
    """Options, modules, targets and files, of the commands that are not run too."""
    text = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command.text).replace(".venv/bin/", "")
    if text.startswith("make "):
        assert re.search(rf"^{text.split()[1]}:", (ROOT / "Makefile").read_text("utf8"), re.MULTILINE)
    elif match := re.match(r"python -m ((?:evaluation|training|benchmarks)\.\w+)", text):
        assert importlib.util.find_spec(match[1]), match[1]
    elif text.startswith("focusllava "):
        _parse(shlex.split(text)[1:])
    for path in re.findall(r"(?:training|tests|cluster|evaluation)/[\w./-]+\.(?:py|yaml)", text):
        assert (ROOT / path).is_file(), path


def _parse(words: list[str]) -> None:
    """Raises click's errors for options that there are not; arguments that name files need not be there."""
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found is not None, words
        command, words = found, words[1:]
    known = {name: option for option in command.params for name in (*option.opts, *option.secondary_opts)}
    given = [word.partition("=")[0] for word in words if word.startswith("-") and word != "-"]
    assert set(given) <= set(known), (words, sorted(known))
