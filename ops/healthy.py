"""Exit 0 when HEALTH_URL answers with a status of 200 to 299 within 3 seconds; else one line and exit 1.

The health check of the images: they have no curl. Standard library only.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 3.0


def problem(url: str | None) -> str | None:
    """What is wrong at `url` in a few words, or None."""
    if not url:
        return "HEALTH_URL is not set; give it the address that this container answers on"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return None if 200 <= answer.status < 300 else f"{url} answers {answer.status}"
    except urllib.error.HTTPError as error:
        return f"{url} answers {error.code}"
    except OSError as error:
        return f"{url} does not answer: {error}"


if __name__ == "__main__":
    found = problem(os.environ.get("HEALTH_URL"))
    if found:
        print(found)
    sys.exit(1 if found else 0)
