"""Tells somebody how a run ended: a POST to a URL, or a command. Knows nothing of runs.

Nothing here fails a run: what cannot be told is a warning.
"""

import json
import logging
import os
import subprocess
import urllib.request
from collections.abc import Mapping
from typing import Any

ANSWER_SECONDS = 10.0
COMMAND_SECONDS = 300.0

log = logging.getLogger(__name__)


def notify(target: str, news: Mapping[str, Any]) -> None:
    """Gives `news`, plain JSON values, to a URL as the body of a POST, or to a shell command.

    The command gets the JSON on its standard input, and each value as WALLAROO_<NAME> in its environment.
    """
    body = json.dumps(dict(news), ensure_ascii=False).encode()
    try:
        if target.startswith(("http://", "https://")):
            request = urllib.request.Request(target, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS):
                return
        values = {f"WALLAROO_{name.upper()}": str(value).replace("\0", "") for name, value in news.items()}
        subprocess.run(
            target, shell=True, input=body, env=os.environ | values, timeout=COMMAND_SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:
        log.warning("--on-finish: the command ended with %d, so perhaps nobody was told.", error.returncode)
    except (OSError, subprocess.TimeoutExpired) as error:
        # A URL may hold a secret, so only its host is named by the error itself.
        log.warning("--on-finish: nobody could be told (%s).", type(error).__name__)
