"""Who may see the pages: a browser of this machine that knows the token, and nobody that it was lured here by."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping

from nemotron_launch.frozen import frozen

_NAMES = ("127.0.0.1", "localhost")
# The pages' own scripts and styles, and this server: nothing else, and no other page around them.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report is a page for itself, with a policy of its own in it.
REPORT_POLICY = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@frozen
class Gate:
    """The token of one server. Cookies know no ports, so each server's has another name."""

    port: int
    token: str

    @property
    def cookie(self) -> str:
        return f"nemotron-{self.port}"

    @property
    def address(self) -> str:
        """What the user opens; it leaves the token in a cookie and the address without it."""
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    def knows_host(self, host: str) -> bool:
        """Whether a request's Host is ours: a name that was made to lead to this machine is not (DNS rebinding)."""
        return host.lower() in {f"{name}:{self.port}" for name in _NAMES}

    def from_elsewhere(self, headers: Mapping[str, str]) -> bool:
        """Whether another site's page has asked; such a page may link here, but not read."""
        site = headers.get("Sec-Fetch-Site", "none")
        linked = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
        return site not in ("none", "same-origin") and not linked

    def opens(self, token: str) -> bool:
        return hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode())

    def has_cookie(self, header: str) -> bool:
        """Whether a Cookie header has the token. Other servers of this machine may have put anything beside it."""
        pairs = (part.strip().partition("=") for part in header.split(";"))
        return any(name == self.cookie and self.opens(value) for name, _, value in pairs)

    def set_cookie(self) -> str:
        """Lax, for a link from a terminal or a file counts as another site's; nothing here changes anything."""
        return f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Lax"


def new_gate(port: int) -> Gate:
    return Gate(port, secrets.token_urlsafe(24))
