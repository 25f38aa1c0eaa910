"""Embedders against independent references, awkward images, and the cache."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.pictures import copy_emoji
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from eval.embed import main
from eval.embedders.registry import UNIFORM_LENGTH, Embedder, check_embedder, load_embedder
from eval.embedders.sscd import SSCD, generalised_mean, load_sscd
from eval.embedding import Embedded, FeatureCache, embed_images, normalised
from eval.images import drop_duplicates, read_folder
from sdxl_ambient.errors import StageError
from sdxl_ambient.images.load import load_rgb

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    model = Dinov2Model(config).eval()
    folder = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=16
    )
    model = CLIPVisionModelWithProjection(config).eval()
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def sscd(tmp_path_factory):
    """SSCD with random weights and running statistics, stored in torchvision's naming."""
    torch.manual_seed(0)
    model = SSCD().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("sscd") / "sscd_disc_mixup.safetensors"
    save_file({f"backbone.{k}": v for k, v in model.state_dict().items()}, path)
    return path, model


def test_dinov2_is_its_class_token_after_a_stretched_bicubic_resize(dinov2, photographs):
    folder, model = dinov2
    embedder = load_embedder("dinov2", str(folder))
    image = load_rgb(photographs / "china.jpg")
    pixels = (np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)) / 255 - MEAN) / STD
    batch = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))[None]
    torch.testing.assert_close(embedder.prepare(image)[None], batch)
    with torch.no_grad():
        torch.testing.assert_close(embedder.encode(batch), model(pixel_values=batch).last_hidden_state[:, 0])


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_dinov2_paper_is_a_stretch_to_1024_and_bilinear_samples_of_it(dinov2, photographs, name):
    """The second step by hand: four neighbours of each sampled point, so that a thin line can fall between two points."""
    folder, model = dinov2
    embedder = load_embedder("dinov2_paper", str(folder))
    image = load_rgb(photographs / name)
    first = np.asarray(image.resize((1024, 1024), Image.Resampling.BILINEAR)) / 255
    at = (np.arange(224) + 0.5) * 1024 / 224 - 0.5
    low, share = np.floor(at).astype(int), at % 1
    rows = first[low] * (1 - share)[:, None, None] + first[low + 1] * share[:, None, None]
    pixels = rows[:, low] * (1 - share)[:, None] + rows[:, low + 1] * share[:, None]
    batch = embedder.prepare(image)[None]
    wanted = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))[None]
    torch.testing.assert_close(batch, wanted, atol=1e-4, rtol=0)  # torch computes the points in float32
    assert batch.min() >= 0 and batch.max() <= 1
    first = torch.from_numpy(first.transpose(2, 0, 1).astype(np.float32))[None]
    plain, smooth = (torch.nn.functional.interpolate(first, (224, 224), mode="bilinear", antialias=a) for a in (False, True))
    torch.testing.assert_close(batch, plain, atol=1e-6, rtol=0)
    assert (batch - smooth).abs().max() > 0.05  # antialiasing would have shown
    with torch.no_grad():
        torch.testing.assert_close(embedder.encode(batch), model(pixel_values=batch).last_hidden_state[:, 0])
    assert embedder.key != load_embedder("dinov2", str(folder)).key


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_clip_matches_transformers_own_processor(clip, photographs, name):
    folder, model = clip
    embedder = load_embedder("clip", str(folder))
    image = load_rgb(photographs / name)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    batch = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(embedder.prepare(image)[None], batch, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(embedder.encode(batch), model(pixel_values=batch).image_embeds)


def resnet_name(name):
    """torchvision's naming → transformers' ResNet, for the independent implementation below."""
    if name.startswith(("conv1", "bn1")):
        part = "convolution" if name.startswith("conv1") else "normalization"
        return f"embedder.embedder.{part}.{name.split('.', 1)[1]}"
    layer, block, part, *rest = name.split(".")
    start = f"encoder.stages.{int(layer[-1]) - 1}.layers.{block}"
    if part == "downsample":
        return f"{start}.shortcut.{'convolution' if rest[0] == '0' else 'normalization'}.{rest[1]}"
    kind = "convolution" if part.startswith("conv") else "normalization"
    return f"{start}.layer.{int(part[-1]) - 1}.{kind}.{rest[0]}"


def test_sscd_is_resnet50_with_generalised_mean_pooling(sscd, photographs):
    path, _ = sscd
    state = {k.removeprefix("backbone."): v for k, v in load_file(path).items()}
    reference = ResNetModel(ResNetConfig()).eval()  # the published ResNet-50
    reference.load_state_dict({resnet_name(k): v for k, v in state.items() if not k.startswith("fc")})
    embedder = load_embedder("sscd", str(path))
    image = load_rgb(photographs / "coffee.png")
    pixels = (np.asarray(image.resize((320, 320), Image.Resampling.BILINEAR)) / 255 - MEAN) / STD
    batch = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))[None]
    torch.testing.assert_close(embedder.prepare(image)[None], batch)
    with torch.no_grad():
        features = reference(batch).last_hidden_state
        pooled = features.clamp(min=1e-6).pow(3).flatten(2).mean(2).pow(1 / 3)
        wanted = torch.nn.functional.normalize(pooled @ state["fc.weight"].T + state["fc.bias"])
        torch.testing.assert_close(embedder.encode(batch), wanted, atol=1e-5, rtol=1e-4)


