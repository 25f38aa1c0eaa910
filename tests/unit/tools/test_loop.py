"""The loop: samples of the posterior at the level asked for, the lineage that says what they are, and what is refused."""

import copy
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from support.pictures import copy_emoji
from support.running import arguments, process_env, train_here
from support.stores import equal, latents_in, snapshot

from sdxl_ambient.config.parser import build_options
from sdxl_ambient.config.settings import settings_of
from sdxl_ambient.errors import InterchangeError, ModelError, OptionError, StoreError
from sdxl_ambient.formats.peft import save_lora, save_unet
from sdxl_ambient.formats.record import LORA_FILE, read_training_info
from sdxl_ambient.hub.card import model_card
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.loop import (
    __main__ as loop,
)
from sdxl_ambient.loop import (
    draw as loop_draw,
)
from sdxl_ambient.loop import (
    model as loop_model,
)
from sdxl_ambient.loop import (
    options as loop_options,
)
from sdxl_ambient.loop import (
    provenance as loop_provenance,
)
from sdxl_ambient.loop import (
    run as loop_run,
)
from sdxl_ambient.loop.settings import LoopSettings
from sdxl_ambient.models.load import load_encoders
from sdxl_ambient.models.lora import add_lora, add_text_lora
from sdxl_ambient.privacy.options import PrivacyOptions
from sdxl_ambient.provenance import hash_tensors, read_json, read_sealed, write_sealed
from sdxl_ambient.randomness import Randomness
from sdxl_ambient.store.build import build_store
from sdxl_ambient.store.checks import check_stores, observed_t_n
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.store.settings import StoreSettings

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, VARIANCE = 0.4, 0.5  # of Gaussian clean data, number by number


def draw_store(folder, encoders, schedule, **changes):
    """A store of six emoji in three shards in ``folder``/first, one of them with two captions; its images are beside it."""
    images = folder / "emoji"
    if not images.exists():
        copy_emoji(images, 6)
        twice = sorted(images.glob("*.png"))[0]
        (images / "copy.png").write_bytes(twice.read_bytes())
        (images / "copy.txt").write_text("another caption of the same picture")
    usual = dict(shard_size=2, noise_key_file=str(folder / "key"), keep_tokens=True)
    settings = StoreSettings(Geometry(64), **{**usual, **changes})
    build_store(images, folder / "first", encoders, schedule, settings, log=lambda message: None)
    return folder / "first"


@pytest.fixture(scope="module", autouse=True)
def loaded(miniature, encoders):
    """The miniature's encoders are not loaded anew for each round."""

    def load(base, *, vae=None, **keywords):
        return encoders if (base, vae) == (str(miniature), None) else load_encoders(base, vae=vae, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdxl_ambient.loop.provenance.load_encoders", load)
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory, encoders, schedule):
    return draw_store(tmp_path_factory.mktemp("loop"), encoders, schedule)


@pytest.fixture(scope="module")
def settings(miniature):
    """Settings of the loop, by what differs from the usual options."""

    def make(store, output, **changes):
        usual = dict(pretrained_model_name_or_path=str(miniature), latents_dir=str(store), output_dir=str(output))
        values = {**usual, "t_n": 300, "steps": 3, "batch_size": 2, **changes}
        return settings_of(LoopSettings, build_options(loop_options.LoopOptions, values))

    return make


@pytest.fixture(scope="module")
def second(first, settings):
    """The first store restored to t = 300 by the base model, beside it."""
    loop_run.restore_store(settings(first, first.parent / "second"), log=lambda message: None)
    return first.parent / "second"


def quietly(options, log=lambda message: None):
    return loop_run.restore_store(options, log=log)


def with_lora(unet, folder, data, **info):
    """A LoRA's folder whose record says that it was trained on ``data``."""
    tuned = copy.deepcopy(unet)
    add_lora(tuned, rank=2, alpha=1, targets=["attention"])
    generator = torch.Generator().manual_seed(0)
    for p in tuned.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
    save_lora(tuned, folder, {"t_n": 500, "data": data, "low_noise": "skip", "step": 7, **info})
    return tuned


# -- exactness ------------------------------------------------------------------------------------------------------


