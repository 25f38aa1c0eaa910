r"""The ambient loop: from a store of noisy latents, a store of samples at a lower noise level that a model draws given them.

    python -m sdxl_ambient.loop --pretrained_model_name_or_path BASE --lora RUN --latents_dir STORE --t_n 300 \
        --output_dir RESTORED

x_n *is* x_t at t = t_n, so the model's reverse chain from it down to t = m gives one sample of p(x_m | x_n). Training goes
on from those at t_n = m, the next model draws the next store, and so on: expectation-maximisation, a store for each round
(Bai et al., arXiv 2405.13712; Hosseintabar et al., arXiv 2510.12691). ``--low_noise restore`` does the like within a run, in
a buffer.

The new store has the layout of any (:mod:`sdxl_ambient.latents`), and plan.json and manifest.json say what it holds:
``restored`` is a link for each round, the oldest first, and every image has the level it was observed at, ``observed_t_n``.
Restored samples are no observations: what protects an image is its one observation behind them, as long as the models that
drew them have seen nothing else of it. See docs/LOOP.md.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import UNet2DConditionModel
from tqdm import tqdm

from sdxl_ambient.chain import Denoise, spaced_times, walk
from sdxl_ambient.checkpoint import CheckpointError, read_training_info
from sdxl_ambient.config import OptionError, option, parse_options
from sdxl_ambient.data import LatentStore, collate, sample_generator, spoken_levels
from sdxl_ambient.geometry import size_of
from sdxl_ambient.interchange import Adapter, InterchangeError, attach, lora_file, read_adapter
from sdxl_ambient.latents import processes
from sdxl_ambient.manifest import atomic, differences, hash_file, hash_json, hash_tensors, read_json, versions, write_json
from sdxl_ambient.models import (
    Denoiser,
    ModelError,
    check_sdxl,
    load_encoders,
    load_schedule,
    load_unet,
    load_unet_file,
    unet_file,
)
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.options import MAXIMUM_T_N, ModelOptions, check_writable
from sdxl_ambient.plan import StoreError, compare, fingerprint_of_text, restored_levels, rounds, shards
from sdxl_ambient.plan import spoken_levels as spoken
from sdxl_ambient.preview import DTYPES, is_store
from sdxl_ambient.randomness import Randomness
from sdxl_ambient.shard_files import readable, write_shard

# -- options ----------------------------------------------------------------------


@dataclass
class LoopOptions(ModelOptions):
    """``python -m sdxl_ambient.loop``."""

    lora: str | None = option(
        None,
        "LoRA of the UNet that the base model restores with: a folder or file of ours, of diffusers or of kohya's scripts",
    )
    unet: str | None = option(None, "in its place a fully fine-tuned UNet: a training run, a unet folder, or a file")
    latents_dir: str | None = option(None, "store of noisy latents, or of restored samples, to restore")
    t_n: int | None = option(
        None,
        "noise level to restore to, a timestep below the images'; images at or below it are taken over as they are",
        minimum=0,
        maximum=MAXIMUM_T_N,
    )
    steps: int = option(50, "reverse steps per image, an evaluation of the UNet each", minimum=1)
    batch_size: int = option(4, "images in each forward pass", minimum=1)
    dtype: str = option("float32", "precision of the UNet", choices=tuple(DTYPES))
    seed: int = option(0, "an image's randomness follows from this, its pixels and the round", minimum=0)
    allow_foreign_model: bool = option(
        False,
        "restore with a model that was not trained on this store alone: if it has seen more of these images, no t_n says "
        "what protects them",
    )
    output_dir: str | None = option(None, "folder for the new store")

    def validate(self) -> None:
        super().validate()
        if self.lora is not None and self.unet is not None:
            raise OptionError("--unet: excludes --lora; allowed is one of them, or neither for the base model")
        for name in ("lora", "unet"):
            value = getattr(self, name)
            if value is not None and not Path(value).exists():
                raise OptionError(f"--{name}: {value!r} does not exist")
        if not self.latents_dir:
            raise OptionError("--latents_dir: a value is required, a store of noisy latents")
        if not (Path(self.latents_dir) / "manifest.json").is_file():
            raise OptionError(f"--latents_dir: {self.latents_dir!r} is not a finished store: it has no manifest.json")
        if self.t_n is None:
            raise OptionError(f"--t_n: a value is required, a timestep from 0 to {MAXIMUM_T_N} below the store's")
        if not self.output_dir:
            raise OptionError("--output_dir: a value is required, a folder for the new store")
        check_writable("output_dir", self.output_dir)
        self._validate_output()

    def _validate_output(self) -> None:
        output, store = Path(self.output_dir).resolve(), Path(self.latents_dir).resolve()
        if output.is_relative_to(store):
            raise OptionError(
                f"--output_dir: {self.output_dir!r} lies in --latents_dir, which stays as it is; allowed is another folder"
            )
        if is_store(output) and restored_levels(output) is None:
            raise OptionError(
                f"--output_dir: {self.output_dir!r} holds a store of something else than restored samples; allowed is "
                "another folder"
            )

    @property
    def model(self) -> tuple[str, str] | None:
        """The option that names the model to restore with, and its value; None for the base model alone."""
        return next(((name, getattr(self, name)) for name in ("lora", "unet") if getattr(self, name) is not None), None)


# -- the model ----------------------------------------------------------------------


def load_model(options: LoopOptions, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet to restore with, frozen, on the CPU.

    Raises:
        ModelError, InterchangeError: one that can't be loaded, or that is not for this base.
    """
    base = options.pretrained_model_name_or_path
    if options.unet is not None:
        file = unet_file(options.unet)
        how = dict(dtype=dtype)
        unet = load_unet_file(file, base, revision=options.revision, **how) if file else load_unet(options.unet, **how)
        wanted = UNet2DConditionModel.load_config(base, subfolder="unet", revision=options.revision)
        names = ("in_channels", "cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim")
        if wrong := [n for n in names if unet.config.get(n) != wanted.get(n)]:
            raise ModelError(f"--unet: {options.unet!r} is of another architecture than {base}: its {wrong[0]} differs")
    else:
        unet = load_unet(base, dtype=dtype, revision=options.revision, variant=options.variant)
    if options.lora is not None:
        try:
            attach(unet, read_lora(options.lora, dict(unet.config)))
        except InterchangeError as error:
            raise InterchangeError(f"--lora: {error}") from None
    return unet.eval().requires_grad_(False)


