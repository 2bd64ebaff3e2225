"""The fused decode step on CUDA: Triton kernels in one graph. Experimental: no GPU has run it yet."""
