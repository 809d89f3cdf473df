"""The secret without which a stage answers nobody: a replica's own, or the one that clusters share."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from typing import Any

from services.common.call_metadata import text_metadata
from services.common.errors import WrongSecret
from services.common.settings import require

SECRET_METADATA = "focusllava-stage-secret"
"""A call of a stage bears the secret here."""
SECRET_VARIABLE = "FOCUSLLAVA_STAGE_SECRET"
"""Variable of the environment: the secret that a stage takes beside its replica's own, and that the gateway of another
cluster sends. Unset: the stage answers its own cluster's gateways alone."""
SHORTEST = 32


def shared_secret(environment: Mapping[str, str]) -> str:
    """The clusters' shared secret; empty where none is set. Raises InvalidInput for one that could be guessed."""
    secret = environment.get(SECRET_VARIABLE, "")
    fit = not secret or (len(secret) >= SHORTEST and secret.isascii() and secret.isprintable())
    # The message names no value: it would lie in a log.
    require(fit, SECRET_VARIABLE, "(hidden)", f"{SHORTEST} or more printable ASCII characters: `openssl rand -hex 32`")
    return secret


def check_secret(context: Any, accepted: Iterable[str]) -> None:
    """Raises WrongSecret unless the call bears one of the accepted secrets. An empty one is never accepted.

    context: a call's, of gRPC or of Ray Serve, which has its metadata.
    """
    said = text_metadata(context).get(SECRET_METADATA, "").encode()
    matches = [hmac.compare_digest(said, secret.encode()) for secret in accepted if secret]
    if not any(matches):
        raise WrongSecret("is not this stage's: it answers gateways alone", field=SECRET_METADATA)
