"""The captions of a store: their embeddings, and their tokens where text encoders are trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from sdxl_ambient.errors import ModelError, StoreError
from sdxl_ambient.images.sources import Log
from sdxl_ambient.models.conditioning import encode_prompts, is_truncated, tokenize
from sdxl_ambient.models.load import Encoders
from sdxl_ambient.provenance import hash_bytes, hash_json, hash_tensors
from sdxl_ambient.store.plan import TOKENS
from sdxl_ambient.store.records import Counts, Prompts
from sdxl_ambient.store.scan import Check, Scanned
from sdxl_ambient.store.shards import check_shard, header_hashes, write_shard

PROMPT_BATCH = 16


def write_texts(
    output_dir: Path,
    pictures: Sequence[Scanned],
    encoders: Encoders,
    shard_size: int,
    keep_tokens: bool,
    state: PartialState,
    log: Log,
    check: Check = lambda: None,
) -> tuple[Prompts, Counts]:
    """Embed the pictures' captions and the empty one, which training shows in their place now and then.

    Returns the manifest's record of them, and how many there are.
    """
    captions = {hash_bytes(c.encode()): c for p in pictures for c in p.record.captions}
    count, cut = len(captions), sum(is_truncated(c, encoders.tokenizers[0]) for c in captions.values())
    captions[hash_bytes(b"")] = ""
    # Keep writing tokens once a store has them, so that a later run with --train_text_encoder finds them.
    keep_tokens = keep_tokens or (output_dir / TOKENS).exists()
    prompts: Prompts = {"prompts": write_prompts(output_dir, captions, encoders, shard_size, state, log, check)}
    state.wait_for_everyone()
    if keep_tokens:
        prompts["tokens"] = TOKENS
        if state.is_main_process:
            write_tokens(output_dir / TOKENS, captions, encoders.tokenizers)
    if cut:
        log(f"note: {cut} of {count} captions are longer than the text encoders read and were cut")
    return prompts, {"captions": count, "captions_cut": cut}


def write_prompts(
    output_dir: Path,
    captions: dict[str, str],
    encoders: Encoders,
    size: int,
    state: PartialState,
    log: Log,
    check: Check = lambda: None,
) -> dict[str, str]:
    """Embed every distinct caption that no shard holds yet. Returns caption hash → file name, over all processes.

    A shard's name starts with a hash of the text encoders and ends with one of its captions.
    """
    models = hash_json([hash_tensors(e.state_dict()) for e in encoders.text_encoders])[:12]
    file_of: dict[str, str] = {}
    for path in sorted(output_dir.glob(f"prompts-{models}-*.safetensors")):
        try:
            hashes = header_hashes(path)
            check_shard(path, hashes)
        except StoreError as error:
            # Embedding anew draws nothing.
            log(f"note: {error}; its captions are embedded again")
            continue
        file_of.update({name.split(".")[0]: path.name for name in hashes})
    state.wait_for_everyone()  # all see the same files before anyone adds one
    missing = sorted(set(captions) - set(file_of))
    size = max(1, min(size, -(-len(missing) // state.num_processes)))
    groups = [missing[i : i + size] for i in range(0, len(missing), size)]
    names = [f"prompts-{models}-{hash_json(g)[:16]}.safetensors" for g in groups]
    with tqdm(total=len(missing), desc="embedding captions", unit="caption", disable=not state.is_main_process) as bar:
        for name, group in list(zip(names, groups, strict=True))[state.process_index :: state.num_processes]:
            tensors: dict[str, torch.Tensor] = {}
            for i in range(0, len(group), PROMPT_BATCH):
                check()
                keys = group[i : i + PROMPT_BATCH]
                tensors |= _embedded({key: captions[key] for key in keys}, encoders)
                bar.update(len(keys) * state.num_processes)
            write_shard(output_dir / name, tensors)
    file_of.update({k: name for name, group in zip(names, groups, strict=True) for k in group})
    return {k: file_of[k] for k in captions}


def _embedded(captions: dict[str, str], encoders: Encoders) -> dict[str, torch.Tensor]:
    """Both embeddings of each caption, under its hash. Raises ModelError where they aren't finite."""
    embeds, pooled = encode_prompts(list(captions.values()), encoders.tokenizers, encoders.text_encoders)
    if not bool(torch.isfinite(embeds).all() and torch.isfinite(pooled).all()):
        raise ModelError("the text encoders give values that are not finite; their weights are damaged")
    tensors = {}
    for key, states, summary in zip(captions, embeds, pooled, strict=True):
        tensors[f"{key}.embeds"] = states.cpu().contiguous().clone()
        tensors[f"{key}.pooled"] = summary.cpu().contiguous().clone()
    return tensors


def write_tokens(path: Path, captions: dict[str, str], tokenizers) -> None:
    """The tokens of every caption for both text encoders, (2, 77) int64 each, under its hash."""
    keys = sorted(captions)
    tokens = tokenize([captions[key] for key in keys], tokenizers)
    write_shard(path, {f"{key}.tokens": row.clone() for key, row in zip(keys, tokens, strict=True)})
