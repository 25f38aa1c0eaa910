"""The shipped miniature: its splits, its tokenizers, its interface, and that it really is trained."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from benchmarks import train_miniature
from benchmarks.miniature import data as miniature_data
from benchmarks.miniature import models as miniature_models
from benchmarks.miniature import training as miniature_training
from benchmarks.miniature import unet as miniature_unet
from benchmarks.miniature import vae as miniature_vae
from sdxl_ambient.training.state import load_tree

MINIATURE = Path(__file__).parents[3] / "miniature"
PIPELINE = MINIATURE / "pipeline"


@pytest.fixture(scope="module")
def parts():
    return {name: miniature_data.read_emoji(MINIATURE / "data" / name) for name in miniature_data.SPLITS}


@pytest.fixture(scope="module")
def pipeline():
    pipe = StableDiffusionXLPipeline.from_pretrained(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def config(*names):
    return json.loads(PIPELINE.joinpath(*names).read_text())


def test_every_base_emoji_is_in_exactly_one_split(parts):
    sizes = {name: len(members) for name, members in parts.items()}
    assert sizes == {"pretrain": 1599, "finetune": 117, "heldout": 195}
    names = [e.file_name for members in parts.values() for e in members]
    assert len(names) == len(set(names)) == 1911
    for name, members in parts.items():
        on_disk = {p.name for p in (MINIATURE / "data" / name).glob("*.png")}
        assert on_disk == {e.file_name for e in members}


def test_pictures_are_64x64_with_lower_case_captions(parts):
    for e in (e for members in parts.values() for e in members):
        assert Image.open(io.BytesIO(e.png)).size == (64, 64)
        assert e.text and e.text == e.text.lower()


def test_split_rule_gives_the_shipped_splits(parts):
    everything = sorted((e for members in parts.values() for e in members), key=lambda e: e.file_name)
    assert miniature_data.split(everything) == parts


def test_no_near_duplicates_across_splits(parts):
    thumbs = {name: miniature_data.thumbnails(members) for name, members in parts.items()}
    for a, b in (("pretrain", "finetune"), ("pretrain", "heldout"), ("finetune", "heldout")):
        assert not {e.png for e in parts[a]} & {e.png for e in parts[b]}
        names = [{miniature_data.name_key(e) for e in parts[name]} for name in (a, b)]
        assert not names[0] & names[1]
        difference, correlation = miniature_data.pixel_similarity(np.concatenate([thumbs[a], thumbs[b]]))
        across = np.s_[: len(thumbs[a]), len(thumbs[a]) :]
        assert difference[across].min() > miniature_data.MAX_RMS
        assert correlation[across].max() < miniature_data.MIN_CORRELATION


@pytest.mark.parametrize(
    ("names", "same"),
    [
        (("man astronaut", "woman astronaut", "astronaut"), True),
        (("family: man, boy", "family: woman, girl, girl"), True),
        (("clock face one oclock", "clock face twelve-thirty"), True),
        (("woman walking facing right", "person walking"), True),
        (("keycap 7", "hash key"), False),  # by name; their pictures join them
        (("penguin", "polar bear"), False),
    ],
)
def test_name_key_drops_only_what_tells_variants_apart(names, same):
    keys = {miniature_data.name_key(miniature_data.Emoji("", name, b"")) for name in names}
    assert (len(keys) == 1) is same


def test_tokenizers_are_sdxl_s(pipeline):
    first, second = pipeline.tokenizer, pipeline.tokenizer_2
    cat = [49406, 320, 1125, 539, 320, 2368, 49407]
    for tokenizer, pad in ((first, 49407), (second, 0)):
        assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
        assert tokenizer("a photo of a cat").input_ids == cat
        assert tokenizer("A  photo of a CAT").input_ids == cat
        padded = tokenizer("a photo of a cat", padding="max_length", max_length=77).input_ids
        assert padded == cat + [pad] * 70
        assert len(tokenizer("cat " * 100, truncation=True, max_length=77).input_ids) == 77
    vocabulary = first.get_vocab()
    assert [vocabulary[s] for s in miniature_models.byte_symbols()] == list(range(256))


def test_interface_is_sdxl_s(pipeline):
    index = config("model_index.json")
    assert index["force_zeros_for_empty_prompt"] is True
    assert {k: v[1] for k, v in index.items() if isinstance(v, list) and v[0]} == {
        "scheduler": "EulerDiscreteScheduler", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer",
    }  # fmt: skip
    scheduler = config("scheduler", "scheduler_config.json")
    expected = {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
        "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": False,
        "interpolation_type": "linear", "timestep_type": "discrete",
    }  # fmt: skip
    assert {k: scheduler[k] for k in expected} == expected
    unet, first, second = pipeline.unet.config, pipeline.text_encoder.config, pipeline.text_encoder_2.config
    assert unet.addition_embed_type == "text_time" and unet.use_linear_projection
    assert unet.cross_attention_dim == first.hidden_size + second.hidden_size
    assert unet.projection_class_embeddings_input_dim == 6 * unet.addition_time_embed_dim + second.projection_dim
    assert pipeline.vae.config.force_upcast is False and unet.sample_size * pipeline.vae_scale_factor == 64
    assert {m.dtype for m in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)} == {
        torch.float32
    }


def test_small_enough_to_ship_and_safetensors_only():
    assert miniature_models.folder_bytes(PIPELINE) < 25e6
    weights = {p.suffix for p in PIPELINE.rglob("*") if p.is_file()}
    assert weights == {".json", ".safetensors"}


def test_encode_prompts_is_what_the_pipeline_computes(pipeline):
    captions = ["penguin", "a much longer caption of a red apple on a table"]
    ids = miniature_models.token_ids((pipeline.tokenizer, pipeline.tokenizer_2), captions)
    encoders = pipeline.text_encoder, pipeline.text_encoder_2
    with torch.no_grad():
        states, pooled = miniature_models.encode_prompts(encoders, ids)
        want, _, want_pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    torch.testing.assert_close(states, want)
    torch.testing.assert_close(pooled, want_pooled)


def test_autoencoder_restores_pictures_it_never_saw(pipeline):
    _, pixels = miniature_data.read_imagefolder(MINIATURE / "data" / "heldout")
    assert miniature_vae.psnr(pipeline.vae, pixels[:64]) > 26
    _, pixels = miniature_data.read_imagefolder(MINIATURE / "data" / "pretrain")
    latents = miniature_vae.encode(pipeline.vae, pixels[:128]) * pipeline.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=0.1)


@torch.no_grad()
def test_denoiser_is_trained_and_heeds_the_caption(pipeline):
    captions, pixels = miniature_data.read_imagefolder(MINIATURE / "data" / "pretrain")
    captions, pixels = captions[::25], pixels[::25]
    latents = miniature_vae.encode(pipeline.vae, pixels) * pipeline.vae.config.scaling_factor
    states, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.full((len(latents),), 700)
    losses = [
        miniature_training.denoising_loss(
            pipeline.unet, pipeline.scheduler.alphas_cumprod, latents, *conditioning, t, noise
        ).mean()
        for conditioning in ((states, pooled), (states * 0, pooled * 0), (states.roll(1, 0), pooled.roll(1, 0)))
    ]
    right, none, wrong = losses
    assert right < 0.1 and right < 0.9 * none and right < 0.8 * wrong, losses


def test_draws_with_the_stock_pipeline(pipeline):
    def draw(seed):
        generators = [torch.Generator().manual_seed(seed + i) for i in range(2)]
        return pipeline(
            ["red apple", "green heart"], height=64, width=64, num_inference_steps=4, guidance_scale=4.0,
            generator=generators, output_type="np",
        ).images  # fmt: skip

    images = draw(0)
    assert images.shape == (2, 64, 64, 3) and np.isfinite(images).all() and images.std() > 0.05
    np.testing.assert_array_equal(images, draw(0))
    assert np.abs(images - draw(1)).mean() > 0.01


def test_each_epoch_visits_each_picture_once():
    for epoch in range(2):
        steps = range(5 * epoch, 5 * epoch + 5)
        seen = torch.cat([miniature_training.batch_indices(23, 4, step, seed=0) for step in steps])
        assert len(set(seen.tolist())) == 20


def test_crops_and_their_mirror_images_carry_their_corners():
    """The corner that the time ids carry is where the view lies in the enlarged picture, mirrored or not."""
    x = torch.arange(64, dtype=torch.float).mul(3).expand(64, 64)
    pixels = torch.stack([x, x.T, 255 - x]).to(torch.uint8).expand(2, 3, 64, 64)
    views, corners = miniature_data.random_crops(pixels, 3, seed=0)
    assert views.shape == (4, 2, 3, 64, 64) and torch.equal(views[0], pixels) and not corners[0].any()
    size = (64 + miniature_data.ROOM,) * 2
    large = torch.nn.functional.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True)
    for view, place in zip(views[1:].flatten(0, 1), corners[1:].flatten(0, 1), strict=True):
        for flip in (0, 1):
            picture, shown = (large[0].flip(-1), view.flip(-1)) if flip else (large[0], view)
            (cx, cy) = miniature_data.mirrored(place[None], torch.tensor([flip]))[0].tolist()
            torch.testing.assert_close(shown.float(), picture[:, cy : cy + 64, cx : cx + 64], atol=0.51, rtol=0)
    whole = miniature_data.mirrored(torch.zeros(1, 2, dtype=torch.long), torch.tensor([1]))
    assert miniature_training.micro_conditioning(whole).tolist() == [[64, 64, 0, 0, 64, 64]]
    assert miniature_training.micro_conditioning(torch.tensor([[2, 7]])).tolist() == [[64, 64, 7, 2, 64, 64]]


def test_words_are_replaced_between_start_and_end_alone(pipeline):
    ids = miniature_models.token_ids((pipeline.tokenizer, pipeline.tokenizer_2), ["a red apple", "penguin"] * 200)
    first, second = miniature_unet.replace_words(ids, 0.5, torch.Generator().manual_seed(0))
    changed = first != ids[0]
    assert torch.equal(changed, second != ids[1]) and torch.equal(first[changed], second[changed])
    end = (ids[0] == 49407).int().argmax(1, keepdim=True)
    position = torch.arange(77)
    assert not changed[(position == 0) | (position >= end)].any()
    assert 0.15 < changed[(position > 0) & (position < end)].float().mean() < 0.35  # half of the rows, half of their words
    assert all(torch.equal(a, b) for a, b in zip(miniature_unet.replace_words(ids, 0.0, None), ids, strict=True))


def test_untaught_words_keep_their_embeddings(pipeline):
    encoders = miniature_models.build_text_encoders()
    ids = miniature_models.token_ids((pipeline.tokenizer, pipeline.tokenizer_2), ["apple"])
    miniature_unet.keep_untaught_words(encoders, ids)
    states, pooled = miniature_models.encode_prompts(encoders, [torch.full_like(i, 1234) for i in ids])
    (states.square().sum() + pooled.sum()).backward()
    gradients = [miniature_models.input_embeddings(e).weight.grad for e in encoders]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_interrupted_training_continues_exactly(tmp_path, parts, monkeypatch):
    few = {name: members[:8] for name, members in parts.items()}
    miniature_data.write_imagefolders(few, tmp_path / "data")

    def train(work_dir):
        train_miniature.main(
            f"--stage vae --output_dir {tmp_path} --work_dir {work_dir} --vae_steps 4 --vae_batch_size 2 "
            "--checkpointing_steps 2 --logging_steps 1".split()
        )
        return load_tree(work_dir / "vae.safetensors")["vae"]

    whole = train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        write = miniature_training.Log.__call__

        def stop_at_3(self, **record):
            write(self, **record)
            if record["step"] == 3:
                raise KeyboardInterrupt

        patch.setattr(miniature_training.Log, "__call__", stop_at_3)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts")
    resumed = train(tmp_path / "parts")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "vae_log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_the_unet_is_trained_and_an_interrupted_run_continues_exactly(tmp_path, parts, pipeline, monkeypatch):
    few = {name: members[:8] for name, members in parts.items()}
    miniature_data.write_imagefolders(few, tmp_path / "data")
    monkeypatch.setattr(miniature_models, "build_tokenizers", lambda path: (pipeline.tokenizer, pipeline.tokenizer_2))
    (tmp_path / "merges").touch()

    def train(work_dir):
        torch.manual_seed(0)  # of the VAE, which no stage before this one has trained
        train_miniature.main(
            f"--stage unet --output_dir {tmp_path} --work_dir {work_dir} --bpe_merges {tmp_path / 'merges'} --unet_steps 4 "
            "--unet_batch_size 2 --checkpointing_steps 2 --logging_steps 1 --crops 1 --device cpu --threads 1".split()
        )
        return load_tree(work_dir / "unet.safetensors")

    whole = train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        write = miniature_training.Log.__call__

        def stop_at_3(self, **record):
            write(self, **record)
            if record["step"] == 3:
                raise KeyboardInterrupt

        patch.setattr(miniature_training.Log, "__call__", stop_at_3)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts")
    resumed = train(tmp_path / "parts")
    start = miniature_models.build_denoiser(0).state_dict()
    for kind in ("modules", "average"):
        assert all(torch.equal(whole[kind][k], resumed[kind][k]) for k in start)
        moved = [name for name, value in start.items() if not torch.equal(value, whole[kind][name])]
        assert {"unet", "text_encoder", "text_encoder_2"} == {name.split(".")[0] for name in moved}
    lines = (tmp_path / "parts" / "unet_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4] and "heldout_loss" in json.loads(lines[-1])


def test_missing_input_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit):
        train_miniature.parse_args(["--stage", "data"])
    assert "needs --archive" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_miniature.parse_args(["--stage", "data", "--archive", str(tmp_path / "nothing.tgz")])
    assert "nothing.tgz: no such file" in capsys.readouterr().err
