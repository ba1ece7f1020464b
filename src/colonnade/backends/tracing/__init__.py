"""Machinery around a call: autocast, compilers, and what is kept from one call to the next."""
