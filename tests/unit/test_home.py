"""The user's own folder and the secrets in it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support.stores import environment

from sdxl_ambient.errors import UserError
from sdxl_ambient.home import KEY_BYTES, home, private_home, secret, secret_file, signing_key


def test_the_folder_is_the_platforms_or_the_one_that_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SDXL_AMBIENT_HOME", str(tmp_path / "mine"))
    assert home() == tmp_path / "mine"
    monkeypatch.delenv("SDXL_AMBIENT_HOME")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert home() == tmp_path / "config" / "sdxl_ambient" if sys.platform == "linux" else home().name == "sdxl_ambient"


def test_a_secret_is_made_once_and_private(private_home):
    old = os.umask(0)
    try:
        first = secret("one.key")
    finally:
        os.umask(old)
    assert len(first) == KEY_BYTES and first == secret("one.key") != secret("two.key") != signing_key()
    assert stat.S_IMODE((private_home / "one.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(private_home.stat().st_mode) == 0o700
    assert not list(private_home.glob("*.tmp"))


def test_processes_that_ask_at_once_get_the_same(private_home):
    program = "from sdxl_ambient.home import secret; print(secret('one.key').hex())"
    running = [
        subprocess.Popen([sys.executable, "-c", program], env=environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    assert len({process.communicate(timeout=60)[0] for process in running}) == 1


@pytest.mark.parametrize("content", [b"", b"secret", b"ab" * 31, b"\xff" * 64, b"zz" * 32])
def test_what_is_no_key_is_refused_without_showing_it(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(UserError, match="is not a key of 64 hexadecimal digits") as error:
        secret_file(path)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_what_others_can_read_is_refused(tmp_path, mode):
    secret_file(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(UserError, match="can be read by others; make it mode 600"):
        secret_file(tmp_path / "key")


def test_a_folder_that_can_not_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDXL_AMBIENT_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="SDXL_AMBIENT_HOME names another folder") as error:
        private_home()
    assert Path(tmp_path / "file").is_file() and "\n" not in str(error.value)
