"""The model card: what was trained on what, how to load it, and what the evaluation measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from sdxl_ambient.errors import HubError, one_line
from sdxl_ambient.formats.record import LORA_FILE
from sdxl_ambient.provenance import read_json

REPORT_SCHEMA = 3
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
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        _what(info, lora, base),
        "## How to sample it",
        _sampling(info, lora),
        f"```python\n{snippet(info, repo_id=repo_id, base=base)}```",
        *(
            ["## Samples", *(f"![A sample]({where})" for where, _ in numbered_images(validation_images))]
            if validation_images
            else []
        ),
        "## How it was trained",
        _table(_training(info)),
        "## Memorisation",
        _memorisation(folder, info, report),
    ]
    return str(ModelCard(f"---\n{data.to_yaml().strip()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _what(info: dict, lora: bool, base: str) -> str:
    kind = "A LoRA for" if lora else "A fully fine-tuned UNet of"
    text = f"{kind} Stable Diffusion XL (`{base}`), made with SDXL Ambient"
    if info.get("t_n") is None:
        return f"{text} from **clean** latents (t_n = none): the objective protects nothing of the images."
    if info.get("low_noise") == "clean":
        return (
            f"{text} (arXiv 2502.21278): above t_n training saw each image as one noisy latent, {_level(info)}; at and "
            "below t_n it was trained on their **clean** latents, and noise protects nothing of the images there."
        )
    if info.get("restored"):
        return (
            f"{text} (arXiv 2404.10177, 2405.13712): training saw each image only as a sample {_level(info)} that a model "
            f"drew given its one **noisy** latent, which was observed {_observed(info)}; the samples are no observations. "
            f"{_drawn_by(info)}"
        )
    return (
        f"{text} (arXiv 2404.10177): training saw each image only as one **noisy** latent, {_level(info)}, and no clean "
        "one. This lowers what the model can copy; it does not rule copying out."
    )


def _level(info: dict) -> str:
    if not isinstance(info["t_n"], int):
        return "every image at a noise level of its own"
    return f"at timestep t_n = {info['t_n']} (σ = {_sigma(info):.3f})"


def _observed(info: dict) -> str:
    return "at a level of its own" if info["observed_t_n"] == "mixed" else f"at t_n = {info['observed_t_n']}"


def _drawn_by(info: dict) -> str:
    """What the samples' models had seen, for restored samples."""
    if any(link["foreign_model"] for link in info["restored"]):
        return "A model that may have seen more of the images drew some of them, so the noise level says nothing of those."
    return "What the noisy latents show bounds what the model can copy; it does not rule copying out."


def _rounds(info: dict) -> str | None:
    """The rounds of restored samples, the oldest first: their level and the model that drew them."""
    models = {"base": "the base model", "lora": "a LoRA", "unet": "a fine-tuned UNet"}
    told = [f"to t_n = {link['t_n']} by {models[link['model']['kind']]}" for link in info.get("restored") or []]
    return f"observed {_observed(info)}; restored {', then '.join(told)}" if told else None


def _sigma(info: dict) -> float:
    """σ at t_n: the recorded one, else that of SDXL's own schedule."""
    if info.get("sigma") is not None:
        return float(info["sigma"])
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return float((1 - schedule.alphas_cumprod[info["t_n"]]) ** 0.5)


def fitting_sampler(info: dict) -> str:
    """The sampler that uses the trained levels and no others: ``hybrid`` where those up to t_n were left out."""
    skipped = isinstance(info.get("t_n"), int) and info.get("low_noise", "skip") == "skip"
    return "hybrid" if skipped else "full"


def _sampling(info: dict, lora: bool) -> str:
    t_n, what = info.get("t_n"), "LoRA" if lora else "UNet"
    if fitting_sampler(info) == "hybrid":
        return (
            f"Sampler: **hybrid**. The {what} was trained at timesteps above t_n = {t_n} only (`--low_noise skip`). A stock "
            f"pipeline uses it at and below {t_n} too, where it was never trained, and may then draw noise; so hand over to "
            f"the base model there. (`early_stop`, which ends at t_n with one estimate, is in "
            f"`sdxl_ambient.pipeline.sample`.)"
        )
    if t_n is None:
        return "Sampler: **full**, a stock pipeline: every timestep was trained on clean latents."
    if info.get("low_noise", "skip") == "skip":
        return (
            "Sampler: **full**, a stock pipeline. Every image has its own t_n; timesteps below the lowest of them were not "
            "trained (`--low_noise skip`)."
        )
    how = {
        "consistency": "to agree with the levels above (`--low_noise consistency`)",
        "restore": "on samples that a model drew given the noisy latents (`--low_noise restore`)",
        "clean": "on clean latents (`--low_noise clean`)",
    }.get(info["low_noise"], f"as `--low_noise {info['low_noise']}` says")
    return f"Sampler: **full**, a stock pipeline: the timesteps at and below t_n were trained too, {how}."


_SNIPPET = """import torch
from diffusers import StableDiffusionXLPipeline{unet_import}

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = StableDiffusionXLPipeline.from_pretrained("{base}").to(device)
{load}{hand_over}image = pipe("a photograph of a lighthouse"{argument}).images[0]
"""
_LOAD = {
    "lora": 'pipe.load_lora_weights("{repo_id}")\n',
    "full": 'tuned = UNet2DConditionModel.from_pretrained("{repo_id}", subfolder="unet").to(device)\n{base_unet}'
    "pipe.unet = tuned{again}\n",
}
_HAND_OVER = '''

def hand_over(pipe, step, timestep, tensors):
    """At and below t_n = {t_n} the base model goes on alone."""
    rest = pipe.scheduler.timesteps[step + 1 :]
    if len(rest) and rest[0] <= {t_n}:
        {switch}
    return tensors


{before}'''


