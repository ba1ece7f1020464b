"""The backends, which run calls: each knows the plan, and none of the others.

Import from here with `from colonnade.backends import …`: as an attribute of the package,
`colonnade.backends` is the public function that lists them.

call.py         one call: its options, and which keys there are
documents.py    packed documents: their lengths, and batches of equal ones
dropout.py      which weights are dropped: a function of a seed and of where they are
environment.py  environment variables of all backends, and their folder
choice.py       the order of the backends, which one runs, and why not the others
tracing/        autocast, compilers, plans that are kept
reference.py    softmax over a dense mask: the specification
eager/          every pattern in plain PyTorch
native/         the plan on CPUs, in C++
triton/         the plan on GPUs, in Triton
"""
