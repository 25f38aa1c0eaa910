"""Training of the miniature's UNet and text encoders, jointly, on latents of the trained VAE."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.miniature import data as miniature_data
from benchmarks.miniature import models as miniature_models
from benchmarks.miniature.training import (
    Log,
    TrainingRun,
    batch_indices,
    denoising_loss,
    learning_rate,
    load_state,
    micro_conditioning,
    save_state,
    step_generator,
)
from benchmarks.miniature.vae import encode, trained_vae

STATE_FILE = "unet.safetensors"


@dataclass(frozen=True)
class UnetSettings:
    """What only this stage is told.

    Attributes:
        bpe_merges: OpenAI's bpe_simple_vocab_16e6.txt.gz.
        max_loss_weight: cap of the weight 1 / abar_t; 1 is the plain loss.
        crops: random crops made of each picture.
        dropout: in the UNet while it is trained.
        word_replacement: share of captions with random words in them.
        caption_dropout: share of captions left out.
        ema_decay: of the exponential moving average of the weights.
        start_from: a pipeline folder whose denoiser the training starts from, or None.
    """

    bpe_merges: Path
    max_loss_weight: float
    crops: int
    dropout: float
    word_replacement: float
    caption_dropout: float
    ema_decay: float
    start_from: Path | None


# -- data ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """Pictures and captions as the networks take them.

    Attributes:
        latents: (2, views, n, 4, 16, 16), see :func:`training_latents`; corners: of the views, (views, n, 2).
        ids: the captions' tokens, two tensors (n, 77), on the CPU.
        heldout: latents (m, 4, 16, 16) and tokens of pictures for the log.
        alphas_cumprod: (1000,).
    """

    latents: torch.Tensor
    corners: torch.Tensor
    ids: Sequence[torch.Tensor]
    heldout: tuple[torch.Tensor, list[torch.Tensor]]
    alphas_cumprod: torch.Tensor


def read_data(run: TrainingRun, settings: UnetSettings) -> TrainingData:
    """The pre-training and held-out pictures of output_dir/data/, encoded by the trained VAE."""
    device, vae = run.device, trained_vae(run.work_dir, run.device)
    tokenizers = miniature_models.build_tokenizers(settings.bpe_merges)
    captions, pixels = miniature_data.read_imagefolder(run.output_dir / "data" / "pretrain")
    views, corners = miniature_data.random_crops(pixels, settings.crops, run.seed)
    heldout_captions, heldout_pixels = miniature_data.read_imagefolder(run.output_dir / "data" / "heldout")
    heldout_ids = [i.to(device) for i in miniature_models.token_ids(tokenizers, heldout_captions)]
    return TrainingData(
        latents=training_latents(vae, views),
        corners=corners.to(device),
        ids=miniature_models.token_ids(tokenizers, captions),
        heldout=(training_latents(vae, heldout_pixels[None])[0, 0], heldout_ids),
        alphas_cumprod=miniature_models.build_scheduler().alphas_cumprod.to(device),
    )


def training_latents(vae, views: torch.Tensor) -> torch.Tensor:
    """float32 latents (2, views, n, 4, 16, 16), scaled, of uint8 views (views, n, 3, 64, 64) and of their mirror images."""
    both = torch.stack([torch.stack([encode(vae, v), encode(vae, v.flip(-1))]) for v in views], dim=1)
    return both * vae.config.scaling_factor


@torch.no_grad()
def heldout_loss(unet, text_encoders, alphas_cumprod, latents, ids) -> float:
    """Denoising loss on the held-out pictures at evenly spread t and fixed noise; for the log only."""
    t = torch.arange(len(latents)) * 1000 // len(latents)
    t = t[torch.randperm(len(t), generator=step_generator(1, 0))]
    noise = torch.randn(latents.shape, generator=step_generator(2, 0)).to(latents.device)
    states, pooled = miniature_models.encode_prompts(text_encoders, ids)
    return denoising_loss(unet, alphas_cumprod, latents, states, pooled, t.to(latents.device), noise).mean().item()


# -- draws ---------------------------------------------------------------------------------------------------------------


def draws(run: TrainingRun, settings: UnetSettings, step: int, ids: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What is random in one step, on the run's device.

    ids: the captions' tokens, two tensors (pictures, 77). Returns index, view, flip and t (n,), noise (n, 4, 16, 16),
    caption kept (n,), and the batch's tokens, twice (n, 77).
    """
    generator, n = step_generator(run.seed, step), run.batch_size
    view = torch.randint(1, 1 + max(1, settings.crops), (n,), generator=generator)
    view = torch.where(torch.rand(n, generator=generator) < (0.5 if settings.crops else 0), view, 0)
    flip = torch.randint(2, (n,), generator=generator)
    t = torch.randint(1000, (n,), generator=generator)
    noise = torch.randn(n, 4, miniature_models.RESOLUTION // 4, miniature_models.RESOLUTION // 4, generator=generator)
    keep = (torch.rand(n, generator=generator) >= settings.caption_dropout).float()
    index = batch_indices(len(ids[0]), n, step, run.seed)
    words = replace_words([i[index] for i in ids], settings.word_replacement, generator)
    return [x.to(run.device, non_blocking=True) for x in (index, view, flip, t, noise, keep, *words)]


def replace_words(ids: Sequence[torch.Tensor], share: float, generator: torch.Generator | None) -> list[torch.Tensor]:
    """Token ids (two tensors (n, 77)) with random tokens in place of some, the same in both; a `share` of rows is touched.

    In a touched row every token between start and end is replaced with one probability, itself uniform on [0, 1).
    """
    n, length = ids[0].shape
    rate = torch.rand(n, 1, generator=generator) * (torch.rand(n, 1, generator=generator) < share)
    chosen = torch.rand(n, length, generator=generator) < rate
    words = torch.randint(miniature_models.VOCABULARY - 2, (n, length), generator=generator)
    end = (ids[0] == miniature_models.VOCABULARY - 1).int().argmax(1, keepdim=True)
    position = torch.arange(length)
    chosen &= (position > 0) & (position < end)
    return [torch.where(chosen, words, i) for i in ids]


def keep_untaught_words(encoders: Iterable[torch.nn.Module], ids: Iterable[torch.Tensor]) -> None:
    """Give the embeddings of tokens that no caption holds no gradient; they stay what they were drawn as."""
    for encoder, tokens in zip(encoders, ids, strict=True):
        weight = miniature_models.input_embeddings(encoder).weight
        taught = torch.zeros(len(weight), 1, device=weight.device)
        taught[tokens.unique()] = 1
        weight.register_hook(lambda gradient, taught=taught: gradient * taught)


# -- training ------------------------------------------------------------------------------------------------------------


def as_cuda_graph(step: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`step` as one CUDA graph over inputs of these shapes; it is run a few times first, at learning rate zero."""
    held = [x.clone() for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(*held)

    def replay(*inputs):
        for old, new in zip(held, inputs, strict=True):
            old.copy_(new)
        graph.replay()
        return output

    return replay


class Networks:
    """UNet and text encoders, their exponential moving average, and the optimizer; from the last checkpoint if there is one.

    ``modules`` and ``average`` are each a ModuleDict of unet, text_encoder and text_encoder_2. ``first`` is the first step
    that is still to be made.
    """

    def __init__(self, run: TrainingRun, settings: UnetSettings, ids: Sequence[torch.Tensor]):
        self.path, self.first = run.work_dir / STATE_FILE, 0
        self.modules = miniature_models.build_denoiser(run.seed, settings.dropout).to(run.device).train()
        self.average = miniature_models.build_denoiser(run.seed).to(run.device).eval().requires_grad_(False)
        if settings.start_from:
            for denoiser in (self.modules, self.average):
                miniature_models.load_denoiser(denoiser, settings.start_from)
        self.weights: list[torch.Tensor] = list(self.modules.parameters())
        self.averaged: list[torch.Tensor] = list(self.average.parameters())
        self.encoders = self.modules["text_encoder"], self.modules["text_encoder_2"]
        # No weight decay on the text encoders: it would erase the embeddings of words that pre-training never sees.
        groups = [
            dict(params=self.modules["unet"].parameters(), weight_decay=1e-2),
            dict(params=[p for e in self.encoders for p in e.parameters()], weight_decay=0.0),
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True, capturable=run.device == "cuda")
        if state := load_state(self.path):
            self.modules.load_state_dict(state["modules"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.first = state["step"]
        keep_untaught_words(self.encoders, ids)
        self.rate = torch.zeros((), device=run.device)  # the learning rate, as a tensor that a CUDA graph reads
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

    def update_average(self, decay: float) -> None:
        torch._foreach_lerp_(self.averaged, self.weights, 1 - decay)

    def heldout_loss(self, data: TrainingData) -> float:
        encoders = self.average["text_encoder"], self.average["text_encoder_2"]
        return heldout_loss(self.average["unet"], encoders, data.alphas_cumprod, *data.heldout)

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps."""
        parts = dict(modules=self.modules, average=self.average, optimizer=self.optimizer)
        save_state({**{name: part.state_dict() for name, part in parts.items()}, "step": step}, self.path)


def train_step_of(networks: Networks, data: TrainingData, max_loss_weight: float) -> Callable[..., torch.Tensor]:
    """One update as a function of what :func:`draws` returns; it gives the batch's plain loss."""
    alphas_cumprod = data.alphas_cumprod

    def train_step(index, view, flip, t, noise, keep, *words):
        states, pooled = miniature_models.encode_prompts(networks.encoders, words)
        # Zeros stand for the empty prompt, as force_zeros_for_empty_prompt has it in the pipeline.
        states, pooled = states * keep[:, None, None], pooled * keep[:, None]
        time_ids = micro_conditioning(miniature_data.mirrored(data.corners[view, index], flip))
        x_0 = data.latents[flip, view, index]
        losses = denoising_loss(networks.modules["unet"], alphas_cumprod, x_0, states, pooled, t, noise, time_ids)
        # Layout and colour are decided at high noise, where the plain loss is tiny: 1 / abar_t is v-prediction's weight.
        loss = (losses * (1 / alphas_cumprod[t]).clamp(max=max_loss_weight)).mean()
        networks.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.weights, 1.0)
        networks.optimizer.step()
        return losses.detach().mean()

    return train_step


def train_unet(run: TrainingRun, settings: UnetSettings) -> None:
    """Train as far as ``run.steps``, from work_dir/unet.pt where it is there; log and checkpoint on the way."""
    data = read_data(run, settings)
    networks = Networks(run, settings, data.ids)
    first, train_step = networks.first, train_step_of(networks, data, settings.max_loss_weight)
    if run.device == "cuda":  # so small a network waits for its kernels' launches otherwise
        train_step = as_cuda_graph(train_step, draws(run, settings, first, data.ids))
    log, losses, start = Log(run.work_dir / "unet_log.jsonl", first), [], time.perf_counter()

    for step in range(first, run.steps):
        networks.rate.fill_(learning_rate(run.learning_rate, step, run.steps, warmup=200))
        torch.manual_seed(run.seed * 1_000_003 + step)  # dropout
        losses.append(train_step(*draws(run, settings, step, data.ids)).clone())
        networks.update_average(min(settings.ema_decay, (1 + step) / (10 + step)))
        last = step + 1 == run.steps
        if (step + 1) % run.logging_steps == 0 or last:
            record = dict(stage="unet", step=step + 1, loss=torch.stack(losses).mean().item())
            if (step + 1) % (5 * run.logging_steps) == 0 or last:
                record["heldout_loss"] = networks.heldout_loss(data)
            log(**record, steps_per_second=(step + 1 - first) / (time.perf_counter() - start))
            losses = []
        if (step + 1) % run.checkpointing_steps == 0 or last:
            networks.save(step + 1)