def read_lora(lora: str, config: dict) -> Adapter:
    """A LoRA of the UNet alone, since a store holds what the base's own text encoders made of its captions.

    Raises:
        InterchangeError: one that is unreadable, for another architecture, or of the text encoders too.
    """
    adapter = read_adapter(lora_file(Path(lora)), config)
    if others := [part for part in adapter.parts if part != "unet"]:
        raise InterchangeError(f"{lora!r} changes {' and '.join(others)} too; only a LoRA of the UNet alone can restore")
    return adapter


def check_base(options: LoopOptions, store: LatentStore, schedule: NoiseSchedule, info: dict) -> None:
    """The base model must be the one that the store was made with, and what was trained must predict what it predicts.

    Raises:
        StoreError: naming the parts that differ.
        ModelError: another prediction type.
    """
    base, have = options.pretrained_model_name_or_path, store.manifest["fingerprint"]
    predicts = info.get("prediction_type", schedule.prediction_type)
    if predicts != schedule.prediction_type:
        raise ModelError(
            f"--{options.model[0]}: {options.model[1]!r} was trained to predict {predicts}, but the scheduler of {base} "
            f"says {schedule.prediction_type}"
        )
    wrong = ["schedule"] if store.schedule_hash != schedule.hash else []
    if not wrong:
        encoders = load_encoders(
            base,
            vae=options.pretrained_vae_model_name_or_path,
            revision=options.revision,
            variant=options.variant,
        )
        vae = {"vae": hash_tensors(encoders.vae.state_dict()), "scaling_factor": encoders.vae.config.scaling_factor}
        # Latents that were noisy already have no VAE.
        wanted = {**{k: v for k, v in vae.items() if k in have["latent"]}, **fingerprint_of_text(encoders)}
        wrong = [name for name, value in wanted.items() if {**have["latent"], **have["text"]}.get(name) != value]
    if wrong:
        raise StoreError(
            f"the store {store.folder} was made with another base model than {base} ({', '.join(wrong)} differ); give that"
        )


def told(options: LoopOptions) -> dict:
    """What training recorded of the model to restore with; {} for the base model, and where nothing is recorded."""
    if options.model is None:
        return {}
    name, path = options.model
    return read_training_info(lora_file(Path(path)) if name == "lora" else path)


def first_observations(rounds: Sequence[dict], data: str | None) -> str | None:
    """The hash of the store of observations behind some data: the data itself, or the first parent of restored samples."""
    return rounds[0]["parent"] if rounds else data


