"""Captions → the two text encoders' states; sizes and crops → SDXL's time ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch


@torch.no_grad()
def encode_prompts(captions: Sequence[str], tokenizers, text_encoders) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``StableDiffusionXLPipeline.encode_prompt``: both penultimate states side by side, and the second's pooled.

    Returns:
        prompt_embeds (n, 77, 768 + 1280 for SDXL) and pooled (n, 1280), in the encoders' dtype, on their device.
    """
    states, pooled = [], None
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        tokens = tokenizer(
            list(captions),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        output = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        # Element 0 is the projected, pooled embedding in the encoder with projection, which comes last.
        pooled = output[0]
    return torch.cat(states, dim=-1), pooled


def is_truncated(caption: str, tokenizer) -> bool:
    """Whether a caption has more tokens than the encoder reads (77, two of them the start and end marks)."""
    return len(tokenizer(caption, truncation=False, verbose=False).input_ids) > tokenizer.model_max_length


def time_ids(original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int]) -> list[int]:
    """SDXL's size and crop conditioning: (height, width), (top, left), (height, width), in pixels."""
    return [*original_size, *crop_top_left, *target_size]
