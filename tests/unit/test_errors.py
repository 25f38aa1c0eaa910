"""What a user is told is about what was given, not about the workings of a library."""

import pytest
import torch

from sdxl_ambient.errors import OptionError, one_line

CONTENT = "its content is not what it should be"


def raised(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    "function",
    [
        lambda: [][0],
        lambda: None.x,
        lambda: 1 + "a",
        lambda: (1)[0],
        lambda: torch.zeros(3, 4) + torch.zeros(5),
        lambda: torch.zeros(3, 4).reshape(5),
        lambda: torch.nn.Linear(2, 2, device="meta").to("cpu"),
        lambda: torch.nn.Linear(2, 2).load_state_dict({"weight": torch.zeros(3, 3)}),
    ],
)
def test_internals_are_put_in_words(function):
    assert one_line(raised(function)) == CONTENT


def test_diffusers_words_for_an_unknown_state_dict_too():
    assert one_line(ValueError("Could not automatically infer state dict type from the given state dict.")) == CONTENT


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("beta_start"), "'beta_start' is missing"),
        (ValueError("beta_start must be\n positive"), "beta_start must be positive"),
        (OSError("no space left on device"), "no space left on device"),
        (OptionError("--x: 5 is out of range"), "--x: 5 is out of range"),
        (RuntimeError(), "RuntimeError"),
        (TypeError("f() got an unexpected keyword argument 'betas'"), "f() got an unexpected keyword argument 'betas'"),
    ],
)
def test_what_helps_is_kept(error, words):
    assert one_line(error) == words
