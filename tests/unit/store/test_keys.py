"""The noise key: kept, in a file, or nowhere."""

import os
import stat

import pytest
from accelerate import PartialState

from sdxl_ambient.errors import NoiseKeyError, RegisterError
from sdxl_ambient.home import KEY_BYTES
from sdxl_ambient.store.keys import kept_path, noise_key, shared_key
from sdxl_ambient.store.register import register_path


def test_the_default_key_is_made_once_and_kept(private_home):
    key = noise_key()
    assert key.kept and len(key.secret) == KEY_BYTES and noise_key() == key == shared_key("kept", None, PartialState())
    assert kept_path().parent == private_home and stat.S_IMODE(kept_path().stat().st_mode) == 0o600
    assert key.secret.hex() not in repr(key) and len(key.id) == 64 and key.secret.hex() not in key.id


def test_a_key_that_is_never_written_is_random(private_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = noise_key("none"), noise_key("none")
    assert first.secret != second.secret and not first.kept and first.id is None
    assert not list(tmp_path.iterdir()) and not private_home.exists()


def test_a_key_file_is_made_private_and_read_again(tmp_path):
    path = tmp_path / "keys" / "key"
    old = os.umask(0)
    try:
        key = noise_key("kept", path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert noise_key("kept", path) == key and key.kept and key.id != noise_key().id


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_can_read_is_refused(tmp_path, mode):
    path = tmp_path / "key"
    key = noise_key("kept", path)
    path.chmod(mode)
    with pytest.raises(NoiseKeyError, match="--noise_key_file: .* can be read by others; make it mode 600") as error:
        noise_key("kept", path)
    assert key.secret.hex() not in str(error.value)
    noise_key()
    kept_path().chmod(mode)
    with pytest.raises(NoiseKeyError, match="--noise_key kept: .* can be read by others"):
        noise_key()


@pytest.mark.parametrize("content", [b"", b"secret", b"ab" * 31, b"\xff" * 64, b"zz" * 32])
def test_a_file_that_is_no_key_is_refused_without_showing_it(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(NoiseKeyError, match="is not a key of 64 hexadecimal digits") as error:
        noise_key("kept", path)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_key_that_can_not_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NoiseKeyError, match="--noise_key_file: .*: (Not a directory|File exists)"):
        noise_key("kept", tmp_path / "file" / "key")


def test_a_key_without_its_register_tells_of_a_loss(private_home):
    noise_key()
    register_path().unlink()
    kept_path().unlink()
    with pytest.raises(RegisterError, match="register of observations .* is lost.*sdxl_ambient.key rebuild"):
        noise_key()
