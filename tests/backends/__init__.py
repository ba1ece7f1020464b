"""Tests of the backends, each by itself."""
