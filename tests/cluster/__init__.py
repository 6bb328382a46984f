"""Tests under schedulers that they start themselves, as root."""
