"""LyCORIS's other kinds are read for evaluation: merged as their published formulas say, switched off again, or refused."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from eval.checkpoints import check_checkpoint
from eval.generate import main as generate
from sdxl_ambient.errors import ModelError, OptionError
from sdxl_ambient.formats.load_lora import set_strength
from sdxl_ambient.formats.merged import is_merged_only
from sdxl_ambient.pipeline import load_pipeline, sample

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "down_blocks.0.resnets.0.norm1"
SGM = "input_blocks_3_1_transformer_blocks_0_attn1_to_q"
KOHYA = "lora_unet_" + LINEAR.replace(".", "_")
KOHYA_CONV = "lora_unet_" + CONV.replace(".", "_")


@pytest.fixture(scope="module")
def numbers():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: 0.3 * torch.randn(*shape, generator=generator)


@pytest.fixture(scope="module")
def plain(miniature):
    """The base's pipeline. Not to be changed."""
    return load_pipeline(str(miniature))


def weights_of(pipe, name):
    module = pipe.unet.get_submodule(name)
    return module.weight.detach().double().clone(), None if module.bias is None else module.bias.detach().double().clone()


def loaded(miniature, tmp_path, state, **keywords):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "change.safetensors")
    return load_pipeline(str(miniature), lora=tmp_path / "change.safetensors", **keywords)


