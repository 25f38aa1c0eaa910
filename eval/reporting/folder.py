"""One folder of generated images → everything that the report says of it."""

from __future__ import annotations

from eval import metrics
from eval.embedding import Embedded
from eval.neighbours import nearest
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
from eval.schema import ClipFigures, FolderFigures, QuickFigures


def folder_figures(
    generated: Embedded,
    pooled: Embedded,
    references: References,
    runs: list[int] | None = None,
    clip: ClipFigures | None = None,
) -> FolderFigures:
    """Everything measured on one folder of generated images; docs/EVALUATION.md explains each key.

    Args:
        generated: in the report's embedder. pooled: pooled pixels.
        runs: for each image the seed that its run was given.
        clip: the CLIP score's figures.
    """
    train, heldout, clusters = references.train, references.heldout, prompts_of(generated)
    neighbours = Neighbours.of(generated, references)
    to_train, to_heldout = neighbours.to_train, neighbours.to_nearest_heldout
    share, p = share_figures(to_train, references, clusters), p_values(to_train, references)
    effective, legacy = share["effective_images"], metrics.LEGACY_THRESHOLDS.get(references.embedder, (0.9, 0.95))
    return {
        "n_generated": len(generated),
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
        "images": image_rows(generated, neighbours, p, train),
    }


def quick_figures(generated: Embedded, references: References) -> QuickFigures:
    """Of :func:`folder_figures` the copied share and its excess alone, with the similarities to the training set."""
    clusters, to_train = prompts_of(generated), nearest(generated.embeddings, references.train.embeddings, 1)[0][:, 0]
    return {
        "n_generated": len(generated),
        "similarity_to_train": similarity_figures(to_train),
        **share_figures(to_train, references, clusters),
        **excess_figures(generated, clusters, references),
    }
