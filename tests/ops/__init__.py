"""Tests of the operation and of its backends."""
