"""One fault after another: inject, look, run again, compare."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.faults.child import YEAR, Armed, Ended, start, wait
from benchmarks.faults.commands import PICTURES, Command, copy_pictures
from benchmarks.faults.left import artefacts, differing, finished, noisy_latents
from sdxl_ambient.store.register import open_register

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
FAULTS = (
    "SIGKILL at a write", "SIGTERM at a write", "SIGKILL in time", "SIGTERM in time", "disk full", "small disk", "read-only",
    "truncated", "zeroed", "bit flipped", "pickle planted", "two at once", "picture missing", "picture changed", "clock",
)  # fmt: skip
WEIGHTS = (5, 3, 3, 2, 2, 1, 1, 2, 2, 4, 2, 2, 1, 1, 1)
COUNTS = ("second_observations", "silent_corruptions", "lost_finished_work", "tracebacks", "code_executed", "not_resumed")


@dataclass
class Reference:
    """An undisturbed run of a command: its exit code, what it leaves, in what two such runs differ, its noise and writes."""

    code: int
    left: dict[str, Any]
    unstable: set[str]
    noise: dict[str, set[str]]
    writes: int
    seconds: float


@dataclass
class Result:
    """One fault and what it did. ``skipped``: why it couldn't be injected.

    ``ends``: exit codes of the disturbed runs, negative for a signal, then of the continuation. ``message``: its error.
    """

    command: str
    fault: str
    seed: int
    skipped: str | None = None
    ends: list[int] = field(default_factory=list)
    message: str | None = None
    problems: dict[str, str] = field(default_factory=dict)


class Campaign:
    """All faults of one worker. ``prepared``: has images, other, drawn, store and a home with a key."""

    def __init__(self, work: Path, prepared: Path):
        self.work, self.prepared = work, prepared
        self.references: dict[str, Reference] = {}

    def case(self, command: Command, name: str) -> Path:
        """A new folder with what a command reads."""
        case = self.work / name
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir(parents=True)
        for what in ("images", "home", *command.inputs):
            shutil.copytree(self.prepared / what, case / what)
        return case

    def reference(self, command: Command) -> Reference:
        if command.name not in self.references:
            left = []
            for k in (1, 2):
                case = self.case(command, f"reference-{k}")
                ended = wait(start(command, case), case)
                if ended.code not in command.codes:
                    raise RuntimeError(f"{command.name} fails undisturbed: {ended.errors[-2000:]}")
                left.append(artefacts(case / "out"))
            noise = noisy_latents(case)
            unstable = set(differing(*left))
            self.references[command.name] = Reference(ended.code, left[0], unstable, noise, ended.writes, ended.seconds)
        return self.references[command.name]

    def inject(self, command: Command, fault: str, seed: int) -> Result:
        """One fault, its continuation, and what is wrong after it."""
        chance, result = random.Random(f"{command.name}|{fault}|{seed}"), Result(command.name, fault, seed)
        reference, case = self.reference(command), self.case(command, f"case-{os.getpid()}")
        disturbed = _disturb(command, fault, chance, case, reference, result)
        if result.skipped is None:
            self._look(command, fault, case, reference, disturbed, result)
        _unmount(case)
        shutil.rmtree(case, ignore_errors=True)
        return result

    def _look(
        self, command: Command, fault: str, case: Path, reference: Reference, disturbed: list[Ended], result: Result
    ) -> None:
        _widen(case)
        noise, kept = noisy_latents(case), finished(case / "out") if fault not in DAMAGES else {}
        again = wait(start(command, case), case)
        problems, result.ends = result.problems, [ended.code for ended in (*disturbed, again)]
        result.message = _last_error(again) if again.code == 2 else None
        for ended in (*disturbed, again):
            if "Traceback (most recent call last)" in ended.errors:
                problems["tracebacks"] = ended.errors.strip().splitlines()[-1][:200]
        if (case / "executed").exists():
            problems["code_executed"] = "a planted payload ran"
        seen = noisy_latents(case)
        for content, hashes in noise.items():
            seen[content] = seen.get(content, set()) | hashes
        own = {c: h | (reference.noise.get(c, set()) if command.keeps_key else set()) for c, h in seen.items()}
        if fault not in DAMAGES and (twice := [c for c, h in own.items() if len(h) > 1]):
            problems["second_observations"] = f"{len(twice)} pictures have two x_n"
        changed = fault in ("picture missing", "picture changed")
        if again.code == reference.code:
            stable = {n: v for n, v in reference.left.items() if n not in reference.unstable}
            left = {n: v for n, v in artefacts(case / "out").items() if n not in reference.unstable}
            if command.keeps_key and not changed and (wrong := _not_the_same(stable, left)):
                problems["silent_corruptions"] = ", ".join(wrong[:3])
            gone = [n for n, h in kept.items() if finished(case / "out").get(n) != h]
            if gone and not changed and "checkpoint" not in gone[0]:
                problems["lost_finished_work"] = ", ".join(gone[:3])
        elif again.code != 2 or fault not in MAY_REFUSE:
            problems["not_resumed"] = f"exit {again.code}: {_last_error(again)}"


def _not_the_same(stable: dict[str, Any], left: dict[str, Any]) -> list[str]:
    """What differs. Prompts may be embedded again into files of other names, which are compared by the manifest alone."""
    return [n for n in differing(stable, left) if not n.rsplit("/", 1)[-1].startswith("prompts-")]


def _last_error(ended: Ended) -> str:
    lines = [line for line in ended.errors.splitlines() if "error:" in line] or ended.errors.strip().splitlines() or [""]
    return lines[-1][:300]


DAMAGES = ("truncated", "zeroed", "bit flipped", "pickle planted")
MAY_REFUSE = (*DAMAGES, "picture missing", "picture changed")


def _disturb(command: Command, fault: str, chance: random.Random, case: Path, ref: Reference, result: Result) -> list[Ended]:
    """Inject the fault; the runs that it disturbed."""
    if fault in DAMAGES:
        ended = wait(start(command, case), case) if chance.random() < 0.5 else _interrupted(command, chance, case, ref)
        _damage(fault, chance, case)
        return [ended]
    if fault.startswith("picture"):
        ended = _interrupted(command, chance, case, ref)
        picture = chance.choice(sorted((case / "images").glob("*.png")))
        if fault == "picture changed":
            Image.new("RGB", (64, 64), (chance.randrange(256), 1, 2)).save(picture)
        else:
            picture.unlink()
            rows = (case / "images/metadata.jsonl").read_text().splitlines()
            (case / "images/metadata.jsonl").write_text("\n".join(r for r in rows if picture.name not in r) + "\n")
        return [ended]
    if fault == "two at once":
        running = [start(command, case) for _ in range(2)]
        return [wait(process, case) for process in running]
    if fault in ("small disk", "read-only") and (reason := _mount(fault, chance, case)):
        result.skipped = reason
        return []
    armed = _armed(fault, chance, ref)
    return [wait(start(command, case, armed), case, armed)]


def _armed(fault: str, chance: random.Random, ref: Reference) -> Armed | None:
    name = fault.split()[0]
    if fault.endswith("at a write"):
        return Armed(number=SIGNALS[name], at_write=chance.randint(1, max(1, ref.writes)))
    if fault.endswith("in time"):
        return Armed(number=SIGNALS[name], after=chance.uniform(0.05, ref.seconds))
    if fault == "disk full":
        return Armed(limit=int(10 ** chance.uniform(2, 5.5)))
    return Armed(clock=chance.choice([-YEAR, YEAR])) if fault == "clock" else None


def _interrupted(command: Command, chance: random.Random, case: Path, ref: Reference) -> Ended:
    armed = Armed(number=signal.SIGKILL, at_write=chance.randint(2, max(2, ref.writes)))
    return wait(start(command, case, armed), case, armed)


def _payload(marker: Path) -> bytes:
    """A pickle in text that makes a folder when it is loaded, written out: nothing here imports the module that reads it."""
    return b"cos\nmkdir\n(V" + str(marker).encode() + b"\ntR."


def _damage(fault: str, chance: random.Random, case: Path) -> None:
    files = sorted(p for p in (case / "out").rglob("*") if p.is_file() and p.stat().st_size and ".lock" not in p.name)
    if not files:
        return
    path = chance.choice(files)
    data = bytearray(path.read_bytes())
    if fault == "truncated":
        data = data[: chance.randrange(len(data))]
    elif fault == "zeroed":
        data = bytearray(len(data))
    elif fault == "bit flipped":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    else:
        data = bytearray(_payload(case / "executed"))
    path.unlink()
    path.write_bytes(data)


def _mount(fault: str, chance: random.Random, case: Path) -> str | None:
    """Mount what starves the output folder; the reason where that can't be done."""
    out = case / "out"
    out.mkdir(exist_ok=True)
    size = f"size={chance.randint(8, 120)}k"
    small = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(out)]
    read_only = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(out)]
    try:
        done = subprocess.run(small if fault == "small disk" else read_only, capture_output=True, text=True)
    except OSError as error:
        return f"mount: {error.strerror}"
    return None if done.returncode == 0 else done.stderr.strip()[:100]


