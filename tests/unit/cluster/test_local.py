"""What is said before a cluster starts, and that the shipped Serve configurations fit the settings they set."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import signal
import socket
import time

import pytest
import yaml
from ray.serve.config import AutoscalingConfig

from cluster import autoscaling, deploy, local, ray_head, serve_api
from cluster.app import encoder, gateway, llm
from cluster.checks import ClusterError, Ports, check_disk, check_host, check_port, free_ports
from cluster.deployer import Deployer
from cluster.interrupts import SIGNALS, signals_interrupt
from cluster.ray_head import ClusterState
from services.checkpoint.finding import CHECKPOINT_VARIABLE, find_checkpoint
from services.common.errors import InvalidInput
from services.common.settings import build_settings
from services.gateway.admission import AdmissionLimits

CONFIGS = sorted(pathlib.Path(local.__file__).parent.glob("serve*.yaml"))
PORTS = Ports(grpc=1, dashboard=2, metrics=3, gcs=4, agent=5, agent_grpc=6, runtime_env=8, http=7)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv(CHECKPOINT_VARIABLE, raising=False)
    monkeypatch.setattr(ray_head.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_setting_of_a_shipped_configuration_exists(path, folder):
    config = yaml.safe_load(path.read_text())
    built, patience_s = {}, {}
    for application in config["applications"]:
        name = application["name"]
        builder = {"gateway": gateway, "encoder": encoder, "llm": llm}[name]
        assert application["import_path"] == f"cluster.app:{builder.__name__}"
        # Serve routes gRPC to nothing without one; the gateway's is where OpenAI's clients look for /v1.
        assert application["route_prefix"] == ("/" if name == "gateway" else f"/{name}")
        said = {"network": "closed by a test"} if name == "gateway" else {}
        bound = builder({**application["args"], **said, "checkpoint": str(folder)})
        (deployment,) = application["deployments"]
        assert deployment["name"] == bound._bound_deployment.name
        scaling = deployment["autoscaling_config"]
        policies = {"gateway": None, "encoder": "EncoderPolicy", "llm": "LanguageModelPolicy"}
        policy = AutoscalingConfig.model_validate(scaling).policy  # fails where there is no such policy
        assert scaling["min_replicas"] < scaling["max_replicas"]
        if policies[name] is None:
            assert deployment["max_ongoing_requests"] > scaling["target_ongoing_requests"]
        else:
            assert policy.policy_function == f"cluster.autoscaling:{policies[name]}"
            made = getattr(autoscaling, policies[name])(**policy.policy_kwargs)
            assert deployment["max_ongoing_requests"] > getattr(made, "answers", 0)
        built[name] = bound._bound_deployment.init_args[0]
        if name == "gateway":  # or Ray's queue, which knows no keys, would decide who waits
            limits = build_settings(AdmissionLimits, deployment["user_config"], over=built[name].limits)
            assert deployment["max_ongoing_requests"] > limits.running.requests + limits.waiting.requests
        patience_s[name] = deployment.get("graceful_shutdown_timeout_s")
    # An answer passes through the gateway to its end: a gateway that stops earlier would cut it off.
    assert patience_s["gateway"] == patience_s["llm"] >= 60
    for name, stage in (("encoder", built["gateway"].encoder), ("llm", built["gateway"].llm)):
        assert (stage.application, stage.target) == (name, None)  # its replicas are called themselves
    assert config["grpc_options"]["grpc_servicer_functions"] == ["cluster.ingress.add_services_to_server"]


def test_it_says_where_it_listens_and_warns_where_it_is_open(folder):
    state = ClusterState(temp_dir=str(folder), checkpoint="x", ports=PORTS)
    api, dashboard = local.opened(state)
    assert api == "try it at http://127.0.0.1:7/; OpenAI's API at http://127.0.0.1:7/v1"
    assert str(state.token_file) in dashboard
    assert local.opened(dataclasses.replace(state, playground=False))[0] == "OpenAI's API at http://127.0.0.1:7/v1"
    for host, seen in (("0.0.0.0", "127.0.0.1"), ("192.0.2.7", "192.0.2.7"), ("fd00::7", "[fd00::7]")):
        api, _, warning, _ = local.opened(ClusterState(temp_dir=str(folder), checkpoint="x", ports=PORTS, host=host))
        assert api.endswith(f"http://{seen}:7/v1")
        assert warning.startswith(f"open to the network: ports 1 (gRPC) and 7 (HTTP) of {host}, without TLS")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"route_prefix": 1}, "route_prefix"),
        ({"route_prefx": "/"}, "gateway.route_prefx: not for a start on one machine, only"),
        ({"import_path": "cluster.app:gateway", "args": {"network": "closed", "cache_byte": 1}}, "cache_byte: unknown"),
        ({"deployments": [{"name": "Gatewy"}]}, "gateway: has no deployment 'Gatewy', only Gateway"),
    ],
)
def test_a_wrong_configuration_is_refused_before_ray_is_there(folder, change, says):
    state = ClusterState(temp_dir=str(folder), checkpoint=str(folder), ports=PORTS)
    config = local.serve_config(local.SERVE_CONFIG, PORTS, str(folder), {})
    config["applications"][0] |= change
    with Deployer(state, config, os.environ) as deployer:
        with pytest.raises(ClusterError, match="not deployed: ") as caught:
            while True:
                assert not deployer.states()
                time.sleep(0.1)
    assert says in str(caught.value)


def test_a_status_that_serve_cannot_tell_is_asked_for_again(monkeypatch, capsys):
    """What was last known stands meanwhile, and the log says why."""
    known = {"llm": ("DEPLOYING", "")}
    answers = iter([RuntimeError("no controller"), known, TimeoutError("busy"), ValueError("odd"), known])

    def states():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    class Reader(io.StringIO):
        def flush(self):
            if len(self.getvalue().splitlines()) == 5:
                raise BrokenPipeError  # as when nobody reads any more

    monkeypatch.setattr(deploy, "_states", states)
    monkeypatch.setattr(deploy, "POLL_S", 0)
    reader = Reader()
    with pytest.raises(BrokenPipeError):
        deploy._tell_states(reader)
    told = [json.loads(line)["states"] for line in reader.getvalue().splitlines()]
    assert told == [{}] + 4 * [{"llm": ["DEPLOYING", ""]}]
    assert "no controller" in capsys.readouterr().err


def test_a_misspelt_setting_is_named(folder):
    with pytest.raises(InvalidInput, match="kv_cache_byte: unknown setting"):
        llm({"checkpoint": str(folder), "kv_cache_byte": 1})
    with pytest.raises(InvalidInput, match="llm.attempts: is 'x', expected int"):
        gateway({"checkpoint": str(folder), "network": "closed", "llm": {"attempts": "x"}})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_configuration_waits_for_its_operator_to_close_the_network(path, folder):
    (args,) = (a["args"] for a in yaml.safe_load(path.read_text())["applications"] if a["name"] == "gateway")
    for said in ({}, {"network": ""}, {"network": " "}, {"network": True}):
        with pytest.raises(InvalidInput, match="network: is not set: Ray runs code for whoever reaches its ports"):
            gateway({**args, **said, "checkpoint": str(folder)})


def test_the_local_configuration_has_this_clusters_ports_checkpoint_and_settings():
    config = local.serve_config(local.SERVE_CONFIG, PORTS, "/some/where", {"llm": {"max_running": 3}})
    assert config["grpc_options"]["port"] == 1
    assert config["http_options"] == {"host": "127.0.0.1", "port": 7, "request_timeout_s": 600}
    args = {application["name"]: application["args"] for application in config["applications"]}
    assert all(settings["checkpoint"] == "/some/where" for settings in args.values())
    assert "target" not in args["gateway"]["encoder"] and "target" not in args["gateway"]["llm"]
    assert args["llm"]["max_running"] == 3
    assert args["gateway"]["network"] == "loopback"
    assert "api_keys" not in args["gateway"]
    opened = local.serve_config(local.SERVE_CONFIG, PORTS, "/some/where", {}, host="0.0.0.0")
    assert opened["http_options"]["host"] == "0.0.0.0"


def test_a_configuration_of_applications_alone_has_both_doors(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("applications: [{name: gateway}, {name: encoder}, {name: llm}]")
    config = local.serve_config(file, PORTS, "/some/where", {})
    assert config["http_options"] == {"host": "127.0.0.1", "port": 7}
    shipped = local.serve_config(local.SERVE_CONFIG, PORTS, "/some/where", {})["grpc_options"]
    assert config["grpc_options"] == {name: shipped[name] for name in ("port", "grpc_servicer_functions")}


def test_the_checkpoint_comes_from_the_argument_then_the_environment(folder, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    (other / "config.json").write_text("{}")
    monkeypatch.setenv(CHECKPOINT_VARIABLE, str(other))
    assert find_checkpoint() == other and find_checkpoint(folder) == folder
    with pytest.raises(InvalidInput, match="checkpoint: no config.json in .*nowhere: name a checkpoint folder"):
        find_checkpoint(folder / "nowhere")


def test_a_taken_port_is_named_with_what_to_do():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ClusterError, match=f"port {port} is taken: stop what uses it, or choose another with --p"):
            check_port(port, "--p")
    check_port(port, "--p")
    with pytest.raises(ClusterError, match="--p is 70000"):
        check_port(70000, "--p")


def test_a_taken_port_and_a_missing_checkpoint_are_one_line_of_the_command(folder, capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        assert local.main(["up", "--checkpoint", str(folder), "--grpc-port", port]) == 1
    assert local.main(["up", "--checkpoint", str(folder / "nowhere")]) == 1
    assert local.main(["down", "--grpc-port", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True] * 3
    assert f"port {port} is taken" in lines[0] and "no config.json" in lines[1] and "no cluster of ours" in lines[2]


def test_a_host_is_an_address_of_this_machine():
    assert (check_host("127.0.0.1"), check_host("0.0.0.0")) == ("127.0.0.1", "0.0.0.0")
    assert check_host("localhost") == "127.0.0.1"
    for host in ("203.0.113.7", "no.such.host.invalid", "a b"):  # the first is nobody's, for documentation
        with pytest.raises(ClusterError, match=f"--host is '{host}', expected an address of this machine"):
            check_host(host)


def test_a_full_disk_is_named(folder):
    check_disk(folder, 1)
    with pytest.raises(ClusterError, match="free some space or set TMPDIR"):
        check_disk(folder, 2**62)


def test_free_ports_differ_and_keep_the_one_asked_for():
    ports = free_ports(4321, 4322)
    assert (ports.grpc, ports.http) == (4321, 4322)
    numbers = [getattr(ports, name) for name in Ports.__dataclass_fields__]
    assert len(set(numbers)) == len(numbers)


def test_a_cluster_whose_processes_are_gone_is_not_found(folder):
    state = ClusterState(temp_dir=str(folder / "gone"), checkpoint="x", ports=PORTS)
    ray_head._state_file(1).write_text(json.dumps(ray_head.dataclasses.asdict(state)))
    assert ray_head.load_state(1) is None and ray_head.load_state(2) is None


@pytest.mark.parametrize("change", [{"colour": 1}, {"ports": {"grpc": 1}}, {"ports": 5}, {"ports": None}, None])
def test_a_state_file_of_another_version_is_one_line_that_names_it(folder, capsys, change):
    state = ray_head.dataclasses.asdict(ClusterState(temp_dir="gone", checkpoint="x", ports=PORTS))
    file = ray_head._state_file(1)
    file.write_text(json.dumps({**state, **change} if change else {}))
    for verb in ("down", "status"):
        assert local.main([verb, "--grpc-port", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(str(file) in line and "remove the file" in line for line in lines)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_up_once_and_what_it_started_is_stopped(monkeypatch, capsys, number):
    stopped = []
    # Tests in the background have SIGINT ignored, tests under nohup SIGHUP.
    outside = {each: signal.signal(each, signal.SIG_DFL) for each in SIGNALS}
    before = [signal.getsignal(each) for each in SIGNALS]

    class Cluster:
        def __init__(self, **_):
            pass

        def start(self, progress):
            try:
                os.kill(os.getpid(), number)
                time.sleep(10)
            except BaseException:
                os.kill(os.getpid(), number)  # a closing terminal sends it twice
                stopped.append(True)
                raise

    monkeypatch.setattr(local, "LocalCluster", Cluster)
    assert local.main(["up"]) == 130 and stopped == [True]
    assert "interrupted" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in SIGNALS] == before
    for each, handler in outside.items():
        signal.signal(each, handler)


def test_a_signal_that_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_interrupt():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_state_folder_must_be_private(folder):
    (folder / f"focusllava-state-{ray_head.os.getuid()}").mkdir(mode=0o777)
    (folder / f"focusllava-state-{ray_head.os.getuid()}").chmod(0o777)
    with pytest.raises(ClusterError, match="not a private folder"):
        ray_head.load_state(1)


def test_the_failure_line_is_the_cause():
    message = "It failed 3 times.\n  File \"/x.py\"\nservices.common.errors.InvalidInput: dtype: is 'x'\n\n"
    application = {"message": "Failed to update the deployments", "deployments": {"Llm": {"message": message}}}
    assert serve_api.failure_line(application) == "services.common.errors.InvalidInput: dtype: is 'x'"
    assert serve_api.failure_line({"message": "plain\n", "deployments": {}}) == "plain"


@pytest.mark.parametrize(
    "kwargs, says",
    [({"tile": 4}, "unexpected keyword argument 'tile'"), ({"tiles": 0}, "tiles=0.*, expected more than 0 of each")],
)
def test_targets_that_no_policy_has_are_refused_before_the_start(folder, kwargs, says):
    config = yaml.safe_load(CONFIGS[0].read_text())
    application = next(each for each in config["applications"] if each["name"] == "encoder")
    application["args"] = {"checkpoint": str(folder)}
    deploy._target(application)
    application["deployments"][0]["autoscaling_config"]["policy"]["policy_kwargs"] = kwargs
    with pytest.raises((TypeError, ValueError), match=says):
        deploy._target(application)
