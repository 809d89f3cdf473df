"""`python -m evaluation.score` refuses what it cannot score before it has loaded a model."""

import sys

import pytest

from evaluation.score import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "both,bothh"], "'bothh' is not one of off, vision, text, both"),
        (["--images", "0"], "0 is not positive"),
        (["--threshold", "7"], "prune.threshold: is 7.0, expected (0, 1]"),
        ([], "checkpoint: no config.json in nowhere"),
    ],
)
def test_what_cannot_be_scored_is_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["score", "nowhere", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert message in f"{ended.value} {capsys.readouterr().err}"
