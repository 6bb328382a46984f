"""What the fork server imports once, so that a forked rank starts in milliseconds. It must not compute anything."""

import tests.parity  # noqa: F401
