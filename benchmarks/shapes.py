"""Decoder-block shapes of real models, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """A Llama-style decoder block: attention with grouped heads, and a gated MLP."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Layer name relative to the block -> (output features N, input features K)."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }

    def parameters(self) -> int:
        """Weights of all linear layers."""
        return sum(rows * columns for rows, columns in self.linears().values())


SHAPES = {
    "llama-3-8b": BlockShape(hidden=4096, mlp=14336, heads=32, kv_heads=8, head_dim=128),
    "llama-3-70b": BlockShape(hidden=8192, mlp=28672, heads=64, kv_heads=8, head_dim=128),
    "llama-3.2-1b": BlockShape(hidden=2048, mlp=8192, heads=32, kv_heads=8, head_dim=64),
    "tiny": BlockShape(hidden=256, mlp=768, heads=4, kv_heads=2, head_dim=64),  # a smoke run on a CPU
}
