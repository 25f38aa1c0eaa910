"""One folder of generated images → everything that the report says of it."""

from __future__ import annotations

import numpy as np

from eval import metrics
from eval.embedding import Embedded
from eval.found import contained
from eval.reporting.images import image_rows, most_copied
from eval.reporting.neighbours import (
    Neighbours,
    authpct,
    c_t_figures,
    d1_over_d2_figures,
    l2_ratio_figures,
    normalized_figures,
    search_figures,
    similarity_figures,
)
from eval.reporting.quality import frechet, quality_figures
from eval.reporting.references import References
from eval.reporting.shares import (
    copied_figures,
    discovery_figures,
    excess_figures,
    p_values,
    prompts_of,
    seed_figures,
    share_above,
    share_figures,
)
from eval.schema import ClipFigures, Contained, FolderFigures, FoundCopy, QuickFigures


def folder_figures(
    generated: Embedded,
    pooled: Embedded,
    references: References,
    runs: list[int] | None = None,
    clip: ClipFigures | None = None,
    found: dict[str, FoundCopy] | None = None,
) -> FolderFigures:
    """Everything measured on one folder of generated images; docs/EVALUATION.md explains each key.

    Args:
        generated: in the report's embedder. pooled: pooled pixels.
        runs: for each image the seed that its run was given.
        clip: the CLIP score's figures.
        found: what is a copy without a threshold, by the image's name; None where that wasn't looked for.
    """
    everything, rows = len(generated), distinct(generated)
    generated, runs = generated.subset(rows), None if runs is None else [runs[i] for i in rows]
    copies = [found.get(generated.images.name(i)) if found else None for i in range(len(generated))]
    train, heldout, clusters = references.train, references.heldout, prompts_of(generated)
    neighbours = Neighbours.of(generated, references)
    to_train, to_heldout = neighbours.to_train, neighbours.to_nearest_heldout
    parts, copied = references.parts, np.array([copy is not None for copy in copies])
    if parts and parts.null:
        copied |= parts.flags(generated.images)
    share = share_figures(to_train, references, clusters, copied)
    p = p_values(to_train, references)
    effective, legacy = share["effective_images"], metrics.LEGACY_THRESHOLDS.get(references.embedder, (0.9, 0.95))
    return {
        "n_generated": everything,
        "distinct_images": len(generated),
        "contained": _contained(copies, found, references),
        "local_copies": parts.figures(generated.images) if parts else None,
        "search": search_figures(neighbours),
        "similarity_to_train": similarity_figures(to_train),
        "similarity_to_heldout": None if to_heldout is None else similarity_figures(to_heldout),
        **share,
        "share_above_threshold_heldout": share_above(to_heldout, references),
        **excess_figures(generated, clusters, references),
        "copied_share": copied_figures(share["share_above_threshold"], effective, references, references.confidence),
        "discoveries": discovery_figures(p, references),
        "seeds": seed_figures(to_train, runs, references),
        "legacy_shares": metrics.legacy_shares(to_train, legacy),
        "score_normalized": normalized_figures(neighbours, references),
        "authpct": authpct(neighbours, train),
        "c_t": c_t_figures(generated, neighbours, references),
        "mann_whitney_z": None if references.null is None else metrics.mann_whitney_z(to_train, references.null),
        "l2_ratio": l2_ratio_figures(neighbours),
        "d1_over_d2": d1_over_d2_figures(neighbours),
        "fd_pixels": frechet(pooled, references.heldout_pooled),
        "fd_embedding": frechet(generated, heldout),
        **quality_figures(generated, heldout),
        "clip_score": clip,
        "most_copied": most_copied(generated, neighbours, references),
        "excluded": generated.images.excluded,
        "ledger": generated.images.record(),
        "images": image_rows(generated, neighbours, p, train, copies),
    }


def distinct(images: Embedded) -> list[int]:
    """The rows of the first of files that are equal, byte for byte."""
    first: dict[str, int] = {}
    for i, digest in enumerate(images.images.hashes):
        first.setdefault(digest, i)
    return sorted(first.values())


def _contained(
    copies: list[FoundCopy | None], found: dict[str, FoundCopy] | None, references: References
) -> Contained | None:
    if found is None or references.known is None:
        return None
    return contained([copy for copy in copies if copy is not None], len(copies), references.known)


def quick_figures(generated: Embedded, references: References) -> QuickFigures:
    """Of :func:`folder_figures` the copied share and its excess alone, with the similarities to the training set."""
    everything, generated = len(generated), generated.subset(distinct(generated))
    clusters, to_train = prompts_of(generated), references.nearest_in_train(generated.embeddings)[0]
    return {
        "n_generated": everything,
        "similarity_to_train": similarity_figures(to_train),
        **share_figures(to_train, references, clusters),
        **excess_figures(generated, clusters, references),
    }