def law(schedule, x_n, t_n, t_m):
    """Mean and variance of p(x_m | x_n) in closed form, for clean data N(MEAN, VARIANCE)."""
    alpha = schedule.alpha(torch.tensor([t_m]))
    prior = alpha**2 * VARIANCE + 1 - alpha**2
    r, nu = schedule.transition(torch.tensor([t_m]), torch.tensor([t_n]))
    variance = 1 / (1 / prior + r**2 / nu**2)
    return variance * (alpha * MEAN / prior + r * x_n / nu**2), float(variance)


class Exact:
    """The network that knows Gaussian clean data, called as a UNet is. Keeps what it was told."""

    device = torch.device("cpu")

    def __init__(self, schedule):
        self.schedule, self.seen = schedule, []

    def __call__(self, x, t, **told):
        self.seen.append((t, told))
        alpha, sigma = (f(t).reshape(-1, *[1] * (x.ndim - 1)) for f in (self.schedule.alpha, self.schedule.sigma))
        return ((sigma * (x.double() - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)).to(x.dtype),)


def check_law(standardised):
    """Standard normal numbers, within five standard errors and what the steps' length takes from the variance."""
    n = standardised.numel()
    assert abs(float(standardised.mean())) < 5 / n**0.5
    assert abs(float(standardised.var()) - 1) < 5 * (2 / n) ** 0.5 + 0.02


@pytest.mark.parametrize("t_m", [0, 100, 300])
def test_samples_have_the_posterior_law_at_the_level_asked_for(schedule, t_m):
    """On Gaussian data with the exact denoiser, from two levels in one batch, in many steps."""
    t_n = torch.tensor([350, 500]).repeat(5_000)
    x_n = torch.where(t_n == 500, 1.3, -0.4).double()[:, None]
    network, randomness = Exact(schedule), Randomness(torch.Generator().manual_seed(1), len(t_n))
    x_m = loop_draw.draw_lower(lambda x, t: network(x, t)[0], schedule, x_n, t_n, t_m, 200, randomness)
    for level in (350, 500):
        rows = t_n == level
        mean, variance = law(schedule, x_n[rows], level, t_m)
        check_law((x_m[rows] - mean) / variance**0.5)
    last = network.seen[-1][0]
    assert network.seen[0][0].tolist() == t_n.tolist() and bool((last >= t_m).all())


def test_a_stores_samples_have_that_law(first, settings, schedule, tmp_path):
    """Through what reads and writes stores: 6,144 numbers, each given its own x_n."""
    store, network = LatentStore(first), Exact(schedule)
    captions = [i["captions"][0] for i in store.images]
    # Five of them, of which training would show the fourth here.
    store.images = [{**i, "captions": (captions[k:] + captions[:k])[:5]} for k, i in enumerate(store.images)]
    shown = LatentStore(first)
    shown.images = store.images
    assert shown[0, 0]["embeds"].ne(_load(first / store._prompts[captions[0]])[f"{captions[0]}.embeds"]).any()
    draw = loop_draw.RestoredLatentMaker(store, network, schedule, settings(first, tmp_path / "out", steps=100))
    x_m = {}
    for indices in draw.batches(store.images):
        x_m |= draw.restored(indices)
    x_n = latents_in(first)
    assert x_m.keys() == x_n.keys() and all(x.dtype == torch.float32 and x.shape == (4, 16, 16) for x in x_m.values())
    standardised = []
    for content, x in x_m.items():
        mean, variance = law(schedule, x_n[content].double(), 500, 300)
        standardised.append((x.double() - mean) / variance**0.5)
    # The pictures are not Gaussian, but the exact network's posterior takes them as given.
    check_law(torch.stack(standardised))
    prompts = {k: v for p in first.glob("prompts-*.safetensors") for k, v in _load(p).items()}
    told = [network.seen[k * 100][1] for k in range(3)]
    rows = torch.cat([t["encoder_hidden_states"] for t in told])
    assert all(torch.equal(e, prompts[f"{i['captions'][0]}.embeds"]) for e, i in zip(rows, store.images, strict=True))
    assert len(captions) == len(set(captions)) == 6  # so that another caption than the first is another text
    ids = torch.cat([t["added_cond_kwargs"]["time_ids"] for t in told])
    assert ids.tolist() == [i["time_ids"] for i in store.images]


def _load(path):
    with safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


# -- one sample per image, whatever the batch, the processes and interruptions ------------------------------------------


