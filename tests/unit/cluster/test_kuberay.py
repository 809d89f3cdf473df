"""The Kubernetes manifests: current, valid by KubeRay's own schemas, closed to the network, and roomy enough.

What only a Kubernetes cluster can show is not tested here.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.app import gateway
from cluster.kuberay import __main__ as kuberay
from services.common.settings import build_settings
from services.encoder.settings import EncoderSettings
from services.llm.settings import LanguageModelSettings
from training.config import load

ROOT = pathlib.Path(__file__).parents[3]
SCHEMAS = json.loads(pathlib.Path(__file__).with_name("crds.json").read_text())
MANIFESTS = {
    f"{file.name} {document['kind']}": document
    for file in sorted(kuberay.HERE.glob("*.yaml"))
    for document in yaml.safe_load_all(file.read_text())
}
SERVICE = MANIFESTS["rayservice.yaml RayService"]["spec"]
JOB = MANIFESTS["rayjob.yaml RayJob"]["spec"]
CLUSTERS = {"service": SERVICE["rayClusterConfig"], "job": JOB["rayClusterSpec"]}
GIB = {"Gi": 1, "Ti": 1024, "Mi": 1 / 1024}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template by where it stands."""
    for name, cluster in CLUSTERS.items():
        yield f"{name} head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{name} {group['groupName']}", group["template"]
    yield "submitter", JOB["submitterPodTemplate"]
    yield "redis", next(d for d in documents("redis.yaml") if d["kind"] == "StatefulSet")["spec"]["template"]


def documents(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((kuberay.HERE / file).read_text()))


POD_NAMES = [name for name, _ in pods()]


@pytest.fixture(params=POD_NAMES)
def pod(request) -> dict[str, Any]:
    return dict(pods())[request.param]


@pytest.mark.parametrize("name", kuberay.written())
def test_what_other_files_decide_is_current(name):
    assert (kuberay.HERE / name).read_text() == kuberay.written()[name], "python -m cluster.kuberay writes it"


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name.split()[-1] in SCHEMAS])
def test_a_custom_resource_matches_its_schema(name):
    validator = jsonschema.Draft202012Validator({**SCHEMAS[MANIFESTS[name]["kind"]], "$defs": SCHEMAS["$defs"]})
    faults = [
        f"{'/'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in validator.iter_errors(MANIFESTS[name])
    ]
    assert not faults


