"""Deploys the applications of one local cluster, in a process of its own: `python -m cluster.deploy`.

`serve deploy` builds each application in a fresh worker, which imports torch, transformers and Ray Serve anew. Here one
process imports them for all three, while Ray still starts. Standard input holds {"address": HOST:PORT of the GCS,
"config": a Serve configuration}. Standard output gets one JSON object a line until the process is ended: {"states":
{application: [status, reason]}}, or {"error": text} as the last.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from cluster.checks import ClusterError
from cluster.hooks import without_pandas
from cluster.serve_api import failure_line
from services.common.errors import FocusError

POLL_S = 0.5
_PLACES = ("proxy_location", "http_options", "grpc_options")
_KNOWN = {"name", "import_path", "route_prefix", "args", "deployments"}


def main() -> int:
    request = json.load(sys.stdin)
    config, out = request["config"], sys.stdout
    sys.stdout = sys.stderr  # for whatever else prints
    with without_pandas():
        from ray import serve
    try:
        targets = [_target(application) for application in config["applications"]]
        _connect(request["address"], out)
        serve.start(**{name: config[name] for name in _PLACES if name in config})
        serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _tell_states(out)
    except (ClusterError, FocusError, ValueError, TypeError) as error:  # what the configuration may have wrong
        _say(out, {"error": " ".join(str(error).split())})
    return 1


def _target(application: Mapping[str, Any]) -> Any:
    from ray import serve
    from ray.serve.schema import ServeApplicationSchema

    for name in application.keys() - _KNOWN:
        raise ClusterError(f"{application.get('name')}.{name}: not for a start on one machine, only {sorted(_KNOWN)}")
    schema = ServeApplicationSchema.model_validate(application)
    built = _imported(schema.import_path)(application.get("args") or {})
    deployment = built._bound_deployment
    for options in application.get("deployments", ()):
        if options["name"] != deployment.name:
            raise ClusterError(f"{schema.name}: has no deployment {options['name']!r}, only {deployment.name}")
        _check_policy(options)
        deployment = deployment.options(**options)
    target = deployment.bind(*deployment.init_args, **deployment.init_kwargs)
    return serve.RunTarget(target, name=schema.name, route_prefix=schema.route_prefix)


def _check_policy(options: Mapping[str, Any]) -> None:
    """Makes the policy that Serve's controller would. Raises TypeError or ValueError for its `policy_kwargs`."""
    from ray.serve.config import AutoscalingConfig

    policy = AutoscalingConfig.model_validate(options.get("autoscaling_config") or {}).policy
    made = policy.get_policy()
    if isinstance(made, type):
        made(**policy.policy_kwargs)


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(__import__(module, fromlist=[name]), name)


def _connect(address: str, out: TextIO) -> None:
    import ray

    while True:  # whoever started this watches Ray's head, and ends this with it
        _say(out, {"states": {}})  # fails when nobody reads it any more
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            return
        except (ConnectionError, RuntimeError, ray.exceptions.RayError):
            time.sleep(POLL_S)


def _tell_states(out: TextIO) -> None:
    """Tells them until nobody reads. Whoever does has the deadline, so what Serve cannot answer is asked again."""
    states: dict[str, tuple[str, str]] = {}
    while True:
        try:
            states = _states()
        except Exception as error:  # of any kind: the controller is busy, starts anew, or its answer is lost
            print(f"serve.status: {error!r}", file=sys.stderr)
        _say(out, {"states": states})
        time.sleep(POLL_S)


def _states() -> dict[str, tuple[str, str]]:
    from ray import serve

    found = {}
    for name, overview in serve.status().applications.items():
        deployments = {each: {"message": state.message} for each, state in overview.deployments.items()}
        reason = failure_line({"message": overview.message, "deployments": deployments})
        found[name] = (str(getattr(overview.status, "value", overview.status)), reason)
    return found


def _say(out: TextIO, message: Mapping[str, Any]) -> None:
    print(json.dumps(message), file=out, flush=True)


if __name__ == "__main__":
    sys.exit(main())
