"""The fused decode step: models of the Llama family as plain matrices, and loops over them on CPU and GPU."""