def _widen(case: Path) -> None:
    """Make a small or read-only disk large and writable, with what lies on it."""
    if os.path.ismount(case / "out"):
        words = ["mount", "-o", "remount,rw,size=1g", str(case / "out")]
        subprocess.run(words, check=True, capture_output=True)


def _unmount(case: Path) -> None:
    if os.path.ismount(case / "out"):
        subprocess.run(["umount", "-l", str(case / "out")], capture_output=True)


def prepare(folder: Path, commands: dict[str, Command]) -> None:
    """Pictures, a home with a key, a store and drawn images, made once."""
    copy_pictures(folder / "images", 0, PICTURES)
    copy_pictures(folder / "other", 40, 12)
    (folder / "home").mkdir()
    for name, what in (("encode", "store"), ("generate", "drawn")):
        ended = wait(start(commands[name], folder), folder)
        if ended.code != 0:
            raise RuntimeError(f"{name} fails undisturbed: {ended.errors[-2000:]}")
        (folder / "out").rename(folder / what)
    for path in (folder / "home").glob("observations.sqlite*"):
        path.unlink()
    (folder / "home/register.key").unlink(missing_ok=True)
    key = (folder / "home/noise.key").read_bytes()
    shutil.rmtree(folder / "home")
    _new_home(folder / "home", key)


