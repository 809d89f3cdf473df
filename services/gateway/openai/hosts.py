"""The names that a server may be called by: its own, and no other site's.

A stranger's page may have its own name point to this machine (DNS rebinding), and then asks as if it came from here;
its browser still sends that name as Host.
"""

from __future__ import annotations

import ipaddress
import urllib.parse
from collections.abc import Sequence

from starlette.requests import Request

from services.gateway.openai.fields import shown


def wrong_host(request: Request, allowed: Sequence[str]) -> str | None:
    """What is wrong with the request's Host; None where it may be this server's.

    The machine's own names always may, and those in `allowed`. Others may where none are in `allowed` and the request
    did not come over the loopback interface. Without a Host it is no browser's.
    """
    host = request.headers.get("host")
    name = _name(host) if host else ""
    if not host or _is_local(name) or name in allowed:
        return None
    server = request.scope.get("server")
    if not allowed and not (server and _is_local(server[0])):
        return None
    return f"host: is {shown(repr(host))}, which is not a name of this server's; allowed_hosts in its settings adds one"


def _name(host: str) -> str:
    """A host without its port, in small letters; empty for what is none."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_local(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
