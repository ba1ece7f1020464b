"""Training and evaluation of byte models, on the transformers Trainer."""
