"""What a default start opens to the network, and on this machine to callers without a token: nothing that runs code."""

from __future__ import annotations

import json
import pathlib
import pickle
import socket
import urllib.error
import urllib.request

import grpc
import psutil
import pytest
from ray.core.generated import ray_client_pb2
from ray.serve.generated import serve_pb2

from cluster.listeners import listeners
from services.common.stage_secret import SECRET_METADATA
from tests.serving_client import until

REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED}


class Touch:
    """Whoever unpickles this runs its command."""

    def __init__(self, file: pathlib.Path):
        self._file = file

    def __reduce__(self):
        return pathlib.Path.touch, (self._file,)


@pytest.fixture(scope="module")
def listening(cluster):
    found = listeners(cluster.state.pids())
    assert {"gcs_server", "raylet"} <= {each.process for each in found}, found
    return found


@pytest.fixture(scope="module")
def token(cluster) -> str:
    return cluster.state.token_file.read_text()


def other_addresses() -> list[str]:
    """Addresses of this machine that a server on 127.0.0.1 does not have; Linux gives it all of 127.0.0.0/8."""
    found = ["127.0.0.2", "::1"]
    for interface in psutil.net_if_addrs().values():
        for address in interface:
            local = address.address.startswith("127.") or "%" in address.address  # another machine cannot name a scope
            if address.family in (socket.AF_INET, socket.AF_INET6) and not local:
                found.append(address.address)
    return found


def ports_of(listening, process: str) -> list[int]:
    found = [each.port for each in listening if each.process.startswith(process)]
    assert found, f"no {process} listens: {listening}"
    return found


def test_every_listener_is_on_the_loopback_interface(listening):
    assert not [each for each in listening if not each.is_local]


def test_no_port_answers_at_another_address(listening):
    answered = []
    for address in other_addresses():
        for port in sorted({each.port for each in listening}):
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
                probe.settimeout(5)
                if probe.connect_ex((address, port)) == 0:
                    answered.append((address, port))
    assert not answered


def test_the_token_is_for_its_owner(cluster, token):
    assert cluster.state.token_file.stat().st_mode & 0o077 == 0
    assert pathlib.Path(cluster.state.temp_dir).stat().st_mode & 0o077 == 0
    assert len(token) == 64


@pytest.mark.parametrize("name, path", [("dashboard", "/api/jobs/"), ("agent", "/api/job_agent/jobs/")])
def test_a_job_needs_the_token(cluster, token, tmp_path, name, path):
    """Ways 1 and 2 to run code: the job API of the dashboard, and of the dashboard's agent."""
    url = f"http://127.0.0.1:{getattr(cluster.state.ports, name)}{path}"

    def status(entrypoint: str, headers: dict[str, str]) -> int:
        body = json.dumps({"entrypoint": entrypoint}).encode()
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code

    stolen, ran = tmp_path / "stolen", tmp_path / "ran"
    assert status(f"touch {stolen}", {}) == 401
    assert status(f"touch {stolen}", {"Authorization": f"Bearer {'0' * 64}"}) == 403
    if name == "dashboard":  # with the token it does run: the two above were asked the right way
        assert status(f"touch {ran}", {"Authorization": f"Bearer {token}"}) == 200
        assert until(ran.exists, 120)
    assert not stolen.exists()


def test_no_port_speaks_to_rays_client(cluster, listening, token):
    """Way 3 to run code: the server of Ray's client runs what it is sent."""
    titles = [" ".join(psutil.Process(pid).cmdline()) for pid in cluster.state.pids() if psutil.pid_exists(pid)]
    assert titles and not [title for title in titles if "ray.util.client.server" in title]
    request = ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING).SerializeToString()
    codes = {each.port: call(each.port, "/ray.rpc.RayletDriver/ClusterInfo", request, token) for each in listening}
    assert set(codes.values()) <= REFUSED, codes


def test_a_replica_unpickles_nothing_from_who_has_no_token(listening, token, tmp_path):
    """Way 4 to run code: the gRPC port of each replica."""
    method, codes = "/ray.serve.ASGIService/HandleRequest", []
    stolen, ran = tmp_path / "stolen", tmp_path / "ran"
    for port in ports_of(listening, "ray::ServeReplica"):
        request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(Touch(stolen))).SerializeToString()
        codes += [call(port, method, request), call(port, method, request, "0" * 64)]
    assert set(codes) <= REFUSED and grpc.StatusCode.UNAUTHENTICATED in codes, codes
    assert not stolen.exists()
    for port in ports_of(listening, "ray::ServeReplica"):  # with the token it does: it was asked the right way
        request = serve_pb2.ASGIRequest(pickled_request_metadata=pickle.dumps(Touch(ran))).SerializeToString()
        call(port, method, request, token)
    assert ran.exists()


@pytest.mark.parametrize("method", ["EncoderService/CheckEncoder", "LanguageModelService/CheckLanguageModel"])
def test_a_stages_own_port_asks_for_its_secret(listening, token, method):
    """It is no secret of Ray's: the token does not open it either."""
    asked = [(SECRET_METADATA, secret) for secret in ("", "0" * 64, token)]
    refused = 0
    for port in ports_of(listening, "ray::ServeReplica"):
        for metadata in asked:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/focusllava.v1.{method}")(b"", timeout=10, metadata=(metadata,))
            assert caught.value.code() in REFUSED, caught.value
            refused += SECRET_METADATA in caught.value.details()
    assert refused == len(asked), "one stage has this method"


@pytest.mark.parametrize(
    "process, method",
    [
        ("gcs_server", "/ray.rpc.InternalKVGcsService/InternalKVGet"),
        ("raylet", "/ray.rpc.NodeManagerService/GetNodeStats"),
        ("ray::ServeReplica", "/ray.rpc.CoreWorkerService/PushTask"),
    ],
)
def test_rays_own_ports_ask_for_the_token(listening, process, method):
    codes = [call(port, method, b"") for port in ports_of(listening, process)]
    assert set(codes) <= REFUSED and grpc.StatusCode.UNAUTHENTICATED in codes, codes


def call(port: int, method: str, request: bytes, token: str = "") -> grpc.StatusCode:
    """The status of a unary call at this port."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(method)(request, timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK
