"""Files that are damaged, or made to do harm: one line for each, and no hang."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.lora_files import LORA, as_kohya, metadata_of, write

from sdxl_ambient.errors import CheckpointError, InterchangeError, UserError
from sdxl_ambient.formats.files import check_files, part_state
from sdxl_ambient.formats.find import part_files
from sdxl_ambient.formats.load_lora import load_lora
from sdxl_ambient.formats.peft import load_lora_state
from sdxl_ambient.formats.read import from_kohya, read_adapter
from sdxl_ambient.formats.record import INFO_KEY, lora_metadata, read_training_info
from sdxl_ambient.models.load import load_unet_file
from sdxl_ambient.pipeline import load_pipeline

NUMBERS = [float("nan"), float("inf"), -float("inf")]
# What takes longer than this hangs.
quick = settings(
    deadline=2000,
    max_examples=60,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def bytes_of(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def one_line(call, *arguments):
    """What ``call`` says against its arguments; None where it takes them."""
    try:
        call(*arguments)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


@pytest.fixture
def readers(config, miniature):
    """Everything that reads weights from one file."""
    return [
        lambda file: read_adapter(file, config),
        lambda file: from_kohya(file, config),
        lambda file: load_unet_file(file, miniature),
        lambda file: check_files([file]),
        read_training_info,
        lora_metadata,
    ]


def lora_entry(**more):
    return {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4], **more}


NAME = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
HEADERS = {
    "empty file": b"",
    "short file": b"\x01\x02",
    "huge length": bytes_of({}, length=1 << 62),
    "length past the end": bytes_of({}, length=100),
    "no UTF-8": bytes_of(b'{"\xff\xfe": {}}'),
    "no JSON": bytes_of(b"]["),
    "deep": bytes_of(b"[" * 100_000),
    "deep metadata": bytes_of(b'{"__metadata__":' + b'{"a":' * 50_000 + b"}" * 50_001),
    "a list": bytes_of([]),
    "no tensors": bytes_of({}),
    "overlapping": bytes_of({NAME: lora_entry(), NAME.replace("_A", "_B"): lora_entry()}, b"0000"),
    "past the end": bytes_of({NAME: lora_entry(data_offsets=[0, 1 << 40])}, b"0000"),
    "backwards": bytes_of({NAME: lora_entry(data_offsets=[4, 0])}, b"0000"),
    "below zero": bytes_of({NAME: lora_entry(data_offsets=[-4, 0])}, b"0000"),
    "huge shape": bytes_of({NAME: lora_entry(shape=[1 << 40, 1 << 40])}, b"0000"),
    "huge integer": bytes_of(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}', b"0000"),
    "unknown dtype": bytes_of({NAME: lora_entry(dtype="F3")}, b"0000"),
    "integers": bytes_of({NAME: lora_entry(dtype="I32")}, b"0000"),
    "numbers in the metadata": bytes_of({"__metadata__": {"a": 1}, NAME: lora_entry()}, b"0000"),
    "no dimensions": bytes_of({NAME: lora_entry(shape=[])}, b"0000"),
    "bytes left over": bytes_of({NAME: lora_entry()}, b"00000000"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_header_is_one_line(readers, tmp_path, case):
    file = tmp_path / LORA
    file.write_bytes(HEADERS[case])
    said = [one_line(reader, file) for reader in readers]
    assert all(said[:3]) and all(str(file) in text for text in said[:3] if text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KIND = st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "F4", ""])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": KIND | JSON,
        "shape": st.lists(st.integers(-1, 9), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | JSON,
    }
)
TENSOR = st.sampled_from(
    [NAME, NAME.replace("_A", "_B"), "lora_unet_mid_block_attentions_0_proj_in.alpha", "conv_in.weight"]
)


@quick
@given(st.dictionaries(TENSOR | st.text(max_size=9), ENTRY | JSON, max_size=4), st.binary(max_size=64))
def test_any_header_is_read_or_refused(readers, tmp_path, header, body):
    file = tmp_path / LORA
    file.write_bytes(bytes_of(header, body))
    for reader in readers:
        one_line(reader, file)


@pytest.fixture(scope="module")
def good(loras, config, tmp_path_factory):
    """The bytes of a LoRA in both formats."""
    kohya = tmp_path_factory.mktemp("kohya") / "k.safetensors"
    write(kohya, *as_kohya(loras / "patterns", config=config))
    return (loras / "patterns" / LORA).read_bytes(), kohya.read_bytes()


@quick
@given(st.data())
def test_flipped_and_cut_bytes_are_read_or_refused(good, readers, tmp_path, data):
    content = bytearray(data.draw(st.sampled_from(good)))
    header = 8 + int.from_bytes(content[:8], "little")
    for place in data.draw(st.lists(st.integers(0, header + 64), max_size=4)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    file = tmp_path / LORA
    file.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    for reader in readers[:2]:
        one_line(reader, file)


METADATA = st.dictionaries(
    st.sampled_from(
        [f"unet.{k}" for k in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")]
    )
    | st.text(max_size=9),
    JSON | st.dictionaries(st.sampled_from(["conv1", "^conv_in", "(a+)+$", "to_k"]), JSON, max_size=3),
)


@quick
@given(METADATA | JSON)
def test_any_configuration_is_read_or_refused(loras, config, tmp_path, value):
    file = loras / "plain" / LORA
    described = {**metadata_of(file), "lora_adapter_metadata": json.dumps(value)}
    one_line(read_adapter, write(tmp_path / LORA, load_file(file), described), config)


@quick
@given(JSON | st.dictionaries(st.sampled_from(["t_n", "step", "prediction_type", "finetune", "low_noise"]), JSON))
def test_any_record_is_read_or_refused(tmp_path, value):
    (tmp_path / "training.json").write_text(json.dumps(value))
    one_line(read_training_info, tmp_path)
    file = write(tmp_path / LORA, {"a": torch.ones(1)}, {INFO_KEY: json.dumps(value)})
    one_line(read_training_info, file)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "\x00", "9" * 5000, '{"t_n": NaN}', '{"t_n": 1, "t_n": 2}']
)
def test_a_record_that_is_no_json_is_named(tmp_path, text):
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"training\.json can't be read"):
        read_training_info(tmp_path)
    with pytest.raises(CheckpointError, match="its LoRA's configuration"):
        lora_metadata(write(tmp_path / LORA, {"a": torch.ones(1)}, {"lora_adapter_metadata": text}))


def test_a_record_in_other_bytes_is_named(tmp_path):
    (tmp_path / "training.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match=r"training\.json can't be read.*byte 7 is not UTF-8"):
        read_training_info(tmp_path)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"t_n": "500"}, "its t_n is '500'; possible are 0 to 998 and 'mixed'"),
        ({"t_n": 1 << 70}, "its t_n is"),
        ({"t_n": True}, "its t_n is True, not a whole number or a text"),
        ({"step": [1]}, r"its step is \[1\], not a whole number"),
        ({"step": -1}, "its step is -1, which is below 0"),
        ([1], "is not a JSON object"),
    ],
)
def test_a_record_of_other_types_is_refused(tmp_path, info, message):
    (tmp_path / "training.json").write_text(json.dumps(info))
    with pytest.raises(CheckpointError, match=message):
        read_training_info(tmp_path)


# -- patterns ------------------------------------------------------------------------------------------------------


def described(loras, tmp_path, kind="plain", **changes):
    file = loras / kind / LORA
    said = metadata_of(file)
    config = {**json.loads(said["lora_adapter_metadata"]), **{f"unet.{k}": v for k, v in changes.items()}}
    return write(tmp_path / LORA, load_file(file), {**said, "lora_adapter_metadata": json.dumps(config)})


HOSTILE = [
    "(a+)+$",
    "(.*.*)*x",
    "(?:[a-z_.0-9]*)*!",
    "((([a-z0-9_.]+)+)+)+X",
    "to_q|",
    "",
    "^",
    "(?P<n>to_q)",
    "to_q\n",
    "*",
]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_expressions_of_a_file_are_never_run(loras, config, tmp_path, name, pattern):
    with pytest.raises(InterchangeError, match=f"the unet's {name} has .*; only names of modules and their endings"):
        read_adapter(described(loras, tmp_path, **{name: {pattern: 4}}), config)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("target", HOSTILE)
def test_nor_are_those_of_the_targets(loras, config, tmp_path, miniature, target):
    """The weights say which modules the LoRA is on."""
    plain = read_adapter(loras / "plain", config)
    hostile = described(loras, tmp_path, target_modules=target, exclude_modules=target, layers_pattern=target)
    assert read_adapter(hostile, config).peft_config("unet") == plain.peft_config("unet")
    load_lora(load_pipeline(str(miniature)), hostile)


@pytest.mark.timeout(20)
def test_very_many_patterns_take_no_time(loras, config, tmp_path):
    many = {f"x{i}.to_q": 4 for i in range(100_000)}
    adapter = read_adapter(described(loras, tmp_path, rank_pattern=many, alpha_pattern={**many, "to_q": 5}), config)
    assert {w.alpha for name, w in adapter.parts["unet"].items() if name.endswith("to_q")} == {5.0}


def test_patterns_are_names_endings_and_whole_names_as_peft_and_diffusers_write_them(loras, config, tmp_path):
    names = [n for n in read_adapter(loras / "plain", config).parts["unet"] if n.endswith("to_q")]
    patterns = {f"^{names[0]}": 1.5, names[1]: 2.5, "attn2\\.to_q": 3.5, "to_q$": 4.5, "q": 9, "^to_q": 9, "to_q": 9}
    found = read_adapter(described(loras, tmp_path, alpha_pattern=patterns), config).parts["unet"]
    assert found[names[0]].alpha == 1.5 and found[names[1]].alpha == 2.5
    for name in names[2:]:
        assert found[name].alpha == (3.5 if name.endswith("attn2.to_q") else 4.5)
    assert found["conv_in"].alpha == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": "four"}, "the rank of unet.* is 'four' by its configuration, not a number"),
        ({"r": None}, "is None by its configuration"),
        ({"r": -4}, "of rank 4, but of rank -4"),
        ({"lora_alpha": []}, "the alpha of unet.* is \\[\\]"),
        ({"lora_alpha": True}, "is True by its configuration"),
        ({"lora_alpha": 10**400}, "too large a number"),
        ({"lora_alpha": 1e39}, "alpha = 1e\\+39"),
        ({"rank_pattern": ["to_q"]}, "rank_pattern is \\['to_q'\\], not a value for each name"),
        ({"alpha_pattern": {"to_q": "x"}}, "is 'x' by its configuration"),
    ],
)
def test_strengths_that_are_no_numbers_are_refused(loras, config, tmp_path, changes, message):
    with pytest.raises(InterchangeError, match=message):
        read_adapter(described(loras, tmp_path, **changes), config)


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_alpha_in_the_configuration_is_finite(loras, config, tmp_path, alpha):
    file = loras / "plain" / LORA
    said = metadata_of(file)
    text = said["lora_adapter_metadata"].replace('"unet.lora_alpha": 6', f'"unet.lora_alpha": {alpha}')
    assert text != said["lora_adapter_metadata"]
    write(tmp_path / LORA, load_file(file), {**said, "lora_adapter_metadata": text})
    with pytest.raises(InterchangeError, match="its LoRA's configuration is not valid JSON"):
        read_adapter(tmp_path, config)


# -- numbers -------------------------------------------------------------------------------------------------------


def spoiled(state, name, value):
    tensor = state[name].clone()
    tensor.view(-1)[-1] = value
    return {**state, name: tensor}


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize("kind", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_a_lora_with_one_number_that_is_not_finite_is_refused_by_every_reader(
    loras, tuned, config, miniature, tmp_path, kind, value
):
    state = load_file(loras / "dora" / LORA)
    name = next(n for n in sorted(state) if kind in n)
    file = write(tmp_path / LORA, spoiled(state, name, value), metadata_of(loras / "dora" / LORA))
    for call in (
        lambda: read_adapter(file, config),
        lambda: load_lora(load_pipeline(str(miniature)), file),
        lambda: load_lora_state(tuned["dora"], file),
        lambda: check_files([file]),
    ):
        with pytest.raises(UserError, match=f"{name} holds NaN or infinity"):
            call()


@pytest.mark.parametrize("value", [*NUMBERS, 1e39])
def test_so_is_one_of_kohyas_format(loras, config, tmp_path, value):
    state, metadata = as_kohya(loras / "dora", config=config)
    for kind in ("alpha",) if value == 1e39 else ("lora_down.weight", "lora_up.weight", "dora_scale", "alpha"):
        name = next(n for n in sorted(state) if n.endswith(kind))
        tensors = spoiled(state, name, value) if kind != "alpha" else {**state, name: torch.tensor(value).double()}
        file = write(tmp_path / "k.safetensors", tensors, metadata)
        with pytest.raises(InterchangeError, match=r"alpha = " if kind == "alpha" else "holds NaN or infinity"):
            read_adapter(file, config)


def test_what_the_pipelines_precision_can_not_hold_is_refused(loras, miniature, tmp_path):
    state = load_file(loras / "plain" / LORA)
    name = next(n for n in sorted(state) if "lora_A" in n)
    file = write(tmp_path / LORA, spoiled(state, name, 1e6), metadata_of(loras / "plain" / LORA))
    load_lora(load_pipeline(str(miniature)), file)
    with pytest.raises(UserError, match="holds NaN or infinity in float16"):
        load_lora(load_pipeline(str(miniature), dtype=torch.float16), file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.int32), "has a down of int32, which is no weight's"),
        (lambda t: t.to(torch.complex64), "has a down of complex64"),
        (lambda t: t.reshape(-1)[0], r"has a down of shape \(\)"),
        (lambda t: t[:0], r"has a down of shape \(0, "),
    ],
)
def test_weights_of_other_kinds_are_refused(loras, config, tmp_path, change, message):
    state = load_file(loras / "plain" / LORA)
    name = next(n for n in sorted(state) if n.endswith("to_q.lora_A.weight"))
    file = write(tmp_path / LORA, {**state, name: change(state[name]).contiguous()})
    with pytest.raises(InterchangeError, match=message):
        read_adapter(file, config)


def test_an_alpha_of_several_numbers_is_refused(loras, config, tmp_path):
    state, _ = as_kohya(loras / "plain", config=config)
    name = next(n for n in state if n.endswith(".alpha"))
    with pytest.raises(InterchangeError, match=r"has a alpha of shape \(2,\); a single number is needed"):
        read_adapter(write(tmp_path / "k.safetensors", {**state, name: torch.ones(2)}), config)


# -- parts in shards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../x.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "x.bin"}},
    ],
)
def test_an_index_names_files_beside_it(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InterchangeError, match="its weight_map doesn't name"):
        part_files(tmp_path)


def test_a_part_that_is_not_finite_is_refused(tmp_path):
    write(tmp_path / "model.safetensors", {"a": torch.ones(2), "b": torch.tensor([float("nan")])})
    with pytest.raises(InterchangeError, match="b holds NaN or infinity"):
        part_state(tmp_path)
