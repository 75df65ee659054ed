"""What goes wrong in requests to the hub, as one line each; temporary failures are retried."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from moe_surgery.checkpoint.http_connections import transport_errors
from moe_surgery.checkpoint.http_source import describe
from moe_surgery.checkpoint.retries import TRANSIENT, Retries, delay_asked_for
from moe_surgery.errors import OutputError

__all__ = ["requesting"]

MOST_ATTEMPTS = 5

Result = TypeVar("Result")


def requesting(
    ask: Callable[[], Result], where: str, repository: str, revision: str | None, endpoint: str
) -> Result:
    """The result of `ask`, which makes one request through huggingface_hub's client; `where` begins every error.

    Raises OutputError for what the hub refuses, NetworkError where it cannot be reached or keeps failing.
    """
    from huggingface_hub import errors

    retries = Retries(where, time.sleep, most=MOST_ATTEMPTS)
    while True:
        try:
            return ask()
        except errors.OfflineModeIsEnabled:
            raise OutputError(f"{where}: not in the local hub cache, and HF_HUB_OFFLINE is set") from None
        except errors.GatedRepoError:
            raise OutputError(
                f"{where}: access is restricted; ask for it at {endpoint}/{repository}, then log in with "
                "hf auth login or set HF_TOKEN"
            ) from None
        except errors.RepositoryNotFoundError:
            raise OutputError(
                f"{where}: no such folder, and {endpoint} has no such model; if it is private, log in with "
                "hf auth login or set HF_TOKEN"
            ) from None
        except errors.RevisionNotFoundError:
            raise OutputError(f"{where}: {repository} has no revision {revision} at {endpoint}") from None
        except errors.EntryNotFoundError:
            raise OutputError(f"{where}: not in the repository") from None
        except errors.LocalTokenNotFoundError:
            raise OutputError(f"{where}: no token; log in with hf auth login or set HF_TOKEN") from None
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            headers = {name.lower(): value for name, value in error.response.headers.items()}
            problem = f"{endpoint} answers HTTP {status}"
            if status == 429:
                problem = f"{endpoint} limits requests (HTTP 429); wait, or log in with hf auth login"
            if status not in TRANSIENT:
                raise OutputError(f"{where}: {problem}") from None
            retries.failed(problem, delay_asked_for(headers))
        except transport_errors() as error:
            retries.failed(f"{endpoint} cannot be reached: {describe(error)}")
