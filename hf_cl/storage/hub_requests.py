"""Asking the Hub: again where it is busy, and in plain words where it refuses.

The client repeats some requests (the HEAD of a file, uploads) and not others: never the POST of a commit, nor a GET
that answers 500. Here every call is repeated that may be; what a lost answer means is the caller's to know.

No message holds a token: none is ever formatted here, and a server's own words are cut to one printable line.
"""

from collections.abc import Callable
from time import sleep
from typing import TypeVar

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_cl.errors import BankCorruptError, BankError

HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
"""Base of all that the client's HTTP library raises; which library that is differs between versions of the client."""
FAILURES = (HTTPError, OSError, ValueError, RuntimeError)
"""What a request may end with: the client's own errors, those of a cache on a bad disk, and hf_xet's."""
WAITS = (1.0, 2.0, 4.0, 8.0, 8.0)
"""Seconds before each new try; a server that says `Retry-After` is waited for longer."""
MOST_WAIT = 300.0
"""Seconds: the length of the Hub's own windows of rate limits."""
Result = TypeVar("Result")


def patiently(call: Callable[[], Result]) -> Result:
    """Return what a call gives; a busy or unreachable Hub is asked again, as the client does not do for each request.

    Raises:
        Exception: What the call raises: at once where asking again cannot help, else the last time.
    """
    for wait in WAITS:
        try:
            return call()
        except (HTTPError, OSError) as error:
            if not passes(error):
                raise
            pause(wait, error)
    return call()


def passes(error: Exception) -> bool:
    """Return whether an error may be gone at the next try: the Hub is busy or cannot be reached."""
    if isinstance(error, HfHubHTTPError):
        return status_of(error) in (408, 429) or status_of(error) >= 500
    if isinstance(error, OfflineModeIsEnabled):
        return False
    return isinstance(error, (HTTPError, ConnectionError, TimeoutError))


def pause(wait: float, error: Exception | None = None) -> None:
    """Sleep before the next try, as long as the server asks for."""
    found = root(error) if error is not None else None
    asked = found.response.headers.get("Retry-After", "") if isinstance(found, HfHubHTTPError) else ""
    sleep(min(max(wait, float(asked) if asked.isdecimal() else 0.0), MOST_WAIT))


def root(error: Exception) -> Exception:
    """Return what the client has wrapped into an error of its own: an upload, a forced download, a cache that lacks."""
    cause = error.__cause__
    wraps = not isinstance(error, HfHubHTTPError) and isinstance(error, (RuntimeError, ValueError, EntryNotFoundError))
    return root(cause) if wraps and isinstance(cause, Exception) else error


def status_of(error: Exception) -> int:
    """Return the HTTP status of an error, 0 where there was no answer."""
    return int(error.response.status_code) if isinstance(error, HfHubHTTPError) else 0


def refusal(error: Exception, repo_id: str, revision: str | None, name: str | None = None) -> BankError:
    """Return, in this package's words, why the Hub did not give what it was asked for."""
    error = root(error)
    known = _known(error, repo_id, revision, name)
    if known is not None:
        return known
    status = status_of(error)
    if status == 401:
        return BankError(f"{repo_id}: the Hub does not know this token (401). Log in anew with `hf auth login`.")
    if status == 403:
        return BankError(f"{repo_id}: this token does not allow it (403). Give one with that right, or another repo.")
    if status in (408, 429) or status >= 500:
        return BankError(f"{repo_id}: the Hub is busy and answered {status} each time. Try again later.")
    if status:
        return BankError(f"{repo_id}: the Hub refuses this ({status}: {_said(error)}).")
    if passes(error):
        what = f" for {name}" if name else ""
        return BankError(f"{repo_id}: the Hub cannot be reached{what} ({type(error).__name__}). Try again later.")
    return BankError(f"{repo_id}: {name or 'the repository'} cannot be had ({type(error).__name__}: {_said(error)}).")


def _known(error: Exception, repo_id: str, revision: str | None, name: str | None) -> BankError | None:
    """Return what to say of the errors that the client has a name for."""
    if isinstance(error, GatedRepoError):
        return BankError(
            f"{repo_id}: is gated, and this token has no access. Ask for it on the repository's page, then log in with "
            f"`hf auth login` or give token=."
        )
    if isinstance(error, RepositoryNotFoundError):
        return BankError(
            f"{repo_id}: is no folder here, and no repository on the Hub that this token may see. Check the name; for "
            f"a private one log in with `hf auth login` or give token=."
        )
    if isinstance(error, RevisionNotFoundError):
        return BankError(f"{repo_id}: has no revision {revision!r}. Give a branch, a tag or a commit that it has.")
    if isinstance(error, EntryNotFoundError) and status_of(error):
        at = f"@{revision[:12]}" if revision else ""
        return BankCorruptError(
            f"{repo_id}{at}: holds no {name}, so this is no whole bank. Give the repository of a bank, or another "
            f"revision."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return BankError(f"{repo_id}: the Hub is not asked (offline). Unset HF_HUB_OFFLINE.")
    return None


def _said(error: Exception) -> str:
    """Return the first line of what an error says, in printable characters: a server may have chosen them."""
    text = getattr(error, "server_message", None) or str(error)
    line = next((line for line in str(text).splitlines() if line.strip()), "")
    return "".join(char if char.isprintable() else "?" for char in line)[:200]
