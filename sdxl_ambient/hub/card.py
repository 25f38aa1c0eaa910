"""The model card: what was trained on what, how to load it, and what the evaluation measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from diffusers import DDPMScheduler
from huggingface_hub import ModelCard, ModelCardData

from sdxl_ambient.errors import HubError, one_line
from sdxl_ambient.formats.record import LORA_FILE
from sdxl_ambient.provenance import read_sealed

REPORT_SCHEMA = 3
TEMPLATE = Path(__file__).with_name("model_card.md.j2")
IMAGES = "images"  # of the validation, in the repository
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def numbered_images(pictures: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """Pictures with their places in the repository: numbered, since names of files may tell of the data."""
    return [(f"{IMAGES}/{i:02d}{Path(p).suffix.lower()}", Path(p)) for i, p in enumerate(pictures)]


def model_card(
    folder: str | Path,
    info: dict,
    *,
    repo_id: str,
    license: str,
    report: str | Path | None = None,
    validation_images: Sequence[str | Path] = (),
) -> str:
    """The text of README.md: YAML for the Hub, then what the model is, how to sample it, and what was measured.

    Args:
        folder: the run's, where the report looks for its model.
        info: what training recorded (training.json). ``sigma`` is used if there; else t_n's σ is that of SDXL's schedule.
        report: report.json of an evaluation of these weights; without it the card says that none was made.

    Raises:
        HubError: a report that can't be read or is of another model.
    """
    lora, base = info.get("finetune", "lora") != "full", str(info.get("base_model") or "")
    known = base if _HUB_NAME.fullmatch(base) else None
    data = ModelCardData(
        license=license,
        base_model=known,
        base_model_relation=("adapter" if lora else "finetune") if known else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", *(["lora"] if lora else []), "stable-diffusion-xl", "ambient-diffusion"],
    )
    # A local folder's name says what was trained on; its place says something of the machine.
    base = known or Path(base).name or "BASE_MODEL"
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        info=info,
        repo_id=repo_id,
        base=base,
        lora=lora,
        t_n=info.get("t_n"),
        low_noise=info.get("low_noise", "skip"),
        sampler=fitting_sampler(info),
        sigma=_sigma(info),
        observed_t_n=info.get("observed_t_n"),
        rounds=info.get("restored"),
        foreign=any(link["foreign_model"] for link in info.get("restored") or []),
        resolution=_resolution(info),
        images=[place for place, _ in numbered_images(validation_images)],
        measured=_measured(folder, info, report),
    )
    return str(card)


def fitting_sampler(info: dict) -> str:
    """The sampler that uses the trained levels and no others: ``hybrid`` where those up to t_n were left out."""
    skipped = isinstance(info.get("t_n"), int) and info.get("low_noise", "skip") == "skip"
    return "hybrid" if skipped else "full"


def _sigma(info: dict) -> str | None:
    """σ at t_n: the recorded one, else that of SDXL's own schedule. None where there is no one level."""
    if not isinstance(info.get("t_n"), int):
        return None
    if info.get("sigma") is not None:
        return f"{float(info['sigma']):.3f}"
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return f"{float((1 - schedule.alphas_cumprod[info['t_n']]) ** 0.5):.3f}"


def _resolution(info: dict) -> str | None:
    """Pixels, or width × height."""
    resolution = info.get("resolution")
    if resolution is None:
        return None
    return "×".join(map(str, resolution)) if isinstance(resolution, list) else str(resolution)


def _measured(folder: str | Path, info: dict, report: str | Path | None) -> dict | None:
    """What the card says of an evaluation: its sizes, the worst sampler, its controls and the worst attack.

    None without a report. There are no figures where there was no threshold.
    """
    if report is None:
        return None
    measured = read_report(report)
    _, model = measured_model(measured, folder, info)
    train, heldout = measured["data"]["train"], measured["data"]["heldout"]
    facts = {
        "model": model,
        "train": train["n_images"],
        "heldout": heldout["n_images"] if heldout else None,
        "embedder": measured["embedder"]["name"],
    }
    if model["worst_case"] is None:
        return facts
    worst, own = model["worst_sampler"], model["own_sampler"]
    rows = {row["name"]: row for row in model["worst_case"]["rows"]}
    attacks = [row for row in rows.values() if row["kind"] == "attack"]
    return {
        **facts,
        "worst": rows[worst],
        "as_many_heldout": model["samplers"][worst]["share_above_threshold_as_many_heldout"],
        "own": rows[own] if own != worst else None,
        "attacks": attacks,
        "attack": max(attacks, key=lambda row: (row["above"], row["low"])) if attacks else None,
    }


def read_report(path: str | Path) -> dict:
    """An evaluation's report.json of the schema that is understood here. Raises HubError."""
    try:
        report = read_sealed(path)
        schema = report["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HubError(f"--memorization_report: {str(path)!r} can't be read: {one_line(error)}") from None
    if schema != REPORT_SCHEMA:
        raise HubError(f"--memorization_report: {str(path)!r} is of schema {schema}, not {REPORT_SCHEMA}; evaluate anew")
    return report


def measured_model(report: dict, folder: str | Path, info: dict) -> tuple[str, dict]:
    """Name and figures of the model in ``report`` that ``folder`` holds: the one at its path, or the only fine-tuned one
    that was trained at the same t_n.

    Raises:
        HubError: there is none, so its figures would be another model's.
    """
    tuned = {name: m for name, m in report["models"].items() if m["kind"] in ("lora", "unet")}
    places = {Path(folder).resolve() / part for part in ("", LORA_FILE, "unet")}
    fitting = {name: m for name, m in tuned.items() if Path(m["path"]).resolve() in places}
    if not fitting and len(tuned) == 1:
        steps = (None, info.get("step"))
        fitting = {n: m for n, m in tuned.items() if m["trained_t_n"] == info.get("t_n") and m["step"] in steps}
    if len(fitting) != 1:
        raise HubError(
            f"--memorization_report: none of its models ({', '.join(tuned) or 'no fine-tuned one'}) is surely the one in "
            f"{folder}; evaluate that"
        )
    return next(iter(fitting.items()))
