"""Tests of the torch modules."""
