"""The benchmarks' arithmetic: the closed loop, turns, percentiles, ratios, prefill work, and the report's tables."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.engine import compare
from benchmarks.keep_ratio import PICTURES, SELECTOR, set_vision_keep_ratio
from benchmarks.measure import Progress, Timeline, closed_loop, parse_cores, percentile, ratio_of, summary, take_turns
from benchmarks.prefill import prefill_work
from benchmarks.report import DOCUMENT, MARKER, TABLES, fill, markdown
from benchmarks.workload import jpeg
from services.checkpoint.config import FocusLlavaConfig
from services.checkpoint.store import STAGES, load_stage, verify
from services.encoder.model import EncoderModel
from services.encoder.pipeline import EncoderPipeline
from tests.tiny_checkpoints import make_random_checkpoint


class Counter:
    """Answers each request with three tokens, one a step, and counts those in flight."""

    def __init__(self):
        self.left: dict[int, int] = {}
        self.most = 0

    def add(self, request):
        self.left[request] = 3
        self.most = max(self.most, len(self.left))

    def step(self):
        for request in list(self.left):
            self.left[request] -= 1
            finished = self.left[request] == 0
            if finished:
                del self.left[request]
            yield Progress(request=request, new_tokens=1, finished=finished)


@pytest.mark.parametrize("concurrency, most", [(1, 1), (4, 4), (16, 10)])
def test_closed_loop_keeps_that_many_in_flight_and_answers_all(concurrency, most):
    peer = Counter()
    seconds, timelines = closed_loop(peer, range(10), concurrency)
    assert peer.most == most and sorted(t.request for t in timelines) == list(range(10))
    for timeline in timelines:
        assert len(timeline.token_times) == 3 and timeline.added <= timeline.token_times[0]
        assert list(timeline.token_times) == sorted(timeline.token_times)
    assert seconds >= max(t.token_times[-1] - t.added for t in timelines)


def test_timeline_and_summary():
    timeline = Timeline(request=0, added=10.0, token_times=(12.0, 12.5, 14.0))
    assert (timeline.ttft_s, timeline.tpot_s) == (2.0, 1.0)
    alone = Timeline(request=1, added=10.0, token_times=(11.0,))
    assert math.isnan(alone.tpot_s)
    figures = summary(4.0, [timeline, alone])
    assert figures["requests_per_s"] == 0.5 and figures["output_tokens_per_s"] == 1.0
    assert figures["ttft_p50_ms"] == 1500 and figures["tpot_p50_ms"] == 1000  # NaN is no figure


def test_percentile_interpolates_and_leaves_nan_out():
    assert percentile([3, 1, 2], 0.5) == 2 and percentile([1, 2], 0.5) == 1.5
    assert percentile([0, 10, math.nan], 0.99) == pytest.approx(9.9)
    assert math.isnan(percentile([math.nan], 0.5))


def test_turns_rotate_and_warm_up_is_dropped():
    heard: list[str] = []
    turns = {name: lambda name=name: heard.append(name) or len(heard) for name in "abc"}
    results = take_turns(turns, 2, warm_up=1)
    assert {name: len(result) for name, result in results.items()} == {"a": 2, "b": 2, "c": 2}
    assert sorted(heard) == list("aaabbbccc") and len({heard[0], heard[3], heard[6]}) == 3


def test_ratio_is_of_the_same_rounds():
    assert ratio_of([2, 4, 9], [1, 1, 3]) == (3, 2, 4)
    turns = {name: [{"requests_per_s": rate}] for name, rate in {"off": 2.0, "both": 6.0, "hf": 0.5}.items()}
    ratios = compare(turns)
    assert set(ratios) == {"off/hf", "both/off", "both/hf"}  # nothing of peers that did not run
    assert ratios["off/hf"]["median"] == 4 and ratios["both/off"]["median"] == 3


def test_cores():
    assert parse_cores("0-2,5,1") == (0, 1, 2, 5) and parse_cores("3") == (3,)
    for bad in ("", "a", "3-1"):
        with pytest.raises(ValueError):
            parse_cores(bad)


def test_prefill_work_is_linear_and_quadratic():
    one, two = prefill_work([100], 10, 8), prefill_work([200], 10, 8)
    assert two.linear == 2 * one.linear and two.attention == 4 * one.attention
    assert one.linear == 2 * 100 * 10 and one.attention == 4 * 8 * 100 * 100 / 2
    assert prefill_work([100, 50], 10, 8).seconds(1e3, 1e3) == (3000 + 16 * (10_000 + 2500)) / 1e3


def test_every_seed_is_another_file_and_the_same_seed_the_same():
    assert jpeg(1, 64, 48) != jpeg(2, 64, 48)
    first = jpeg(3, 64, 48)
    jpeg.cache_clear()
    assert jpeg(3, 64, 48) == first


def test_report_fills_its_own_tables_and_nothing_else():
    machine = {"processor": "P", "cores_used": [0], "torch": "2", "load_average_1min": 0.1}
    point = {"usual_gap_ms": 1.0, "longest_gap_ms": 9.0, "p50_gap_ms": 2.0, "ttft_ms": 30.0}
    result = {"benchmark": "arrival", "checkpoint": "50m", "machine": machine, "load_average_1min_at_end": 0.2,
              "budgets": {"512": point}}  # fmt: skip
    before = "a\n<!-- table: arrival -->\nold\n<!-- end -->\nb\n<!-- table: engine -->\nkeep\n<!-- end -->\n"
    after = fill(before, [json.loads(json.dumps(result))])
    assert "old" not in after and "keep" in after and after.startswith("a\n") and "| 512 | 1.0 | 9.0 | 30.0 |" in after
    assert fill(after, [result]) == after
    with pytest.raises(KeyError):
        fill("<!-- table: nonsense -->\n<!-- end -->", [])


def test_the_document_has_every_table():
    assert [match["name"] for match in MARKER.finditer(DOCUMENT.read_text("utf8"))] == [
        "engine", "prefill", "samplers", "roofline", "arrival", "served", "images", "wire_dtypes", "affinity",
        "autoscaling", "serving", "scaling", "encoder",
    ]  # fmt: skip
    assert set(TABLES) == {match["name"] for match in MARKER.finditer(DOCUMENT.read_text("utf8"))}


def test_markdown():
    assert markdown(("a", "b"), [(1, 2)]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"


def test_setting_the_kept_share_changes_the_selector_and_nothing_else(tmp_path):
    folder = tmp_path / "checkpoint"
    make_random_checkpoint(folder, dtype="bfloat16", tile_px=112)
    before = {stage: {n: t.clone() for n, t in load_stage(folder, stage).items()} for stage in STAGES}
    files = {p.name: p.read_bytes() for p in folder.glob("*.json*") if ".safetensors." not in p.name}

    said = set_vision_keep_ratio(folder, 0.49)

    assert said == pytest.approx(0.49, abs=0.02)
    verify(folder)
    assert {name: (folder / name).read_bytes() for name in files} == files
    with torch.device("meta"):
        whole = EncoderModel(FocusLlavaConfig.load(folder)).state_dict()
    load_stage(folder, "encoder", expected={name: tensor.shape for name, tensor in whole.items()})
    changed = set()
    for stage in STAGES:
        after = load_stage(folder, stage)
        assert set(after) == set(before[stage])
        for name, tensor in after.items():
            assert tensor.dtype == before[stage][name].dtype == torch.bfloat16
            changed |= {name} if not torch.equal(tensor, before[stage][name]) else set()
    assert changed == {f"{SELECTOR}.weight", f"{SELECTOR}.bias"}

    pipeline = EncoderPipeline.from_checkpoint(folder)
    encoded = pipeline.encode([pipeline.prepare(jpeg(seed)) for seed in range(PICTURES)], [True] * PICTURES)
    kept, full = (sum(n) for n in zip(*((len(e.tokens_ND), e.uncompressed_tokens) for e in encoded), strict=True))
    assert kept / full == pytest.approx(said, abs=1e-3)
    assert len({int(branch) for e in encoded for branch in e.branch_ids_M}) > 1
