"""Tests of the public operations over every backend."""
