"""The model card says what is true and its snippet runs; uploads hold what they should and nothing else.

The uploads go to a local server that answers what huggingface_hub asks of the Hub for them, over HTTP.
"""

import base64
import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import constants
from support.pictures import REPOSITORY
from support.running import process_env

from sdxl_ambient.errors import HubError
from sdxl_ambient.formats.peft import save_lora, save_unet
from sdxl_ambient.formats.record import LORA_FILE
from sdxl_ambient.hub.__main__ import main
from sdxl_ambient.hub.card import fitting_sampler, model_card
from sdxl_ambient.hub.upload import check_hub, push, repository
from sdxl_ambient.models.lora import add_lora
from sdxl_ambient.pipeline import euler_like, sample, timestep_grid
from sdxl_ambient.provenance import read_json, write_json, write_sealed

DATA = REPOSITORY / "miniature" / "data"
TOKEN = "hf_a_token_of_the_tests"
STEPS = 4


def record(**changes):
    """What training records of a run."""
    usual = {
        "t_n": 500, "low_noise": "skip", "loss_space": "epsilon", "finetune": "lora", "base_model": "owner/base", "step": 40,
        "data": "f" * 64, "images": 6, "prediction_type": "epsilon", "resolution": [64, 64],
    }  # fmt: skip
    return {**usual, **changes}


@pytest.fixture(scope="module")
def run(unet, tmp_path_factory):
    """A finished run: a LoRA, and all that must stay at home beside it."""
    folder = tmp_path_factory.mktemp("runs") / "emoji"
    one = copy.deepcopy(unet)
    add_lora(one, rank=2, alpha=2, targets=["attention"])
    for p in one.parameters():
        if p.requires_grad:
            p.data += 0.03
    save_lora(one, folder, record())
    write_json(folder / "options.json", {"options": {"train_data_dir": str(folder)}})
    for name in ("latents/latents-0.safetensors", "checkpoint-40/optimizer.bin", "logs/events", "validation/grinning.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"a secret of this machine")
    return folder


# -- the card ----------------------------------------------------------------------


def parts(card):
    """The card's YAML and its text."""
    _, head, text = card.split("---\n", 2)
    return yaml.safe_load(head), text


def card_of(folder="runs/x", **changes):
    return model_card(folder, record(**changes), repo_id="me/emoji", license="openrail++")


def test_the_card_says_what_the_model_is():
    head, text = parts(card_of())
    assert head == {
        "license": "openrail++",
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "lora", "stable-diffusion-xl", "ambient-diffusion"],
    }
    for told in ("t_n = 500 (σ = 0.851)", "`skip` at t ≤ t_n", "epsilon", "f" * 64, "| images | 6 |", "64×64", "| 40 |"):
        assert told in text
    assert "Sampler: **hybrid**" in text and "has not been measured" in text
    head, text = parts(card_of(finetune="full", sigma=0.25))
    assert head["base_model_relation"] == "finetune" and "lora" not in head["tags"]
    # Only what is named is taken over, whatever else a record may hold.
    assert "abc123" not in card_of(noise_key="abc123", captions=["abc123"], train_data_dir="abc123")
    assert "fully fine-tuned UNet" in text and "(σ = 0.250)" in text and "load_lora_weights" not in text


@pytest.mark.parametrize(
    ("changes", "sampler", "told"),
    [
        ({}, "hybrid", "hand over to the base model"),
        ({"low_noise": "restore"}, "full", "samples that a model drew"),
        ({"low_noise": "consistency"}, "full", "agree with the levels above"),
        ({"t_n": None}, "full", "**clean** latents"),
        ({"t_n": "mixed"}, "full", "Every image has its own t_n"),
        ({"t_n": "mixed", "low_noise": "restore"}, "full", "a noise level of its own"),
    ],
)
def test_the_sampler_fits_what_was_trained(changes, sampler, told):
    assert fitting_sampler(record(**changes)) == sampler
    text = card_of(**changes)
    assert told in text and f"Sampler: **{sampler}**" in text
    assert ("hand_over" in text) == (sampler == "hybrid")


def test_a_local_base_model_is_called_by_its_name_alone():
    for base in ("pipeline", "/home/somebody/models/pipeline"):
        head, text = parts(card_of(base_model=base))
        assert "base_model" not in head and "base_model_relation" not in head
        assert "(`pipeline`)" in text and "somebody" not in text


