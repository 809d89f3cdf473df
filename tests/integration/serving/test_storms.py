"""Short storms against the running cluster: a burst at both doors, and some of the ten thousand hostile inputs."""

from __future__ import annotations

import argparse
import asyncio

from benchmarks.questions import Photos
from benchmarks.storm import burst, hostile
from benchmarks.storm.doors import ANSWER, REFUSAL
from benchmarks.storm.vitals import wait_until_idle


def test_a_burst_at_both_doors_is_answered_or_told_when_to_come_back_and_leaves_nothing(cluster):
    work = Photos(6, 0.5, [(90, 120)], tokens=8)
    ended = asyncio.run(burst.endings(cluster, work, requests=150, seconds=0.5, seed=1))
    wrong = [ending for ending in ended if ending.kind not in (ANSWER, REFUSAL)]
    assert len(ended) == 150 and not wrong
    assert wait_until_idle(cluster) == {}


def test_hostile_inputs_crash_nothing_and_are_told_nothing(cluster):
    assert hostile.against(cluster, argparse.Namespace(inputs=400, seed=50_000, only=None)) == []
