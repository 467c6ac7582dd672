"""Is there a W&B server that would take this run? Answered in seconds, before `wandb.init` could hang."""

import base64
import http.client
import json
import netrc
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_VIEWER = {"operationName": "Viewer", "query": "query Viewer { viewer { id entity } }", "variables": {}}

# Seconds. Who asks for online explicitly gets more; the run does not wait for it.
_PATIENCE = {"auto": 3.0, "online": 10.0}


def patience(mode: str) -> float:
    """How long a server may take to answer, by `tracking.wandb.mode`."""
    return _PATIENCE[mode]


@dataclass(frozen=True)
class ServerAnswer:
    """Whether a run can go online, and why not."""

    usable: bool
    reason: str
    """A clause for a person, e.g. `no API key: run "wandb login"`."""


def ask_server(
    base_url: str,
    settings_key: str | None = None,
    timeout: float = 3.0,
    environment: Mapping[str, str] = os.environ,
    verify_tls: bool = True,
) -> ServerAnswer:
    """Ask the server who the API key belongs to, in `timeout` seconds at most.

    A GraphQL question with a JSON answer, because a plain GET can be answered by any proxy or login page.
    """
    has_token_file = bool(environment.get("WANDB_IDENTITY_TOKEN_FILE"))
    key = find_api_key(base_url, environment) or settings_key
    if not key and not has_token_file:
        return ServerAnswer(False, 'no API key: run "wandb login" or set WANDB_API_KEY')
    answers: list[ServerAnswer] = []
    # In a thread of its own: looking up a name has no time limit of its own.
    thread = threading.Thread(
        target=lambda: answers.append(_ask(base_url, key, timeout, verify_tls)),
        name="wandb-probe",
        daemon=True,
    )
    thread.start()
    thread.join(timeout)
    return answers[0] if answers else ServerAnswer(False, f"{base_url} did not answer within {timeout:.0f} s")


def find_api_key(base_url: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key that wandb itself would use: WANDB_API_KEY, else the netrc file's entry for the server."""
    if key := environment.get("WANDB_API_KEY"):
        return key
    path = Path(environment.get("NETRC", "~/.netrc")).expanduser()
    if "NETRC" not in environment and not path.exists():
        path = Path("~/_netrc").expanduser()
    try:
        entry = netrc.netrc(path).authenticators(urlsplit(base_url).netloc)
    except (OSError, netrc.NetrcParseError):
        return None
    return entry[2] or None if entry else None


def _ask(base_url: str, key: str | None, timeout: float, verify_tls: bool) -> ServerAnswer:
    try:
        request = urllib.request.Request(
            base_url.rstrip("/") + "/graphql",
            data=json.dumps(_VIEWER).encode(),
            headers={"Content-Type": "application/json", "User-Agent": "dist_transformer"},
        )
    except ValueError:
        return ServerAnswer(False, f"{base_url!r} is no address of a server")
    if key:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"api:{key}".encode()).decode())
    context = ssl.create_default_context()
    if not verify_tls:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(request, timeout=timeout, context=context) as response:
            answer: Any = json.loads(response.read(1 << 20))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return ServerAnswer(False, f"{base_url} refused the API key ({error.code})")
        return ServerAnswer(False, f"{base_url} answered {error.code} {error.reason}")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return ServerAnswer(False, f"{base_url} cannot be reached ({reason})")
    except ValueError:
        return ServerAnswer(
            False, f"{base_url} did not answer as a W&B server: a proxy or login page in between?"
        )
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, dict) or "viewer" not in data:
        return ServerAnswer(False, f"{base_url} did not answer as a W&B server")
    if key and not data["viewer"]:
        return ServerAnswer(False, f"{base_url} does not know the API key")
    return ServerAnswer(True, f"{base_url} answered")