def classy_name(name):
    if name.startswith("fc"):
        return name.replace("fc", "embeddings.1")
    inner = {"conv1": "convolutional_block.0", "bn1": "convolutional_block.1", "conv2": "convolutional_block.3"}
    inner |= {"bn2": "convolutional_block.4", "conv3": "convolutional_block.6", "bn3": "bn"}
    if name.startswith("layer"):
        layer, block, part, rest = name.split(".", 3)
        stage = int(layer[-1]) - 1
        return f"backbone.blocks.{stage}.block{stage}-{block}.{inner.get(part, part)}.{rest}"
    return f"backbone.initial_block._module.{0 if name.startswith('conv1') else 1}.{name.split('.')[1]}"


def test_sscd_reads_classy_visions_naming_too(sscd, tmp_path):
    path, model = sscd
    save_file({classy_name(k): v for k, v in model.state_dict().items()}, tmp_path / "classy.safetensors")
    loaded = load_sscd(tmp_path / "classy.safetensors").state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items() if "num_batches" not in k)


def test_generalised_mean_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, -5.0]]]])
    assert generalised_mean(x).item() == pytest.approx((36 / 4) ** (1 / 3), rel=1e-5)


def test_pixel_similarity_is_the_correlation_of_centred_channels():
    embedder = load_embedder("pixel")
    rng = np.random.default_rng(0)
    pair = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(2)]
    a, b = normalised(embedder.encode(torch.stack([embedder.prepare(p) for p in pair])).numpy())
    x, y = (np.asarray(p, dtype=float) - np.asarray(p, dtype=float).mean((0, 1)) for p in pair)
    assert a @ b == pytest.approx((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()), abs=1e-5)


def pixel_embeddings(pictures):
    embedder = load_embedder("pixel")
    return normalised(embedder.encode(torch.stack([embedder.prepare(p) for p in pictures])).numpy())


def test_a_uniform_image_resembles_those_of_its_colour():
    """The cosine is the mean over the channels of cos(π (v − v′)), in closed form."""
    colours = np.array([(77, 130, 9), (77, 130, 9), (78, 130, 9), (0, 0, 0), (255, 255, 255), (128, 128, 128)])
    sizes = [(64, 64), (5, 300), *[(32, 32)] * 4]
    found = pixel_embeddings([Image.new("RGB", s, tuple(map(int, c))) for s, c in zip(sizes, colours, strict=True)])
    wanted = np.cos(np.pi * (colours[:, None] - colours[None]) / 255).mean(axis=2)
    assert np.abs(found.astype(np.float64) @ found.T - wanted).max() < 1e-5
    assert found[0] @ found[1] == pytest.approx(1, abs=1e-6) and found[3] @ found[4] == pytest.approx(-1, abs=1e-6)


