"""How close each method gets to the truth, where the truth is known: a ring of eight Gaussians in two dimensions.

    python -m benchmarks.exactness [--quick] --json benchmarks/results/exactness.json [--plot exactness.png]

Every method trains the same small network on the same noisy points with the same number of network evaluations (one
evaluation is one forward pass of one point; backward passes are not counted). Against the closed form it reports

    excess   E‖h(x_t, t) − E[x_0|x_t]‖² / E‖x_0 − E[x_0|x_t]‖²: how far beyond the error that no model can avoid
    swd      sliced 2-Wasserstein distance of samples to true ones, sampled all the way and stopped at t_n, beside the
             distance of two true samples

at several seeds, which train side by side as one batched network. Three quarters of an hour on two cores.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.record import target, write_record
from benchmarks.sdxl import sdxl_schedule
from sdxl_ambient.levels import CLEAN
from sdxl_ambient.noise import NoiseSchedule
from sdxl_ambient.objective import ExtraRows, ObjectiveOptions, ambient_objective
from sdxl_ambient.posterior import ancestral_steps, posterior_mean, sample_posterior, spaced_times
from sdxl_ambient.provenance import hash_json, read_json
from sdxl_ambient.randomness import Randomness

MODES, RADIUS, SPREAD = 8, 1.5, 0.1
POINTS, BATCH, WIDTH = 20_000, 256, 128
LEVELS = (100, 300)


# -- the truth ----------------------------------------------------------------------


def centres(dtype=torch.float64) -> torch.Tensor:
    angle = torch.arange(MODES, dtype=dtype) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)


def true_points(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 2), float32."""
    which = torch.randint(MODES, (count,), generator=generator)
    return centres(torch.float32)[which] + SPREAD * torch.randn(count, 2, generator=generator)


