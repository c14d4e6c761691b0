"""The page on thousands of clients says what was measured, and what follows from it."""

from __future__ import annotations

import json
import math
import re

from fedkd_utils import bench, methods
from fedkd_utils.bench_growth import CLIENTS, EDGES
from fedkd_utils.bench_learning import AIMED, BYTES, TIME
from fedkd_utils.networks import VNET_WIDTH, build_network, copy_state, nbytes
from fedkd_utils.notebooks import PROJECT
from fedkd_utils.settings import PAPER, QUICK, SETTINGS_OF_CLIENTS, Settings

PAGE = " ".join((PROJECT / "docs" / "scaling.md").read_text(encoding="utf-8").split())
FACTS = json.loads(bench.FILE.read_bytes())
MEASURED = bench.medians(FACTS)
STUDENT = nbytes(copy_state(build_network(QUICK, 0)))


def growth(what: str) -> float:
    return MEASURED[f"growth: {what}"]


SECONDS = growth("one more client, a round of one step, CPU s")
MEMORY = growth("one more client, memory beyond its volumes, MB")


def model(first: str, slope: float, clients: int) -> float:
    return growth(f"{CLIENTS[0]} clients, {first}") + slope * (clients - CLIENTS[0])


def lines_of_growth() -> list[tuple[float, ...]]:
    time, memory = "a round of one step, CPU s", "peak memory beyond volumes, MB"
    return [
        (
            growth(f"{n} clients, {time}"),
            model(time, SECONDS, n),
            growth(f"{n} clients, {memory}"),
            model(memory, MEMORY, n),
            growth(f"{n} clients, sent in all, MB"),
            3 * STUDENT * n / 1e6,
        )
        for n in CLIENTS
    ]


def voxels(settings: Settings) -> int:
    d, h, w = settings.grid_shape
    return d * h * w


