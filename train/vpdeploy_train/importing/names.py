"""What the public code calls the parts of a model."""

from __future__ import annotations

from typing import Final

MODEL: Final = "enc."
TRANSFORMER: Final = f"{MODEL}transformer"
EMBEDDINGS: Final = f"{TRANSFORMER}.embeddings"
ENCODER: Final = f"{TRANSFORMER}.encoder"
LAYERS: Final = f"{ENCODER}.layer"
HEAD: Final = "head.last_layer"
KEY_VALUE_PROMPTS: Final = "attn.deep_QKV_embeddings"
"""E²VPT's, inside each layer; all else in a layer is the backbone's."""