def true_mean(schedule: NoiseSchedule, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[x_0 | x_t] of the mixture in closed form, float64. x_t (n, 2), t (n,)."""
    x_t = x_t.double()
    alpha, variance = schedule.alpha(t)[:, None], 1 - schedule.alpha_bar(t)[:, None]
    total = alpha**2 * SPREAD**2 + variance
    c = centres()
    residual = x_t[:, None] - alpha[:, None] * c  # (n, modes, 2)
    share = torch.softmax(-residual.square().sum(-1) / (2 * total), dim=1)
    per_mode = c + (alpha * SPREAD**2 / total)[:, None] * residual
    return (share[..., None] * per_mode).sum(1)


# -- the network ----------------------------------------------------------------------


class Network(torch.nn.Module):
    """ε̂ of points in the plane: one multilayer perceptron per seed, evaluated together. Counts its evaluations."""

    def __init__(self, seeds: int):
        super().__init__()
        features = 2 + 2 * 16 + 1
        sizes = [features, WIDTH, WIDTH, WIDTH, 2]
        self.weights, self.biases = torch.nn.ParameterList(), torch.nn.ParameterList()
        for a, b in zip(sizes[:-1], sizes[1:], strict=True):
            each = [torch.randn(a, b, generator=torch.Generator().manual_seed(s)) / math.sqrt(a) for s in range(seeds)]
            self.weights.append(torch.nn.Parameter(torch.stack(each)))
            self.biases.append(torch.nn.Parameter(torch.zeros(seeds, 1, b)))
        self.seeds, self.evaluations = seeds, 0
        bar = sdxl_schedule().alpha_bar(torch.arange(1000))
        self.log_snr: torch.Tensor
        self.register_buffer("log_snr", (bar / (1 - bar)).log().float())

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x (seeds, n, 2), t (seeds, n) → (seeds, n, 2)."""
        self.evaluations += x.shape[0] * x.shape[1]
        log_snr = self.log_snr[t][..., None]
        angle = log_snr * (2.0 ** torch.linspace(-3, 2, 16))
        h = torch.cat([x, angle.sin(), angle.cos(), log_snr / 5], dim=-1)
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(b, h, w)
            if i < len(self.weights) - 1:
                h = torch.nn.functional.silu(h)
        return h

    def flat(self, *groups: int):
        """``denoise(x, t)`` over rows that hold, one after the other, groups of (seeds × size) rows each."""

        def denoise(x, t):
            # A call with fewer rows than the groups make up is one group; with twice as many, the groups twice.
            whole = sum(groups) * self.seeds
            sizes = groups * (len(x) // whole) if whole and len(x) % whole == 0 else (len(x) // self.seeds,)
            rows = [n * self.seeds for n in sizes]
            xs = [p.reshape(self.seeds, n, 2) for p, n in zip(x.split(rows), sizes, strict=True)]
            ts = [p.reshape(self.seeds, n) for p, n in zip(t.split(rows), sizes, strict=True)]
            out = self(torch.cat(xs, 1), torch.cat(ts, 1)).split(list(sizes), 1)
            return torch.cat([o.reshape(-1, 2) for o in out])

        return denoise


# -- the methods ----------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """``data``: what the network is given as noisy at t_n ("noisy"), or as clean ("clean" points, or noisy ones "naive")."""

    data: str = "noisy"
    options: dict = field(default_factory=dict)
    whole_jump: bool = False  # the consistency loss's largest step is t_n itself
    repeats_forward: bool = False  # pays the anchor's forward pass twice, as the official code does
    restore: int = 0  # restored points per batch
    refresh: int = 0
    steps: int = 10
    start: float = 0.0  # share of the evaluations before restoring and consistency begin
    every: int = 1  # steps from one consistency loss to the next
    levels: str = "low"
    batch: int = BATCH


OFFICIAL = dict(consistency_estimator="both", consistency_stop_anchor=True)
NEAR = dict(t_sampling="near")
PAIRS = dict(consistency_weight=0.3, consistency_space="snr", **NEAR)
# The levels just above t_n weighed like the others, with antithetic noise: half as many points, each of them twice.
BALANCED = dict(antithetic=True, weighting="balanced", balance_cap=100.0, **NEAR)
CHAIN = dict(consistency_anchor="chain", consistency_space="snr", consistency_max_step=100, consistency_stop_anchor=True)
METHODS = {
    "clean": Method("clean"),
    "naive": Method("naive"),
    "ambient": Method(),
    # The official weight is 0.01; larger ones are here so that the comparison is with its best.
    "official_0.01": Method(options=dict(consistency_weight=0.01, **OFFICIAL), whole_jump=True, repeats_forward=True),
    "official_0.1": Method(options=dict(consistency_weight=0.1, **OFFICIAL), whole_jump=True, repeats_forward=True),
    "official_1": Method(options=dict(consistency_weight=1.0, **OFFICIAL), whole_jump=True, repeats_forward=True),
    "consistency": Method(options=PAIRS),
    "restore": Method(options=NEAR, restore=128, refresh=8, steps=20, start=0.2),
    "restore_all": Method(options=NEAR, restore=256, refresh=12, steps=20, levels="all", start=0.2),
    "restore_consistency": Method(options=PAIRS, restore=128, refresh=8, steps=20, start=0.2),
    "balanced": Method(options=BALANCED, batch=128),
    "balanced_chain": Method(options=BALANCED | CHAIN | dict(consistency_weight=0.5), batch=128, every=4, start=0.5),
}
OFFICIALS = [name for name in METHODS if name.startswith("official")]
AMBIENT = [name for name in METHODS if name not in ("clean", "naive")]


class Buffer:
    """A restored point for every noisy one, per seed; refreshed in the order of a permutation."""

    def __init__(self, x_n: torch.Tensor, t_n: int, method: Method, schedule: NoiseSchedule):
        self.x_n, self.t_n, self.method, self.schedule = x_n, t_n, method, schedule
        self.x_0 = torch.full_like(x_n, float("nan"))

    def restored(self, network: Network, generator: torch.Generator) -> ExtraRows:
        seeds, count, _ = self.x_n.shape
        index = torch.randint(count, (self.method.restore,), generator=generator)
        missing = self.x_0[0, index, 0].isnan()
        missing[: self.method.refresh] = True
        stale = index[missing]
        if len(stale):
            rows = self.x_n[:, stale].reshape(-1, 2)
            t_n = torch.full((len(rows),), self.t_n)
            found = sample_posterior(
                network.flat(), self.schedule, rows, t_n, self.method.steps, Randomness(generator, len(rows))
            )
            self.x_0[:, stale] = found.reshape(seeds, -1, 2)
        x_0 = self.x_0[:, index].reshape(-1, 2)
        top = self.schedule.num_timesteps - 1 if self.method.levels == "all" else self.t_n
        return ExtraRows(x_0, torch.full((len(x_0),), top))


def train(method: Method, t_n: int, budget: int, seeds: int, learning_rate: float = 2e-3) -> tuple[Network, dict]:
    """Train one network per seed until each has made ``budget`` evaluations; the averaged networks, and what it cost."""
    schedule = sdxl_schedule()
    x_0 = torch.stack([true_points(POINTS, torch.Generator().manual_seed(100 + s)) for s in range(seeds)])
    z = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(7))
    level = torch.full((1,), t_n)
    x_n = x_0 if method.data == "clean" else schedule.observe(x_0, level, z)
    given = CLEAN if method.data != "noisy" else t_n
    later = ObjectiveOptions(**method.options)
    if method.whole_jump:
        later = replace(later, consistency_max_step=t_n)
    before = replace(later, consistency_weight=0.0)
    network, average = Network(seeds), Network(seeds).requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)
    buffer = Buffer(x_n, t_n, method, schedule) if method.restore else None
    generator = torch.Generator().manual_seed(1)
    used, step, started = 0, 0, time.perf_counter()
    while used < budget:
        progress = used / budget
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        restored, groups = None, [method.batch]
        options = later if progress >= method.start and step % method.every == 0 else before
        if buffer and progress >= method.start:
            restored = buffer.restored(average, generator)
            groups = [0, method.restore] if method.levels == "all" else [method.batch, method.restore]
        rows = torch.randint(POINTS, (groups[0],), generator=generator)
        batch = x_n[:, rows].reshape(-1, 2)
        t_given = torch.full((len(batch),), given)
        losses = ambient_objective(network.flat(*groups), schedule, batch, t_given, generator, options, restored)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
        step += 1
        extra = step * method.batch * seeds if method.repeats_forward else 0
        used = (network.evaluations + average.evaluations + extra) / seeds
    return average, dict(steps=step, evaluations=used, seconds=time.perf_counter() - started)


