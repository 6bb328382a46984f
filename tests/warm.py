"""What the fork server imports once, so that a forked rank starts in milliseconds. It must not compute anything."""

import contextlib

import tests.parity  # noqa: F401

with contextlib.suppress(ImportError):
    import gymnasium  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import sklearn.datasets  # noqa: F401
