"""A preview's figures and tiles → one picture: the original first, then what each noise level leaves of it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WARNING = "Holds clean images: treat it like the originals."
INK, FAINT, RED, PAPER, BAND = "#1a1a1a", "#666666", "#b00020", "#ffffff", "#eef1f5"
PAD, GAP, GROUP_GAP = 24, 6, 26  # pixels: around everything, between tiles, between levels
TOP = PAD + 158  # where the first row starts
NARROWEST = 340  # a level's columns, so that its figures fit above them


def tile_side(resolution: int) -> int:
    """Side of a tile in the picture, pixels: small ones are enlarged by a whole factor, large ones reduced."""
    return resolution * max(1, 128 // resolution) if resolution <= 144 else 144


def wrap(text: str, size: int, width: int) -> list[str]:
    """Lines of whole words, at most ``width`` pixels wide where words allow, in the font at ``size``."""
    font, lines = ImageFont.load_default(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width or not lines[-1] else [*lines, word]
    return lines


class _Canvas:
    """Draws texts and tiles on white."""

    def __init__(self, size: tuple[int, int]):
        self.image = Image.new("RGB", size, PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: int, y: int, text: str, size: int = 13, fill: str = INK, width: int | None = None) -> None:
        """One line at (x, y), cut to ``width`` pixels."""
        font = ImageFont.load_default(size)
        if width is not None and font.getlength(text) > width:
            while text and font.getlength(text + "…") > width:
                text = text[:-1]
            text = text.rstrip() + "…"
        self.draw.text((x, y), text, font=font, fill=fill)

    def tile(self, x: int, y: int, path: Path, side: int) -> None:
        """The picture at ``path``, ``side`` pixels wide: enlarged without blur, reduced without aliasing."""
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        resampling = Image.Resampling.NEAREST if image.width <= side else Image.Resampling.LANCZOS
        self.image.paste(image.resize((side, side), resampling), (x, y))
        self.draw.rectangle((x - 1, y - 1, x + side, y + side), outline="#c8ccd2")


def draw(output: Path, preview: dict) -> Image.Image:
    """The picture of a preview (preview.json), whose tiles lie in ``output``: a row per image, columns by level.

    Raises:
        OSError, KeyError, TypeError, AttributeError: a tile or a figure is missing or damaged.
    """
    side, columns = tile_side(preview["settings"]["resolution"]), 2 + preview["settings"]["posterior_samples"]
    wide, left, row = max(columns * (side + GAP) - GAP, NARROWEST), PAD + 2 * side + GAP + GROUP_GAP, side + 52
    width = left + len(preview["levels"]) * (wide + GROUP_GAP) - GROUP_GAP + PAD
    legend = wrap(_legend(preview["settings"]), 13, min(width - 2 * PAD, 1250))
    bottom = TOP + len(preview["images"]) * row
    canvas = _Canvas((width, bottom + 18 * len(legend) + PAD))
    canvas.text(PAD, PAD - 6, "Noisy latents, and what the base model makes of them", 22, width=width - 2 * PAD)
    canvas.text(PAD, PAD + 24, WARNING, 14, RED, width - 2 * PAD)
    for i, name in enumerate(("original", "through the VAE")):
        canvas.text(PAD + i * (side + GAP), TOP - 22, name, 13, FAINT, side)
    for k, (t, level) in enumerate(preview["levels"].items()):
        x = left + k * (wide + GROUP_GAP)
        _draw_level(canvas, x, t, level, preview, wide)
        for i, name in enumerate(["noisy", "denoised", *(f"sample {j + 1}" for j in range(columns - 2))]):
            canvas.text(x + i * (side + GAP), TOP - 22, name, 13, FAINT, side)
    for i, image in enumerate(preview["images"]):
        _draw_row(canvas, output, image, TOP + i * row, left, side, wide)
    for i, line in enumerate(legend):
        canvas.text(PAD, bottom + 18 * i, line, 13, FAINT)
    return canvas.image


def _legend(settings: dict) -> str:
    text = "each image's caption" if settings["caption"] else "no caption"
    return (
        f"The model gets {text}. noisy: the noisy latent as the VAE decodes it. denoised: the posterior mean, in one "
        f"step. sample: a draw from the posterior, by {settings['steps']} reverse steps. Below each: PSNR in dB and "
        "correlation r at 16 x 16 pixels, to the image through the VAE. latent: squared error, in dB below the latents' "
        "variance. found: nearest to its own original. The noise is the preview's own, not that of a store."
    )


def _draw_level(canvas: _Canvas, x: int, t: str, level: dict, preview: dict, wide: int) -> None:
    """The band above a level's columns: t_n, errors in the latent, and how many images could be told apart."""
    y = PAD + 50
    canvas.draw.rectangle((x - 1, y, x + wide, y + 80), fill=BAND)
    canvas.text(x + 8, y + 5, f"t_n = {t}", 18, width=wide - 16)
    rates, shown = level["identification_rate"], len(preview["images"])
    error = level["denoised"].get("latent_psnr_db")
    model = "" if error is None else f"model {error:.1f} dB, "
    canvas.text(
        x + 8, y + 31, f"latent: {model}best linear {level['linear_expected']['latent_psnr_db']:.1f} dB", 13, INK, wide - 16
    )
    if rates["noisy"]["candidates"] is not None:
        counts = (f"{rates[what]['candidates'] * shown:.0f} of {shown} {what}" for what in ("denoised", "noisy"))
        text = f"found among {preview['candidates']}: {', '.join(counts)}"
        canvas.text(x + 8, y + 53, text, 13, INK, wide - 16)


def _draw_row(canvas: _Canvas, output: Path, image: dict, y: int, left: int, side: int, wide: int) -> None:
    canvas.tile(PAD, y, output / image["original"], side)
    canvas.tile(PAD + side + GAP, y, output / image["round_trip"]["tile"], side)
    name = image["caption"] or image["file"]
    canvas.text(PAD, y + side + 5, name, 13, INK, side)
    canvas.text(PAD + side + GAP, y + side + 5, _figures(image["round_trip"]), 13, INK, side)
    for k, entry in enumerate(image["levels"].values()):
        for i, tile in enumerate([entry["noisy"], entry["denoised"], *entry["samples"]]):
            x = left + k * (wide + GROUP_GAP) + i * (side + GAP)
            canvas.tile(x, y, output / tile["tile"], side)
            canvas.text(x, y + side + 5, _figures(tile), 13, INK, side)


def _figures(tile: dict) -> str:
    return f"{tile['psnr_db']:.1f} dB  r {tile['correlation']:.2f}"