# -- what is measured ----------------------------------------------------------------------


@torch.no_grad()
def excess(network: Network, schedule: NoiseSchedule, t: int, count: int) -> list[float]:
    """Per seed: squared distance of h from the truth over the Bayes error, on fresh points."""
    generator = torch.Generator().manual_seed(10_000 + t)
    x_0 = true_points(count, generator)
    at = torch.full((count,), t)
    x_t = schedule.renoise(x_0, torch.full((count,), CLEAN), at, torch.randn(count, 2, generator=generator))
    truth = true_mean(schedule, x_t, at)
    bayes = (x_0 - truth).square().mean()
    many = x_t.repeat(network.seeds, 1)
    h = posterior_mean(network.flat(), schedule, many, at.repeat(network.seeds)).double().reshape(network.seeds, count, 2)
    return ((h - truth).square().mean((1, 2)) / bayes).tolist()


@torch.no_grad()
def samples(network: Network, schedule: NoiseSchedule, stop: int, count: int, steps: int = 250) -> torch.Tensor:
    """(seeds, count, 2): ancestral samples from pure noise to t = stop, then x̂_0."""
    generator = torch.Generator().manual_seed(20_000)
    rows = network.seeds * count
    start, end = torch.full((rows,), 999), torch.full((rows,), stop)
    times = spaced_times(start, end, steps, power=1.5)
    x = ancestral_steps(
        network.flat(), schedule, torch.randn(rows, 2, generator=generator), times, Randomness(generator, rows)
    )
    return posterior_mean(network.flat(), schedule, x, end).reshape(network.seeds, count, 2)


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: int = 200) -> float:
    """Sliced 2-Wasserstein distance of two equally large sets of points (n, 2): root mean square over directions."""
    angle = torch.arange(directions, dtype=torch.float64) * (math.pi / directions)
    project = torch.stack([angle.cos(), angle.sin()])
    one, two = ((p.double() @ project).sort(0).values for p in (a, b))
    return (one - two).square().mean().sqrt().item()