def draw_shards(first, output, options, unet, schedule, processes=1):
    """The shards of ``second``'s plan, by so many processes one after the other."""
    store = LatentStore(first)
    plan = read_json(first.parent / "second" / "plan.json")
    for rank in range(processes):
        state = SimpleNamespace(process_index=rank, num_processes=processes)
        todo = loop_draw.missing_shards(output, plan, state)
        loop_draw.write_samples(output, todo, loop_draw.RestoredLatentMaker(store, unet, schedule, options), quiet=True)
    return latents_in(output)


def test_batch_and_processes_change_nothing(first, second, settings, unet, schedule, tmp_path):
    want = latents_in(second)
    assert want.keys() == latents_in(first).keys() and len(want) == 6
    two = draw_shards(first, tmp_path / "two", settings(first, tmp_path / "o"), unet, schedule, processes=2)
    assert equal(want, two)
    files = [p.name for p in sorted(second.glob("latents-*"))]
    assert all((tmp_path / "two" / name).read_bytes() == (second / name).read_bytes() for name in files)
    alone = draw_shards(first, tmp_path / "one", settings(first, tmp_path / "o", batch_size=1), unet, schedule)
    for content, x in alone.items():
        torch.testing.assert_close(x, want[content], atol=1e-4, rtol=1e-4)  # a batch's size changes the last bits
    other = draw_shards(first, tmp_path / "seed", settings(first, tmp_path / "o", seed=1), unet, schedule)
    # Independent noise at t = 300 differs by about a unit; only the seed does that.
    assert all(float((x - want[content]).square().mean()) > 0.01 for content, x in other.items())


def test_a_round_draws_no_random_numbers_of_another(first, settings, schedule, tmp_path):
    drawn = []
    for lineage in ([], [{}]):
        store = LatentStore(first)
        store.lineage = lineage
        draw = loop_draw.RestoredLatentMaker(store, Exact(schedule), schedule, settings(first, tmp_path / "o"))
        drawn.append(draw.restored([1])[store.images[1]["content"]])
    assert float((drawn[0] - drawn[1]).square().mean()) > 0.01


def test_interrupted_and_resumed_equals_uninterrupted(first, second, settings, tmp_path):
    """A shard that is missing, and one that is damaged, are drawn again; what is there stays."""
    part = shutil.copytree(second, tmp_path / "part")
    before = snapshot(part)
    files = sorted(part.glob("latents-*"))
    (part / "manifest.json").unlink()
    files[0].unlink()
    damaged = files[1].read_bytes()[:-8]
    files[1].unlink()  # the copy may be a link
    files[1].write_bytes(damaged)
    stood = files[2].stat().st_mtime_ns
    quietly(settings(first, part))
    assert snapshot(part) == before and files[2].stat().st_mtime_ns == stood
    quietly(settings(first, part))  # confirms
    assert snapshot(part) == before


def content_of(store):
    """Every file of a store, but for the random name that the register knows it by."""
    files = snapshot(store)
    for name in ("plan.json", "manifest.json"):
        files[name] = {k: v for k, v in json.loads(files[name]).items() if k not in ("store_id", "checksum")}
    return files


