"""report.json, schema 3, section by section: what the measuring writes and what verdict, page and plots read.

docs/EVALUATION.md says what each key means. Keys, their order and their rounding are a data format. None is null there.
"""

from __future__ import annotations

from typing import Any, TypedDict

SCHEMA_VERSION = 3


class Excluded(TypedDict):
    """An image that was left out, and why."""

    file: str
    reason: str


class EstimateFigures(TypedDict):
    """A value with its interval."""

    value: float
    low: float
    high: float


class CopiedShare(EstimateFigures):
    """The share of images that are copies, and the control whose recall it is corrected by.

    Its upper end is that of ``least_recall``, the change on the must-see list that the threshold finds least of.
    """

    recall_control: str
    least_recall: str


class Similarities(TypedDict):
    """Nearest-neighbour similarities: their mean, and quantiles keyed ``"0.5"`` and so on."""

    mean: float
    quantiles: dict[str, float]


class ShareFigures(TypedDict):
    """Images above the threshold; all None where nothing is calibrated. ``interval`` is [low, high].

    It is that of the prompts that were drawn, of which every image is a draw of its own; ``interval_other_prompts`` is that
    of other prompts, of which each one drawn is one; None with fewer than two.
    """

    share_above_threshold: float | None
    count_above_threshold: int | None
    effective_images: float | None
    interval: list[float] | None
    interval_other_prompts: list[float] | None


class FoundCopy(TypedDict):
    """A generated image that is a copy without any threshold: of which training image, and by what."""

    file: str
    train: str
    kind: str  # same file; same pixels; near-duplicate; near-duplicate, mirrored


class LocalCopy(TypedDict):
    """A generated image that shows a part of a training picture: how many keypoints agree, and the boxes around them.

    Regions are left, top, right and bottom, from 0 to 1 of each picture.
    """

    file: str
    train: str
    inliers: int
    mirrored: bool
    region: list[float]
    train_region: list[float]


class LocalFigures(TypedDict):
    """The images of a folder that show a part of a training picture; more inliers than ``limit`` do.

    ``looked_at`` are those that similarity and fingerprints had not found.
    """

    looked_at: int
    limit: int
    highest_of_heldout: int | None
    n_heldout: int
    count: int
    copies: list[LocalCopy]


class Contained(TypedDict):
    """The copies found in a folder without a threshold; ``certain`` are equal by bytes or pixels.

    ``near_duplicates`` agree by fingerprint, as ``heldout_twins`` of ``n_heldout`` held-out images do with a training image;
    the p-value is that of so many by chance.
    """

    same_file: int
    same_pixels: int
    near_duplicates: int
    heldout_twins: int
    n_heldout: int
    near_duplicates_p_value: float | None
    certain: int
    copies: list[FoundCopy]


class ExcessFigures(TypedDict):
    """The share above the threshold less that beside as many held-out images; all None without those or a threshold."""

    excess_over_heldout: float | None
    excess_interval: list[float] | None
    excess_set_size: int | None
    share_above_threshold_as_many_heldout: float | None


class SearchFigures(TypedDict):
    """How the nearest images were searched."""

    method: str
    recall: float
    recall_measured_on: int


class Discoveries(TypedDict):
    """Images too near to be chance, at a false discovery rate."""

    rate: float
    count: int
    smallest_p: float


class SeedFigures(TypedDict):
    """The images of one seed."""

    seed: int
    n: int
    share_above_threshold: float | None
    median: float


class ScoreNormalized(TypedDict):
    """Similarities less those to the nearest ``k`` held-out images."""

    k: int
    quantiles: dict[str, float]
    threshold: float | None
    share_above_threshold: float | None


class CTFigures(TypedDict):
    """C_T over so many cells."""

    value: float
    cells: int


class L2RatioFigures(TypedDict):
    """The ℓ2 ratio to the ``k`` nearest training images."""

    k: int
    alpha: float
    quantiles: dict[str, float]


class D1OverD2Figures(TypedDict):
    """Distances to the nearest over those to the second nearest training image."""

    quantiles: dict[str, float]
    share_below_third: float


class QualityFigures(TypedDict):
    """Fidelity and variety beside the held-out images; ``quality_images`` is how many of each set were taken."""

    kid: float | None
    prdc: dict[str, float] | None
    vendi: float | None
    quality_images: list[int]


class ClipFigures(TypedDict):
    """The mean CLIP score over n images, and the SHA-256 of the model's weights."""

    mean: float
    n: int
    model: str | None


class CopiedImage(TypedDict):
    """A training image that generated ones are nearest to, and the nearest of those."""

    file: str
    caption: str | None
    nearest_of: int
    above_threshold: int | None
    highest: float
    generated: str


class ImageRow(TypedDict):
    """One generated image."""

    file: str
    prompt: str | None
    nearest_train: str
    nearest_train_caption: str | None
    similarity_to_train: float
    similarity_to_heldout: float | None
    l2_ratio: float
    p_value: float | None
    score_normalized: float | None
    found: str | None  # as what it is a copy without a threshold


