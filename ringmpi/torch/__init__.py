"""Ring attention for PyTorch: differentiable by autograd, on tensors of the CPU or of a GPU, which are not copied."""

from .function import redistribute, ring_attention
from .sdpa import scaled_dot_product_attention
from .sequence import SequenceParallel, sequence_parallel

__all__ = ["SequenceParallel", "redistribute", "ring_attention", "scaled_dot_product_attention", "sequence_parallel"]
