"""API keys: which file is refused, who is let in, what a changed or broken file does, and what a minute allows."""

from __future__ import annotations

import hashlib
import logging
import os
import re

import pytest

from services.common.errors import InvalidInput, Overloaded, WrongKey
from services.gateway import keys as keys_module
from services.gateway.callers import ApiKey, Caller
from services.gateway.keys import PREFIX, Keys, hash_of, new_key, parse_keys
from tests.fakes.stages import METRICS

ALICE, BOB = PREFIX + 43 * "a", PREFIX + 43 * "b"
"""Always the same: they stand in names of tests, which each process of xdist collects."""


def entry(name: str, key: str, **limits: int) -> str:
    return "\n".join([f"- name: {name}", f"  sha256: {hash_of(key)}", *(f"  {k}: {v}" for k, v in limits.items())])


def file_of(*entries: str) -> str:
    return "\n".join(["keys:", *entries, ""])


def test_a_key_is_random_and_only_its_hash_is_kept():
    assert len({new_key() for _ in range(50)}) == 50
    assert re.fullmatch(r"fl-[A-Za-z0-9_-]{43}", ALICE)
    assert hash_of(ALICE) == hashlib.sha256(ALICE.encode()).hexdigest()
    (key,) = parse_keys(file_of(entry("alice", ALICE, requests_per_minute=60)))
    assert key == ApiKey(name="alice", sha256=hash_of(ALICE), requests_per_minute=60)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "keys: is missing"),
        ("keys", "keys: is missing"),
        ("keys:", "keys: is None, expected a list"),
        ("keys: [", "keys: is no YAML, line 1"),
        ("others: []", "others: unknown setting"),
        (file_of("- name: a"), "keys[0].sha256: is missing"),
        (file_of(f"- {{name: a, sha256: {ALICE}}}"), "keys[0].sha256: is '...', expected 64 hexadecimal digits"),
        (file_of(entry("a b", ALICE)), "keys[0].name: is 'a b'"),
        (file_of(entry("a", ALICE, concurrency=0)), "keys[0].concurrency: is 0, expected 1 or more"),
        (file_of(entry("a", ALICE), entry("a", BOB)), "keys[1].name: is the same as that of keys[0]"),
        (file_of(entry("a", ALICE), entry("b", ALICE)), "keys[1].sha256: is the same as that of keys[0]"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_and_a_key_is_never_shown(text, says):
    with pytest.raises(InvalidInput) as caught:
        parse_keys(text)
    assert says in str(caught.value) and ALICE not in str(caught.value)


def test_without_keys_everybody_is_let_in_and_what_is_set_and_empty_is_wrong(tmp_path):
    assert Keys.configured(None, {}, METRICS).caller(None).name == ""
    for environment in ({"FOCUSLLAVA_API_KEYS": ""}, {"FOCUSLLAVA_API_KEYS_FILE": ""}):
        with pytest.raises(InvalidInput):
            Keys.configured(None, environment, METRICS)
    with pytest.raises(InvalidInput, match="No such file"):
        Keys.configured(str(tmp_path / "none"), {}, METRICS)
    nobody = Keys.configured(None, {"FOCUSLLAVA_API_KEYS": "keys: []"}, METRICS)
    with pytest.raises(WrongKey):
        nobody.caller(f"Bearer {ALICE}")


def test_the_settings_file_goes_before_the_environments_and_both_before_its_text(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.write_text(file_of(entry("mine", ALICE)))
    other.write_text(file_of(entry("other", ALICE)))
    text = file_of(entry("text", ALICE))
    environment = {"FOCUSLLAVA_API_KEYS": text, "FOCUSLLAVA_API_KEYS_FILE": str(other)}
    asked = f"Bearer {ALICE}"
    assert Keys.configured(str(mine), environment, METRICS).caller(asked).name == "mine"
    assert Keys.configured(None, environment, METRICS).caller(asked).name == "other"
    assert Keys.configured(None, {"FOCUSLLAVA_API_KEYS": text}, METRICS).caller(asked).name == "text"


@pytest.mark.parametrize("said", [None, "", "Bearer", "Bearer ", f"Bearer {BOB}", ALICE, f"Basic {ALICE}", "Bearer é"])
def test_only_a_known_key_as_bearer_is_let_in(said):
    keys = Keys(METRICS, text=file_of(entry("alice", ALICE)))
    with pytest.raises(WrongKey, match="^authorization: (is missing|has a key that is not known here)"):
        keys.caller(said)
    assert keys.caller(f"bearer  {ALICE} ").name == "alice"


def test_a_changed_file_is_taken_over_and_a_broken_one_keeps_the_old_keys_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(keys_module, "RELOAD_S", 0.0)
    path = tmp_path / "keys.yaml"
    path.write_text(file_of(entry("alice", ALICE, concurrency=1)))
    keys = Keys(METRICS, path=path)
    alice = keys.caller(f"Bearer {ALICE}")
    with alice.request():
        path.write_text(file_of(entry("alice", ALICE, concurrency=2), entry("bob", BOB)))
        assert keys.caller(f"Bearer {BOB}").name == "bob"
        again = keys.caller(f"Bearer {ALICE}")
        assert again.in_flight == 1 and again.key.concurrency == 2  # what is in flight still counts

    with caplog.at_level(logging.WARNING, "focusllava"):
        for broken in ("keys: [", "", file_of(entry("alice", ALICE)) + "- name: x\n"):
            path.write_text(broken)
            assert keys.caller(f"Bearer {BOB}").name == "bob"
            assert "the 2 keys of before stay" in caplog.records[-1].message
            said = len(caplog.records)
            keys.caller(f"Bearer {BOB}")
            assert len(caplog.records) == said  # once for each change
        os.remove(path)
        assert keys.caller(f"Bearer {ALICE}").name == "alice"
        path.write_text(file_of(entry("alice", ALICE)))
        with pytest.raises(WrongKey):
            keys.caller(f"Bearer {BOB}")
    assert ALICE not in caplog.text and BOB not in caplog.text


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def caller(**limits: int) -> tuple[Caller, Clock]:
    clock = Clock()
    return Caller(ApiKey(name="a", sha256="0" * 64, **limits), clock), clock


def test_requests_a_minute_come_back_steadily():
    someone, clock = caller(requests_per_minute=6)
    for _ in range(6):
        with someone.request():
            pass
    with pytest.raises(Overloaded, match="the key 'a' has used its 6 requests a minute") as caught, someone.request():
        pass
    assert caught.value.retry_after_s == 10.0
    clock.now += 10
    with someone.request():
        pass
    with pytest.raises(Overloaded):
        someone.check()
    clock.now += 3600  # an hour saves up no more than a minute's
    for _ in range(6):
        with someone.request():
            pass
    with pytest.raises(Overloaded):
        someone.check()


def test_tokens_a_minute_may_be_overdrawn_once_and_are_paid_back():
    someone, clock = caller(tokens_per_minute=60)
    someone.check()
    someone.charge(120)
    with pytest.raises(Overloaded, match="60 tokens a minute") as caught:
        someone.check()
    assert caught.value.retry_after_s == 61.0
    clock.now += 61
    someone.check()


def test_requests_in_flight_are_bounded_and_end_with_their_block():
    someone, _ = caller(concurrency=1)
    with someone.request():
        with pytest.raises(Overloaded, match="has 1 requests in flight, its limit"):
            someone.check()
    someone.check()


def test_a_keys_longest_answer_is_never_above_the_doors():
    assert caller(max_tokens=10)[0].most_tokens(100) == 10
    assert (
        caller(max_tokens=1000)[0].most_tokens(100) == caller()[0].most_tokens(100) == Caller().most_tokens(100) == 100
    )