def test_a_uniform_image_resembles_no_other_and_other_features_stay_as_they_were(tmp_path):
    """Beside 130 real pictures its similarity is that of chance, and their features are centred pixels, bit for bit."""
    pictures = [Image.open(p).convert("RGB") for p in sorted(copy_emoji(tmp_path / "set", 130).glob("*.png"))]
    colours = [tuple(map(int, c)) for c in np.random.default_rng(0).integers(0, 256, (50, 3))]
    uniform = pixel_embeddings([Image.new("RGB", (8, 8), colour) for colour in colours])
    assert np.abs(pixel_embeddings(pictures) @ uniform.T).max() < 0.2
    embedder = load_embedder("pixel")
    batch = torch.stack([embedder.prepare(p) for p in [*pictures, Image.new("RGB", (8, 8), "red")]])
    centred = (batch - batch.mean((2, 3), keepdim=True)).flatten(1)
    features = embedder.encode(batch)
    assert torch.equal(features[:-1], centred[:-1]) and features[-1].norm() == pytest.approx(UNIFORM_LENGTH, rel=1e-5)


def test_awkward_images_are_used_or_listed_with_the_reason(tmp_path):
    folder = copy_emoji(tmp_path / "set", 3)
    (folder / "metadata.jsonl").unlink()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 30), dtype=np.uint8)).save(folder / "grey.png")
    Image.fromarray(rng.integers(0, 65535, (40, 30), dtype=np.uint16)).save(folder / "sixteen.png")
    Image.new("RGB", (1, 1)).save(folder / "one_pixel.png")
    whole = (folder / "grey.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.jpg").write_text("not an image")
    embedded = embed_images(read_folder(folder), load_embedder("pixel"), tmp_path / "cache")
    assert len(embedded) == 5
    reasons = {row["file"]: row["reason"] for row in embedded.images.excluded}
    assert set(reasons) == {"one_pixel.png", "truncated.png", "words.jpg"}
    assert "too small: 1x1" in reasons["one_pixel.png"]
    assert np.isfinite(embedded.embeddings).all()


def test_a_folder_with_nothing_usable_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "words.jpg").write_text("not an image")
    with pytest.raises(StageError, match="no usable image; the first problem: not an image"):
        embed_images(read_folder(tmp_path / "set"), load_embedder("pixel"), tmp_path / "cache")


def test_only_new_content_is_computed(tmp_path):
    folder, embedder = copy_emoji(tmp_path / "set", 4), load_embedder("pixel")
    first = embed_images(read_folder(folder), embedder, tmp_path / "cache", batch_size=3)
    again = embed_images(read_folder(folder), embedder, tmp_path / "cache", batch_size=1)
    assert (first.computed, again.computed) == (4, 0)
    np.testing.assert_array_equal(first.features, again.features)
    # Same name, other content: a cache by path would miss this.
    path = first.images.records[0].path
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    changed = embed_images(read_folder(folder), embedder, tmp_path / "cache")
    assert changed.computed == 1
    assert not np.allclose(changed.features[0], first.features[0])
    np.testing.assert_array_equal(changed.features[1:], first.features[1:])


def digests(count):
    return [f"{i:064x}" for i in range(count)]


