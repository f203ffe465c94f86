"""How good a model is: validation in training, open-loop evaluation, collapse checks, pictures."""
