"""What the fork server imports once, so that a forked rank starts in milliseconds. It must not compute anything."""

import contextlib
import gc

import hypothesis  # noqa: F401
import pytest.__main__  # noqa: F401  # the main module of whoever runs the tests, which each rank would import again

# What torch imports when a model is first wrapped or trained: up to two seconds a rank.
import torch._dynamo
import torch._inductor  # by deterministic algorithms
import torch.distributed.algorithms.join
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.nn.parallel
import torch.onnx  # noqa: F401

import distloop.api
import distloop.build
import distloop.cli
import distloop.transports.join
import distloop.transports.process_group
import distloop.transports.shared_memory
import distloop.transports.sockets  # noqa: F401
import tests.parity  # noqa: F401

with contextlib.suppress(ImportError):
    import gymnasium  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import sklearn.datasets  # noqa: F401

# Else the first collection of garbage in each rank would look through all of this, and so copy it.
gc.collect()
gc.freeze()
