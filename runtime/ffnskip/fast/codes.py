"""The enumerations of cpp/: how the compiled step numbers rules, formats of matrices and activation functions."""

RULES = {"cosine": 1, "predicted-damage": 2, "price": 3}  # those that have a fused step; 0 is no rule
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
