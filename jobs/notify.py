"""Reports how a run ended: a POST to a URL, or a command. Knows nothing of runs.

Nothing here fails a run: a failed report is a warning.
"""

import json
import logging
import os
import subprocess
import urllib.request
from collections.abc import Mapping
from typing import Any

URL_TIMEOUT = 10.0
COMMAND_TIMEOUT = 300.0
"""Seconds."""

log = logging.getLogger(__name__)


def notify(target: str, news: Mapping[str, Any]) -> None:
    """Sends how a run ended to a URL or a shell command.

    Args:
        target: A URL, which gets the JSON as the body of a POST; or a command, which gets it on its standard
            input, and each value as WALLAROO_<NAME> in its environment.
        news: Plain JSON values by name.
    """
    body = json.dumps(dict(news), ensure_ascii=False).encode()
    try:
        if target.startswith(("http://", "https://")):
            request = urllib.request.Request(target, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=URL_TIMEOUT):
                return
        values = {f"WALLAROO_{name.upper()}": str(value).replace("\0", "") for name, value in news.items()}
        subprocess.run(
            target, shell=True, input=body, env=os.environ | values, timeout=COMMAND_TIMEOUT, check=True
        )
    except subprocess.CalledProcessError as error:
        log.warning("the --on-finish command exited with status %d", error.returncode)
    except (OSError, subprocess.TimeoutExpired) as error:
        # A URL may hold a secret, so only its host is named by the error itself.
        log.warning("--on-finish failed (%s)", type(error).__name__)
