"""Tests of colonnade.train."""
