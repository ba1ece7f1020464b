"""Tests of the plan against the pattern."""
