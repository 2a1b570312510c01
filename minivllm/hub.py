"""The Hugging Face hub and its cache, asked in a way that fails within seconds and with one line."""

import http.client
import ssl
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

from minivllm.errors import ModelError

_PROBE_SECONDS = 4.0
_FILES = ["*.json", "*.jinja", "*.txt", "*.tiktoken", "tokenizer.model", "spiece.model"]
_WEIGHTS = ["*.safetensors"]
_IGNORED = ["*/*", "consolidated*"]  # other formats of the same weights


def endpoint() -> str:
    """Base address of the hub; honours HF_ENDPOINT."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def is_reachable() -> bool:
    """Whether the hub answers anything within a few seconds; False at once with HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    answers: list[bool] = []
    # A thread, because name resolution has no timeout of its own.
    probe = threading.Thread(target=lambda: answers.append(_answers(endpoint())), daemon=True)
    probe.start()
    probe.join(_PROBE_SECONDS)
    return any(answers)


def cached_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """What the Hugging Face cache holds of a repository, complete or not. Raises `ModelError` for a malformed id."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ModelError(f"{repo_id!r} is neither a directory nor a hub id like owner/name") from error


def download(repo_id: str, revision: str | None, *, with_weights: bool, with_code: bool) -> Path:
    """Fetch what serving needs of a repository into the Hugging Face cache. Raises `ModelError`."""
    from huggingface_hub import constants, errors, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not is_reachable():
        offline = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{endpoint()} cannot be reached"
        raise ModelError(f"{repo_id} is neither a directory nor in the Hugging Face cache, and {offline}")
    if not sys.stderr.isatty():
        disable_progress_bars()
    patterns = _FILES + (_WEIGHTS if with_weights else []) + (["*.py"] if with_code else [])
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED))
    except errors.GatedRepoError as error:
        raise ModelError(f"{repo_id} is gated: accept its terms on {endpoint()} and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repo_id} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(f"{repo_id} is not on {endpoint()}, or private (then set HF_TOKEN)") from error
    except (OSError, RuntimeError, errors.HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot download {repo_id}: {reason}") from error


def _answers(url: str) -> bool:
    try:
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - the user's own HF_ENDPOINT
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()  # noqa: S310
    except urllib.error.HTTPError:
        return True  # an error page is an answer
    except urllib.error.URLError as error:
        # A certificate this probe does not know may be one that the hub's client is configured to trust.
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, http.client.HTTPException):
        return False
    return True