class FolderFigures(ShareFigures, ExcessFigures, QualityFigures):
    """Everything measured on one folder of generated images."""

    n_generated: int
    distinct_images: int  # files of equal bytes count once in all that follows
    contained: Contained | None
    local_copies: LocalFigures | None
    search: SearchFigures
    similarity_to_train: Similarities
    similarity_to_heldout: Similarities | None
    share_above_threshold_heldout: float | None
    copied_share: CopiedShare | None
    discoveries: Discoveries | None
    seeds: list[SeedFigures] | None
    legacy_shares: dict[str, float]
    score_normalized: ScoreNormalized | None
    authpct: float | None
    c_t: CTFigures | None
    mann_whitney_z: float | None
    l2_ratio: L2RatioFigures
    d1_over_d2: D1OverD2Figures | None
    fd_pixels: float | None
    fd_embedding: float | None
    clip_score: ClipFigures | None
    most_copied: list[CopiedImage]
    excluded: list[Excluded]
    ledger: dict[str, Any]  # what became of every file of the folder
    images: list[ImageRow]


class QuickFigures(ShareFigures, ExcessFigures):
    """Of :class:`FolderFigures` the copied share and its excess alone."""

    n_generated: int
    similarity_to_train: Similarities


class SamplerFigures(FolderFigures):
    """One sampler of a model: where its images lie and how they were made, what was measured on them, and the difference of
    their share to the base model's."""

    folder: str
    settings: dict[str, Any] | None
    t_n: int | None
    difference_to_base: EstimateFigures | None


class GapFigures(TypedDict, total=False):
    """Of denoising errors alone: the mean over training images less that over held-out ones."""

    gap: float | None
    gap_standard_error: float | None


class AttackFigures(GapFigures):
    """How well one attack tells training images from held-out ones."""

    n_train: int
    n_heldout: int
    mean_train: float
    mean_heldout: float
    auc: float
    auc_interval: list[float]
    tpr_at_1_fpr: float
    difference_to_base: EstimateFigures | None


class WorstCaseRow(TypedDict):
    """One sampler or attack among all that a model is judged by."""

    name: str
    kind: str
    value: float
    low: float
    high: float
    control: float
    copied: CopiedShare | None
    contained: Contained | None
    difference_to_base: EstimateFigures | None
    above: bool


class WorstCase(TypedDict):
    """All samplers and attacks of a model, with intervals that hold for all of them at once."""

    confidence: float
    tests: int
    confidence_each: float
    worst: str
    rows: list[WorstCaseRow]


class Verdict(TypedDict):
    """above, unclear, within or unknown, and one sentence."""

    level: str
    text: str


class ModelIdentity(TypedDict):
    """What a model is: its kind (base, lora, unet, images) and place, its noise level, and of a run which step."""

    kind: str
    path: str
    trained_t_n: int | None
    run: str | None
    step: int | None


class ModelFigures(ModelIdentity):
    """A model's entry. The figures at its top are those of its worst sampler."""

    own_sampler: str
    worst_sampler: str
    n_generated: int
    similarity_to_train: Similarities
    similarity_to_heldout: Similarities | None
    share_above_threshold: float | None
    interval: list[float] | None
    samplers: dict[str, SamplerFigures]
    attacks: dict[str, AttackFigures] | None
    worst_case: WorstCase | None
    verdict: Verdict


class ThresholdFigures(TypedDict):
    """The threshold, the images that set it (``null``: heldout, base or None), or why there is none (``refusal``)."""

    value: float | None
    null: str | None
    normalized_value: float | None
    alpha: float
    confidence: float
    n_heldout: int
    n_null: int
    n_heldout_needed: int
    source_p_value: float | None  # of the two-sample test that H is of T's source
    refusal: str | None
    local_false_alarms: float  # of the search for parts, beside alpha; 0 without it
    local_copies_missing: str | None  # the packages for want of which it was left out


class ControlFigures(ShareFigures):
    """Real images' similarities to the training set."""

    n: int
    similarity_to_train: Similarities


class HeldoutControl(ControlFigures):
    """The null itself, with its sorted similarities."""

    similarities: list[float]


class Controls(TypedDict):
    """What real images and planted copies reach, and the Fréchet distances of the training to the held-out set."""

    heldout_to_train: HeldoutControl | None
    train_to_train: ControlFigures | None
    planted: dict[str, ControlFigures]
    fd_pixels: float | None
    fd_embedding: float | None


class DataFigures(TypedDict):
    """A set of real images."""

    folder: str
    n_images: int
    excluded: list[Excluded]
    ledger: dict[str, Any]


class Data(TypedDict):
    """Both sets of real images."""

    train: DataFigures
    heldout: DataFigures | None


class Report(TypedDict):
    """The whole report.json."""

    schema_version: int
    environment: dict[str, Any]
    settings: dict[str, Any]
    embedder: dict[str, Any]
    quality_features: dict[str, Any]
    data: Data
    threshold: ThresholdFigures
    controls: Controls
    models: dict[str, ModelFigures]
