"""How well generated images fit their prompts: the CLIP score's two embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from eval import metrics
from eval.embedders.registry import Embedder, load_embedder
from eval.embedding import embed
from eval.images import ImageSet
from eval.schema import ClipFigures
from sdxl_ambient.errors import StageError, one_line
from sdxl_ambient.models.finite import check_finite
from sdxl_ambient.models.libraries import LOADING_ERRORS

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection


class ClipScore:
    """A CLIP model from a local folder or the Hub, for :func:`eval.metrics.clip_score`.

    Raises:
        StageError: weights that are missing, damaged or of another model.
    """

    def __init__(self, weights: str, device: torch.device | str = "cpu"):
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        self.images: Embedder = load_embedder("clip", weights, device)
        options = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(weights)
            loaded = CLIPTextModelWithProjection.from_pretrained(weights, output_loading_info=True, **options)
        except LOADING_ERRORS as error:
            reason = one_line(error)
            raise StageError(f"--clip_score_model: {weights!r} can't be loaded: {reason}") from None
        # A pair, since the loading information was asked for.
        self.network, report = cast("tuple[CLIPTextModelWithProjection, dict[str, Any]]", loaded)
        if report["missing_keys"]:
            raise StageError(f"--clip_score_model: {weights!r} lacks weights of CLIP's text model")
        check_finite(self.network.state_dict(), f"--clip_score_model: {weights!r}", StageError)
        # The cast, since transformers wraps Module.to in a way that hides its arguments.
        cast(torch.nn.Module, self.network.eval()).to(device)

    @torch.no_grad()
    def texts(self, prompts: list[str], batch_size: int = 64) -> np.ndarray:
        """Projected embeddings of the prompts, cut to the model's length: (n, d) float32."""
        parts = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            tokens = self.tokenizer(batch, padding="max_length", truncation=True, return_tensors="pt")
            parts.append(self.network(tokens.input_ids.to(self.network.device)).text_embeds.float().cpu().numpy())
        return np.concatenate(parts)

    def figures(self, images: ImageSet, cache: str | Path, batch_size: int) -> ClipFigures | None:
        """Mean score over the images that have a prompt; None if none has."""
        rows = [i for i, record in enumerate(images.records) if record.caption]
        if not rows:
            return None
        embedded = embed(images.subset(rows), self.images, cache, batch_size)
        prompts = [record.caption or "" for record in embedded.images.records]
        distinct = sorted(set(prompts))
        texts = self.texts(distinct)[[distinct.index(p) for p in prompts]]
        scores = metrics.clip_score(embedded.embeddings, texts)
        return {"mean": float(scores.mean()), "n": len(scores), "model": self.images.weights_hash}
