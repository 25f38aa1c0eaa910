"""The names that options offer. What they stand for lies elsewhere, with libraries that ``--help`` need not import."""

SAMPLERS = ("full", "early_stop", "hybrid")
WORST_CASES = ("standard", "none")  # sets of further samplers, :mod:`eval.samplers`
EMBEDDERS = ("pixel", "dinov2", "dinov2_paper", "clip", "sscd")
ATTACKS = ("noise", "mask", "magnitude")
ATTACK_MODES = ("one_step", "posterior")
BASE = "base"  # the base model's name in a report
STAGES = ("generate", "embed", "attack", "measure")
PICTURES = ("auto", "all", "generated", "none")  # what a page embeds, :mod:`eval.reporting.pictures`
ALPHA = 0.02  # share of unrelated images above the threshold
CONFIDENCE = 0.95  # of intervals
EMBEDDING_BATCH = 32  # images embedded at once