@pytest.mark.slow
def test_two_real_processes_draw_what_one_draws(first, second, miniature, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "sdxl_ambient.loop",
    ]
    flags = dict(pretrained_model_name_or_path=miniature, latents_dir=first, output_dir=tmp_path / "two", t_n=300, steps=3)
    flags["batch_size"] = 2
    command = [*launch, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    run = subprocess.run(command, capture_output=True, text=True, env=process_env(), timeout=180)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("6 images restored to t_n = 300") == 1  # one process speaks
    assert content_of(tmp_path / "two") == content_of(second)
    run = subprocess.run([*command, "--seed", "1"], capture_output=True, text=True, env=process_env(), timeout=180)
    assert run.returncode != 0 and run.stderr.count("is of something else (round 1: seed: stored 0, wanted 1)") == 2


# -- the lineage ----------------------------------------------------------------------------------------------------------


def test_the_lineage_tells_how_the_samples_came_about(first, second, settings, unet, tmp_path):
    one, two = LatentStore(first), LatentStore(second)
    (one_round,) = two.lineage
    assert one_round["parent"] == one.hash and one_round["parent_levels"] == {"500": 6} and one_round["t_n"] == 300
    assert one_round["key_id"] == one.manifest["key_id"] is not None and "key_id" not in two.manifest
    own = hash_tensors(unet.state_dict())
    assert one_round["model"] == {"kind": "base", "weights": own} and one_round["base_model"] == own
    assert (one_round["steps"], one_round["seed"], one_round["foreign_model"], one_round["images_restored"]) == (
        3,
        0,
        False,
        6,
    )
    assert one_round["versions"]["torch"] == torch.__version__ and one.lineage == []
    assert all(i["t_n"] == 300 and i["observed_t_n"] == 500 for i in two.images)
    assert read_json(second / "plan.json")["restored"] == two.lineage
    assert two.manifest["tokens"] and two[0, 0]["tokens"].shape == (2, 77)
    assert [i["captions"] for i in two.images] == [i["captions"] for i in one.images]  # training draws from all of them
    # The second round, by a model that was trained on the first one's samples.
    with_lora(unet, tmp_path / "run", two.hash, t_n=300, restored=two.public_lineage)
    quietly(settings(second, tmp_path / "third", lora=str(tmp_path / "run"), t_n=100))
    three = LatentStore(tmp_path / "third")
    assert three.lineage[0] == one_round and len(three.lineage) == 2
    last = three.lineage[1]
    assert last["parent"] == two.hash and last["parent_levels"] == {"300": 6} and "key_id" not in last
    assert last["model"].items() >= {"kind": "lora", "t_n": 300, "data": two.hash, "step": 7}.items()
    assert all(i["t_n"] == 100 and i["observed_t_n"] == 500 for i in three.images)
    assert len({one.hash, two.hash, three.hash}) == 3
    two.lineage = [{**one_round, "key_id": None}]
    assert two.hash == last["parent"]  # as of any store, it says nothing of the noise
    drawn = latents_in(tmp_path / "third")
    assert drawn.keys() == latents_in(first).keys() and not equal(drawn, latents_in(second))


def test_nothing_of_the_machine_nor_the_key_is_in_a_restored_store(first, second):
    key = (first.parent / "key").read_text().strip()
    for path in second.iterdir():
        told = path.read_bytes()
        assert str(first.parent).encode() not in told and key.encode() not in told and bytes.fromhex(key) not in told


def test_a_restored_store_is_another_than_one_observed_at_its_level(first, second, encoders, schedule, tmp_path):
    """Else a model of one would pass for a model of the other."""
    observed = draw_store(tmp_path, encoders, schedule, t_n=300)
    assert LatentStore(observed).hash != LatentStore(second).hash
    assert observed_t_n(LatentStore(second)) == 500 and observed_t_n(LatentStore(observed)) == 300


def test_images_at_or_below_the_level_and_clean_ones_are_taken_over(encoders, schedule, settings, tmp_path):
    copy_emoji(tmp_path / "emoji", 6)
    rows = [json.loads(line) for line in (tmp_path / "emoji/metadata.jsonl").read_text().splitlines()]
    for row, level in zip(rows, (-1, 100, 300, 301, 700, None), strict=True):
        row["level"] = level
    (tmp_path / "emoji/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store, said = draw_store(tmp_path, encoders, schedule, t_n_column="level"), []
    manifest = quietly(settings(store, tmp_path / "out"), said.append)
    want = {None: None, 100: 100, 300: 300, 301: 300, 700: 300, 500: 300}
    before, after = latents_in(store), latents_in(tmp_path / "out")
    for old, new in zip(LatentStore(store).images, LatentStore(tmp_path / "out").images, strict=True):
        assert new["t_n"] == want[old["t_n"]] and new["observed_t_n"] == old["t_n"]
        assert torch.equal(before[old["content"]], after[new["content"]]) == (old["t_n"] == new["t_n"])
    assert manifest["counts"].items() >= {"images": 6, "restored": 3, "taken_over": 2, "clean": 1}.items()
    assert "3 images restored to t_n = 300; 2 at or below it and 1 clean ones taken over" in said[-1]
    assert manifest["restored"][0]["parent_levels"] == dict.fromkeys(("100", "300", "301", "500", "700", "none"), 1)


# -- models ----------------------------------------------------------------------------------------------------------


def test_the_model_is_the_one_that_was_trained(first, settings, unet, tmp_path):
    """A LoRA and a whole UNet restore with the weights that were saved."""
    tuned = with_lora(unet, tmp_path / "run", LatentStore(first).hash)
    whole = copy.deepcopy(unet)
    for p in whole.parameters():
        p.data *= 1.01
    save_unet(whole, tmp_path / "full", {"t_n": 500, "data": LatentStore(first).hash})
    store = LatentStore(first)
    item = store[0, 0]
    told = dict(encoder_hidden_states=item["embeds"][None], return_dict=False)
    told["added_cond_kwargs"] = {"text_embeds": item["pooled"][None], "time_ids": torch.tensor([item["time_ids"]])}
    x, t = item["x_n"][None], torch.tensor([400])
    for kind, path, model in (("lora", "run", tuned), ("unet", "full", whole)):
        options = settings(first, tmp_path / "o", **{kind: str(tmp_path / path)})
        loaded = loop_model.load_model(options, torch.float32)
        assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
        with torch.no_grad():
            torch.testing.assert_close(loaded(x, t, **told)[0], model(x, t, **told)[0], atol=1e-5, rtol=1e-5)
        assert not loop_provenance.check_history(options, store, loop_model.training_info(options))
    half = loop_model.load_model(settings(first, tmp_path / "o", lora=str(tmp_path / "run")), torch.bfloat16)
    halves = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in told.items()}
    halves["added_cond_kwargs"]["text_embeds"] = halves["added_cond_kwargs"]["text_embeds"].bfloat16()
    with torch.no_grad():
        assert half(x.bfloat16(), t, **halves)[0].dtype == torch.bfloat16


def histories(store):
    """Records of models that may have seen more of the images than their observations, and what is said of them."""
    own, other = {"data": store.hash, "t_n": 500}, {"data": "0" * 64, "t_n": 300}
    foreign = [{"parent": store.hash, "foreign_model": True}]
    return [
        ({"data": None}, "does not say what it was trained on"),
        ({**other, "t_n": None}, "was trained on other data, at t_n = none"),
        (other, "was trained on other data, at t_n = 300"),
        ({**other, "t_n": 700}, "was trained on other data, at t_n = 700"),
        ({**own, "low_noise": "clean"}, "was trained on the clean images too"),
        ({**own, "started_from": {"data": "0" * 64, "t_n": None}}, "was trained on other data, at t_n = none"),
        ({**own, "started_from": {}}, "does not say what it was trained on"),
        ({"data": "1" * 64, "t_n": 300, "restored": foreign}, "was trained on samples that a model of other data drew"),
    ]


def test_models_that_may_have_seen_more_are_refused(first, second, settings, unet, tmp_path):
    store = LatentStore(first)
    for info, message in histories(store):
        assert message in loop_provenance.seen_besides(info, store)
    with_lora(unet, tmp_path / "clean", "0" * 64, t_n=None)
    options = settings(first, tmp_path / "o", lora=str(tmp_path / "clean"))
    with pytest.raises(
        StoreError, match="--lora: .* was trained on other data, at t_n = none; .* t_n = 500 do.*--allow_for"
    ) as e:
        quietly(options)
    assert "\n" not in str(e.value) and not (tmp_path / "o").exists()
    # A model of the store, of what it was restored from, and of samples restored from either has seen nothing else.
    two = LatentStore(second)
    for seen in (store, two):
        for store_to_restore in (store, two):
            assert (
                loop_provenance.seen_besides(
                    {"data": seen.hash, "t_n": 1, "restored": seen.public_lineage}, store_to_restore
                )
                is None
            )


def test_what_a_foreign_model_drew_says_so(first, settings, unet, tmp_path, schedule):
    with_lora(unet, tmp_path / "clean", "0" * 64, t_n=None)
    said = []
    quietly(settings(first, tmp_path / "o", lora=str(tmp_path / "clean"), allow_foreign_model=True), said.append)
    assert any(s.startswith("warning: --lora was trained on other data, at t_n = none") for s in said)
    store = LatentStore(tmp_path / "o")
    assert store.lineage[0]["foreign_model"] is True
    (line,) = check_stores(store, None, schedule)
    assert "a model that may have seen more of the images drew them, so no t_n says what protects those" in line
    info = {"data": store.hash, "t_n": 300, "restored": store.public_lineage, "observed_t_n": 500}
    assert "a model of other data drew" in loop_provenance.seen_besides(info, LatentStore(first))
    card = model_card(tmp_path / "o", info, repo_id="me/x", license="openrail++")
    assert "A model that may have seen more of the images drew some of them" in card


def test_a_unet_of_another_architecture_can_not_restore(first, settings, unet, tmp_path):
    other = UNet2DConditionModel.from_config({**unet.config, "cross_attention_dim": 24})
    save_unet(other, tmp_path / "full", {"t_n": 500, "data": LatentStore(first).hash})
    options = settings(first, tmp_path / "o", unet=str(tmp_path / "full"))
    with pytest.raises(ModelError, match="--unet: .* is of another architecture than .*: its cross_attention_dim differs"):
        loop_model.load_model(options, torch.float32)


def test_a_lora_of_the_text_encoders_can_not_restore(first, settings, unet, encoders, tmp_path):
    tuned, text = copy.deepcopy(unet), copy.deepcopy(encoders.text_encoders)
    add_lora(tuned, rank=2, alpha=1, targets=["attention"])
    add_text_lora(text, rank=2, alpha=1)
    save_lora(tuned, tmp_path / "run", {"t_n": 500, "data": LatentStore(first).hash}, text)
    with pytest.raises(StoreError, match="--lora: .* changes text_encoder and text_encoder_2 too; only a LoRA of the UNet"):
        quietly(settings(first, tmp_path / "o", lora=str(tmp_path / "run")))
    assert not (tmp_path / "o").exists()
    with pytest.raises(InterchangeError, match="--lora: "):
        loop_model.load_model(settings(first, tmp_path / "o", lora=str(tmp_path / "run")), torch.float32)


# -- what is refused ----------------------------------------------------------------------------------------------------


def refused(options, message):
    with pytest.raises((StoreError, ModelError), match=message) as error:
        quietly(options)
    assert "\n" not in str(error.value)


def test_another_base_model_is_refused(first, settings, miniature, encoders, unet, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(miniature, base)
    scheduler = DDPMScheduler.from_pretrained(miniature, subfolder="scheduler")
    DDPMScheduler.from_config(scheduler.config, beta_end=0.013).save_pretrained(base / "scheduler")
    other = settings(first, tmp_path / "o", pretrained_model_name_or_path=str(base))
    refused(other, r"was made with another base model than .* \(schedule differ\)")
    vae = copy.deepcopy(encoders.vae)
    vae.decoder.conv_out.bias.data += 1
    vae.save_pretrained(tmp_path / "vae")
    refused(settings(first, tmp_path / "o", pretrained_vae_model_name_or_path=str(tmp_path / "vae")), r"\(vae differ\)")
    shutil.copytree(miniature / "scheduler", base / "scheduler", dirs_exist_ok=True)
    text = copy.deepcopy(encoders.text_encoders[1])
    text.text_projection.weight.data += 1e-3
    text.save_pretrained(base / "text_encoder_2")
    refused(other, r"\(text_encoders differ\)")
    with_lora(unet, tmp_path / "run", LatentStore(first).hash, prediction_type="v_prediction")
    refused(
        settings(first, tmp_path / "o", lora=str(tmp_path / "run")), "was trained to predict v_prediction, but .* epsilon"
    )
    assert not (tmp_path / "o").exists()


def test_a_level_that_is_not_lower_is_refused(first, second, settings, tmp_path):
    refused(settings(first, tmp_path / "o", t_n=500), "--t_n: 500 is not below the level of any image in .*first, t_n = 500")
    refused(
        settings(second, tmp_path / "o", t_n=300), "--t_n: 300 is not below the level of any image in .*second, t_n = 300"
    )
    assert not (tmp_path / "o").exists()


def test_another_round_is_refused_by_name(first, second, settings):
    before, store, (one_round,) = snapshot(second), LatentStore(first), LatentStore(second).lineage
    assert loop_run.reconcile_restored_plan(
        second, loop_run.make_plan(store, {**one_round, "versions": {}}, 1)
    ) == read_sealed(second / "plan.json")
    for change, message in (
        (dict(t_n=200), r"latent\.t_n: stored 300, wanted 200"),
        (dict(seed=1), "round 1: seed: stored 0, wanted 1"),
        (dict(steps=4), "round 1: steps: stored 3, wanted 4"),
        (dict(parent="0" * 64), "round 1: parent: stored "),
        (dict(captions="0" * 64), "round 1: captions: stored "),
    ):
        with pytest.raises(StoreError, match=f"the store .*second is of something else .*{message}.*use another folder"):
            loop_run.reconcile_restored_plan(second, loop_run.make_plan(store, {**one_round, **change}, 2))
    refused(settings(first, second, seed=1), "round 1: seed: stored 0, wanted 1")
    assert snapshot(second) == before


def test_damaged_plans_and_lost_ones_are_refused(second, tmp_path):
    part, plan = shutil.copytree(second, tmp_path / "part"), read_sealed(second / "plan.json")
    for text in ("{", "{}", json.dumps({**plan, "restored": []})):
        (part / "plan.json").write_text(text)
        with pytest.raises(StoreError, match="plan.json is damaged"):
            loop_run.reconcile_restored_plan(part, plan)
    write_sealed(part / "plan.json", {**plan, "restored": []})
    with pytest.raises(StoreError, match="is of another number of rounds"):
        loop_run.reconcile_restored_plan(part, plan)
    (part / "plan.json").unlink()
    with pytest.raises(StoreError, match="holds latents but no plan.json"):
        loop_run.reconcile_restored_plan(part, plan)
    manifest = read_sealed(part / "manifest.json")
    del manifest["images"][0]["observed_t_n"]
    write_sealed(part / "manifest.json", manifest)
    with pytest.raises(StoreError, match="manifest.json is damaged: it lacks 'observed_t_n'"):
        LatentStore(part)  # never taken for an observation at its new level


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(t_n=None), "--t_n: a value is required, a timestep from 0 to 998 below the store's"),
        (dict(t_n=-1), "--t_n: -1 is below the smallest allowed value, 0"),
        (dict(lora="nowhere"), "--lora: 'nowhere' does not exist"),
        (dict(lora=".", unet="."), "--unet: excludes --lora"),
        (dict(latents_dir=None), "--latents_dir: a value is required"),
        (dict(latents_dir="miniature"), "--latents_dir: 'miniature' is not a finished store: it has no manifest.json"),
        (dict(output_dir=None), "--output_dir: a value is required"),
        (dict(steps=0), "--steps: 0 is below the smallest allowed value, 1"),
        (dict(dtype="int8"), "--dtype: 'int8' is not one of float32, float16, bfloat16"),
    ],
)
def test_wrong_options_are_one_line(first, settings, tmp_path, changes, message):
    with pytest.raises(OptionError) as error:
        settings(first, tmp_path / "o", **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_observations_are_never_written_over(first, settings, tmp_path):
    for output, message in ((first, "lies in --latents_dir"), (first / "x", "lies in --latents_dir")):
        with pytest.raises(OptionError, match=message):
            settings(first, output)
    other = shutil.copytree(first, tmp_path / "other")
    with pytest.raises(OptionError, match="holds a store of something else than restored samples"):
        settings(first, other)


def test_the_command_line(first, miniature, tmp_path, capsys):
    flags = [
        "--pretrained_model_name_or_path",
        miniature,
        "--latents_dir",
        first,
        "--output_dir",
        tmp_path / "o",
        "--steps",
        1,
    ]
    assert loop.main([str(f) for f in (*flags, "--t_n", 500)]) == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("sdxl_ambient.loop: error: ")]
    assert "--t_n: 500 is not below" in line
    assert loop.main([str(f) for f in (*flags, "--t_n", 499)]) == 0
    assert "6 images restored to t_n = 499" in capsys.readouterr().out
    assert LatentStore(tmp_path / "o").images[0]["t_n"] == 499