def seen_besides(info: dict | None, store: LatentStore) -> str | None:
    """What a model may have seen of a store's images besides their observations, in words; None for nothing.

    A model has seen nothing else if it was trained on the store, on one that the store was restored from, or on samples
    restored from either, and if the same holds of what its training started from and of the models that drew those samples.

    Args:
        info: what training recorded (training.json).
    """
    wanted = first_observations(store.rounds, store.hash)
    while info is not None:
        links = info.get("restored") or []
        level = "none" if info.get("t_n") is None else info["t_n"]
        if not info.get("data"):
            return "does not say what it was trained on"
        if first_observations(links, info["data"]) != wanted:
            return f"was trained on other data, at t_n = {level}"
        if info.get("low_noise") == "clean":
            return "was trained on the clean images too (--low_noise clean)"
        if any(link["foreign_model"] for link in links):
            return "was trained on samples that a model of other data drew"
        info = info.get("started_from")
    return None


def check_history(options: LoopOptions, store: LatentStore, info: dict) -> bool:
    """Whether the model may have seen more of the images than the store's observations, where that is allowed.

    Raises:
        StoreError: where it isn't.
    """
    found = None if options.model is None else seen_besides(info, store)
    if found is not None and not options.allow_foreign_model:
        name, path = options.model
        at = spoken(store.observed.values())
        raise StoreError(
            f"--{name}: {path!r} {found}; what it draws may tell more of these images than their observations at t_n = {at} "
            "do. Use a model trained on this store alone, or give --allow_foreign_model"
        )
    return found is not None


# -- what will be drawn ----------------------------------------------------------------------


def lowered(entry: dict, t_n: int) -> bool:
    """Whether an image of a store is restored to ``t_n``: neither clean nor at or below it already."""
    return entry["t_n"] is not None and entry["t_n"] > t_n


def make_link(options: LoopOptions, store: LatentStore, info: dict, foreign: bool) -> dict:
    """How this round's samples come about. No name of a file or folder is in it, and no key."""
    base = options.pretrained_model_name_or_path
    weights = dict(revision=options.revision, variant=options.variant)
    # In float32, into which every other precision goes without loss, so that the hash is that of the weights.
    unet = load_unet(base, **weights)
    base_hash = own_hash = hash_tensors(unet.state_dict())
    kind, path = options.model or ("base", None)
    if kind == "lora":
        try:
            read_lora(path, dict(unet.config))  # before anything is written
        except InterchangeError as error:
            raise InterchangeError(f"--lora: {error}") from None
        own_hash = hash_file(lora_file(Path(path)))
    elif kind == "unet":
        own_hash = hash_tensors(load_model(options, torch.float32).state_dict())
    before = Counter("none" if i["t_n"] is None else str(i["t_n"]) for i in store.images)
    link = {
        "t_n": options.t_n,
        "parent": store.hash,
        "parent_levels": dict(sorted(before.items())),
        "images_restored": sum(lowered(i, options.t_n) for i in store.images),
        "captions": hash_json([i["captions"][:1] for i in store.images]),
        "model": {"kind": kind, "weights": own_hash, **{n: info[n] for n in ("t_n", "data", "step") if n in info}},
        "base_model": base_hash,
        "foreign_model": foreign,
        "steps": options.steps,
        "seed": options.seed,
        "dtype": options.dtype,
        "versions": versions(),
    }
    # Whose noise the observations have is told once, by the round that read them.
    return link if store.rounds else {**link, "key_id": store.manifest.get("key_id")}


def make_plan(store: LatentStore, link: dict, shard_size: int) -> dict:
    """What the new store will hold, as :func:`sdxl_ambient.plan.make_plan`'s of a first one."""
    marks, t_m = store.manifest["fingerprint"], link["t_n"]
    images = [
        {**i, "t_n": t_m if lowered(i, t_m) else i["t_n"], "observed_t_n": store.observed[i["content"]]}
        for i in store.images
    ]
    return {
        "fingerprint": {**marks, "latent": {**marks["latent"], "t_n": t_m}},
        "shard_size": shard_size,
        "images": images,
        "restored": [*store.rounds, link],
    }


def settle(output: Path, wanted: dict) -> dict:
    """The plan to follow: the stored one if it agrees, so that an interrupted round goes on, else the wanted one.

    Raises:
        StoreError: a store of something else, or a damaged one.
    """
    path = output / "plan.json"
    if not path.exists():
        if next(output.glob("latents-*.safetensors"), None) is not None:
            raise StoreError(f"{output} holds latents but no plan.json, so what they are can't be told; use another folder")
        return wanted
    try:
        stored = read_json(path)
        found = compare(stored, wanted)
        for number, (old, new) in enumerate(zip(rounds(stored), rounds(wanted), strict=True), 1):
            # Another version of the software goes on, since what it is started with is recorded.
            old, new = ({k: v for k, v in link.items() if k != "versions"} for link in (old, new))
            found += differences(old, new, f"round {number}: ")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged, or of another number of rounds ({error}); use another folder") from None
    if found:
        raise StoreError(f"the store {output} is of something else ({'; '.join(found)}); use another folder")
    return {**wanted, "shard_size": stored["shard_size"], "restored": stored["restored"]}


