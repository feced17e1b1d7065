"""What makes XLA compile small programs quickly."""

from ring_attention.parallel.xla_flags import knows_flag

_WANTED = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # jaxlib 0.12 has no second

OPTIONS = {name: value for name, value in _WANTED.items() if knows_flag(name)}
"""The same operations as machine code that nobody optimised: half the time, most of which is compilation."""