# -- restored samples are no observations ---------------------------------------------------------------------------------


def test_no_noise_is_drawn_into_a_restored_store(first, second, encoders, schedule, tmp_path):
    restored = shutil.copytree(second, tmp_path / "restored")
    before = snapshot(restored)
    for t_n, allowed in ((300, False), (500, True)):
        settings = StoreSettings(Geometry(64), t_n, allow_second_observation=allowed, shard_size=2)
        with pytest.raises(StoreError, match="holds restored samples, and no noise is drawn into it; use another folder"):
            build_store(first.parent / "emoji", restored, encoders, schedule, settings, log=lambda message: None)
    assert snapshot(restored) == before


def test_restored_samples_are_no_noisy_latents_to_start_from(second, encoders, schedule, tmp_path):
    nested = shutil.copytree(second, tmp_path / "folder" / "restored")
    for folder, pre_noised in ((second, True), (second, False), (nested.parent, True)):
        settings = StoreSettings(Geometry(64), 300, pre_noised=pre_noised, instance_prompt="x")
        with pytest.raises(
            StoreError, match="--train_data_dir: .* is a store of restored samples.* t_n = 500.*--latents_dir"
        ):
            build_store(folder, tmp_path / "s", encoders, schedule, settings)
    assert not (tmp_path / "s").exists()


