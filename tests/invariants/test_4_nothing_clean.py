"""Invariant 4: no clean pixel or latent is written by the noisy path, and the key lies in no artefact."""

import base64
import re
import secrets

import numpy as np
import pytest
import torch
from scipy import stats
from support.stores import clean_latents, command, equal, latents_in, load_file, snapshot

from sdxl_ambient.images.load import load_rgb
from sdxl_ambient.latents import main
from sdxl_ambient.store.keys import noise_key


@pytest.mark.parametrize("t_n", [100, 500, 900])
def test_a_stored_latent_is_the_clean_one_under_noise(build, emoji, tmp_path, encoders, schedule, t_n):
    """x_n = α_n x_0 + σ_n z with z standard normal: right level, right noise, and nothing else stored."""
    manifest = build(emoji, tmp_path / "s", t_n=t_n)
    clean, noisy = clean_latents(emoji, encoders), latents_in(tmp_path / "s")
    assert clean.keys() == noisy.keys()
    alpha, sigma = schedule.alpha(torch.tensor([t_n])), schedule.sigma(torch.tensor([t_n]))
    z = torch.cat([((noisy[k].double() - alpha * clean[k]) / sigma).flatten() for k in sorted(clean)])
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
    x_0 = torch.cat([clean[k].flatten() for k in sorted(clean)]).double()
    x_n = torch.cat([noisy[k].flatten() for k in sorted(clean)]).double()
    centred = x_0 - x_0.mean()
    predicted = alpha * centred.std() / (alpha**2 * centred.var() + sigma**2).sqrt()
    assert np.corrcoef(x_0, x_n)[0, 1] == pytest.approx(predicted.item(), abs=0.03)
    assert all(i["t_n"] == t_n for i in manifest["images"])


def test_noise_of_pictures_is_independent_and_of_levels_one_path(build, emoji, tmp_path, encoders, schedule):
    """The same z at two levels could simply be solved for the picture; independent ones could be averaged."""
    clean, noise = clean_latents(emoji, encoders), []
    for t_n in (500, 300):
        build(emoji, tmp_path / str(t_n) / "s", t_n=t_n)
        noisy, t = latents_in(tmp_path / str(t_n) / "s"), torch.tensor([t_n])
        z = [(noisy[k] - schedule.alpha(t) * clean[k]) / schedule.sigma(t) for k in sorted(clean)]
        noise.append(torch.stack(z).flatten(1).numpy())
    correlations = np.corrcoef(np.concatenate(noise))
    path = float((schedule.snr(torch.tensor(500)) / schedule.snr(torch.tensor(300))).sqrt())
    want = np.block([[np.eye(6), path * np.eye(6)], [path * np.eye(6), np.eye(6)]])
    assert np.abs(correlations - want).max() < 5 / np.sqrt(1024)


def test_no_clean_latent_and_no_pixel_is_stored(build, emoji, tmp_path, encoders):
    store = tmp_path / "s"
    build(emoji, store)
    clean = clean_latents(emoji, encoders)
    tensors = [t for path in store.glob("*.safetensors") for t in load_file(path).values()]
    assert len(tensors) == 6 + 2 * (6 + 1)
    for tensor in tensors:
        for x_0 in clean.values():
            assert tensor.shape != x_0.shape or (tensor - x_0).abs().mean() > 0.3
    allowed = r"\.lock|plan\.json|manifest\.json|latents-\d{5}\.safetensors|prompts-[0-9a-f]+-[0-9a-f]+\.safetensors"
    assert all(re.fullmatch(allowed, p.name) for p in store.iterdir())
    everything = b"".join(snapshot(store).values())
    for path in emoji.glob("*.png"):
        assert path.read_bytes()[60:160] not in everything
        assert np.asarray(load_rgb(path))[28:36].tobytes() not in everything


def test_a_clean_store_says_that_it_is_clean(build, emoji, tmp_path, encoders):
    said = []
    build(emoji, tmp_path / "s", t_n=None, log=said.append)
    assert equal(latents_in(tmp_path / "s"), clean_latents(emoji, encoders))
    assert any("holds clean latents, which decode to the images" in s for s in said)


def test_the_key_is_in_no_file_and_no_message(build, emoji, tmp_path, capfd, private_home):
    key, said, drawn = tmp_path / "key", [], []
    build(emoji, tmp_path / "s", noise_key_file=key, log=said.append)
    # A key that is never written is seen where the noise is drawn.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_bytes", lambda n, real=secrets.token_bytes: drawn.append(real(n)) or drawn[-1])
        build(emoji, tmp_path / "deep" / "s", noise_key="none", allow_second_observation=True, log=said.append)
    random = [one for one in drawn if len(one) == 32]
    build(emoji, tmp_path / "kept" / "s", allow_second_observation=True, log=said.append)
    assert key.stat().st_mode & 0o777 == 0o600 and len(random) == 1
    assert random[0].hex() not in "".join(p.read_text(errors="replace") for p in private_home.rglob("*") if p.is_file())
    captured = capfd.readouterr()
    texts = [b"".join(snapshot(tmp_path / d).values()) for d in ("s", "deep", "kept")]
    texts += [" ".join(said).encode(), (captured.out + captured.err).encode()]
    for secret in (noise_key("kept", key).secret, noise_key().secret, random[0]):
        spellings = [secret, secret.hex().encode(), secret.hex().upper().encode(), base64.b64encode(secret)[:40]]
        spellings += [base64.urlsafe_b64encode(secret)[:40], secret[::-1], secret[:16], secret.hex()[:32].encode()]
        for spelling in spellings:
            assert not any(spelling in text for text in texts)


def test_a_key_that_others_can_read_is_refused_before_anything_is_drawn(emoji, miniature, tmp_path, capsys):
    key = tmp_path / "key"
    noise_key("kept", key)
    key.chmod(0o644)
    assert main(command(emoji, tmp_path / "s", miniature, "--noise_key_file", key)) == 2
    assert "can be read by others; make it mode 600" in capsys.readouterr().err
    assert not latents_in(tmp_path / "s")
    with pytest.raises(SystemExit):
        main(command(emoji, tmp_path / "s", miniature, "--noise_key_file", tmp_path / "s" / "key"))
    assert "lies inside" in capsys.readouterr().err and not (tmp_path / "s" / "key").exists()
