"""Tests of the cache that a decoder reads."""
