"""Training and evaluation of byte models on the transformers Trainer; needs the extra "train"."""

import accelerate  # noqa: F401  # Without it transformers fails, and does not name what it lacks.
