"""The structure of a KV cache: layers, heads, rows, bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerGeometry:
    """One layer of the cache.

    Attributes:
        il: layer index in the model.
        n_head, n_head_kv: numbers of query heads and KV heads; ``n_head // n_head_kv`` query heads share a KV head.
        n_embd_head_k, n_embd_head_v: elements of one head's key and value.
        type_k, type_v: ggml types of the stored rows.
        v_trans: True if V is stored transposed, as llama.cpp does without flash attention.
        n_bytes_row: bytes of one token's key and value in all KV heads.
        v_in_k: True if no values are stored: a value is the first ``n_embd_head_v`` elements of its key, as in latent
            attention (MLA).
    """

    il: int
    n_head: int
    n_head_kv: int
    n_embd_head_k: int
    n_embd_head_v: int
    type_k: int
    type_v: int
    v_trans: bool
    n_bytes_row: int
    v_in_k: bool = False

    @property
    def v_quantized(self) -> bool:
        """Returns whether values are quantized."""
        from gguf import GGMLQuantizationType as GGML

        return self.type_v not in (GGML.F32, GGML.F16, GGML.BF16)


@dataclass(frozen=True)
class KVCells:
    """Rows of one layer: the number allocated, and the number that hold a composite or a token."""

    n_rows: int
    n_rows_used: int
    n_bytes: int


@dataclass(frozen=True)
class CacheState:
    """The current state of the whole cache.

    Attributes:
        n_cells: size of the cell list, llama.cpp's n_ctx.
        n_cells_alloc: cells with allocated memory.
        n_cells_used: index of the last used cell + 1.
        n_composed: tokens that belong to composites, 0 for a full cache.
        scoring: True while attention scores are collected.
        n_cells_swa: cells of the layers with a sliding window, which are not compressed; 0 if there are none.
        recurrent: True if there are also recurrent layers.
        n_bytes: bytes of the K and V buffers of all other layers.
    """

    n_cells: int
    n_cells_alloc: int
    n_cells_used: int
    n_composed: int
    scoring: bool
    n_cells_swa: int
    recurrent: bool
    n_bytes: int

    @property
    def can_go_back(self) -> bool:
        """Returns whether the newest tokens can simply be removed; windows and recurrent layers have forgotten."""
        return not self.n_cells_swa and not self.recurrent

    @property
    def forgets(self) -> bool:
        """Returns whether some layers have less than all tokens, so that going back needs their state of that time."""
        return self.recurrent or 0 < self.n_cells_swa < self.n_cells
