"""The settings of a run's parts, as plain values, made from its options."""

from __future__ import annotations

from dataclasses import dataclass, fields

from sdxl_ambient.config.training import TrainOptions
from sdxl_ambient.objective import ObjectiveOptions


@dataclass(frozen=True)
class RestoreOptions:
    """How posterior samples are drawn and trained on.

    batch_size: restored samples in each forward pass. refresh: how many of those are drawn anew each time; an image without
        a sample gets one when its turn comes. steps: evaluations of the chain that draws one.
    levels: "low" trains them at t ≤ t_n, beside the ambient loss; "all" at every t, in its place.
    """

    batch_size: int
    refresh: int
    steps: int
    levels: str


def objective_settings(options: TrainOptions) -> ObjectiveOptions:
    """The objective's options, which have the flags' names but for those that depend on another flag."""
    given = {f.name: getattr(options, f.name) for f in fields(ObjectiveOptions) if hasattr(options, f.name)}
    if options.consistency_weight is None:
        given["consistency_weight"] = 2.0 if options.low_noise == "consistency" else 0.0
    if options.low_noise == "clean":
        given["restore_weight"] = options.clean_weight  # clean rows stand where restored ones do
    weightings = {
        "min_snr": options.snr_gamma,
        "balanced": options.balance_cap,
        "debiased": options.debiased_estimation_loss,
    }
    given["weighting"] = next((name for name, value in weightings.items() if value), "none")
    given["snr_gamma"] = options.snr_gamma or ObjectiveOptions.snr_gamma
    given["balance_cap"] = options.balance_cap or ObjectiveOptions.balance_cap
    return ObjectiveOptions(**given)


def restore_settings(options: TrainOptions) -> RestoreOptions:
    """How samples are restored; a quarter of a forward pass's samples is drawn anew where nothing is said."""
    count = options.restored_per_batch
    refresh = count // 4 if options.restore_refresh is None else options.restore_refresh
    return RestoreOptions(count, refresh, options.restore_steps, options.restore_levels)
