"""The replicas of a stage that run, as Ray Serve's controller tells every handle."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import FIFOMixin, LocalityMixin, PendingRequest, RequestRouter, RunningReplica

from services.common.errors import Overloaded, StageUnavailable
from services.common.grpc_status import one_line
from services.common.logs import LOGGER
from services.gateway.replicas import Replica

NONE_S = 0.5
"""A router that has named no replica for so long knows of none."""

_log = logging.getLogger(LOGGER)


class ListingRouter(FIFOMixin, LocalityMixin, RequestRouter):
    """The stages' request router: two replicas at random, of which Serve takes the one with the shorter queue.

    Whoever brings a list gets all replicas into it. Serve sends this class to its proxies and handles by value.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Candidates for a call, which Serve asks for once more where none of them has room."""
        if pending_request is not None and pending_request.args and isinstance(pending_request.args[0], list):
            pending_request.args[0].extend(candidate_replicas)
            return [candidate_replicas]
        near = self.apply_locality_routing(pending_request)  # its own node's first, where the caller is a proxy
        chosen = random.sample(sorted(near, key=str), min(2, len(near)))
        return [[replica for replica in candidate_replicas if replica.replica_id in chosen]]


class ServeReplicas:
    """The running replicas of one stage; asks nobody, for its handle is told of changes."""

    def __init__(self, deployment: str, application: str):
        self._deployment, self._application = deployment, application
        self._handle: DeploymentHandle[Any] | None = None

    async def running(self) -> list[Replica]:
        """All of them, one at least. Where none runs, Serve is told that a call waits, and starts one.

        Raises StageUnavailable where the application is not deployed, Overloaded where too many wait for a replica.
        """
        try:
            found = await self._listed()
            while not found:
                # A place that is asked for counts as a queued request, which has Serve start a replica from none.
                async with (await self._connected()).choose_replica():
                    found = await self._listed()
            return [Replica(name=each.replica_id.unique_id, **each.replica_metadata) for each in found]
        except BackPressureError:
            raise Overloaded(f"too many wait for a replica of the {self._application} stage; try again later") from None
        except (RayServeException, RayError) as error:
            self._handle = None
            _log.warning("%s of application %s: %s", self._deployment, self._application, one_line(str(error)))
            raise StageUnavailable(f"the {self._application} stage is not deployed") from None

    async def is_asleep(self) -> bool:
        """Whether none runs because none is wanted: the stage was scaled to zero. Asks Serve's controller then."""
        try:
            if await self._listed():
                return False
            status = await asyncio.to_thread(serve.status)
        except (RayServeException, RayError):
            return False
        application = status.applications.get(self._application)
        found = application.deployments.get(self._deployment) if application else None
        if found is None or found.status not in ("HEALTHY", "DOWNSCALING"):
            return False
        return all(state == "STOPPING" for state, replicas in found.replica_states.items() if replicas)

    async def _listed(self) -> Sequence[RunningReplica]:
        handle = await self._connected()
        found: list[RunningReplica] = []
        try:
            # Serve's router alone, without its queue: the replica's port has one (`services/common/port.py`).
            async with asyncio.timeout(NONE_S), handle.choose_replica(found, _reserve=False):
                return found
        except TimeoutError:
            return ()

    async def _connected(self) -> DeploymentHandle[Any]:
        if self._handle is None:
            find = functools.partial(serve.get_deployment_handle, self._deployment, self._application)
            self._handle = await asyncio.to_thread(find)
        return self._handle
