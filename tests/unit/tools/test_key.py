"""python -m sdxl_ambient.key: where the key is, what lies on it, backup, destruction, a register made anew."""

import json
import stat

import pytest
from support.stores import equal, latents_in

from sdxl_ambient.errors import StoreError, UserError
from sdxl_ambient.key import main
from sdxl_ambient.store.keys import kept_path, noise_key
from sdxl_ambient.store.register import register_path


def said(capsys, *argv, code=0):
    assert main(list(map(str, argv))) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_before_anything_is_observed_there_is_nothing(capsys, private_home):
    assert "no picture was observed yet" in said(capsys) and not private_home.exists()
    assert "there is no key" in said(capsys, "destroy", "--yes", code=2)
    assert "there is no key" in said(capsys, "backup", private_home.parent / "b", code=2)


def test_it_shows_where_the_key_is_and_what_lies_on_it(build, emoji, tmp_path, capsys):
    build(emoji, tmp_path / "a/s")
    build(emoji, tmp_path / "b/s", t_n=300)
    build(emoji, tmp_path / "c/s", noise_key="none", allow_second_observation=True)
    text = said(capsys)
    assert text == said(capsys, "show") and str(kept_path()) in text and str(register_path()) in text
    assert f"{tmp_path / 'a/s'}: 6 at t_n 500, since 20" in text and f"{tmp_path / 'b/s'}: 6 at t_n 300" in text
    assert "never written" in text and "a second observation" in text and "6 pictures in 3 stores" in text
    assert noise_key().secret.hex() not in text and noise_key().id[:16] in text


def test_a_backup_brings_the_same_noise_back(build, emoji, tmp_path, capsys, private_home):
    build(emoji, tmp_path / "a/s")
    path = tmp_path / "backup.json"
    assert "Whoever has this file and a store has the pictures" in said(capsys, "backup", path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "exists; give a new file" in said(capsys, "backup", path, code=2)
    assert "nothing is overwritten" in said(capsys, "restore", path, code=2)
    private_home.rename(private_home.with_name("old"))
    assert "6 observations are back" in said(capsys, "restore", path)
    build(emoji, tmp_path / "b/c/s")
    assert equal(latents_in(tmp_path / "a/s"), latents_in(tmp_path / "b/c/s"))
    with pytest.raises(StoreError, match="already have a noisy latent in .*a/s"):
        build(emoji, tmp_path / "d/e/s", noise_key="none")


@pytest.mark.parametrize("damage", [lambda v: v.pop("noise.key"), lambda v: v.update(observations=3), lambda v: v.clear()])
def test_a_damaged_backup_is_refused(tmp_path, capsys, damage, private_home):
    noise_key()
    said(capsys, "backup", tmp_path / "b")
    value = json.loads((tmp_path / "b").read_text())
    damage(value)
    (tmp_path / "b").write_text(json.dumps(value))
    private_home.rename(private_home.with_name("old"))
    assert "is no backup of a key" in said(capsys, "restore", tmp_path / "b", code=2)
    assert not kept_path().exists()


def test_after_destruction_no_key_observes_those_pictures(build, emoji, tmp_path, capsys):
    build(emoji, tmp_path / "a/s")
    key = noise_key().secret
    assert "--yes is needed" in said(capsys, "destroy", code=2) and kept_path().exists()
    assert "6 pictures were observed with it" in said(capsys, "destroy", "--yes") and not kept_path().exists()
    build(emoji, tmp_path / "a/s")  # which is there and stays usable
    with pytest.raises(StoreError, match="already have a noisy latent in .*a/s, made with another key"):
        build(emoji, tmp_path / "b/c/s")
    assert noise_key().secret != key
    assert "drawn with other keys" in said(capsys)


def test_a_register_is_made_anew_from_stores(build, emoji, tmp_path, capsys, private_home):
    build(emoji, tmp_path / "a/s")
    register_path().write_bytes(b"damaged")
    for extra in private_home.glob("observations.sqlite-*"):
        extra.unlink()
    with pytest.raises(UserError, match="rebuild STORE"):
        build(emoji, tmp_path / "b/c/s", noise_key="none")
    assert "is no store" in said(capsys, "rebuild", tmp_path, code=2)
    text = said(capsys, "rebuild", tmp_path / "a/s")
    assert "6 observations" in text and "observations.before-" in text
    assert len(list(private_home.glob("observations.before-*"))) == 1
    with pytest.raises(StoreError, match="already have a noisy latent in .*a/s"):
        build(emoji, tmp_path / "b/c/s", noise_key="none")
    build(emoji, tmp_path / "d/e/s")
    assert equal(latents_in(tmp_path / "a/s"), latents_in(tmp_path / "d/e/s"))
