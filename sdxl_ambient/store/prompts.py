"""The captions of a store: their embeddings, and their tokens where text encoders are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from sdxl_ambient.errors import ModelError
from sdxl_ambient.models.conditioning import encode_prompts, is_truncated, tokenize
from sdxl_ambient.models.load import Encoders
from sdxl_ambient.provenance import hash_bytes, hash_json, hash_tensors
from sdxl_ambient.store.plan import TOKENS
from sdxl_ambient.store.scan import Scanned
from sdxl_ambient.store.shards import write_shard

PROMPT_BATCH = 16


def write_texts(
    output_dir: Path,
    pictures: Sequence[Scanned],
    encoders: Encoders,
    shard_size: int,
    keep_tokens: bool,
    state: PartialState,
    log,
    check: Callable[[], None] = lambda: None,
) -> dict:
    """Embed the pictures' captions and the empty one, which training shows in their place now and then. Returns what the
    manifest says of them."""
    captions = {hash_bytes(c.encode()): c for p in pictures for c in p.record.captions}
    count, cut = len(captions), sum(is_truncated(c, encoders.tokenizers[0]) for c in captions.values())
    captions[hash_bytes(b"")] = ""
    # A store that has tokens keeps them, and those of the captions that it has now.
    keep_tokens = keep_tokens or (output_dir / TOKENS).exists()
    found = {"prompts": write_prompts(output_dir, captions, encoders, shard_size, state, check)}
    state.wait_for_everyone()
    if keep_tokens:
        found["tokens"] = TOKENS
        if state.is_main_process:
            write_tokens(output_dir / TOKENS, captions, encoders.tokenizers)
    if cut:
        log(f"note: {cut} of {count} captions are longer than the text encoders read and were cut")
    return {**found, "counts": {"captions": count, "captions_cut": cut}}


def write_prompts(
    output_dir: Path, captions: dict[str, str], encoders: Encoders, size: int, state: PartialState, check=lambda: None
) -> dict:
    """Embed every distinct caption that no shard holds yet. Returns caption hash → file name, over all processes.

    A shard's name starts with a hash of the text encoders and ends with one of its captions.
    """
    models = hash_json([hash_tensors(e.state_dict()) for e in encoders.text_encoders])[:12]
    where: dict[str, str] = {}
    for path in sorted(output_dir.glob(f"prompts-{models}-*.safetensors")):
        try:
            with safe_open(str(path), "pt") as file:
                where.update({k.split(".")[0]: path.name for k in file.keys()})
        except SafetensorError:
            continue  # damaged; its captions are embedded again, which draws nothing
    state.wait_for_everyone()  # all see the same files before anyone adds one
    missing = sorted(set(captions) - set(where))
    size = max(1, min(size, -(-len(missing) // state.num_processes)))
    groups = [missing[i : i + size] for i in range(0, len(missing), size)]
    names = [f"prompts-{models}-{hash_json(g)[:16]}.safetensors" for g in groups]
    with tqdm(total=len(missing), desc="embedding captions", unit="caption", disable=not state.is_main_process) as bar:
        for name, group in list(zip(names, groups, strict=True))[state.process_index :: state.num_processes]:
            tensors = {}
            for i in range(0, len(group), PROMPT_BATCH):
                check()
                keys = group[i : i + PROMPT_BATCH]
                embeds, pooled = encode_prompts([captions[k] for k in keys], encoders.tokenizers, encoders.text_encoders)
                for j, k in enumerate(keys):
                    tensors[f"{k}.embeds"] = embeds[j].cpu().contiguous().clone()
                    tensors[f"{k}.pooled"] = pooled[j].cpu().contiguous().clone()
                bar.update(len(keys) * state.num_processes)
            if not all(bool(torch.isfinite(v).all()) for v in tensors.values()):
                raise ModelError("the text encoders give values that are not finite; their weights are damaged")
            write_shard(output_dir / name, tensors)
    where.update({k: name for name, group in zip(names, groups, strict=True) for k in group})
    return {k: where[k] for k in captions}


def write_tokens(path: Path, captions: dict[str, str], tokenizers) -> None:
    """The tokens of every caption for both text encoders, (2, 77) int64 each, under its hash."""
    keys = sorted(captions)
    tokens = tokenize([captions[key] for key in keys], tokenizers)
    write_shard(path, {f"{key}.tokens": row.clone() for key, row in zip(keys, tokens, strict=True)})