def test_a_cache_is_read_in_the_order_asked_for_across_its_shards(tmp_path):
    rng = np.random.default_rng(0)
    raw, hashes = rng.standard_normal((10, 5), dtype=np.float32) * 30, digests(10)
    raw[3] = 0
    writer = FeatureCache(tmp_path)
    for rows in ([4, 1, 7], [0, 9, 2, 3], [8], [6, 5]):
        writer.add([hashes[i] for i in rows], raw[rows])
    reader = FeatureCache(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert all(digest in reader for digest in hashes) and digests(11)[10] not in reader
    order = [9, 3, 3, 0, 8, 5, 1]  # not all, and one twice
    for cache in (writer, reader):
        embeddings, norms = cache.read([hashes[i] for i in order])
        assert embeddings.dtype == norms.dtype == np.float32
        np.testing.assert_allclose(embeddings * norms[:, None], raw[order], rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), [1, 0, 0, 1, 1, 1, 1], atol=1e-6)
    assert (embeddings[1] == 0).all() and norms[1] == 0


def test_features_are_what_the_embedder_gave(dinov2, tmp_path):
    images, embedder = read_folder(copy_emoji(tmp_path / "set", 7)), load_embedder("dinov2", str(dinov2[0]))
    found = embed_images(images, embedder, tmp_path / "cache", batch_size=4)
    batch = torch.stack([embedder.prepare(load_rgb(record.path)) for record in images.records])
    raw = torch.cat([embedder.encode(batch[:4]), embedder.encode(batch[4:])]).numpy()
    np.testing.assert_allclose(found.features, raw, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.norms, np.linalg.norm(raw, axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.embeddings, normalised(raw), atol=1e-6)


@pytest.fixture
def embedded(tmp_path):
    """Seven images of nine, two of which could not be used."""
    folder = copy_emoji(tmp_path / "set", 7)
    for name in ("0.png", "z.png"):
        (folder / name).write_text(name)
    return embed_images(read_folder(folder), load_embedder("pixel"), tmp_path / "cache")


def rows_are(found: Embedded, whole: Embedded, rows):
    """Whether ``found`` is these rows of ``whole`` in all its parts."""
    rows = list(rows)
    names = [whole.images.name(i) for i in rows]
    assert [found.images.name(i) for i in range(len(found))] == names and len(found) == len(rows)
    assert found.images.hashes == [whole.images.hashes[i] for i in rows]
    for part in ("embeddings", "norms", "features"):
        np.testing.assert_array_equal(getattr(found, part), getattr(whole, part)[rows])


def test_parts_of_a_set_keep_its_rows_together(embedded):
    rows_are(embedded.subset([5, 0, 2]), embedded, [5, 0, 2])
    rows_are(embedded.thinned(3), embedded, [0, 2, 4])
    assert embedded.thinned(7) is embedded and embedded.thinned(100) is embedded
    assert embedded.subset([1]).images.excluded == embedded.images.excluded and len(embedded.images.excluded) == 2
    kept = embedded.images.subset([1, 2, 6], [{"file": "x", "reason": "near-duplicate"}])
    only = embedded.only(kept)
    rows_are(only, embedded, [1, 2, 6])
    every = embedded.images.subset(range(7), [{"file": "x", "reason": "by hand"}])
    rows_are(embedded.only(every), embedded, range(7))
    assert embedded.only(every).images is every
    assert only.images is kept and [row["file"] for row in only.images.excluded] == ["0.png", "z.png", "x"]


def test_other_weights_have_another_cache(dinov2, tmp_path):
    folder, model = dinov2
    before = load_embedder("dinov2", str(folder)).key
    torch.manual_seed(1)
    Dinov2Model(model.config).save_pretrained(tmp_path)
    assert load_embedder("dinov2", str(tmp_path)).key != before == load_embedder("dinov2", str(folder)).key


def test_a_damaged_cache_names_its_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"rubbish")
    with pytest.raises(StageError, match=r"a\.safetensors are damaged"):
        FeatureCache(tmp_path)


def test_an_embedding_that_is_not_finite_names_the_image(tmp_path):
    folder = copy_emoji(tmp_path / "set", 2)
    steps = load_embedder("pixel").preprocessing
    broken = Embedder("broken", steps, lambda batch: batch.flatten(1) / 0 * 0)
    with pytest.raises(StageError, match=r"\.png: its broken embedding is not finite"):
        embed_images(read_folder(folder), broken, tmp_path / "cache")