def code_of(card, names):
    """The snippet in a card, with its names replaced."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    asked = f'"grinning face", num_inference_steps={STEPS}, output_type="latent"'
    asked += ", generator=torch.Generator().manual_seed(3)"
    names = {**names, '"a photograph of a lighthouse"': asked}
    for old, new in names.items():
        assert old in code
        code = code.replace(old, str(new))
    return code


def test_the_snippets_run_and_draw_what_our_own_samplers_draw(miniature, run, unet, tmp_path):
    pipe = StableDiffusionXLPipeline.from_pretrained(miniature)
    pipe.set_progress_bar_config(disable=True)
    # A level on the sampler's own grid, so that both take the same steps.
    t_n = timestep_grid(euler_like(pipe.scheduler), STEPS)[1]
    whole = copy.deepcopy(unet)
    for p in whole.parameters():
        p.data *= 1.02
    save_unet(whole, tmp_path, record())

    def ours(sampler, base_unet=None):
        generators = [torch.Generator().manual_seed(3)]
        how = dict(num_inference_steps=STEPS, output_type="latent", sampler=sampler, t_n=t_n, base_unet=base_unet)
        return sample(pipe, ["grinning face"], generators=generators, **how)[0]

    base = ours("full")
    pipe.load_lora_weights(run)
    drawn = {("lora", "skip"): ours("hybrid"), ("lora", "restore"): ours("full")}
    pipe.unload_lora_weights()
    own, pipe.unet = pipe.unet, whole
    drawn |= {("full", "skip"): ours("hybrid", own), ("full", "restore"): ours("full")}
    assert all((image - base).abs().max() > 1e-2 for image in drawn.values())
    for (finetune, low_noise), expected in drawn.items():
        folder = run if finetune == "lora" else tmp_path
        code = code_of(
            card_of(finetune=finetune, low_noise=low_noise, t_n=t_n), {"owner/base": miniature, "me/emoji": folder}
        )
        found = {}
        exec(code, found)
        torch.testing.assert_close(found["image"], expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def report(run, miniature):
    """A real evaluation of the run, as small as can be, in its place."""
    from eval.memorization import main as evaluate

    flags = [
        *("--pretrained_model_name_or_path", str(miniature), "--lora", f"noisy={run}", "--worst_case", "none"),
        *("--train_data_dir", str(DATA / "finetune"), "--heldout_data_dir", str(DATA / "heldout")),
        *("--num_images", "3", "--num_inference_steps", "2", "--output_dir", str(run / "report")),
        *("--attacks", "noise", "--attack_t", "500", "--attack_images", "4", "--attack_modes", "one_step"),
    ]
    assert evaluate(flags) == 0
    return run / "report" / "report.json"


def test_the_card_shows_measured_memorisation(run, report):
    measured = read_json(report)
    model = measured["models"]["noisy"]
    text = model_card(run, record(), repo_id="me/emoji", license="mit", report=report)
    assert "has not been measured" not in text
    assert model["verdict"]["text"] in text and f"**{model['verdict']['level']}**" in text
    rows = {row["name"]: row for row in model["worst_case"]["rows"]}
    row = rows["full"]
    assert f"{row['value']:.1%} ({row['low']:.1%} to {row['high']:.1%})" in text
    assert f"| copied share, corrected | {row['copied']['value']:.1%} (" in text
    control = model["samplers"]["full"]["share_above_threshold_as_many_heldout"]
    assert f"| control: as near to as many held-out images | {control:.1%} |" in text
    aucs = [f"{r['value']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in rows.values() if r["kind"] == "attack"]
    assert sum(auc in text for auc in set(aucs)) >= 1 and "AUC of the best of 2 attacks" in text
    assert str(run) not in text and "grinning" not in text and str(REPOSITORY) not in text


def test_a_report_of_another_model_is_refused(run, report, tmp_path):
    def card(path, folder=run, **changes):
        return model_card(folder, record(**changes), repo_id="me/x", license="mit", report=path)

    # Moved since: the only fine-tuned model at the same t_n.
    assert "**has not been measured**" not in card(report, tmp_path)
    with pytest.raises(HubError, match=r"none of its models \(noisy\) is surely the one in"):
        card(report, tmp_path, t_n=300)
    old = {**read_json(report), "schema_version": 2}
    write_sealed(tmp_path / "old.json", old)
    with pytest.raises(HubError, match="is of schema 2, not 3; evaluate anew"):
        card(tmp_path / "old.json")
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(HubError, match="no.json' can't be read"):
        card(tmp_path / "no.json")
    without = read_json(report)
    for model in without["models"].values():
        model.update(worst_case=None, verdict={"level": "unknown", "text": "No verdict: too few."})
    write_sealed(tmp_path / "few.json", without)
    assert "**unknown**: No verdict: too few." in card(tmp_path / "few.json")


# -- the Hub ----------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks of the Hub for one upload. ``fail``: the start of a path → statuses, used up in turn."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Scores)
        self.repositories, self.files, self.objects, self.calls, self.fail = {}, {}, {}, [], {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.role = "write"
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()


class Scores(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, body, status=200, headers=()):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in [("Content-Length", str(len(data))), ("Content-Type", "application/json"), *headers]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def handle_call(self):
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.calls.append((self.command, path))
        for start, statuses in hub.fail.items():
            if path.startswith(start) and statuses:
                return self.answer({"error": "as the test wants"}, statuses.pop(0))
        if not path.startswith("/store/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        for pattern, method in self.ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, body, *found.groups())
        self.answer({"error": "no such call"}, 404)

    do_GET = do_POST = do_PUT = handle_call

    def whoami(self, body):
        self.answer({"name": "me", "orgs": [], "auth": {"accessToken": {"role": self.server.role}}})

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if name in self.server.repositories:
            return self.answer({"url": f"{self.server.url}/{name}"}, 409)
        self.server.repositories[name] = asked.get("visibility") or ("private" if asked.get("private") else "public")
        self.answer({"url": f"{self.server.url}/{name}"})

    def info(self, body, name):
        if name not in self.server.repositories:
            return self.answer({"error": "none"}, 404, [("X-Error-Code", "RepoNotFound")])
        self.answer({"id": name, "private": self.server.repositories[name] == "private", "siblings": [], "tags": []})

    def valid(self, body):
        self.answer({"errors": [], "warnings": []})

    def preupload(self, body, name):
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self.answer({"files": files})

    def batch(self, body, name):
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.server.url}/store/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.answer({})

    def commit(self, body, name):
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[name, value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[name, value["path"]] = self.server.objects[value["oid"]]
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1"})

    ROUTES = (
        ("GET /api/whoami-v2", whoami),
        ("POST /api/repos/create", create),
        ("GET /api/models/([^/]+/[^/]+)", info),
        ("POST /api/validate-yaml", valid),
        ("POST /api/models/(.+)/preupload/main", preupload),
        (r"POST /(.+)\.git/info/lfs/objects/batch", batch),
        ("PUT /store/([0-9a-f]+)", store),
        ("POST /api/models/(.+)/commit/main", commit),
    )


@pytest.fixture
def hub(monkeypatch):
    """A Hub of one's own, with a login, on a machine that has a network."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def said(error):
    text = str(error.value)
    assert "\n" not in text and TOKEN not in text
    return text


