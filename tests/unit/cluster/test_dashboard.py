"""Dashboard and alert rules against the metrics that the code declares: names, kinds, units, runbooks.

`python -m benchmarks.dashboard` asks the same queries of a real Prometheus under load.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import re
import shutil
import subprocess

import pytest
import ray
import yaml

from cluster import dashboard
from services.common.errors import Code
from services.common.telemetry import METRICS, MetricSpec

ROOT = pathlib.Path(__file__).parents[3]
ALERTS = ROOT / "cluster" / "prometheus" / "alerts.yml"
ALERT_TEST = pathlib.Path(__file__).with_name("alerts.test.yml")
RUNBOOK = ROOT / "docs" / "operations.md"
ENDINGS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
NAME = re.compile(r"ray_[a-z_]+")
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian: prometheus) is not there")


@functools.cache
def panels() -> list[dict]:
    return [each for each in json.loads(dashboard.FILE.read_text())["panels"] if each["type"] != "row"]


@functools.cache
def rules() -> list[dict]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return group["rules"]


@functools.cache
def queries() -> dict[str, str]:
    """Each PromQL expression by where it stands."""
    drawn = {f"{each['title']} {t['refId']}": t["expr"] for each in panels() for t in each["targets"]}
    return drawn | {rule["alert"]: rule["expr"] for rule in rules()}


@functools.cache
def declared() -> dict[str, MetricSpec]:
    """Our metrics by each name that Prometheus has for them."""
    return {f"ray_{spec.name}{ending}": spec for spec in METRICS for ending in ENDINGS[spec.kind]}


@functools.cache
def rays_own() -> set[str]:
    """Names that Prometheus has for the metrics that the installed Ray makes."""
    folder = pathlib.Path(ray.__file__).parent
    made = re.compile(r"(Counter|Gauge|Histogram)\(\s*(?:name=)?f?\"([^\"]+)\"")
    files = itertools.chain(folder.glob("serve/_private/**/*.py"), folder.glob("dashboard/modules/reporter/*.py"))
    found = {match for file in files for match in made.findall(file.read_text())}
    return {
        f"ray_{re.sub('{.*?}', protocol, name.removesuffix('_total') if kind == 'Counter' else name)}{ending}"
        for kind, name in found
        for ending in ENDINGS[kind.lower()]
        for protocol in ("grpc", "http")  # the proxy puts it into some of its names
    }


def test_the_committed_dashboard_is_current():
    assert dashboard.FILE.read_text() == dashboard.text(), "python -m cluster.dashboard writes it"


@pytest.mark.parametrize("place", queries())
def test_a_query_names_only_metrics_that_are_declared(place):
    names = set(NAME.findall(queries()[place]))
    assert names - set(declared()) - rays_own() == set()
    assert names or "up{" in queries()[place]


def test_each_metric_of_ours_is_drawn():
    drawn = {declared()[name].name for text in queries().values() for name in NAME.findall(text) if name in declared()}
    assert {spec.name for spec in METRICS} - drawn == set()


def expected_unit(expr: str, spec: MetricSpec) -> str:
    """What Grafana calls the unit of an expression whose first metric is this one."""
    if expr.startswith("100 *"):
        return "percent"
    if " / " in expr:
        return f"suffix: {spec.unit}"
    if spec.kind != "histogram" and "rate(" in expr:
        return {"requests": "reqps", "bytes": "Bps"}.get(spec.unit, f"suffix: {spec.unit}/s")
    own = {"seconds": "s", "percent": "percent", "bytes": "bytes", "that of the value": "short"}
    return own.get(spec.unit, f"suffix: {spec.unit}")


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_has_the_unit_of_what_it_draws(panel):
    unit = panel["fieldConfig"]["defaults"]["unit"]
    for target in panel["targets"]:
        specs = {declared()[name].name: declared()[name] for name in NAME.findall(target["expr"]) if name in declared()}
        for spec in list(specs.values())[:1]:
            assert unit == expected_unit(target["expr"], spec)
            assert spec.description in panel["description"]
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            assert f"by ({label})" in target["expr"] or label in next(iter(specs.values())).tags


@pytest.mark.parametrize("place", queries())
def test_a_query_groups_and_selects_by_tags_that_are_there(place):
    expr = queries()[place]
    for name, selector in re.findall(r"(ray_focusllava_[a-z_]+)(?:\{(\w+)=)?", expr):
        if selector:
            assert selector in declared()[name].tags
    for label, name in re.findall(r"by \((\w+)\) \((?:rate|increase)?\(?(ray_focusllava_[a-z_]+)", expr):
        assert label in (*declared()[name].tags, "le")
    outcomes = re.findall(r'outcome=~?"([A-Z_|]+)"', expr)
    assert {each for text in outcomes for each in text.split("|")} <= {code.value for code in Code}


@pytest.mark.parametrize("place", queries())
def test_a_query_trusts_no_gauge_s_latest_moment_and_no_histogram_s_sum(place):
    """Ray forgets gauges that are not set, and makes sums of its buckets' middles."""
    expr = queries()[place]
    for name in NAME.findall(expr):
        spec = declared().get(name)
        assert not name.endswith("_sum")
        if (spec and spec.kind == "gauge") or re.match("ray_(serve_(autoscaling|.*(healthy|queued))|node)_", name):
            assert re.search(rf"(last_over_time|rate)\({name}\b", expr)


def test_panels_have_numbers_of_their_own_and_do_not_overlap():
    everything = json.loads(dashboard.FILE.read_text())["panels"]
    ids = [each["id"] for each in everything]
    assert len(set(ids)) == len(ids)
    taken = [
        (x, y)
        for place in (each["gridPos"] for each in everything)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(taken)) == len(taken) and max(x for x, _ in taken) < 24


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_has_a_runbook_and_a_test(rule):
    file, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert ROOT / file == RUNBOOK and anchor == rule["alert"].lower()
    assert re.search(rf"^### {rule['alert']}$", RUNBOOK.read_text(), re.M)
    assert rule["labels"]["severity"] in ("critical", "warning")
    expected = [t for test in yaml.safe_load(ALERT_TEST.read_text())["tests"] for t in test["alert_rule_test"]]
    fires = {bool(each["exp_alerts"]) for each in expected if each["alertname"] == rule["alert"]}
    assert fires == {True, False}, "one series that fires it, one that does not"


@needs_promtool
@pytest.mark.parametrize(
    "command", [("check", "config", ALERTS.with_name("prometheus.yml")), ("test", "rules", ALERT_TEST)], ids=str
)
def test_prometheus_accepts_configuration_and_rules_and_these_fire_when_they_should(command):
    ran = subprocess.run(["promtool", *map(str, command)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
