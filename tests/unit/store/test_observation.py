"""The noise key and the draw that follows from it."""

import os
import stat

import numpy as np
import pytest
import torch
from scipy import stats

from sdxl_ambient.errors import NoiseKeyError
from sdxl_ambient.provenance import hash_bytes
from sdxl_ambient.store.observation import KEY_BYTES, draw_z, noise_key

A, B, WHAT, OTHER = (hash_bytes(name) for name in (b"picture a", b"picture b", b"level 500", b"level 300"))


def test_without_a_file_the_key_is_random(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = noise_key(None), noise_key(None)
    assert len(first) == KEY_BYTES and first != second and not list(tmp_path.iterdir())


def test_a_key_file_is_made_private_and_read_again(tmp_path):
    path = tmp_path / "keys" / "key"
    old = os.umask(0)
    try:
        key = noise_key(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert noise_key(path) == key and len(key) == KEY_BYTES


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_key_that_others_can_read_is_refused(tmp_path, mode):
    path = tmp_path / "key"
    key = noise_key(path)
    path.chmod(mode)
    with pytest.raises(NoiseKeyError, match="can be read by others; make it mode 600") as error:
        noise_key(path)
    assert key.hex() not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"secret", b"ab" * 31, b"\xff" * 64, b"zz" * 32])
def test_a_file_that_is_no_key_is_refused_without_showing_it(tmp_path, content):
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(NoiseKeyError, match="is not a key of 64 hexadecimal digits") as error:
        noise_key(path)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_key_that_can_not_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NoiseKeyError, match="--noise_key_file: .*: (Not a directory|File exists)"):
        noise_key(tmp_path / "file" / "key")


def test_z_is_standard_normal():
    z = draw_z(b"k" * 32, WHAT, A, (4, 128, 128)).flatten().numpy()
    assert z.dtype == np.float64 and np.isfinite(z).all()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 0.02
    # All bits of a value are random, not only the leading ones.
    assert len(np.unique(z)) == len(z)


def test_z_follows_from_key_picture_and_level_alone():
    def z(*arguments):
        return draw_z(*arguments, (4, 64, 64))

    same, again = z(b"k" * 32, WHAT, A), z(b"k" * 32, WHAT, A)
    assert torch.equal(same, again)
    for other in (z(b"K" + b"k" * 31, WHAT, A), z(b"k" * 32, OTHER, A), z(b"k" * 32, WHAT, B), z(b"k" * 32, A, WHAT)):
        correlation = np.corrcoef(same.flatten(), other.flatten())[0, 1]
        assert abs(correlation) < 0.04


def test_z_is_the_same_on_every_machine():
    """A rebuild from a key years later must give the same noise: these numbers are for ever."""
    z = draw_z(bytes(32), "00" * 32, "11" * 32, (3,))
    import hashlib
    from statistics import NormalDist

    stream = hashlib.shake_256(bytes(64) + bytes([0x11] * 32)).digest(24)
    cells = [int.from_bytes(stream[i : i + 8], "little") >> 12 for i in (0, 8, 16)]
    want = [NormalDist().inv_cdf((c + 0.5) / 2**52) for c in cells]
    np.testing.assert_allclose(z, want, rtol=1e-12)
