"""The preview of noise levels: its closed forms, its pictures, and that it keeps clean images where they belong."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import copy_emoji
from support.stores import snapshot

from sdxl_ambient import probe as preview_probe
from sdxl_ambient.images.geometry import Geometry
from sdxl_ambient.images.load import load_rgb
from sdxl_ambient.models.vae import encode_image
from sdxl_ambient.noise import levels
from sdxl_ambient.preview import (
    __main__ as preview,
)
from sdxl_ambient.preview import (
    figures as preview_figures,
)
from sdxl_ambient.preview import (
    picture as preview_picture,
)
from sdxl_ambient.preview import (
    run as preview_run,
)
from sdxl_ambient.spread import spread
from sdxl_ambient.store.scan import content_hash

pytestmark = pytest.mark.usefixtures("one_thread")

T_N = ("300", "800")


def command(miniature, images, output, **changes) -> list[str]:
    flags = {
        "pretrained_model_name_or_path": miniature, "train_data_dir": images, "output_dir": output, "resolution": 64,
        "num_images": 3, "posterior_samples": 1, "steps": 2, "device": "cpu", "t_n": T_N, **changes,
    }  # fmt: skip
    words = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return copy_emoji(tmp_path_factory.mktemp("data") / "images", 3)


@pytest.fixture(scope="module")
def made(miniature, images, tmp_path_factory):
    """A finished preview of three images at two levels. Not to be changed."""
    output = tmp_path_factory.mktemp("made") / "preview"
    assert preview.main(command(miniature, images, output)) == 0
    return output


# -- closed forms ------------------------------------------------------------------------------------


def test_psnr_by_hand():
    black, one = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    one[0, 0, 0] = 48  # MSE = 48²/48 = 48
    assert preview_probe.psnr_db(one, black) == pytest.approx(10 * math.log10(255**2 / 48), abs=1e-12)
    assert preview_probe.psnr_db(np.full_like(black, 255), black) == pytest.approx(0, abs=1e-12)
    assert preview_probe.psnr_db(black, black) == pytest.approx(10 * math.log10(12 * 255**2))


def test_correlation_is_of_shape_and_not_of_brightness():
    ramp = np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    image, lighter, mirrored = (Image.fromarray(a) for a in (ramp, ramp + 100, np.ascontiguousarray(ramp[:, ::-1])))
    assert preview_probe.correlation(image, lighter) == pytest.approx(1, abs=1e-9)
    assert preview_probe.correlation(image, mirrored) == pytest.approx(-1, abs=1e-3)
    assert preview_probe.correlation(image, Image.new("RGB", (64, 64), "red")) == 0


@pytest.mark.parametrize("variance", [0.3, 1.0, 2.5])
def test_linear_reconstruction_is_the_best_one(schedule, variance):
    for t in (50, 500, 950):
        alpha, sigma = float(schedule.alpha(torch.tensor([t]))), float(schedule.sigma(torch.tensor([t])))
        one = torch.ones(1, dtype=torch.float64)
        gain = float(preview_figures.linear_reconstruction(one, alpha, sigma, variance))

        def error(g, alpha=alpha, sigma=sigma):  # E (g x_n − x_0)² in units of s²
            return (g * alpha - 1) ** 2 + g**2 * sigma**2 / variance

        assert error(gain) == pytest.approx(preview_figures.linear_error(alpha, sigma, variance), abs=1e-12)
        assert error(gain) < min(error(gain * 1.001), error(gain * 0.999))
        mean = preview_figures.linear_reconstruction(alpha * 3 * one, alpha, sigma, variance, 3.0)
        assert float(mean) == pytest.approx(3, abs=1e-12)


def test_linear_reconstruction_agrees_with_least_squares():
    generator = torch.Generator().manual_seed(0)
    x_0 = 1.5 * torch.randn(200_000, generator=generator, dtype=torch.float64) + 0.7
    x_n = 0.6 * x_0 + 0.8 * torch.randn(200_000, generator=generator, dtype=torch.float64)
    slope, intercept = np.polyfit(x_n.numpy(), x_0.numpy(), 1)
    want = slope * x_n + intercept
    assert (preview_figures.linear_reconstruction(x_n, 0.6, 0.8, 1.5**2, 0.7) - want).abs().max() < 0.05


def test_linear_reconstruction_gets_worse_with_t_n(schedule):
    found = []
    for t in range(0, 1000, 37):
        alpha, sigma = (float(f(torch.tensor([t]))) for f in (schedule.alpha, schedule.sigma))
        found.append(preview_figures.decibel(preview_figures.linear_error(alpha, sigma, 0.8)))
    assert all(a > b for a, b in zip(found[:-1], found[1:], strict=True))


def test_moments_are_about_each_channels_mean():
    x_0 = torch.zeros(2, 4, 2, 2)
    x_0[:, 1] = 5.0
    x_0[0, 2], x_0[1, 2] = 1.0, 3.0
    mean, variance = preview_figures.latent_moments(x_0)
    assert mean.dtype == torch.float64 and mean.flatten().tolist() == [0, 5, 2, 0] and variance == 0.25


def test_identification_by_hand():
    x_0 = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert [preview_figures.nearest(q, x_0) for q in torch.tensor([[0.2, 0.1], [0.4, 0.0], [0.1, 1.9]])] == [0, 0, 2]
    assert preview_figures.nearest(torch.tensor([0.5, 0.0]), x_0) == 0  # the first of equals
    # Shown are the last two: an estimate that is nearest to the first, which isn't shown, is found among those shown.
    shown = [SimpleNamespace(index=1), SimpleNamespace(index=2)]
    run = SimpleNamespace(x_0=x_0, shown=shown)
    assert preview_run.Preview.identified(run, shown[0], torch.tensor([0.4, 0.0]), 1.0) == {
        "shown": True,
        "candidates": False,
    }
    assert preview_run.Preview.identified(run, shown[0], torch.tensor([0.4, 0.0]), 0.5) == {
        "shown": True,
        "candidates": True,
    }
    assert preview_run.Preview.identified(run, shown[1], torch.tensor([0.4, 0.0]), 1.0) == {
        "shown": False,
        "candidates": False,
    }


def test_images_are_taken_evenly():
    assert spread(range(4), 9) == [0, 1, 2, 3]
    assert spread(range(100), 4) == [0, 25, 50, 75]
    assert all(len(set(spread(range(n), k))) == min(n, k) for n in range(1, 30) for k in range(1, 30))


def test_decoding_is_the_way_back_from_encoding():
    """An identity for a VAE, with statistics as newer VAEs have them."""
    config = SimpleNamespace(scaling_factor=0.5, latents_mean=[0.1, -0.2, 0.3], latents_std=[0.5, 2.0, 1.5])
    vae = SimpleNamespace(config=config, device="cpu", dtype=torch.float32)
    vae.encode = lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))
    vae.decode = lambda x: SimpleNamespace(sample=x)
    eight = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    image = preview_probe.decode_latent(vae, encode_image(vae, eight / 127.5 - 1))
    assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1).long(), eight)


# -- a preview ------------------------------------------------------------------------------------


def test_every_number_is_that_of_the_tiles(made):
    found = json.loads((made / "preview.json").read_text())
    assert found["holds_clean_images"] is True and found["complete"] is True
    assert list(found["levels"]) == list(T_N) and found["candidates"] == len(found["images"]) == 3
    for image in found["images"]:
        reference = load_rgb(made / image["round_trip"]["tile"])
        for entry in image["levels"].values():
            for tile in (entry["noisy"], entry["denoised"], *entry["samples"]):
                picture = load_rgb(made / tile["tile"])
                assert picture.size == (64, 64)
                again = preview_probe.compare(picture, reference)
                assert again == {"psnr_db": tile["psnr_db"], "correlation": tile["correlation"]}
    for t, level in found["levels"].items():
        entries = [image["levels"][t] for image in found["images"]]
        assert level["denoised"]["latent_mse"] == pytest.approx(np.mean([e["denoised"]["latent_mse"] for e in entries]))
        shares = [e["identified"]["noisy"]["candidates"] for e in entries]
        assert level["identification_rate"]["noisy"]["candidates"] == pytest.approx(np.mean(shares))


def test_more_noise_shows_less(made):
    low, high = json.loads((made / "preview.json").read_text())["levels"].values()
    for what in ("linear", "linear_expected", "denoised"):
        assert low[what]["latent_psnr_db"] > high[what]["latent_psnr_db"]
    # One set's linear reconstructions are as good as expected, to sampling error: their moments are that set's.
    assert low["linear"]["latent_mse"] == pytest.approx(low["linear_expected"]["latent_mse"], rel=0.1)
    for what in ("noisy", "denoised"):
        assert low[what]["correlation"] > high[what]["correlation"]


def test_the_noisy_tile_is_the_stored_latent_decoded(made, images, encoders, schedule):
    found = json.loads((made / "preview.json").read_text())["images"][0]
    image = load_rgb(images / found["file"])
    content = content_hash(image)
    x_0 = encode_image(encoders.vae, Geometry(64).apply(image, content)[0])
    z = torch.randn(x_0.shape, generator=preview_probe.preview_generator(0, content, 300, "observation"))
    x_n = schedule.observe(x_0[None], levels(300, 1), z[None])[0]
    tile = load_rgb(made / found["levels"]["300"]["noisy"]["tile"])
    assert preview_probe.decode_latent(encoders.vae, x_n).tobytes() == tile.tobytes()


def test_the_picture_has_every_tile(made):
    side, gap, group = 128, preview_picture.GAP, preview_picture.GROUP_GAP
    with Image.open(made / "preview.png") as image:
        image.load()
        assert image.width == 2 * preview_picture.PAD + 2 * side + gap + 2 * (group + 3 * side + 2 * gap)
        assert image.height > preview_picture.TOP + 3 * (side + 52)
        found = json.loads((made / "preview.json").read_text())
        tile = load_rgb(made / found["images"][0]["original"]).resize((side, side), Image.Resampling.NEAREST)
        left, top = preview_picture.PAD, preview_picture.TOP
        assert image.crop((left, top, left + side, top + side)).tobytes() == tile.tobytes()
    assert preview_picture.tile_side(1024) == 144 and preview_picture.tile_side(32) == 128
    lines = preview_picture.wrap("as many words as fit in a line, and Donaudampfschifffahrtsgesellschaft", 13, 100)
    assert len(lines) > 2 and lines[-1] == "Donaudampfschifffahrtsgesellschaft"


def test_an_image_is_the_same_in_every_set(made, images, miniature, tmp_path):
    """Neither other images nor their order, nor the other levels, change its noise or its tiles."""
    alone = tmp_path / "alone"
    copy_emoji(alone, 2)
    last = sorted(images.glob("*.png"))[1]
    for path in alone.glob("*.png"):
        if path.name != last.name:
            path.unlink()
    (alone / "metadata.jsonl").write_text(
        "".join(x + "\n" for x in (images / "metadata.jsonl").read_text().splitlines() if last.name in x)
    )
    assert preview.main(command(miniature, alone, tmp_path / "p", t_n="800")) == 0
    (folder,) = (tmp_path / "p/tiles").iterdir()
    for path in folder.iterdir():
        assert path.read_bytes() == (made / "tiles" / folder.name / path.name).read_bytes()


# -- the same bytes, whatever happens ------------------------------------------------------------------------------------


def test_an_interrupted_preview_goes_on_and_gives_the_same_bytes(made, images, miniature, tmp_path, monkeypatch, capsys):
    output, add, count = tmp_path / "preview", preview_run.Preview.add_entry, []

    def killed(self, *arguments):
        if len(count) == 4:
            raise OSError("killed")
        count.append(0)
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preview_run.Preview, "add_entry", killed)
        assert preview.main(command(miniature, images, output)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "sdxl_ambient.preview: error: killed"
    stored = json.loads((output / "preview.json").read_text())
    assert stored["complete"] is False and sum(len(i["levels"]) for i in stored["images"]) == 4
    lost = output / stored["images"][0]["levels"]["300"]["denoised"]["tile"]
    lost.unlink()
    made_now = []
    monkeypatch.setattr(preview_run.Preview, "add_entry", lambda self, *a: (made_now.append(a[1]), add(self, *a)))
    assert preview.main(command(miniature, images, output)) == 0
    assert made_now == [300, 800, 800]
    assert snapshot(output) == snapshot(made)


def test_the_picture_can_be_made_again_alone(made, tmp_path):
    import shutil

    output = tmp_path / "copy"
    shutil.copytree(made, output)
    (output / "preview.png").unlink()
    assert preview.main(["--redraw", "--output_dir", str(output)]) == 0
    assert snapshot(output) == snapshot(made)


# -- captions ------------------------------------------------------------------------------------


def test_without_captions_images_need_none_and_the_model_is_told_none(images, miniature, encoders, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    copy_emoji(bare, 2)
    (bare / "metadata.jsonl").unlink()
    told, reconstruct = [], preview_run.Preview.reconstruct

    def spy(self, image, *rest):
        told.append(image.conditioning)
        return reconstruct(self, image, *rest)

    monkeypatch.setattr(preview_run.Preview, "reconstruct", spy)
    assert preview.main(command(miniature, bare, tmp_path / "a", t_n="500", caption="false", posterior_samples=0)) == 0
    assert len(told) == 2 and not any(c.prompt_embeds.any() or c.pooled.any() for c in told)
    found = json.loads((tmp_path / "a/preview.json").read_text())
    assert [i["caption"] for i in found["images"]] == [None, None] and found["levels"]["500"]["samples"] == {}
    assert preview.main(command(miniature, bare, tmp_path / "b", t_n="500")) == 2


# -- privacy and refusals ------------------------------------------------------------------------------------


def test_it_says_first_that_it_holds_clean_images(made, capsys):
    preview.main(["--redraw", "--output_dir", str(made)])
    assert "holds clean images" in capsys.readouterr().out.splitlines()[0]


def test_no_key_is_read_and_the_noise_is_its_own(monkeypatch):
    assert not {"noise_key", "draw_z", "key_id"} & vars(preview).keys()
    draw = {
        torch.randn(4, generator=preview_probe.preview_generator(seed, content, t, purpose)).sum().item()
        for seed in (0, 1) for content in ("a", "b") for t in (100, 101) for purpose in ("observation", "sample 0")
    }  # fmt: skip
    assert len(draw) == 16


def refused(capsys, argv) -> str:
    with pytest.raises(SystemExit) as stop:
        preview.main(argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(t_n=["100", "100"]), "--t_n: 100 is given twice"),
        (dict(t_n="1000"), "--t_n: 1000 is above the largest allowed value, 998"),
        (dict(t_n="none"), "--t_n: 'none' is not a whole number"),
        (dict(num_images=0), "--num_images: 0 is below the smallest allowed value, 1"),
        (dict(steps=0), "--steps: 0 is below the smallest allowed value, 1"),
        (dict(caption="maybe"), "--caption: 'maybe' is not true or false"),
        (dict(device="tpu"), "--device: 'tpu' is not one of auto, cpu, cuda, cuda:N"),
        (dict(dtype="int8"), "--dtype: 'int8' is not one of float32, float16, bfloat16"),
        (dict(train_data_dir="/nowhere"), "--train_data_dir: '/nowhere' is not a folder"),
        (dict(pretrained_model_name_or_path=None), "--pretrained_model_name_or_path: a value is required"),
        (dict(output_dir=None), "--output_dir: a value is required"),
        (dict(output_dir="/nowhere", redraw="true"), "--redraw: true needs a preview"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_loaded(images, miniature, tmp_path, capsys, changes, message):
    assert message in refused(capsys, command(miniature, images, **{"output": tmp_path / "p", **changes}))
    assert not (tmp_path / "p").exists()


def test_clean_images_do_not_get_into_a_store_or_the_data(images, miniature, build, tmp_path, capsys):
    build(images, tmp_path / "store")
    capsys.readouterr()
    for place in (tmp_path / "store", tmp_path / "store/deep/preview", tmp_path / "link/preview"):
        if place.parent.name == "link":
            place.parent.symlink_to(tmp_path / "store")
        assert "--output_dir" in (line := refused(capsys, command(miniature, images, place))) and "the store" in line
    before = snapshot(tmp_path / "store")
    for name in ("manifest.json", "latents-00000.safetensors"):
        (tmp_path / "store" / name).unlink()
        assert "the store" in refused(capsys, command(miniature, images, tmp_path / "store/p"))
    assert before.keys() - snapshot(tmp_path / "store").keys() == {"manifest.json", "latents-00000.safetensors"}
    assert "lies inside --train_data_dir" in refused(capsys, command(miniature, images, images / "preview"))
    assert not (images / "preview").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=3), "steps: stored 2, wanted 3"),
        (dict(t_n=["300", "801"]), "t_n: stored [300, 800], wanted [300, 801]"),
        (dict(seed=1), "seed: stored 0, wanted 1"),
        (dict(instance_prompt="unused", num_candidates=2), "num_candidates: stored 256, wanted 2"),
    ],
)
def test_a_preview_with_other_settings_is_refused(made, images, miniature, capsys, changes, message):
    before = snapshot(made)
    assert preview.main(command(miniature, images, made, **changes)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert message in line and line.startswith("sdxl_ambient.preview: error:")
    assert snapshot(made) == before


def test_a_preview_of_other_images_or_captions_is_refused(made, miniature, tmp_path, capsys):
    other = copy_emoji(tmp_path / "other", 3)
    (other / "metadata.jsonl").write_text((other / "metadata.jsonl").read_text().replace("flag", "banner"))
    assert preview.main(command(miniature, other, made)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "captions: stored" in line and "images: stored" not in line
    assert preview.main(command(miniature, copy_emoji(tmp_path / "more", 4), made)) == 2
    assert "images: stored" in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_preview_is_named(images, miniature, tmp_path, capsys):
    (tmp_path / "preview.json").write_text("{")
    assert preview.main(command(miniature, images, tmp_path)) == 2
    assert "is damaged or not a preview's" in capsys.readouterr().err.splitlines()[-1]