def test_the_schemas_refuse_what_kubernetes_would_drop():
    wrong = json.loads(json.dumps(MANIFESTS["rayservice.yaml RayService"]))
    wrong["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["enviroment"] = []
    validator = jsonschema.Draft202012Validator({**SCHEMAS["RayService"], "$defs": SCHEMAS["$defs"]})
    assert "enviroment" in " ".join(error.message for error in validator.iter_errors(wrong))


def test_each_custom_resource_has_a_schema():
    custom = {d["kind"] for d in MANIFESTS.values() if d["apiVersion"].startswith(("ray.io/", "monitoring."))}
    assert custom == {"RayService", "RayJob", "PodMonitor", "PrometheusRule"} == set(SCHEMAS) - {"$defs"}


def test_the_serve_configuration_is_one_that_serve_and_the_applications_take(tmp_path):
    config = yaml.safe_load(SERVICE["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    arguments = {application["name"]: application["args"] for application in config["applications"]}
    build_settings(EncoderSettings, {"checkpoint": "x", **arguments["encoder"]})
    build_settings(LanguageModelSettings, {"checkpoint": "x", **arguments["llm"]})
    gateway(arguments["gateway"])  # refuses to be built until it is told how the network is closed


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_ray_cluster_is_of_the_installed_version_and_asks_for_a_token(name):
    assert CLUSTERS[name]["rayVersion"] == ray.__version__
    assert CLUSTERS[name]["authOptions"]["mode"] == "token"
    head = CLUSTERS[name]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0", "work on a head takes it down with it"
    environment = {each["name"]: each.get("value") for each in head["template"]["spec"]["containers"][0]["env"]}
    assert environment["RAY_START_HOOK"] == "cluster.hooks.without_client_server"


def test_each_application_has_a_group_of_its_own_with_room_for_its_most_replicas():
    groups = {group["groupName"]: group for group in SERVICE["rayClusterConfig"]["workerGroupSpecs"]}
    for application in yaml.safe_load(SERVICE["serveConfigV2"])["applications"]:
        (deployment,) = application["deployments"]
        group = groups.pop(application["name"])
        asked = deployment["ray_actor_options"]
        assert group["labels"] == asked["label_selector"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        a_pod = int(limits["cpu"]) // asked["num_cpus"]
        if "num_gpus" in asked:
            a_pod = min(a_pod, int(int(limits["nvidia.com/gpu"]) / asked["num_gpus"]))
        assert group["maxReplicas"] * a_pod >= deployment["autoscaling_config"]["max_replicas"]
    assert not groups


def test_gateways_have_memory_for_their_caches():
    (application,) = (a for a in yaml.safe_load(SERVICE["serveConfigV2"])["applications"] if a["name"] == "gateway")
    (group,) = (g for g in SERVICE["rayClusterConfig"]["workerGroupSpecs"] if g["groupName"] == "gateway")
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    replicas = int(limits["cpu"]) // application["deployments"][0]["ray_actor_options"]["num_cpus"]
    shared_memory = 2
    assert replicas * (application["args"]["cache_bytes"] / 2**30 + 1.5) + shared_memory <= gib(limits["memory"])


def gib(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([GTM]i)", quantity).groups()
    return int(number) * GIB[unit]


def test_containers_run_confined_within_limits_and_without_secrets(pod):
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"]
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
        assert container["resources"]["limits"].get("memory") == container["resources"]["requests"]["memory"]
        for each in container.get("env", ()):
            assert "valueFrom" in each or not re.search("PASSWORD|TOKEN|SECRET|AUTH", each["name"]), each["name"]
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        claimed = {"data"} if "redis" in container["image"] else set()
        assert mounted <= {volume["name"] for volume in spec.get("volumes", ())} | claimed


def test_every_pod_is_behind_a_policy_that_opens_the_ports_of_the_security_page_alone(pod):
    policies = documents("network.yaml")
    labels = pod["metadata"]["labels"]
    selecting = [p["spec"] for p in policies if p["spec"]["podSelector"]["matchLabels"].items() <= labels.items()]
    assert len(selecting) == 1 and "Ingress" in selecting[0]["policyTypes"]
    for rule in selecting[0]["ingress"]:
        assert rule["from"], "an empty list is everybody"
        to_all_ports = "ports" not in rule
        assert not to_all_ports or rule["from"] == [{"podSelector": {"matchLabels": labels}}], "its own kind alone"


def test_the_head_s_metrics_port_is_the_one_that_is_scraped():
    (monitor,) = documents("monitoring.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (selected,) = monitor["spec"]["selector"]["matchExpressions"]
    assert {"targetLabel": "job", "replacement": "ray"} in endpoint["relabelings"]  # as the alert rules say
    for name, template in pods():
        if name not in ("redis", "submitter"):
            assert template["metadata"]["labels"][selected["key"]] in selected["values"]
            assert {"name": endpoint["port"], "containerPort": 8080} in template["spec"]["containers"][0]["ports"], name


def test_the_training_job_s_command_is_one_that_the_script_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = JOB["entrypoint"].split()
    assert words[0] == "python" and (ROOT / words[1]).is_file()
    settings = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    run = load(words[words.index("--config") + 1], settings)
    (group,) = CLUSTERS["job"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["replicas"] * int(limits["nvidia.com/gpu"]) == run.cluster.workers
    assert group["replicas"] * int(limits["cpu"]) >= run.cluster.workers * run.cluster.cpus_per_worker
    mounted = JOB["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"][0][
        "mountPath"
    ]
    assert all(path.startswith(mounted) for path in (run.init_from, run.output, run.cluster.storage_path))


def test_the_kustomization_has_every_file_but_the_job():
    (kustomization,) = documents("kustomization.yaml")
    files = {file.name for file in kuberay.HERE.glob("*.yaml")}
    assert set(kustomization["resources"]) == files - {"kustomization.yaml", "rayjob.yaml"}


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not there")
def test_kustomize_puts_the_image_and_the_namespace_everywhere():
    built = subprocess.run(["kubectl", "kustomize", kuberay.HERE], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    images = set(re.findall(r"^ +image: (.+)$", built.stdout, re.M))
    assert images == {"registry.example.org/focusllava:cuda", "redis:8.2-bookworm"}
    for document in yaml.safe_load_all(built.stdout):
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "focusllava"