def decide(options: LoopOptions, store: LatentStore, schedule: NoiseSchedule, processes: int, say) -> dict:
    """Check everything, and give the plan to follow, which is then on disk. The main process calls it.

    Raises:
        StoreError, ModelError, InterchangeError, CheckpointError: with one line that says what is wrong.
    """
    if not any(lowered(i, options.t_n) for i in store.images):
        raise StoreError(
            f"--t_n: {options.t_n} is not below the level of any image in {store.folder}, t_n = {spoken_levels(store)}"
        )
    info = told(options)
    foreign = check_history(options, store, info)
    check_base(options, store, schedule, info)
    if foreign:
        say(f"warning: --{options.model[0]} {seen_besides(info, store)}, and --allow_foreign_model lets it restore")
    link = make_link(options, store, info, foreign)
    size = max(1, min(store.manifest["shard_size"], -(-len(store) // processes)))
    plan = settle(Path(options.output_dir), make_plan(store, link, size))
    write_json(Path(options.output_dir) / "plan.json", plan)
    return plan


def decide_on_main(options: LoopOptions, store: LatentStore, schedule: NoiseSchedule, state: PartialState, say) -> dict:
    """:func:`decide`'s plan on every process, or its error."""
    decision: dict = {}
    if state.is_main_process:
        try:
            decision = decide(options, store, schedule, state.num_processes, say)
        except (StoreError, ModelError, InterchangeError, CheckpointError, OSError) as error:
            decision = {"error": str(error)}
    if state.num_processes > 1:
        decision = gather_object([decision])[0]
    if "error" in decision:
        raise StoreError(decision["error"])
    return decision


# -- drawing ----------------------------------------------------------------------


def draw_lower(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x_n: torch.Tensor,
    t_n: torch.Tensor,
    t_m: int,
    steps: int,
    randomness: Randomness,
) -> torch.Tensor:
    """A sample of p(x_m | x_n) for each row of ``x_n`` (batch, …): the reverse chain from t_n (batch,) down to exactly t_m.

    The times fall as :func:`sdxl_ambient.chain.restore`'s do, quadratically, so that steps get shorter towards t_m.
    """
    times = spaced_times(t_n, torch.full_like(t_n, t_m), steps, power=2)
    return walk(denoise, schedule, x_n, times, randomness)


@dataclass
class Draw:
    """Makes a new store's latents of ``store``'s, the parent."""

    store: LatentStore
    unet: torch.nn.Module
    schedule: NoiseSchedule
    options: LoopOptions

    def __post_init__(self):
        # Training draws one of an image's captions each time; its one sample is drawn given the first.
        self.store = copy.copy(self.store)
        self.store.images = [{**i, "captions": i["captions"][:1]} for i in self.store.images]
        self.index = {i["content"]: k for k, i in enumerate(self.store.images)}
        self.purpose = f"loop round {len(self.store.rounds) + 1}"  # no round draws the random numbers of another

    def batches(self, entries: Sequence[dict]) -> Iterator[list[int]]:
        """The images of a shard that are restored, in the parent's numbers: those of one size, in forward passes."""
        groups: dict[tuple, list[int]] = {}
        for entry in entries:
            index = self.index[entry["content"]]
            if lowered(self.store.images[index], self.options.t_n):
                groups.setdefault(size_of(entry), []).append(index)
        for members in groups.values():
            for start in range(0, len(members), self.options.batch_size):
                yield members[start : start + self.options.batch_size]

    def restored(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """x_m (4, h, w) of some images, float32 on the CPU, by content.

        Raises:
            ModelError: the UNet gives NaN or infinity.
        """
        batch = collate([self.store[0, index] for index in indices])
        device, dtype = self.unet.device, DTYPES[self.options.dtype]
        generators = [sample_generator(self.options.seed, self.purpose, content) for content in batch.contents]
        x_m = draw_lower(
            Denoiser(self.unet, batch.conditioning.to(device, dtype), dtype),
            self.schedule,
            batch.x_n.to(device),
            batch.t_n,
            self.options.t_n,
            self.options.steps,
            Randomness(generators, len(indices)),
        )
        x_m = x_m.float().cpu()
        if not bool(torch.isfinite(x_m).all()):
            raise ModelError("the UNet gives values that are not finite; use --dtype bfloat16 or float32")
        return {content: x.clone() for content, x in zip(batch.contents, x_m, strict=True)}

    def taken_over(self, entries: Sequence[dict]) -> dict[str, torch.Tensor]:
        """The latents of a shard that stay as they are."""
        kept = [i["content"] for i in entries if not lowered(self.store.images[self.index[i["content"]]], self.options.t_n)]
        return {content: self.store[0, self.index[content]]["x_n"].contiguous() for content in kept}


def whole(path: Path, names: Sequence[str]) -> bool:
    """Whether a shard is there. A damaged one is drawn again, which gives the same samples: they follow from the seed."""
    try:
        return readable(path, names)
    except StoreError:
        return False


def missing_shards(output: Path, plan: dict, state: PartialState) -> list[tuple[str, list[dict]]]:
    """This process's share of the shards, those that aren't there yet."""
    mine = shards(plan)[state.process_index :: state.num_processes]
    return [(name, entries) for name, entries in mine if not whole(output / name, [i["content"] for i in entries])]


def write_samples(output: Path, todo: list[tuple[str, list[dict]]], draw: Draw, quiet: bool = False) -> None:
    """Make some shards, each written once it is whole."""
    total = sum(len(entries) for _, entries in todo)
    with tqdm(total=total, desc="restoring", unit="img", disable=quiet, mininterval=1) as bar:
        for name, entries in todo:
            tensors = draw.taken_over(entries)
            bar.update(len(tensors))
            for indices in draw.batches(entries):
                tensors |= draw.restored(indices)
                bar.update(len(indices))
            write_shard(output / name, tensors)


def share_texts(store: LatentStore, output: Path) -> dict:
    """Give the new store its parent's captions, in links where the file system has them. Returns what its manifest says."""
    told = {name: store.manifest[name] for name in ("prompts", "tokens") if store.manifest.get(name)}
    for name in sorted({*told["prompts"].values(), *([told["tokens"]] if "tokens" in told else [])}):
        with atomic(output / name) as temporary:
            try:
                os.link(store.folder / name, temporary)
            except OSError:
                shutil.copyfile(store.folder / name, temporary)
    return told


# -- the whole store ----------------------------------------------------------------------


def restore_store(options: LoopOptions, state: PartialState | None = None, say=print) -> dict:
    """Restore a store, finish an interrupted round, or confirm that the store there is what is asked for. Returns its
    manifest.

    Every process calls it; each restores its own share.

    Raises:
        StoreError, ModelError, InterchangeError, CheckpointError: with one line that says what is wrong.
    """
    state = state or PartialState()
    say = say if state.is_main_process else (lambda message: None)
    output, store = Path(options.output_dir), LatentStore(options.latents_dir)
    check_sdxl(options.pretrained_model_name_or_path, options.revision)
    schedule = load_schedule(options.pretrained_model_name_or_path, options.revision)
    plan = decide_on_main(options, store, schedule, state, say)
    if todo := missing_shards(output, plan, state):
        unet = load_model(options, DTYPES[options.dtype]).to(state.device)
        write_samples(output, todo, Draw(store, unet, schedule, options), quiet=not state.is_main_process)
    state.wait_for_everyone()
    manifest = {**plan, **counted(store, plan)}
    if state.is_main_process:
        manifest |= share_texts(store, output)
        write_json(output / "manifest.json", manifest)
        counts = manifest["counts"]
        say(
            f"{output}: {counts['restored']} images restored to t_n = {options.t_n}; {counts['taken_over']} at or below it "
            f"and {counts['clean']} clean ones taken over as they were"
        )
    state.wait_for_everyone()
    return manifest


def counted(store: LatentStore, plan: dict) -> dict:
    """What the manifest says beside the plan. Names of files that a first store skipped are in that one's alone."""
    clean = sum(i["t_n"] is None for i in plan["images"])
    restored = plan["restored"][-1]["images_restored"]
    own = {"skipped": 0, "restored": restored, "taken_over": len(plan["images"]) - restored - clean, "clean": clean}
    return {"counts": {**store.manifest["counts"], **own}, "skipped": [], "near_duplicates": None, "versions": versions()}


def main(argv: list[str] | None = None) -> int:
    options = parse_options(LoopOptions, argv, prog="sdxl_ambient.loop", description=__doc__)
    try:
        restore_store(options, processes())
    except (StoreError, ModelError, InterchangeError, CheckpointError, OSError) as error:
        print(f"sdxl_ambient.loop: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
