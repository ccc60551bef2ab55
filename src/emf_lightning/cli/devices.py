"""The accelerators that `emf plan` knows."""

DEVICES = {"A100": (312, 80), "H100": (989, 80), "H200": (989, 141), "B200": (2250, 180)}
"""Name -> dense bf16 TFLOP/s and GB of memory, from the makers' data sheets."""
