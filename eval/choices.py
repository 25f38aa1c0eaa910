"""The names that options offer. What they stand for lies elsewhere, with libraries that ``--help`` need not import."""

SAMPLERS = ("full", "early_stop", "hybrid")
WORST_CASES = ("standard", "none")  # sets of further samplers, :mod:`eval.samplers`
EMBEDDERS = ("pixel", "dinov2", "dinov2_paper", "clip", "sscd")
ATTACKS = ("noise", "mask", "magnitude")
ATTACK_MODES = ("one_step", "posterior")