def levels_of(t_n: int) -> list[int]:
    return [1, t_n // 4, t_n // 2, 3 * t_n // 4, t_n, (t_n + 999) // 2, 900]


def measure(network: Network, t_n: int, count: int) -> dict:
    schedule = sdxl_schedule()
    truth = true_points(count, torch.Generator().manual_seed(30_000))
    full, early = (samples(network, schedule, stop, count) for stop in (0, t_n))
    return dict(
        excess={str(t): excess(network, schedule, t, 20_000) for t in levels_of(t_n)},
        swd_full=[sliced_wasserstein(s, truth) for s in full],
        swd_early_stop=[sliced_wasserstein(s, truth) for s in early],
    )


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def below(figures: dict, t_n: int) -> float:
    """Mean excess over the levels at or below t_n and over the seeds."""
    return mean(mean(v) for t, v in figures["excess"].items() if int(t) <= t_n)


def targets(figures: dict, ours: str) -> list[dict]:
    best = {t: min(below(figures[str(t)][name], t) for name in OFFICIALS) for t in LEVELS}
    ratios = [below(figures[str(t)][ours], t) / best[t] for t in LEVELS]
    at_100 = figures["100"]
    swd = mean(at_100[ours]["swd_full"]) / mean(at_100["clean"]["swd_full"])
    far = []
    for t_n in LEVELS:
        one = figures[str(t_n)]
        high = [str(t) for t in levels_of(t_n) if t >= (t_n + 999) // 2]
        far += [mean(one[ours]["excess"][t]) - mean(one["clean"]["excess"][t]) for t in high]
    return [
        target("excess_below_tn_over_official", max(ratios), "<=", 0.6),
        target("swd_full_over_clean_tn100", swd, "<=", 1.5),
        target("excess_high_t_over_clean", max(far), "<=", 0.01),
        target("naive_over_worst_ambient", min(naive_over_ambient(figures[str(t)], t) for t in LEVELS), ">=", 2),
    ]


def naive_over_ambient(figures: dict, t_n: int) -> float:
    """At t_n itself, which the ambient loss is about: naive's excess over that of the worst method that is ambient."""
    at = {name: mean(figures[name]["excess"][str(t_n)]) for name in figures if name != "floor"}
    return at["naive"] / max(at[name] for name in AMBIENT if name in at)


def plot(figures: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(LEVELS), figsize=(6 * len(LEVELS), 4))
    for axis, t_n in zip(axes, LEVELS, strict=True):
        for name, one in figures[str(t_n)].items():
            if name != "floor":
                axis.plot([int(t) for t in one["excess"]], [mean(v) for v in one["excess"].values()], "o-", label=name, ms=3)
        axis.axvline(t_n, color="grey", lw=1, ls=":")
        axis.set(yscale="log", xlabel="timestep t", ylabel="excess error / Bayes error", title=f"t_n = {t_n}")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def cell(what: tuple) -> dict:
    """One method at one t_n, in a process of its own."""
    name, t_n, budget, seeds, count = what
    torch.set_num_threads(1)
    network, cost = train(METHODS[name], t_n, budget, seeds)
    return {"settings": settings(what), **measure(network, t_n, count), **cost}


def settings(what: tuple) -> dict:
    """What decides a cell's figures: everything is seeded, and one thread's sums have one order."""
    name, t_n, budget, seeds, count = what
    return {**asdict(METHODS[name]), "t_n": t_n, "evaluations": budget, "seeds": seeds, "samples": count}


def kept(path: Path) -> dict:
    """The cells of an earlier run by what decided them."""
    figures = read_json(path)["figures"] if path.exists() else {}
    cells = [one for at in figures.values() for name, one in at.items() if name != "floor"]
    return {hash_json(one["settings"]): one for one in cells}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true", help="a fiftieth of the evaluations, for a look at whether it runs")
    parser.add_argument("--evaluations", type=float, default=8e6, help="network evaluations per method and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="train only what the JSON doesn't have under equal settings")
    parser.add_argument("--processes", type=int, default=2, help="methods trained side by side, one thread each")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--t_n", nargs="+", type=int, default=list(LEVELS))
    parser.add_argument("--ours", default="balanced_chain", choices=list(METHODS), help="what the targets speak of")
    args = parser.parse_args(argv)
    budget = args.evaluations / (50 if args.quick else 1)
    count = 1000 if args.quick else 10_000
    started = time.perf_counter()
    one, two = (true_points(count, torch.Generator().manual_seed(30_000 + k)) for k in range(2))
    figures = {str(t_n): {"floor": {"swd": sliced_wasserstein(one, two)}} for t_n in args.t_n}
    cells = [(name, t_n, budget, args.seeds, count) for t_n in args.t_n for name in args.methods]
    there = kept(args.json) if args.keep else {}
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        running = {c: pool.submit(cell, c) for c in cells if hash_json(settings(c)) not in there}
        for what in cells:
            found = running[what].result() if what in running else there[hash_json(settings(what))]
            name, t_n, *_ = what
            figures[str(t_n)][name] = found
            spread = " ".join(f"{t}:{mean(v):.3f}" for t, v in found["excess"].items())
            swd = f"swd {mean(found['swd_full']):.3f} early {mean(found['swd_early_stop']):.3f}"
            cost = f"{found['steps']} steps {found['seconds']:.0f} s"
            print(f"t_n {t_n} {name:20} excess {spread}  below {below(found, t_n):.3f}  {swd}  {cost}", flush=True)
    whole = set(args.t_n) >= set(LEVELS) and {args.ours, *OFFICIALS, "clean", "naive"} <= set(args.methods)
    write_record(args.json, "exactness", figures, targets(figures, args.ours) if whole else [], started)
    if args.plot:
        plot(figures, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
