"""Tests of colonnade.hf."""
