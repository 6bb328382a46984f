"""Transports: how ranks talk to each other. They know ranks and tensors, nothing of models."""

from distloop.transports.base import Alone, Rows, Shared, Transport, Work
from distloop.transports.threads import ThreadCluster, ThreadTransport

__all__ = ["Alone", "Rows", "Shared", "ThreadCluster", "ThreadTransport", "Transport", "Work"]
