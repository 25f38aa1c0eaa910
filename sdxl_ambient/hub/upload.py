"""Uploads what a run exported: which repository, which files, and whether it may."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from sdxl_ambient.errors import CheckpointError, HubError, InterchangeError, one_line
from sdxl_ambient.formats.files import check_files
from sdxl_ambient.formats.find import lora_file, unet_files
from sdxl_ambient.formats.record import INFO_FILE, LORA_FILE, read_training_info
from sdxl_ambient.hub.card import model_card, numbered_images
from sdxl_ambient.provenance import atomic

CARD = "README.md"
REPORT = Path("report") / "report.json"  # where a run's evaluation is looked for, below its folder
_OFFLINE = "HF_HUB_OFFLINE is set; unset it, or leave out --push_to_hub and upload later (python -m sdxl_ambient.hub)"
_NO_LOGIN = "no login for the Hub: run hf auth login, or set HF_TOKEN"


def repository(hub_model_id: str | None, output_dir: str | Path) -> str:
    """The repository's name: the one asked for, or the output folder's."""
    return hub_model_id or Path(output_dir).resolve().name


def check_hub(repo_id: str, private: bool = True) -> str:
    """Make sure, before anything is trained, that the result can be uploaded. Returns the repository's full name.

    Changes nothing on the Hub.

    Args:
        repo_id: NAME or OWNER/NAME.
        private: a repository of that name that is there already must be a private one.

    Raises:
        HubError: no network wanted, no login or one that may only read, an impossible name, a public repository.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"--hub_model_id: {repo_id!r} is no name for a repository: {one_line(error)}") from None
    try:
        if constants.HF_HUB_OFFLINE:
            raise HubError(f"--push_to_hub: {_OFFLINE}")
        if get_token() is None:
            raise HubError(f"--push_to_hub: {_NO_LOGIN}")
        api = HfApi(library_name="sdxl_ambient")
        who = api.whoami()
        if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise HubError("--push_to_hub: the login may only read; log in with a token that may write")
        name = repo_id if "/" in repo_id else f"{who['name']}/{repo_id}"
        _refuse_public(api, name, private)
    except HubError:
        raise
    # Whatever a network can do: an error here must be one line, not a traceback of its library.
    except Exception as error:
        raise HubError(f"--push_to_hub: {_reason(error)}") from None
    return name


def _refuse_public(api: HfApi, name: str, private: bool) -> None:
    """A repository that is there keeps its visibility, so what was meant to be private would be public."""
    try:
        there = api.model_info(name)
    except RepositoryNotFoundError:
        return
    if private and not there.private:
        raise HubError(
            f"--hub_private: the repository {name!r} is there and public; make it private, take another, or give "
            "--hub_private false"
        )


def _reason(error: Exception) -> str:
    """One line for what went wrong in talking to the Hub."""
    if isinstance(error, OfflineModeIsEnabled):
        return _OFFLINE
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status == 401:
        return "the Hub does not accept the login (401): run hf auth login, or set HF_TOKEN anew"
    if status == 403:
        return "the login may not write there (403): another token or another --hub_model_id is needed"
    return one_line(error)


def push(
    folder: str | Path,
    *,
    repo_id: str,
    private: bool = True,
    license: str = "openrail++",
    report: str | Path | None = None,
    validation_images: Sequence[str | Path] = (),
    log: Callable[[str], None] = print,
) -> str:
    """Upload the adapter or the UNet in ``folder`` with its model card, in one commit. Returns the repository's address.

    The card is written to ``folder/README.md`` first, so that what was or would have been uploaded can be read.

    Args:
        folder: a finished run's.
        repo_id: NAME or OWNER/NAME; the repository is made if missing.
        private: make it a private one; one that is there already must be.
        license: what the card says.
        report: an evaluation's report.json; by default ``folder/report/report.json``, unless the weights are newer.
        validation_images: pictures to upload and show; none unless asked, since they show what was learnt.

    Raises:
        HubError: nothing to upload, or the upload failed. Nothing in ``folder`` is changed or lost.
    """
    folder = Path(folder)
    files = weight_files(folder)
    try:
        check_files(files)
        info = read_training_info(folder)
        if "t_n" not in info:
            raise HubError(f"{folder} has no record of its training ({INFO_FILE}), so the card could not say what it is")
        report = Path(report) if report is not None else _own_report(folder, files, log)
        name = check_hub(repo_id, private)
        card = model_card(folder, info, repo_id=name, license=license, report=report, validation_images=validation_images)
        with atomic(folder / CARD) as temporary:
            temporary.write_text(card, encoding="utf-8")
        files = [*files, folder / INFO_FILE, folder / CARD]
        api = HfApi(library_name="sdxl_ambient")
        address = api.create_repo(name, private=private, exist_ok=True)
        # Once more: it may have been made since, by somebody else.
        _refuse_public(api, name, private)
        adds = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files if path.is_file()]
        adds += [CommitOperationAdd(place, str(path)) for place, path in numbered_images(validation_images)]
        api.create_commit(name, adds, commit_message=f"Upload by sdxl_ambient, step {info.get('step', 'unknown')}")
    # Training may have taken weeks: whatever goes wrong here, the message says that its result is there and what to do.
    except Exception as error:
        reason = str(error) if isinstance(error, (HubError, CheckpointError, InterchangeError)) else _reason(error)
        raise HubError(
            f"the upload to {repo_id!r} failed: {reason}. Nothing is lost: the results are in {folder}; upload them with "
            f"python -m sdxl_ambient.hub --output_dir {folder} --hub_model_id {repo_id}"
        ) from None
    log(f"Uploaded {', '.join(a.path_in_repo for a in adds)} to {address}")
    return str(address)


def weight_files(folder: str | Path) -> list[Path]:
    """The files of the trained weights in a run's folder. Raises HubError where there are none."""
    folder = Path(folder)
    try:
        return [lora_file(folder / LORA_FILE)] if (folder / LORA_FILE).exists() else unet_files(folder / "unet")
    except InterchangeError:
        raise HubError(f"{folder} holds neither {LORA_FILE} nor a UNet; a finished run's --output_dir is needed") from None


def _own_report(folder: Path, files: Sequence[Path], log: Callable[[str], None]) -> Path | None:
    """The run's own report, unless it is older than the weights: then it was made of others."""
    report = folder / REPORT
    if not report.is_file():
        return None
    if report.stat().st_mtime < max(path.stat().st_mtime for path in files):
        log(f"{report} is older than the weights and stays out of the model card; give it with --memorization_report")
        return None
    return report
