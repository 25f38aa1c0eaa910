"""What should make a reader doubt a report's threshold, in sentences."""

from __future__ import annotations

from eval.schema import Report

SOURCE_LEVEL = 0.01  # of the test that T and H are of one source, below which the reader is warned


def cautions(report: Report) -> list[str]:
    """Held-out images of another source, and few of them; [] where nothing of the kind is seen."""
    threshold = report["threshold"]
    sentences: list[str] = []
    p = threshold.get("source_p_value")
    if p is not None and p < SOURCE_LEVEL:
        sentences.append(
            f"The held-out images seem to come from another source than the training images (two-sample test, p = {p:.3f}). "
            "The threshold, and every attack, may then tell the sources apart. Take held-out images of the same source."
        )
    n, needed = threshold["n_null"], threshold["n_heldout_needed"]
    if threshold["null"] == "heldout" and threshold["value"] is not None and n < 2 * needed:
        sentences.append(
            f"Only {n} held-out images set the threshold. It needs at least {needed}, and below {2 * needed} "
            "the share of unrelated images that it lets through is uncertain."
        )
    return sentences
