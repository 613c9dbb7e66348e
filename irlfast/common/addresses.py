"""Addresses of servers, which are checked before anything is sent to them."""

import ipaddress
import re
from urllib.parse import SplitResult, urlsplit

from irlfast.common.files import InputError

EXAMPLE = "expected an address such as http://localhost:8000/v1"


def check_address(name: str, url: str) -> SplitResult:
    """Return the parts of an address of HTTP. ``name`` says where the address comes from.

    Raises:
        InputError: the address cannot be used. The message does not show it, for a secret may stand anywhere in it.
    """
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise InputError(f"{name}: found whitespace or a control character, {EXAMPLE}")
    try:
        address = urlsplit(url)
        host, port = address.hostname, address.port
    except ValueError as error:  # brackets without an end, or a port that is no number up to 65535
        raise InputError(
            f"{name}: found brackets or a port that cannot be, {EXAMPLE}; in a user or password, special characters "
            "are percent-encoded"
        ) from error
    if address.scheme not in ("http", "https"):
        raise InputError(f"{name}: found no http:// or https://, {EXAMPLE}")
    if not host:
        raise InputError(f"{name}: found no host, {EXAMPLE}")
    if port == 0:
        raise InputError(f"{name}: found port 0, {EXAMPLE}")
    return address


def warn_of_open_key(name: str, address: SplitResult) -> None:
    """Warn that a key which goes to this address can be read on the way."""
    from irlfast.common.messages import log_once  # which imports torch

    if address.scheme == "http" and not is_loopback(address.hostname or ""):
        log_once(f"warning: {name}: a key goes to {address.hostname} by http, and can be read on the way; use https")


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine, by its name or its address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
