"""Ray Serve's REST API on the dashboard of one local cluster, and whether its public API answers."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Mapping
from typing import Any

from cluster.ray_head import ClusterState


def request_json(
    state: ClusterState, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = 10.0
) -> Any:
    """GET, or PUT with a body, on the cluster's dashboard, with its token. Raises OSError."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {state.token_file.read_text()}"}
    request = urllib.request.Request(state.dashboard_url + path, data, headers, method="PUT" if data else "GET")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores the environment's proxy
    with opener.open(request, timeout=timeout_s) as response:
        text = response.read()
    return json.loads(text) if text else None


def application_states(state: ClusterState) -> dict[str, tuple[str, str]]:
    """Status and reason of each Serve application; empty while Serve starts."""
    try:
        details = request_json(state, "/api/serve/applications/")
    except OSError:
        return {}
    return {name: (a["status"], failure_line(a)) for name, a in details.get("applications", {}).items()}


def failure_line(application: Mapping[str, Any]) -> str:
    """The line nearest to the cause: a replica's last exception, else the application's own message."""
    messages = [d.get("message", "") for d in application.get("deployments", {}).values()]
    lines = [line.strip() for text in (application.get("message", ""), *messages) for line in text.splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Input|Exception|Large)\b", line)]
    return (errors or [line for line in lines if line] or [""])[-1]


def answers(address: str) -> bool:
    """Whether the gateway at host:port describes its model, or wants an API key for that."""
    import grpc

    from focusllava.v1 import focus_pb2, focus_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        stub = focus_pb2_grpc.FocusServiceStub(channel)
        try:
            stub.GetModelInfo(focus_pb2.GetModelInfoRequest(), timeout=5, metadata=(("application", "gateway"),))
        except grpc.RpcError as error:
            return bool(error.code() is grpc.StatusCode.UNAUTHENTICATED)
    return True
