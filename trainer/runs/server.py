"""Whether the server of a tracker can be used, asked before anything waits for it."""

import os
import urllib.error
import urllib.request
from netrc import NetrcParseError, netrc
from urllib.parse import urlsplit

from trainer.errors import first_line

WAIT = 5  # seconds for a server to answer, and for W&B's to take a run


def unreachable(address: str) -> str | None:
    """Why no server answers at ``address``, if none does."""
    try:
        urllib.request.urlopen(address, timeout=WAIT).close()  # noqa: S310  an address that the user gave
    except urllib.error.HTTPError:
        pass  # an answer all the same
    except (OSError, ValueError) as error:
        return f"{address} cannot be reached ({getattr(error, 'reason', error)})"
    return None


def why_offline(base_url: str, api_key: str | None) -> str | None:
    """Why the server at ``base_url`` cannot be used; None where it answers and there is a key for it."""
    import wandb

    if not api_key and not _has_key(base_url):
        return "no API key is set"
    reason = unreachable(base_url)
    if reason is not None:
        return reason
    try:
        return None if wandb.login(prompt=False, verify=False) else "no API key is set"
    except wandb.Error as error:
        return f"the API key cannot be used ({first_line(error)})"


def _has_key(base_url: str) -> bool:
    """Whether the environment or the netrc file seems to hold a key (W&B itself would ask for one)."""
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = [urlsplit(base_url).netloc, *(["api.wandb.ai"] if base_url == wandb.Settings().base_url else [])]
    try:
        machines = netrc(os.environ.get("NETRC")).hosts
    except (OSError, NetrcParseError):
        return False
    return any(host in machines for host in hosts)
