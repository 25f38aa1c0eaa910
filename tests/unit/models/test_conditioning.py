"""Prompt embeddings are those of the stock pipeline. Time ids: tests/invariants."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from sdxl_ambient.models.conditioning import encode_prompts, is_truncated

CAPTIONS = ["penguin", "a photo of a red apple, on a wooden table!", "", "naïve café 日本語 🐧", "very " * 200 + "long"]


@pytest.fixture(scope="module")
def pipe(miniature):
    return StableDiffusionXLPipeline.from_pretrained(miniature, add_watermarker=False)


@pytest.mark.filterwarnings("ignore")
def test_embeddings_are_the_stock_pipelines(pipe, encoders):
    embeds, pooled = encode_prompts(CAPTIONS, encoders.tokenizers, encoders.text_encoders)
    with torch.no_grad():
        want, _, want_pooled, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    assert embeds.shape == (5, 77, pipe.unet.config.cross_attention_dim)
    torch.testing.assert_close(embeds, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(pooled, want_pooled, rtol=0, atol=1e-6)
    assert not embeds.requires_grad


def test_embeddings_do_not_depend_on_the_company(encoders):
    together, pooled = encode_prompts(CAPTIONS, encoders.tokenizers, encoders.text_encoders)
    for i, caption in enumerate(CAPTIONS):
        alone, alone_pooled = encode_prompts([caption], encoders.tokenizers, encoders.text_encoders)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone_pooled[0], pooled[i], rtol=0, atol=1e-5)


def test_captions_that_are_cut_are_known(encoders):
    tokenizer = encoders.tokenizers[0]
    assert [is_truncated(c, tokenizer) for c in CAPTIONS] == [False, False, False, False, True]
    assert not is_truncated("cat " * 75, tokenizer) and is_truncated("cat " * 76, tokenizer)
