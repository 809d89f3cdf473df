"""The settings of the gateway's replica, and how `user_config` changes them. Starts no Ray."""

from __future__ import annotations

import dataclasses
import re
import types

import pytest

from services.common.errors import InvalidInput
from services.common.settings import build_settings
from services.common.stage_secret import SECRET_VARIABLE
from services.gateway.admission import AdmissionLimits
from services.gateway.deployment import Gateway, GatewaySettings


def test_a_refused_value_of_a_nested_setting_has_its_path_whoever_refuses_it():
    for raw, says in [
        ({"llm": {"target": "nohost"}}, "llm.target: is 'nohost', expected host:port"),
        ({"encoder": {"backoff_s": -1}}, "encoder.backoff_s: is -1, expected 0 or more seconds"),
        ({"limits": {"media": {"max_bytes": 0}}}, "limits.media.max_bytes: is 0, expected 1 or more"),
        ({"redis_timeout_s": 0}, "redis_timeout_s: is 0, expected more than 0 seconds"),
        ({"redis_put_timeout_s": -1}, "redis_put_timeout_s: is -1, expected more than 0 seconds"),
        (
            {"allowed_hosts": ["a.example", "https://b.example"]},
            "allowed_hosts[1]: is 'https://b.example', expected a name in small letters, without scheme and port",
        ),
        ({"limits": {"held_bytes": 0}}, "limits.held_bytes: is 0, expected 1 or more"),
        ({"limits": {"running": {"requests": 4}}}, "limits.running.tokens: is missing"),
        (
            {"limits": {"waiting": {"requests": 4, "tokens": 9, "tiles": 0}}},
            "limits.waiting.tiles: is 0, expected 1 or more",
        ),
    ]:
        with pytest.raises(InvalidInput, match=f"^{re.escape(says)}$"):
            build_settings(GatewaySettings, {"checkpoint": "x", **raw})


def test_a_gateway_of_another_clusters_stages_needs_the_shared_secret(monkeypatch):
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    settings = build_settings(GatewaySettings, {"checkpoint": "x", "llm": {"target": "far:9000"}})
    with pytest.raises(InvalidInput, match=f"^llm.target: is 'far:9000', expected {SECRET_VARIABLE}"):
        Gateway.func_or_class(settings)


def test_user_config_goes_over_the_limits_of_args_and_each_change_starts_from_them():
    replica = Gateway.func_or_class.__new__(Gateway.func_or_class)
    replica._limits = AdmissionLimits(max_turns=4, max_images=2)
    replica._service = types.SimpleNamespace(limits=replica._limits)
    replica.reconfigure({"max_images": 8, "max_tokens": 1024})
    assert replica._service.limits == AdmissionLimits(max_turns=4, max_images=8, max_tokens=1024)
    replica.reconfigure({"running": {"requests": 4}})
    assert replica._service.limits.running == dataclasses.replace(AdmissionLimits().running, requests=4)
    replica.reconfigure({})
    assert replica._service.limits == replica._limits
    with pytest.raises(InvalidInput, match=r"^user_config\.max_turns: is 0"):
        replica.reconfigure({"max_turns": 0})