def test_a_restored_store_stands_for_the_observations_behind_it(first, second, encoders, schedule, tmp_path):
    """New noise beside it is a second observation, though the first store is gone; the same noise is none."""
    shutil.copytree(second, tmp_path / "restored")
    shutil.copytree(first.parent / "emoji", tmp_path / "emoji")
    seen = "6 of these images were observed before: .*restored holds samples restored from"
    with pytest.raises(StoreError, match=seen):
        draw_store(tmp_path, encoders, schedule, noise_key="none", noise_key_file=None)
    assert not (tmp_path / "first").exists()
    shutil.copy(first.parent / "key", tmp_path / "key")
    store = draw_store(tmp_path, encoders, schedule)
    assert equal(latents_in(store), latents_in(first))
    draw_store(tmp_path, encoders, schedule)  # a rerun of the first store with the restored one beside it


def test_privacy_is_not_accounted_at_the_new_level(first, second, miniature):
    images = str(first.parent / "emoji")
    for folders in ((str(second), images), (images, str(second))):
        values = dict(zip(("train_data_dir", "reference_data_dir"), folders, strict=True))
        with pytest.raises(OptionError, match="is a store of restored samples, which are no observations; .* --t_n 500"):
            build_options(PrivacyOptions, {"pretrained_model_name_or_path": str(miniature), **values})