def test_an_upload_holds_the_adapter_its_record_and_the_card_and_nothing_else(hub, run):
    lines = []
    address = push(run, repo_id="emoji", log=lines.append)
    assert address == f"{hub.url}/me/emoji"
    assert hub.repositories == {"me/emoji": "private"}
    names = (LORA_FILE, "training.json", "README.md")
    assert hub.files == {("me/emoji", name): (run / name).read_bytes() for name in names}
    head, text = parts((run / "README.md").read_text())
    assert head["license"] == "openrail++" and 'load_lora_weights("me/emoji")' in text
    for name in ("training.json", "README.md"):
        told = (run / name).read_text()
        assert not any(word in told for word in (str(run), TOKEN, "secret", str(REPOSITORY)))
    assert lines[-1].startswith(f"Uploaded {LORA_FILE}, training.json, README.md to")


def test_a_whole_unet_and_pictures_that_are_asked_for_are_uploaded(hub, unet, tmp_path):
    save_unet(unet, tmp_path / "run", record(finetune="full"))
    (tmp_path / "run/unet/notes.txt").write_text("not ours")
    picture = DATA / "finetune/1f34d.png"
    push(tmp_path / "run", repo_id="org/whole", private=False, license="mit", validation_images=[picture])
    assert hub.repositories == {"org/whole": "public"}
    assert sorted(name for _, name in hub.files) == [
        "README.md", "images/00.png", "training.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
    ]  # fmt: skip
    assert hub.files["org/whole", "images/00.png"] == picture.read_bytes()
    card = hub.files["org/whole", "README.md"].decode()
    assert "![A sample](images/00.png)" in card and "license: mit" in card and "1f34d" not in card


def test_a_report_older_than_the_weights_stays_out_of_the_card(hub, run, report, tmp_path):
    lines = []
    push(run, repo_id="emoji", log=lines.append)
    assert "Verdict, **" in (run / "README.md").read_text()
    before = report.stat().st_mtime
    os.utime(report, (1, 1))
    push(run, repo_id="emoji", log=lines.append)
    assert "has not been measured" in (run / "README.md").read_text()
    assert any("older than the weights and stays out" in line for line in lines)
    push(run, repo_id="emoji", report=report, log=lines.append)
    assert "Verdict, **" in (run / "README.md").read_text()
    os.utime(report, (before, before))