def loha(n, out, inside, kernel, w, scale):
    """ΔW = α/r (W₁ᵃW₁ᵇ) ⊙ (W₂ᵃW₂ᵇ) (Hyeon-Woo et al. 2022, FedPara)."""
    columns = inside * kernel * kernel
    a1, b1, a2, b2 = n(out, 3), n(3, columns), n(out, 3), n(3, columns)
    change = 1.5 / 3 * (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    tensors = dict(hada_w1_a=a1, hada_w1_b=b1, hada_w2_a=a2, hada_w2_b=b2, alpha=torch.tensor(1.5))
    return tensors, w + scale * change.reshape(w.shape)


def lokr(n, out, inside, kernel, w, scale):
    """ΔW = α/r W₁ ⊗ (W₂ᵃW₂ᵇ) (Yeh et al. 2024, LyCORIS)."""
    one, a, b = n(4, 4), n(out // 4, 2), n(2, inside // 4 * kernel * kernel)
    two = (a.double() @ b.double()).reshape(out // 4, inside // 4, *(kernel, kernel) * (kernel > 1))
    big = one.double().reshape(4, 4, *(1, 1) * (kernel > 1))
    change = 1.0 / 2 * torch.kron(big, two)
    if kernel > 1:
        b = b.reshape(2, inside // 4, kernel, kernel)  # as its own trainer stores it
    return dict(lokr_w1=one, lokr_w2_a=a, lokr_w2_b=b, alpha=torch.tensor(1.0)), w + scale * change.reshape(w.shape)


def full(n, out, inside, kernel, w, scale):
    """W + ΔW."""
    change = n(*w.shape)
    return dict(diff=change), w + scale * change.double()


def oft(n, out, inside, kernel, w, scale):
    """R W with R block-diagonal, each block (I + Q)(I − Q)⁻¹ of a skew-symmetric Q (Qiu et al. 2023), Cayley's transform."""
    blocks = n(out // 4, 4, 4)
    q = (blocks - blocks.transpose(1, 2)).double()
    eye = torch.eye(4, dtype=torch.float64)
    r = (eye + q) @ torch.linalg.inv(eye - q)
    rows = w.reshape(out // 4, 4, -1)
    rotated = torch.einsum("knm,kni->kmi", r, rows).reshape(w.shape)
    return dict(oft_blocks=blocks, alpha=torch.tensor(0.0)), w + scale * (rotated - w)


def tucker(n, out, inside, kernel, w, scale):
    """LoCon with Tucker's core: ΔW = α/r core ×₁ up ×₂ down."""
    up, down, core = n(out, 3), n(3, inside), n(3, 3, kernel, kernel)
    change = 3.0 / 3 * torch.einsum("ijkl,oi,jc->ockl", core.double(), up.double(), down.double())
    state = {"lora_up.weight": up[:, :, None, None], "lora_down.weight": down[:, :, None, None], "lora_mid.weight": core}
    return {**state, "alpha": torch.tensor(3.0)}, w + scale * change


def dora_of_inputs(n, out, inside, kernel, w, scale):
    """The first versions' DoRA, whose lengths are those of the inputs' columns."""
    up, down, lengths = n(out, 2), n(2, inside), n(1, inside).abs() + 1
    changed = w + 1 / 2 * up.double() @ down.double()
    changed = changed * lengths.double() / changed.norm(dim=0, keepdim=True)
    state = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(1.0), "dora_scale": lengths}
    return state, w + scale * (changed - w)


OF_LINEAR, OF_CONV = (loha, lokr, full, oft, dora_of_inputs), (loha, lokr, full, tucker)
CASES = [*((kind, LINEAR) for kind in OF_LINEAR), *((kind, CONV) for kind in OF_CONV)]


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_change_is_merged_as_its_formula_says(miniature, plain, numbers, tmp_path, kind, name, scale):
    before, bias = weights_of(plain, name)
    out, inside, *kernel = before.shape
    tensors, wanted = kind(numbers, out, inside, kernel[0] if kernel else 1, before, scale)
    kohya = "lora_unet_" + name.replace(".", "_")
    pipe = loaded(miniature, tmp_path, {f"{kohya}.{k}": t for k, t in tensors.items()}, lora_scale=scale)
    after, _ = weights_of(pipe, name)
    torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)
    others = [n for n, p in pipe.unet.named_parameters() if n != f"{name}.weight"]
    assert all(torch.equal(pipe.unet.get_parameter(n), plain.unet.get_parameter(n)) for n in others)


@pytest.mark.parametrize("names", ["sgm", "lycoris", "comfy", "text"])
def test_every_programs_names_find_their_module(miniature, plain, numbers, tmp_path, names):
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    place = {
        "sgm": "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q",
        "lycoris": "lycoris_" + LINEAR.replace(".", "_"),
        "comfy": "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q",
        "text": text,
    }[names]

    def module(pipe):
        if names != "text":
            return pipe.unet.get_submodule(LINEAR)
        encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
        return encoder.encoder.layers[0].mlp.fc1

    change = numbers(*module(plain).weight.shape)
    pipe = loaded(miniature, tmp_path, {f"{place}.diff": change})
    torch.testing.assert_close(module(pipe).weight, module(plain).weight + change)


def test_norms_and_biases_go_along(miniature, plain, numbers, tmp_path):
    (weight, bias), (conv, conv_bias) = weights_of(plain, NORM), weights_of(plain, CONV)
    norm = "lora_unet_" + NORM.replace(".", "_")
    changes = {f"{norm}.w_norm": numbers(*weight.shape), f"{norm}.b_norm": numbers(*bias.shape)}
    changes |= {f"{KOHYA_CONV}.diff": numbers(*conv.shape), f"{KOHYA_CONV}.diff_b": numbers(*conv_bias.shape)}
    pipe = loaded(miniature, tmp_path, changes)
    after = [*weights_of(pipe, NORM), *weights_of(pipe, CONV)]
    for one, before, change in zip(after, (weight, bias, conv, conv_bias), changes.values(), strict=True):
        torch.testing.assert_close(one, before + change.double(), rtol=1e-6, atol=1e-6)


def test_its_strength_is_changed_and_the_base_comes_back_bit_for_bit(miniature, plain, numbers, tmp_path):
    before, _ = weights_of(plain, LINEAR)
    change = numbers(*before.shape)
    pipe = loaded(miniature, tmp_path, {f"{KOHYA}.diff": change}, lora_scale=1.0)
    for scale in (0.25, 2.0, 1.0):
        set_strength(pipe, scale)
        torch.testing.assert_close(weights_of(pipe, LINEAR)[0], before + scale * change.double(), rtol=1e-6, atol=1e-6)
    pipe.merged_change.remove()
    assert torch.equal(weights_of(pipe, LINEAR)[0], before)


def test_hybrid_sampling_hands_over_to_the_base(miniature, plain, numbers, tmp_path):
    """Handed over at the last level above t_n, only the first steps differ; afterwards the change is in again."""
    encoder = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    shape = plain.unet.get_submodule(LINEAR).weight.shape
    text = getattr(plain.text_encoder, "text_model", plain.text_encoder).encoder.layers[0].mlp.fc1.weight.shape
    pipe = loaded(miniature, tmp_path, {f"{KOHYA}.diff": numbers(*shape), f"{encoder}.diff": numbers(*text)})
    tuned = weights_of(pipe, LINEAR)[0]

    def draw(pipe, **keywords):
        generators = [torch.Generator().manual_seed(0)]
        return sample(pipe, ["a star"], generators=generators, num_inference_steps=4, output_type="latent", **keywords)

    full, base = draw(pipe), draw(plain)
    hybrid = draw(pipe, sampler="hybrid", t_n=500)
    assert torch.equal(weights_of(pipe, LINEAR)[0], tuned)
    assert not torch.allclose(hybrid, full) and not torch.allclose(hybrid, base)
    # Without a change at all it is the base's.
    pipe.merged_change.apply(0.0)
    torch.testing.assert_close(draw(pipe, sampler="hybrid", t_n=500), draw(plain, sampler="full"), rtol=0, atol=0.5)


REFUSED = {
    "another module": ({"lora_unet_nowhere.diff": torch.zeros(1)}, "lora_unet_nowhere.diff has no place in this model"),
    "an unknown kind": ({f"{KOHYA}.diff": torch.zeros(64, 64), f"{KOHYA}.strange": torch.zeros(1)}, "strange has no place"),
    "half of a pair": ({f"{KOHYA}.hada_w1_b": torch.zeros(3, 64)}, "is incomplete: hada_w1_a is missing"),
    "too much": (
        {f"{KOHYA}.diff": torch.zeros(64, 64), f"{KOHYA}.hada_t1": torch.zeros(1)}, "is incomplete: hada_w1_a is missing",
    ),
    "another shape": ({f"{KOHYA}.diff": torch.zeros(3, 5)}, r"doesn't fit unet's weight of shape \(64, 64\)"),
    "no number": ({f"{KOHYA}.diff": torch.full((64, 64), float("nan"))}, "NaN or infinity"),
    "half of LoKr": ({f"{KOHYA}.lokr_w1": torch.zeros(4, 4)}, r"\(LoKr\) is incomplete: lokr_w2 is missing"),
    "whole numbers": ({f"{KOHYA}.diff": torch.zeros(64, 64, dtype=torch.int8)}, "is of int8, which is no weight's"),
    "two layouts": (
        {f"{KOHYA}.diff": torch.zeros(64, 64), f"lora_unet_{SGM}.diff": torch.ones(64, 64)},
        "names a module twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named_in_one_line(miniature, tmp_path, case):
    state, message = REFUSED[case]
    with pytest.raises(ModelError, match=message) as error:
        loaded(miniature, tmp_path, state)
    assert "\n" not in str(error.value) and "change.safetensors" in str(error.value)


def test_without_the_package_the_line_says_what_to_install(miniature, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lycoris", None)
    with pytest.raises(ModelError, match="LyCORIS .* pip install lycoris-lora"):
        loaded(miniature, tmp_path, {f"{KOHYA}.diff": torch.zeros(64, 64)})


def test_only_files_of_these_kinds_are_merged():
    assert is_merged_only([f"{KOHYA}.hada_w1_a"]) and is_merged_only(["lycoris_x.lokr_w1", "lycoris_x.alpha"])
    assert not is_merged_only([f"{KOHYA}.lora_up.weight", f"{KOHYA}.lora_down.weight", f"{KOHYA}.alpha"])
    assert not is_merged_only(["unet.mid_block.attentions.0.proj_in.lora_A.weight", "diff"])


def test_the_evaluation_draws_with_one(miniature, numbers, tmp_path):
    save_file({f"{KOHYA}.diff": numbers(64, 64)}, tmp_path / "full.safetensors")
    check_checkpoint("lora", tmp_path / "full.safetensors")
    (tmp_path / "prompts.txt").write_text("a star\n")
    words = ["--pretrained_model_name_or_path", str(miniature), "--prompts_file", str(tmp_path / "prompts.txt")]
    words += ["--num_inference_steps", "2", "--output_dir"]
    assert generate([*words, str(tmp_path / "base")]) == 0
    assert generate([*words, str(tmp_path / "tuned"), "--lora", str(tmp_path / "full.safetensors")]) == 0
    one, other = ((tmp_path / n / "images/000000.png").read_bytes() for n in ("base", "tuned"))
    assert one != other
    with pytest.raises(OptionError, match="holds no LoRA|is a LoRA"):
        check_checkpoint("unet", tmp_path / "full.safetensors")
