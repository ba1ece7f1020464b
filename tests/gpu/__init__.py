"""Backend "triton" on a GPU: `make gpu` runs the tests of this folder before it measures.

With TRITON_INTERPRET=1 they run on a CPU, smaller, as far as they need no GPU. The ordinary suite
runs a few of them so, those that are marked interpreted besides.
"""