def test_exact_duplicates_are_left_out_and_named(tmp_path):
    train = copy_emoji(tmp_path / "train", 3)
    heldout = copy_emoji(tmp_path / "heldout", 3)  # the same three
    Image.new("RGB", (9, 9)).save(heldout / "zzz.png")
    kept = drop_duplicates(read_folder(heldout), read_folder(train))
    assert [r.path.name for r in kept.records] == ["zzz.png"]
    assert len(kept.excluded) == 3 and "same file as" in kept.excluded[0]["reason"]


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("pixel", "x", "'pixel' has no weights"),
        ("sscd", None, "is not a .safetensors file"),
        ("sscd", "model.torchscript.pt", "is not a .safetensors file"),
        ("dinov2", "./nowhere", "is not a folder"),
    ],
)
def test_impossible_weights_are_refused_before_loading(name, weights, message):
    with pytest.raises(StageError, match=message):
        check_embedder(name, weights)


def test_weights_of_another_model_are_refused(clip, tmp_path, sscd):
    with pytest.raises(StageError, match="--embedder_weights"):
        load_embedder("dinov2", str(clip[0]))
    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)).save_pretrained(
        tmp_path
    )
    with pytest.raises(StageError, match="holds a vit model, not DINOv2"):
        load_embedder("dinov2", str(tmp_path))
    save_file({"a": torch.zeros(1)}, tmp_path / "no.safetensors")
    with pytest.raises(StageError, match="not SSCD's ResNet-50"):
        load_embedder("sscd", str(tmp_path / "no.safetensors"))


def test_a_cache_is_filled_from_the_command_line(tmp_path, capsys):
    sets = [copy_emoji(tmp_path / "one", 3), copy_emoji(tmp_path / "two", 5)]  # the first three are the same
    (sets[1] / "words.jpg").write_text("no image")
    flags = ["--image_dir", *map(str, sets), "--output_dir", str(tmp_path / "cache"), "--embedding_batch_size", "2"]
    assert main(flags) == 0
    folder = tmp_path / "cache" / load_embedder("pixel").key
    lines = [f"{sets[0]}: 3 images in {folder}", f"{sets[1]}: 5 images in {folder}"]
    assert capsys.readouterr().out.splitlines() == [*lines, "  left out: words.jpg: not an image, or of an unknown format"]
    assert len(FeatureCache(folder).place) == 5
    assert all(embed_images(read_folder(s), load_embedder("pixel"), tmp_path / "cache").computed == 0 for s in sets)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--image_dir: required"),
        (["--image_dir", "."], "--output_dir: required"),
        (["--image_dir", "nowhere", "--output_dir", "o"], "--image_dir: 'nowhere' is not a folder"),
        (["--image_dir", "empty", "--output_dir", "o"], "'empty' holds no images"),
        (["--image_dir", "useless", "--output_dir", "o"], "useless: no usable image; the first problem: not an image"),
        (["--image_dir", ".", "--output_dir", "o", "--embedder", "vgg"], "--embedder: 'vgg' is not one of"),
        (["--image_dir", ".", "--output_dir", "o", "--embedder_weights", "x"], "'pixel' has no weights"),
        (["--image_dir", ".", "--output_dir", "o", "--embedder", "sscd"], "is not a .safetensors file"),
        (["--image_dir", ".", "--output_dir", "o", "--embedder", "dinov2", "--embedder_weights", "./x"], "is not a folder"),
        (["--image_dir", ".", "--output_dir", "o", "--embedding_batch_size", "0"], "--embedding_batch_size: 0"),
        (["--image_dir", ".", "--output_dir", "o", "--device", "abacus"], "--device: 'abacus'"),
        (["--images", "."], "images"),
    ],
)
def test_wrong_options_end_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "useless").mkdir()
    (tmp_path / "useless" / "words.jpg").write_text("no image")
    try:
        code = main(flags)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert message in line and line.startswith("eval.embed: error: ")