def test_an_upload_is_tried_again_where_the_hub_is_busy(hub, run):
    hub.fail = {"/api/models/me/emoji/preupload": [503]}
    push(run, repo_id="emoji", log=lambda line: None)
    assert len(hub.files) == 3 and not hub.fail["/api/models/me/emoji/preupload"]


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ({"/api/whoami": [401]}, r"the Hub does not accept the login \(401\): run hf auth login"),
        ({"/api/repos/create": [403]}, r"the login may not write there \(403\)"),
        ({"/api/repos/create": [500]}, "500"),
        ({"/api/models/me/emoji/commit": [500]}, "500"),
    ],
)
def test_a_failed_upload_is_one_line_that_says_how_to_go_on(hub, run, fail, message):
    hub.fail = copy.deepcopy(fail)
    with pytest.raises(HubError, match=message) as error:
        push(run, repo_id="emoji", log=lambda line: None)
    text = said(error)
    assert text.startswith("the upload to 'emoji' failed: ") and f"Nothing is lost: the results are in {run}" in text
    assert f"python -m sdxl_ambient.hub --output_dir {run} --hub_model_id emoji" in text
    assert not hub.files and (run / LORA_FILE).is_file()


def test_what_can_not_be_uploaded_is_refused(hub, run, tmp_path):
    with pytest.raises(HubError, match="holds neither pytorch_lora_weights.safetensors nor a UNet"):
        push(tmp_path, repo_id="emoji")
    (tmp_path / LORA_FILE).write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(HubError, match="has no record of its training"):
        push(tmp_path, repo_id="emoji")
    assert hub.calls == []


def test_before_training_the_login_and_the_name_are_checked(hub, monkeypatch):
    assert check_hub("emoji") == "me/emoji" and check_hub("org/emoji") == "org/emoji"
    assert hub.repositories == {}
    with pytest.raises(HubError, match="--hub_model_id: 'a/b/c' is no name for a repository"):
        check_hub("a/b/c")
    hub.repositories["me/open"] = "public"
    assert check_hub("open", private=False) == "me/open"
    with pytest.raises(HubError, match="the repository 'me/open' is there and public") as error:
        check_hub("open")
    said(error)
    hub.role = "read"
    with pytest.raises(HubError, match="the login may only read"):
        check_hub("emoji")
    hub.fail = {"/api/whoami": [401]}
    with pytest.raises(HubError, match=r"does not accept the login \(401\)") as error:
        check_hub("emoji")
    said(error)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(HubError, match="no login for the Hub: run hf auth login, or set HF_TOKEN") as error:
        check_hub("emoji")
    said(error)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="--push_to_hub: HF_HUB_OFFLINE is set; unset it"):
        check_hub("emoji")


def test_a_dead_network_is_one_line(hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(HubError, match="--push_to_hub: .*onnection") as error:
        check_hub("emoji")
    said(error)


def test_the_repository_is_named_after_the_folder(tmp_path):
    assert repository(None, tmp_path / "runs" / "mine") == "mine" and repository("me/x", tmp_path) == "me/x"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--output_dir: None is not a folder"),
        (["--output_dir", "/nowhere"], "--output_dir: '/nowhere' is not a folder"),
        (["--output_dir", ".", "--memorization_report", "/no"], "--memorization_report: '/no' is not a file"),
        (
            ["--output_dir", ".", "--hub_token", "x"],
            "'hub_token', which diffusers has, is not here: a token on the command line",
        ),
    ],
)
def test_wrong_options_of_the_command_are_one_line(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    printed = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in printed and "\n" not in printed


def test_the_command_uploads_as_users_call_it(run, tmp_path):
    """In a process of its own, whose settings come from the environment."""
    server = Hub()
    env = {
        **process_env(),
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "sdxl_ambient.hub", "--output_dir", str(run), "--hub_model_id", "org/emoji"]
    done = subprocess.run(
        command, env={**env, "HF_HUB_OFFLINE": "0"}, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert server.repositories == {"org/emoji": "private"} and len(server.files) == 3
    assert TOKEN not in done.stdout + done.stderr
    server.shutdown()
    server.server_close()


def test_the_version_of_the_client_is_the_pinned_one():
    """The server above was written from the source of this one."""
    pinned = re.search(r"^huggingface_hub==(\S+)", (REPOSITORY / "constraints.txt").read_text(), re.M).group(1)
    assert huggingface_hub.__version__.split(".")[0] == pinned.split(".")[0]
