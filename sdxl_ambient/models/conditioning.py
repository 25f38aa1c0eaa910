"""Captions → the two text encoders' states; sizes and crops → SDXL's time ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def tokenize(captions: Sequence[str], tokenizers: Sequence[Any]) -> torch.Tensor:
    """Captions → tokens (n, 2, 77) for the two text encoders, int64, cut and padded to what they read."""

    def encode(tokenizer: Any) -> torch.Tensor:
        length = tokenizer.model_max_length
        texts = list(captions)
        return tokenizer(texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt").input_ids

    return torch.stack([encode(tokenizer) for tokenizer in tokenizers], dim=1)


@torch.no_grad()
def encode_prompts(
    captions: Sequence[str], tokenizers: Sequence[Any], text_encoders: Sequence[Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``StableDiffusionXLPipeline.encode_prompt``: both penultimate states side by side, and the second's pooled.

    Returns:
        prompt_embeds (n, 77, 768 + 1280 for SDXL) and pooled (n, 1280), in the encoders' dtype, on their device.
    """
    return encode_tokens(tokenize(captions, tokenizers), text_encoders)


def encode_tokens(
    tokens: torch.Tensor, text_encoders: Sequence[Any], dropped: torch.Tensor | None = None, *, zero_empty: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n, 2, 77) of :func:`tokenize` → what :func:`encode_prompts` gives, with a graph for encoders that train.

    Args:
        text_encoders: both, each in or out of its distributed wrapper.
        dropped: (n,) bool, samples shown without their caption. Their tokens must be the empty caption's; here it says for
            which samples ``zero_empty`` holds.
        zero_empty: they are shown zeros in place of an empty caption's states, as a base model is whose pipeline has
            ``force_zeros_for_empty_prompt``. They have no gradient, but stay in the graph, so that processes agree on it.
    """
    states, pooled = [], torch.empty(0)
    for ids, encoder in zip(tokens.unbind(1), text_encoders, strict=True):
        # A wrapper has no device of its own.
        output = encoder(ids.to(next(encoder.parameters()).device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        # Element 0 is the projected, pooled embedding in the encoder with projection, which comes last.
        pooled = output[0]
    prompt_embeds = torch.cat(states, dim=-1)
    if zero_empty and dropped is not None:
        dropped = dropped.to(pooled.device)
        prompt_embeds, pooled = prompt_embeds.masked_fill(dropped[:, None, None], 0), pooled.masked_fill(dropped[:, None], 0)
    return prompt_embeds, pooled


def is_truncated(caption: str, tokenizer: Any) -> bool:
    """Whether a caption has more tokens than the encoder reads (77, two of them the start and end marks)."""
    return len(tokenizer(caption, truncation=False, verbose=False).input_ids) > tokenizer.model_max_length


def time_ids(original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]) -> list[int]:
    """SDXL's size and crop conditioning: (height, width), (top, left), (height, width), in pixels."""
    return [*original_size, *crop_top_left, *target_size]