def signals(settings: Settings, channels: int) -> int:
    """Bytes of what a teacher says about a volume: four probabilities and an entropy a voxel, and its bottleneck."""
    return 4 * (5 * voxels(settings) + channels * voxels(settings) // math.prod(build_network(settings, 0).strides))


def missing(claims: list[str], page: str = PAGE) -> list[str]:
    return [claim for claim in claims if claim not in page]


def test_the_table_of_clients_is_measured_and_modelled():
    found = lines_of_growth()
    claims = [
        f"| {n} | {s:.2f} | {ms:.2f} | {b:.0f} | {mb:.0f} | {sent:.0f} | {wanted:.0f} |"
        for n, (s, ms, b, mb, sent, wanted) in zip(CLIENTS, found, strict=True)
    ]
    worst = max(max(abs(ms / s - 1), abs(mb / b - 1)) for s, ms, b, mb, _, _ in found)
    claims += [
        f"costs {SECONDS:.4f} s a round",
        f"and {MEMORY:.3f} MB beside its volumes",
        f"by up to {worst:.0%}".replace("%", " %"),
    ]
    assert not missing([*claims, f"a student of {STUDENT / 1e6:.3f} MB"])
    for *_, sent, wanted in found:
        assert float(f"{wanted:.4g}") == sent


def test_the_table_of_volumes_is_measured():
    claims, costs = [], []
    for edge in EDGES:
        seconds = growth(f"step of two cubes, edge {edge}, CPU s")
        memory = growth(f"step of two cubes, edge {edge}, peak memory, MB")
        costs.append(seconds / (2 * edge**3) * 1e6)
        claims.append(f"| {edge} | {seconds:.3f} | {costs[-1]:.2f} | {memory:.0f} |")
    least, most = min(costs), max(costs)
    claims.append(f"a factor of up to {most / least:.1f}: a voxel costs {least:.2f} to {most:.2f} microseconds")
    assert not missing(claims)


def test_a_thousand_clients_follow_from_the_model():
    step = MEASURED["steps: step: dual distillation, ms"] / 1000
    assert QUICK.local_epochs * QUICK.steps_per_epoch == 10 and "10 steps a round" in PAGE
    client = 10 * step + SECONDS
    labels = QUICK.client_labelled + QUICK.client_validation + QUICK.client_test
    images = labels + QUICK.client_unlabelled
    volumes = voxels(QUICK) * (4 * images + 8 * labels) / 1e6
    said = signals(QUICK, QUICK.channels[-1]) * QUICK.client_unlabelled / 1e6
    every = volumes + said + MEMORY
    unlabelled = 1000  # a client of the paper; the profile has fewer
    training = PAPER.client_labelled + unlabelled
    sent = 1000 * STUDENT
    claims = [
        f"step takes {1000 * step:.0f} ms, so a client takes {client:.2f} s a round",
        f"a thousand take {1000 * client / 60:.0f} minutes",
        f"volumes take {volumes:.0f} MB ({images} images in float32 and {labels} labels in int64",
        f"about the {QUICK.client_unlabelled} unlabelled ones {said:.0f} MB",
        f"need {every:.0f} GB: 8 GB hold {8000 / every:.0f} of them",
        f"without distillation {8000 / (volumes + MEMORY):.0f}",
        f"{training} training volumes a client) images alone take {training * voxels(PAPER) * 4 / 1e9:.1f} GB",
        f"signals {unlabelled * signals(PAPER, 16 * VNET_WIDTH) / 1e9:.0f} GB",
        f"send {sent / 1e9:.1f} GB a round and get as much back, {2 * sent / 125e6:.0f} seconds",
        f"for the average takes {sent / 1e9:.1f} GB",
    ]
    assert not missing(claims)


def test_what_the_engine_adds_is_measured():
    job = "flower: a round of 3 clients (dual_kd): "
    inside, ours = (MEASURED[f"flower: {way} / bare loop, ratio"] for way in ("Flower in one process", "simulation"))
    real, bare = MEASURED[f"{job}Flower on real processes, CPU s"], MEASURED[f"{job}bare loop, CPU s"]
    loop = measured_lines("simulation")["our simulation / a bare loop"]
    assert MEASURED["flower: weights after the last round, largest difference, "] == 0
    claims = [
        f"Flower takes {inside:.2f} of a bare loop's processor time, and our simulation {ours:.2f};",
        f"gives {loop['median']:.3f} for our simulation,",
        f"with single rounds from {loop['low']:.2f} to {loop['high']:.2f}:",
        f"{real:.0f} s of processor time instead of {bare:.0f} s, with weights that are equal in every bit",
    ]
    assert not missing(claims)


FULL_SIZE = "160 x 384 x 384 voxels"

#: What the page calls each measured line that has a target, but for those of ``ROWS``.
TARGETS = {
    "steps: dual distillation / supervised, 4 volumes": "a dual-distillation step, of a supervised one",
    "steps: dual distillation, not augmented / supervised, 4 volumes, not augmented": "the same, not augmented",
    "profile: share of a step: data": "data, share of a step",
    "simulation: our simulation / a bare loop": "our simulation, of a bare loop (FedAvg, two clients)",
    "simulation: two clients in turn / side by side": "two clients side by side, times as fast as in turn",
    "simulation: weights in turn and side by side, largest difference": "their weights, largest difference",
    "flower: simulation / bare loop": "our simulation, of a bare loop (dual distillation, three clients)",
    "flower: weights after the last round, largest difference": "weights on Flower, largest difference",
    "growth: one more client, memory beyond its volumes": "memory of one more client beyond its volumes, MB",
    **{
        f"phantom: a knee through {contrast}": f"a made knee, {contrast.replace('_', ' ')}, CPU s"
        for contrast in ("repository_dess", "pd_fs", "t1", "t2_fs", "gre")
    },
    **{
        f"inference: segment {FULL_SIZE}, {network} network, {what}": f"{FULL_SIZE}, {network} network, {unit}"
        for network in ("course's", "paper's")
        for what, unit in (("2 threads", "s"), ("peak memory", "MB"))
    },
}

#: Whose way to the best rival's Dice the page shows, and against whom in which setting.
ROWS = ("fedavg", "dual_kd", "finetune", "combined_kd", "chosen_finetune", "mixed_protocols")
REACH = {
    f"{where}, {cost}": (setting, rival, unit)
    for setting, where, alone in (("paper_like", "near", "mean_teacher"), ("heterogeneous", "far", "local_uamt"))
    for cost, rival, unit in (("time", alone, "CPU s"), ("bytes", "mean_teacher", "MB"))
}

MEAN_TEACHER_THERE = "paper_like: mean_teacher has the Dice of mean_teacher after"
NETWORK_DICE = ("Dice after 20 CPU s", "the thinnest, patellar")


def number(value: float | None) -> str:
    if value is None:
        return "never"
    digits = 0 if value >= 10 or value == 0 else 2 if value >= 0.1 else 3
    return f"{value:.{digits}f}"


def measured_lines(part: str) -> dict[str, dict]:
    return {one["what"]: one for one in FACTS["parts"][part]["lines"]}


def table_of_targets() -> str:
    rows = ["| | target | median | 5 % to 95 % | |", "|---|---|---|---|---|"]
    for name, title in TARGETS.items():
        part, _, what = name.partition(": ")
        one = measured_lines(part)[what]
        goal = f"at most {one['at_most']:g}" if "at_most" in one else f"at least {one['at_least']:g}"
        spread = f"{number(one['low'])} to {number(one['high'])}" if one["repeats"] > 1 else "one measurement"
        verdict = "met" if one["met"] else "**missed**"
        rows.append(f"| {title} | {goal} | {number(one['median'])} | {spread} | {verdict} |")
    return "\n".join(rows)


def table_of_reach() -> str:
    found = measured_lines("reach")
    rows = ["| | " + " | ".join(REACH) + " |", "|---" * (len(REACH) + 1) + "|"]
    for row in ROWS:
        cells = []
        for setting, rival, unit in REACH.values():
            one = found[f"{setting}: {row} / {rival}, {unit}"]
            low, median, high = (number(one[key]) for key in ("low", "median", "high"))
            cells.append(median if low == high else f"{median} ({low} to {high})")
        rows.append(f"| {methods.ROWS[row].title} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def test_both_tables_of_targets_are_what_the_run_says():
    raw = (PROJECT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in (table_of_targets(), table_of_reach()):
        assert f"\n\n{table}\n\n" in raw, f"the page needs this table:\n{table}"
    named = {f"{part}: {one['what']}" for part, f in FACTS["parts"].items() for one in f["lines"] if "met" in one}
    assert {name for name in named if not name.startswith("reach: ")} == TARGETS.keys()


def test_what_the_page_says_of_networks_is_measured():
    lines = measured_lines("networks")
    found = {what: one["median"] for what, one in lines.items()}
    ours, plain = "the course's network", "MONAI UNet, as it comes"
    bare = f"{ours}, without dropout"
    known = [lines[f"{name}: {what}"] for name in (ours, plain, bare) for what in NETWORK_DICE]
    whole = [f"{one['median']:.3f} ({one['low']:.3f} to {one['high']:.3f})" for one in known[::2]]
    thin = [f"{one['median']:.3f}" for one in known[1::2]]
    names = {what.partition(": ")[0] for what in found}
    others = names - {ours, plain, bare}
    steps = [found[f"{name}: a step"] / found[f"{ours}: a step"] for name in others]
    best = max(found[f"{name}: {NETWORK_DICE[0]}"] for name in others)
    numbers = {6: "six", 15: "fifteen"}
    claims = [
        "medians of three seeds",
        f"a test Dice of {whole[0]}, and {thin[0]} on patellar cartilage",
        f"as it comes has {whole[1]} and {thin[1]}.",
        f"steps that take {numbers[round(min(steps))]} to {numbers[round(max(steps))]} times as long",
        f"and at most {best:.2f} by then",
        f"without it, it has {whole[2]} and {thin[2]}",
    ]
    assert not missing(claims) and len(others) == 4
    assert {lines[f"{name}: {NETWORK_DICE[0]}"]["repeats"] for name in names} == {3}
    assert known[0]["high"] < min(known[2]["low"], known[4]["low"])  # it is behind, and without dropout it is not
    assert not missing([f"this one had {FACTS['effort']['repeats']} repeats"])


def test_what_the_page_says_of_the_targets_is_so():
    found = measured_lines("reach")
    met = {name: one["met"] for name, one in found.items() if "met" in one}
    of = {row: [met[f"{setting}: {row} / {rival}, {unit}"] for setting, rival, unit in REACH.values()] for row in AIMED}
    assert of == {"dual_kd": [False] * 4, "combined_kd": [True, False, True, True], "chosen_finetune": [True] * 4}
    dice = {
        where: [one["median"] for name, one in found.items() if name.startswith(f"{where}: final")]
        for where in SETTINGS_OF_CLIENTS
    }
    assert not missing([f"near {dice['paper_like'][0]:.3f}", "far {:.3f} and {:.3f}".format(*dice["heterogeneous"])])
    protocols, fedavg, finetune = (
        [found[f"{setting}: {row} / {rival}, {unit}"]["median"] for setting, rival, unit in REACH.values()]
        for row in ("mixed_protocols", "fedavg", "finetune")
    )
    assert all(ratio < goal for ratio, goal in zip(protocols, (TIME, BYTES) * 2, strict=True))
    assert fedavg[0] < found["paper_like: dual_kd / mean_teacher, CPU s"]["median"]
    others = [row for row in ROWS if row != "finetune"]
    for place, unit in enumerate(("CPU s", "MB")):
        assert finetune[place] <= min(found[f"paper_like: {row} / mean_teacher, {unit}"]["median"] for row in others)


def test_a_teacher_takes_longer_than_the_near_rival():
    """So says the page."""
    rows = bench.PROJECT / "data" / "results" / "reference"
    seconds = [
        json.loads(path.read_bytes())["teacher"]["seconds"] for path in rows.glob("dual_kd-paper_like-seed?.json")
    ]
    times = [one for one in FACTS["parts"]["reach"]["lines"] if one["unit"] == "CPU s"]
    (rival,) = [one["median"] for one in times if one["what"] == MEAN_TEACHER_THERE]
    assert len(seconds) == 5 and min(seconds) > 60 and 19.5 < rival < 20.5
    assert not missing(["more than a minute, while the near rival is there after 20 s"])


def test_a_number_that_is_not_on_the_page_is_found():
    row = re.search(r"\| 64 \| [^|]+\|", PAGE)
    assert row and missing([row[0]], PAGE.replace(row[0], "| 64 | 9.99 |")) == [row[0]]


def test_the_committed_run_is_not_a_quick_one_and_names_its_machine_class_only():
    assert not FACTS["effort"]["quick"] and {"steps", "growth", "simulation"} <= set(FACTS["parts"])
    assert FACTS["machine"].keys() == {"cores", "processor", "system", "device", "threads", "workers"}
