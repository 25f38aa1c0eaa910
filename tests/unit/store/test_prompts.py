"""The captions of a store: embedded once, and kept as tokens where text encoders are trained."""

import json

import torch
from support.stores import equal, load_file

from sdxl_ambient.models.conditioning import encode_prompts
from sdxl_ambient.provenance import hash_bytes


def test_damaged_prompts_are_embedded_again(build, emoji, tmp_path):
    store = tmp_path / "s"
    build(emoji, store)
    (shard,) = store.glob("prompts-*.safetensors")
    want = load_file(shard)
    shard.write_bytes(b"damaged")
    build(emoji, store)
    assert equal(load_file(shard), want)


def test_long_captions_are_counted(build, emoji, tmp_path):
    path = sorted(emoji.glob("*.png"))[0]
    rows = [json.loads(line) for line in (emoji / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        if row["file_name"] == path.name:
            row["text"] = "a very long caption " * 40
    (emoji / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = []
    assert build(emoji, tmp_path / "s", log=said.append)["counts"]["captions_cut"] == 1
    assert any("1 of 6 captions are longer" in s for s in said)


def test_all_captions_of_a_list_are_embedded(build, emoji, tmp_path):
    rows = [json.loads(line) for line in (emoji / "metadata.jsonl").read_text().splitlines()]
    rows[0]["text"] = ["one", "two", "one"]
    (emoji / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = build(emoji, tmp_path / "s")
    assert sorted(len(i["captions"]) for i in manifest["images"]) == [1, 1, 1, 1, 1, 2]
    assert manifest["counts"]["captions"] == 7 and len(manifest["prompts"]) == 8
    want = [hash_bytes(caption.encode()) for caption in ("one", "two")]
    assert want in [i["captions"] for i in manifest["images"]] and set(want) <= manifest["prompts"].keys()


def test_the_empty_caption_is_embedded_as_the_pipeline_does(build, emoji, tmp_path, encoders):
    manifest = build(emoji, tmp_path / "s")
    empty = hash_bytes(b"")
    embeds, pooled = encode_prompts([""], encoders.tokenizers, encoders.text_encoders)
    stored = load_file(tmp_path / "s" / manifest["prompts"][empty])
    torch.testing.assert_close(stored[f"{empty}.embeds"], embeds[0])
    torch.testing.assert_close(stored[f"{empty}.pooled"], pooled[0])


def test_tokens_are_kept_where_they_are_asked_for(build, emoji, tmp_path, encoders):
    store = tmp_path / "s"
    assert "tokens" not in build(emoji, store) and not (store / "tokens.safetensors").exists()
    manifest = build(emoji, store, keep_tokens=True)
    assert manifest["tokens"] == "tokens.safetensors"
    tokens = load_file(store / "tokens.safetensors")
    assert tokens.keys() == {f"{caption}.tokens" for caption in manifest["prompts"]}
    text = json.loads((emoji / "metadata.jsonl").read_text().splitlines()[0])["text"]
    for caption in (text, ""):
        found = tokens[f"{hash_bytes(caption.encode())}.tokens"]
        assert found.shape == (2, 77) and found.dtype == torch.int64
        want = [t(caption, padding="max_length", max_length=77, truncation=True).input_ids for t in encoders.tokenizers]
        assert found.tolist() == want
    # A store that has them keeps them, with the captions that it has now.
    (emoji / "metadata.jsonl").write_text((emoji / "metadata.jsonl").read_text().replace(text, "another"))
    manifest = build(emoji, store)
    assert manifest["tokens"] == "tokens.safetensors"
    assert load_file(store / "tokens.safetensors").keys() == {f"{caption}.tokens" for caption in manifest["prompts"]}