# -- training on them -----------------------------------------------------------------------------------------------------


def test_training_goes_on_from_them_and_says_what_they_are(second, tmp_path, capsys):
    common = dict(latents_dir=second, max_train_steps=3, noise_key_file=None, train_batch_size=2, checkpointing_steps=3)
    assert train_here(arguments(None, tmp_path / "run", **common)) == 0
    (line,) = [s for s in capsys.readouterr().out.splitlines() if "restored samples" in s]
    assert line.startswith("note: 6 of 6 images of ") and "restored samples at t_n = 300" in line
    assert "observations at t_n = 500: not observations, and what protects the images stays what t_n = 500 promises" in line
    lineage = LatentStore(second).public_lineage
    with safe_open(str(tmp_path / "run" / LORA_FILE), "pt") as file:
        info = json.loads(file.metadata()["sdxl_ambient"])
    assert info == read_training_info(tmp_path / "run")
    assert info["t_n"] == 300 and info["observed_t_n"] == 500 and info["restored"] == lineage
    assert "key" not in json.dumps(info)
    assert read_json(tmp_path / "run/checkpoint-3/checkpoint.json")["progress"]["run"]["restored"] == lineage
    card = model_card(tmp_path / "run", info, repo_id="me/x", license="openrail++")
    assert "only as a sample at timestep t_n = 300 (σ = 0.640) that a model drew given its one **noisy** latent" in card
    assert "| restored samples | observed at t_n = 500; restored to t_n = 300 by the base model |" in card
    # A run that starts from it says so, and so carries what that had seen.
    started = dict(lora=tmp_path / "run", rank=None, lora_alpha=None)
    assert train_here(arguments(None, tmp_path / "more", **common, **started)) == 0
    assert read_training_info(tmp_path / "more")["started_from"] == info


def test_held_out_images_are_at_the_level_that_training_has(first, second, schedule):
    one, two = LatentStore(first), LatentStore(second)
    (line,) = check_stores(two, two, schedule)
    assert "not observations" in line
    with pytest.raises(StoreError, match="first is at t_n = 500, .*second at 300"):
        check_stores(two, one, schedule)
    at_300 = LatentStore(first)
    at_300.manifest["images"] = [{**i, "t_n": 300} for i in one.manifest["images"]]
    lines = check_stores(two, at_300, schedule)
    assert len(lines) == 2 and "second holds restored samples and " in lines[1] and "losses differ" in lines[1]
    assert "losses differ" in check_stores(at_300, two, schedule)[0]
    with pytest.raises(
        StoreError, match="--low_noise: 'clean' needs observations, .*second holds restored samples; use skip"
    ):
        check_stores(two, None, schedule, "clean")


def test_only_a_finished_round_is_read(second, tmp_path):
    part = shutil.copytree(second, tmp_path / "part")
    (part / "manifest.json").unlink()
    with pytest.raises(StoreError, match="not a finished store of latents"):
        LatentStore(part)
    assert PartialState().num_processes == 1
