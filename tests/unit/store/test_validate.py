"""What plan.json and manifest.json may hold: every other value is one line, though its seal is right."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdxl_ambient.errors import StoreError
from sdxl_ambient.provenance import read_sealed, write_sealed
from sdxl_ambient.store.reader import LatentStore
from sdxl_ambient.store.validate import read_manifest, read_plan


def edited(folder, places, value, files=("plan.json", "manifest.json")):
    """Change one place of a store's JSON, and seal it again."""
    for name in files:
        content = dict(read_sealed(folder / name))
        inner = content
        for key in places[:-1]:
            inner = inner[key]
        if value is GONE:
            del inner[places[-1]]
        else:
            inner[places[-1]] = value
        write_sealed(folder / name, content)
    return folder


GONE = object()
ENTRY = ("images", 0)
EDITS = {
    "no images": (("images",), [], "images: there are none"),
    "images that are no list": (("images",), {"a": 1}, "images: there are none"),
    "a level in words": ((*ENTRY, "t_n"), "500", "t_n is '500'; allowed are null and timesteps from 0 to 998"),
    "a level above the schedule": ((*ENTRY, "t_n"), 5000, "t_n is 5000"),
    "half a timestep": ((*ENTRY, "t_n"), 499.5, "t_n is 499.5"),
    "a level below zero": ((*ENTRY, "t_n"), -1, "t_n is -1"),
    "a level that is a truth": ((*ENTRY, "t_n"), True, "t_n is True"),
    "the store's level": (("fingerprint", "latent", "t_n"), "many", "fingerprint.latent.t_n is 'many'"),
    "no level": ((*ENTRY, "t_n"), GONE, "it lacks 't_n'"),
    "five time ids": ((*ENTRY, "time_ids"), [64, 64, 0, 0, 64], "time_ids are"),
    "time ids below zero": ((*ENTRY, "time_ids"), [64, 64, 0, -1, 64, 64], "time_ids are"),
    "time ids in words": ((*ENTRY, "time_ids"), [64, 64, 0, 0, 64, "64"], "time_ids are"),
    "no size": ((*ENTRY, "time_ids"), [64, 64, 0, 0, 0, 64], "no size of a latent"),
    "no captions": ((*ENTRY, "captions"), [], "captions are"),
    "a caption that is a number": ((*ENTRY, "captions"), [3], "captions are"),
    "a caption that is a list": ((*ENTRY, "captions"), [["a"]], "captions are"),
    "a content of another length": ((*ENTRY, "content"), "ab", "content 'ab' is not a SHA-256"),
    "a content that is a list": ((*ENTRY, "content"), ["ab"], r"content \['ab'\] is not a SHA-256"),
    "a shard elsewhere": ((*ENTRY, "shard"), "../latents-00000.safetensors", "is no file of latents"),
    "an absolute shard": ((*ENTRY, "shard"), "/etc/passwd", "is no file of latents"),
    "an entry that is text": (ENTRY, "a picture", "is damaged"),
    "an entry twice": (("images", 1), None, "is damaged"),
    "no size of shards": (("shard_size",), 0, "shard_size is 0"),
    "an id that is a number": (("store_id",), 7, "store_id is 7"),
    "no text": (("fingerprint", "text"), {}, "fingerprint.text"),
    "a schedule that is a number": (("fingerprint", "latent", "schedule"), 3, "fingerprint.latent.schedule is 3"),
    "a VAE that is a list": (("fingerprint", "latent", "vae"), [], r"fingerprint.latent.vae is \[\]"),
}


@pytest.mark.parametrize("case", EDITS)
def test_what_a_store_cannot_hold_is_one_line(copied, case):
    places, value, message = EDITS[case]
    folder = edited(copied, places, value)
    for read in (read_manifest, read_plan, LatentStore):
        with pytest.raises(StoreError, match=message) as error:
            read(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("lineage", "message"),
    [
        ("x", "restored is str"),
        ({"parent": "a"}, "restored is dict"),
        ([3], "restored is list"),
        ([{}], "it lacks 'parent'"),
        ([{"parent": 3, "images_restored": 1}], "a round has no parent"),
        ([{"parent": "a", "images_restored": "many"}], "no number of images"),
        ([{"parent": "a", "images_restored": 6}], "it lacks 'observed_t_n'"),
    ],
)
def test_a_lineage_that_is_none_is_one_line(copied, lineage, message):
    folder = edited(copied, ("restored",), lineage)
    with pytest.raises(StoreError, match=message):
        read_manifest(folder)


MANIFEST = {
    "prompts that are no object": (("prompts",), [], "is damaged"),
    "an unknown caption": ((*ENTRY, "captions"), ["f" * 64], "disagree on images|is unknown"),
    "a prompt file elsewhere": (("tokens",), "/etc/passwd", "no file of tokens"),
    "no hashes": (("sha256",), {}, "is damaged: it lacks"),
    "hashes that are numbers": (("sha256",), 3, "is damaged"),
    "a file that is none of a store": (("sha256", "/etc/passwd"), {}, "no file of a store"),
    "a level that the plan has not": ((*ENTRY, "t_n"), 300, "disagree on images"),
    "another id": (("store_id",), "other", "disagree on store_id"),
}


@pytest.mark.parametrize("case", MANIFEST)
def test_a_manifest_that_says_else_than_its_plan_or_files_is_one_line(copied, case):
    places, value, message = MANIFEST[case]
    with pytest.raises(StoreError, match=message) as error:
        read_manifest(edited(copied, places, value, ["manifest.json"]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "9" * 5000, "null", '"a"', "\x00"])
@pytest.mark.parametrize(("name", "read"), [("plan.json", read_plan), ("manifest.json", read_manifest)])
def test_json_that_is_deep_or_no_object_is_one_line(copied, name, read, text):
    (copied / name).write_text(text)
    with pytest.raises(StoreError, match=f"{name} is damaged") as error:
        read(copied)
    assert "\n" not in str(error.value)


def paths(value, before=()):
    yield before
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from paths(one, (*before, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_at_any_place_is_read_or_refused(store, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    plan, manifest = read_sealed(store / "plan.json"), read_sealed(store / "manifest.json")
    more = [("lineage",), ("restored",), (*ENTRY, "observed_t_n"), (*ENTRY, "extra")]
    place = data.draw(st.sampled_from([p for p in paths(manifest) if p] + more))
    value = data.draw(JSON)
    for name, content in (("plan.json", plan), ("manifest.json", manifest)):
        changed = inner = copy.deepcopy(dict(content))
        if place[0] in changed:
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
        try:
            write_sealed(folder / name, changed)
        except ValueError:  # what JSON can't hold
            return
    for read in (read_plan, read_manifest):
        try:
            assert json.dumps(read(folder))
            assert len(LatentStore(folder).hash) == 64
        except StoreError as error:
            assert "\n" not in str(error)
