"""`focusllava key new`: the key is printed once, its hash is what a gateway then knows it by."""

from __future__ import annotations

import pathlib

import pytest
from click.testing import CliRunner

from cluster.key_command import key
from services.common.errors import InvalidInput
from services.gateway.keys import Keys, hash_of, parse_keys
from tests.fakes.stages import METRICS


def run(*arguments: str) -> tuple[str, str]:
    done = CliRunner().invoke(key, ["new", *arguments])
    if isinstance(done.exception, InvalidInput):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout.strip(), done.stderr


def test_it_prints_the_key_and_what_a_file_must_have_of_it():
    secret, entry = run("alice", "--requests-per-minute", "60", "--max-tokens", "100")
    (known,) = parse_keys(entry)
    assert (known.name, known.sha256) == ("alice", hash_of(secret)) and secret not in entry
    assert (known.requests_per_minute, known.max_tokens, known.concurrency) == (60, 100, None)
    assert run("alice")[0] != secret


def test_it_adds_to_a_file_that_nobody_else_can_read(tmp_path: pathlib.Path):
    file = tmp_path / "keys.yaml"
    alice, said = run("alice", "--file", str(file))
    bob, _ = run("bob", "--file", str(file), "--concurrency", "2")
    assert file.stat().st_mode & 0o777 == 0o600 and said == f"alice is in {file}\n"
    assert alice not in file.read_text() and bob not in file.read_text()
    keys = Keys(METRICS, path=file)
    assert [keys.caller(f"Bearer {secret}").name for secret in (alice, bob)] == ["alice", "bob"]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("empty", ["", "keys:\n", "keys: []\n"])
def test_it_begins_a_file_or_says_that_it_cannot(tmp_path: pathlib.Path, empty):
    file = tmp_path / "keys.yaml"
    file.write_text(empty)
    if empty == "keys:\n":
        run("alice", "--file", str(file))
        assert parse_keys(file.read_text())[0].name == "alice"
        return
    with pytest.raises(InvalidInput, match="to which none can be added at the end|keys: is missing"):
        run("alice", "--file", str(file))
    assert file.read_text() == empty


def test_what_is_wrong_changes_nothing(tmp_path: pathlib.Path):
    file = tmp_path / "keys.yaml"
    run("alice", "--file", str(file))
    before = file.read_text()
    for name, says in (("alice", "name: is in the file already"), ("a b", "name: is 'a b'")):
        with pytest.raises(InvalidInput, match=says):
            run(name, "--file", str(file))
    assert file.read_text() == before