def _new_home(home: Path, key: bytes) -> None:
    """A home with this noise key and an empty register."""
    before = os.environ.get("SDXL_AMBIENT_HOME")
    os.environ["SDXL_AMBIENT_HOME"] = str(home)
    with open_register():
        pass
    path = home / "noise.key"
    path.touch(mode=0o600)
    path.write_bytes(key)
    if before is None:
        del os.environ["SDXL_AMBIENT_HOME"]
    else:
        os.environ["SDXL_AMBIENT_HOME"] = before


def summary(results: list[Result]) -> dict[str, Any]:
    """Counts by command and fault, what was skipped, what failed."""
    injected = [r for r in results if r.skipped is None]
    by_command: dict[str, Counter] = {}
    for one in injected:
        by_command.setdefault(one.command, Counter())[one.fault] += 1
    return {
        "faults_injected": len(injected),
        "by_command": {name: dict(sorted(counts.items())) for name, counts in sorted(by_command.items())},
        "by_fault": dict(sorted(Counter(r.fault for r in injected).items())),
        "disturbed_ends": dict(sorted(Counter(f"{r.fault}: {code}" for r in injected for code in r.ends[:-1]).items())),
        "continued": sum(r.message is None for r in injected),
        "refused": dict(sorted(Counter(r.fault for r in injected if r.message).items())),
        "skipped": dict(Counter(f"{r.fault}: {r.skipped}" for r in results if r.skipped)),
        **{name: sum(name in r.problems for r in injected) for name in COUNTS},
        "failures": [{"command": r.command, "fault": r.fault, "seed": r.seed, **r.problems} for r in injected if r.problems],
    }
