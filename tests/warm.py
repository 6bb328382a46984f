"""What the fork server imports once, so that a forked rank starts in milliseconds. It must not compute anything."""

import torch
import torch.nn.parallel.distributed

import distloop.learner
import distloop.loop
import distloop.strategies.ddp
import tests.parity  # noqa: F401
