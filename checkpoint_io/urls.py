"""URLs of weights: which are taken, how they are asked for, and where they may redirect
to.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import urllib.parse
import urllib.request
from typing import Any

from errors import UserError


def split_url(url: str) -> urllib.parse.SplitResult:
    """The parts of a URL; UserError where it is none."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "file" and (
            not parts.hostname or re.search(r"[\s\\%]", parts.hostname) or parts.port == 0
        ):
            raise ValueError
    except ValueError:  # of urlsplit and of `port`; what they say may hold a part of a password
        raise UserError(
            f"{url} is no URL that can be read: https://host/path is one; in a user's name or password "
            "write / as %2F, ? as %3F, # as %23, @ as %40"
        ) from None
    return parts


def refuse_unsafe_url(url: str) -> None:
    """UserError unless the file cannot be altered on its way: https, this machine, or
    what the user has allowed.
    """
    parts = split_url(url)
    if parts.scheme in ("https", "file"):
        return
    if parts.scheme != "http":
        raise UserError(f"{url}: weights are read from https:// or file:// URLs, or from a path")
    if parts.hostname not in ("localhost", "127.0.0.1", "::1") and os.environ.get("BEIT_ALLOW_HTTP") != "1":
        raise UserError(
            f"{url}: http:// can be tampered with on its way; use https://, or set BEIT_ALLOW_HTTP=1"
        )


def hash_address(parts: urllib.parse.SplitResult) -> str:
    """8 hex digits of host and path, and of a query that may choose the file. A
    signature does not choose it, and changes.
    """
    signed = any(key.lower().endswith(("sig", "signature")) for key in urllib.parse.parse_qs(parts.query))
    address = f"{parts.netloc.rpartition('@')[2].lower()}{parts.path}" + ("" if signed else f"?{parts.query}")
    return hashlib.sha256(address.encode(errors="surrogateescape")).hexdigest()[:8]


def build_request(url: str) -> urllib.request.Request:
    """For the file as it is. A user's name and password in the URL go to its own host
    alone, not where it redirects to.
    """
    parts = split_url(url)
    user, _, host = parts.netloc.rpartition("@")
    clean = parts._replace(netloc=host, fragment="").geturl()
    clean = urllib.parse.quote(clean, safe="%/:=&?~+!$,;'@()*[]|", errors="surrogateescape")
    request = urllib.request.Request(
        clean, headers={"User-Agent": "beit-model-zoo", "Accept-Encoding": "identity"}
    )
    if user:
        secret = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode("ascii")
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    return request


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        refuse_unsafe_url(newurl)
        parts = split_url(newurl)
        if req.type == "https" and parts.scheme != "https":
            raise UserError(
                f"{req.full_url} redirects to {newurl}, which can be tampered with on its way: it is not "
                "followed"
            )
        newurl = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        secret = req.unredirected_hdrs.get("Authorization")
        if new is not None and secret and (new.type, new.host) == (req.type, req.host):
            new.add_unredirected_header("Authorization", secret)
        return new