def snippet(info: dict, *, repo_id: str, base: str) -> str:
    """Python that loads the result into a stock diffusers pipeline and samples it as it was trained."""
    kind, hybrid = "full" if info.get("finetune") == "full" else "lora", fitting_sampler(info) == "hybrid"
    switch = {"lora": "pipe.disable_lora()", "full": "pipe.unet = base_unet"}[kind]
    before = {"lora": "pipe.enable_lora()  # before every picture\n", "full": ""}[kind]
    return _SNIPPET.format(
        unet_import=", UNet2DConditionModel" if kind == "full" else "",
        base=base,
        load=_LOAD[kind].format(
            repo_id=repo_id,
            base_unet="base_unet = pipe.unet\n" if hybrid else "",
            again="  # before every picture" if hybrid else "",
        ),
        hand_over=_HAND_OVER.format(t_n=info["t_n"], switch=switch, before=before) if hybrid else "",
        argument=", callback_on_step_end=hand_over" if hybrid else "",
    )


def _training(info: dict) -> list[tuple[str, str]]:
    t_n, resolution = info.get("t_n"), info.get("resolution")
    objective = "denoising" if t_n is None else f"ambient denoising, `{info.get('low_noise', 'skip')}` at t ≤ t_n"
    level = "none (clean)" if t_n is None else f"{t_n}, σ = {_sigma(info):.3f}" if isinstance(t_n, int) else "per image"
    size = "×".join(map(str, resolution)) if isinstance(resolution, list) else resolution
    rows = [
        ("noise level t_n", level),
        ("restored samples", _rounds(info)),
        ("objective", objective),
        ("space of the loss", info.get("loss_space")),
        ("prediction type", info.get("prediction_type")),
        ("trained weights", {"full": "the whole UNet"}.get(info.get("finetune"), "a LoRA")),
        ("images", info.get("images")),
        ("resolution", size),
        ("optimizer steps", info.get("step")),
        ("data (SHA-256 of the store's manifest)", f"`{info['data']}`" if info.get("data") else None),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _memorisation(folder: str | Path, info: dict, report: str | Path | None) -> str:
    if report is None:
        return "What this model has memorised of its training images **has not been measured**."
    measured = read_report(report)
    name, model = measured_model(measured, folder, info)
    train, heldout = measured["data"]["train"], measured["data"]["heldout"]
    sets = f"{train['n_images']} training images" + (f" and {heldout['n_images']} held-out ones" if heldout else "")
    how = (
        f"Measured by `eval.memorization` on {model['n_generated']} generated images against {sets}, compared by "
        f"`{measured['embedder']['name']}`. A model is judged by the worst of its samplers and attacks; all intervals hold "
        "at once."
    )
    rows = _figures(model)
    verdict = f"Verdict, **{model['verdict']['level']}**: {model['verdict']['text']}"
    return "\n\n".join([how, *([_table(rows)] if rows else []), verdict])


def read_report(path: str | Path) -> dict:
    """An evaluation's report.json of the schema that is understood here. Raises HubError."""
    try:
        report = read_json(path)
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
    found = {name: m for name, m in tuned.items() if Path(m["path"]).resolve() in places}
    if not found and len(tuned) == 1:
        steps = (None, info.get("step"))
        found = {n: m for n, m in tuned.items() if m["trained_t_n"] == info.get("t_n") and m["step"] in steps}
    if len(found) != 1:
        raise HubError(
            f"--memorization_report: none of its models ({', '.join(tuned) or 'no fine-tuned one'}) is surely the one in "
            f"{folder}; evaluate that"
        )
    return next(iter(found.items()))


def _figures(model: dict) -> list[tuple[str, str]]:
    """Rows for the worst sampler, its controls and the worst attack; none where there was no threshold."""
    if model["worst_case"] is None:
        return []
    worst, figures = model["worst_sampler"], model["samplers"][model["worst_sampler"]]
    rows = {row["name"]: row for row in model["worst_case"]["rows"]}
    row = rows[worst]
    found = [
        ("worst sampler", f"`{worst}`"),
        ("closer to a training image than the threshold", _interval(row["value"], row["low"], row["high"])),
    ]
    if row["copied"]:
        found.append(("copied share, corrected", _interval(*(row["copied"][k] for k in ("value", "low", "high")))))
    if (control := figures["share_above_threshold_as_many_heldout"]) is not None:
        found.append(("control: as near to as many held-out images", f"{control:.1%}"))
    found.append(("control: the most that the threshold, held-out images and base model reach", f"{row['control']:.1%}"))
    if model["own_sampler"] != worst:
        own = rows[model["own_sampler"]]
        found.append((f"as its owner samples it (`{own['name']}`)", _interval(own["value"], own["low"], own["high"])))
    attacks = [r for r in rows.values() if r["kind"] == "attack"]
    if attacks:
        most = max(attacks, key=lambda r: (r["above"], r["low"]))
        told = f"{most['value']:.2f} ({most['low']:.2f} to {most['high']:.2f}), chance is 0.50"
        found.append((f"AUC of the best of {len(attacks)} attacks (`{most['name']}`)", told))
    return found


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.1%} ({low:.1%} to {high:.1%})"
