"""The course from the command line: ``python -m fedkd_utils --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd_utils.settings import PROFILES, PROJECT, SETTINGS_OF_CLIENTS, Settings, any_contrast, cache_folder

if TYPE_CHECKING:
    from fedkd_utils.experiments import Result
    from fedkd_utils.networks import TappedNetwork


def _course(arguments: argparse.Namespace) -> None:
    from fedkd_utils import publish

    page = publish.run_course()
    print("\nComparison on the test volumes (quick profile, seed 0; every digit has the spread of one seed):\n")
    _compare(argparse.Namespace(profile="quick", setting=SETTINGS_OF_CLIENTS, row=None, seed=[0]))
    print(f"\nRead the course in a browser: {page}")


def _notebooks(arguments: argparse.Namespace) -> None:
    from fedkd_utils import publish

    publish.stamp_all(names=arguments.name)


def _pages(arguments: argparse.Namespace) -> None:
    from fedkd_utils import pages

    print(f"Read the course in a browser: {pages.build_committed(arguments.out)}")


def _glossary(arguments: argparse.Namespace) -> None:
    from fedkd_utils import glossary, notebooks

    terms = glossary.read_terms(notebooks.NOTEBOOKS)
    books = []
    for path in notebooks.notebooks_in(notebooks.NOTEBOOKS):
        books.append(notebooks.read(path))
        count = glossary.link(books[-1], terms)
        notebooks.write(books[-1], path)
        print(f"{path.stem:24s} {count} terms linked")
    if unused := glossary.unused(books, terms):
        print(f"no notebook uses: {', '.join(unused)}")


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.part == ["engine"]:  # an extra, with a record of its own
        from fedkd_utils import engine_recorded

        engine_recorded.need_engine()
        from fedkd_utils import engine_bench

        return engine_bench.report()
    from fedkd_utils import bench, timing

    effort = timing.QUICK if arguments.quick else timing.FULL
    effort = replace(
        effort, repeats=arguments.repeats or effort.repeats, training=arguments.training or effort.training
    )
    words = ["python -m fedkd_utils bench"]
    words += ["--quick"] * arguments.quick + arguments.part
    words += [f"--{name} {getattr(arguments, name)}" for name in ("repeats", "training") if getattr(arguments, name)]
    facts = bench.run(arguments.part, effort, " ".join(words))
    if arguments.out or bench.is_whole(facts):
        print(f"\nwritten: {bench.write(facts, arguments.out or bench.FILE)}")
    else:
        print("\nNothing was written: only a whole run has its place; name one with --out.")


def _hospitals(arguments: argparse.Namespace) -> None:
    from fedkd_utils import engine_recorded

    engine_recorded.need_engine()
    from fedkd_utils import hospitals

    settings = replace(PROFILES[arguments.profile], rounds=arguments.rounds)
    print(hospitals.three_hospitals(arguments.row, settings, arguments.seed, cache_folder() / "hospitals"))


def _cohort(arguments: argparse.Namespace) -> None:
    from fedkd_utils import cohorts, site_folder

    settings = PROFILES[arguments.profile]
    for setting in arguments.setting:
        cohort = cohorts.make_cohort(settings, setting, arguments.seed)
        site_folder.assert_no_leakage(cohort)
        for site in (cohort.repository, *cohort.clients):
            title = site_folder.scanner_title(site)
            print(f"{setting:14s} {site.name:12s} {title:40s} {site.counts}\n{'':15s}{site.folder}")


def _teacher(arguments: argparse.Namespace) -> None:
    from fedkd_utils import cohorts, live, teacher

    settings = PROFILES[arguments.profile]
    site = cohorts.make_repository(settings, arguments.scanner)
    with live.progress_bar(settings.teacher_steps, "teacher") as advance:
        taught = teacher.teacher_on(site, settings, arguments.seed, progress=advance)
    print(f"{taught.path}\nvalidation Dice {taught.best_dice:.3f} at step {taught.best_step}")
    print(f"training took {taught.seconds:.0f} s, {taught.data_share:.0%} of it waiting for data")


def _compare(arguments: argparse.Namespace) -> None:
    from fedkd_utils import cohorts, experiments, shares
    from fedkd_utils.methods import COURSE_ROWS

    settings = PROFILES[arguments.profile]
    results = []
    for setting in arguments.setting:
        cohort = cohorts.make_cohort(settings, setting)
        for seed in arguments.seed:
            sites = experiments.load_clients(shares.share(cohort, settings, seed), settings)
            for row in arguments.row or COURSE_ROWS:
                results.append(experiments.run_row(row, setting, seed, settings, sites=sites))
    _print_comparison(results)


def _print_comparison(results: list[Result]) -> None:
    from fedkd_utils import experiments

    table = experiments.comparison_table(results)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


def _check(arguments: argparse.Namespace) -> int:
    from fedkd_utils import sites

    report = sites.check_sites(arguments.folder, _note())
    print(report.text())
    return 1 if report.errors else 0


def _note() -> Callable[[str], None] | None:
    """Says on a terminal which file is being read."""
    return (lambda text: print(f"\r\033[K{text[:100]}", end="\r", file=sys.stderr)) if sys.stderr.isatty() else None


def _prepare(arguments: argparse.Namespace) -> None:
    from fedkd_utils import prepare

    settings = PROFILES[arguments.profile]
    made = prepare.prepare_sites(
        arguments.folder,
        arguments.out,
        settings,
        arguments.seed,
        _note(),
        centred=arguments.centred,
        network=lambda: _network(arguments, PROFILES["quick"]),  # to find a joint, a coarse grid will do
    )
    print(made.text())
    print(f"written: {arguments.out}; look at {arguments.out / 'preview.html'}")


def _network(arguments: argparse.Namespace, settings: Settings) -> tuple[TappedNetwork, Settings]:
    """The network of the options of ``network_options``: a checkpoint, or a teacher that is made on first use."""
    from fedkd_utils import cohorts, experiments, live, teacher

    if arguments.checkpoint:
        return experiments.open_model(arguments.checkpoint, arguments.client)
    if arguments.contrast == "any":
        settings = any_contrast(settings)
    site = cohorts.make_repository(settings, settings.teacher_contrast)
    with live.progress_bar(settings.teacher_steps, "teacher") as advance:
        return teacher.teacher_on(site, settings, progress=advance).network, settings


def _simulate(arguments: argparse.Namespace) -> None:
    from fedkd_utils import simulate

    simulate.simulate_sites(arguments.folder, arguments.out, arguments.clients, arguments.seed, _note())
    print(f"written: {arguments.out}; train on it with `run --sites {arguments.out}`")


def _run_sites(arguments: argparse.Namespace) -> None:
    from fedkd_utils import experiments, sites
    from fedkd_utils.methods import COURSE_ROWS

    settings, cohort = PROFILES[arguments.profile], sites.open_sites(arguments.sites)
    sites.check_sites(arguments.sites, _note(), dealt=True).stop()  # now, and not after the teacher's training
    results = []
    for seed in arguments.seed:
        for row in arguments.row or COURSE_ROWS:
            one = experiments.run_sites(row, cohort, settings, seed, workers=arguments.workers)
            print(f"{row}, seed {seed}: {experiments.result_folder(one)}", flush=True)
            results.append(one)
    _print_comparison(results)


def _run(arguments: argparse.Namespace) -> None:
    from fedkd_utils import runner

    if arguments.sites is not None:
        return _run_sites(arguments)
    if arguments.row:
        raise ValueError("--row belongs to --sites: choose points of a grid with --only.")
    settings = PROFILES[arguments.profile]
    folder = runner.results_folder(PROJECT, settings)
    points = runner.points_of(arguments.grid, settings, folder, arguments.seed)
    points = [point for point in points if point.setting in arguments.setting]
    points = runner.choose(points, arguments.only, _part(arguments.part))
    if arguments.list:
        for point in points:
            print(point.name)
        return
    out = arguments.out or folder
    found = runner.run_points(points, settings, out, again=arguments.again, workers=arguments.workers)
    left = [point.name for point in (*found.missing, *found.damaged)]
    if left:
        raise ValueError(f"{len(left)} points have no result in {out}: {', '.join(left)}. The lines above say why.")


def _part(text: str) -> tuple[int, int]:
    k, slash, n = text.partition("/")
    if not (k.isdigit() and n.isdigit() and slash):
        raise ValueError(f"--part takes two numbers, as in 1/2, and not {text!r}.")
    return int(k), int(n)


def _tune(arguments: argparse.Namespace) -> None:
    from fedkd_utils import runner
    from fedkd_utils.methods import ROWS

    settings = PROFILES[arguments.profile]
    folder = runner.results_folder(PROJECT, settings)
    rates = runner.tune(arguments.row or list(ROWS), settings, folder, workers=arguments.workers)
    print("\n".join(f"{row:20s} {rate:g}" for row, rate in rates.items()))


def _seconds(arguments: argparse.Namespace) -> None:
    from fedkd_utils import runner
    from fedkd_utils.methods import ROWS

    settings = PROFILES[arguments.profile]
    print(runner.measure_seconds(list(ROWS), settings, runner.results_folder(PROJECT, settings)))


def _results(arguments: argparse.Namespace) -> None:
    from fedkd_utils import grids, runner

    settings = PROFILES[arguments.profile]
    folder = runner.results_folder(PROJECT, settings)
    for name in grids.GRIDS:
        print(runner.report(name, settings, folder, arguments.seed))
    print(runner.cost_report(settings, folder, arguments.seed))


def _segment(arguments: argparse.Namespace) -> None:
    from fedkd_utils import files, segment

    # Refuse what cannot be written and what cannot be a knee before minutes of training.
    out = arguments.out or segment.default_output(arguments.volume)
    segment.check_outputs(arguments.volume, out, arguments.table, arguments.preview)
    volume = segment.read_volume(arguments.volume)
    network, settings = _network(arguments, PROFILES[arguments.profile])
    result = segment.segment_volume(volume, network, settings, out, locate=True, progress=sys.stderr.isatty())
    print(result.report())
    if arguments.table:
        files.write_atomically(arguments.table, result.table().to_csv(index=False).encode())
        print(f"table: {arguments.table}")
    if arguments.preview:
        segment.preview(volume, result.label, arguments.preview)
        print(f"preview: {arguments.preview}")


def _demo(arguments: argparse.Namespace) -> None:
    from fedkd_utils import cohorts, figures, transforms

    folder = PROJECT / "data" / "demo"
    cohorts.write_demonstration(folder)
    volumes, spacings = {}, {}
    for name, scanner in cohorts.DEMONSTRATION.items():
        pair = [
            transforms.to_ras(*transforms.read_volume(folder / f"{kind}_{name}.nii.gz")) for kind in ("knee", "label")
        ]
        title = cohorts.SCANNERS[scanner].title.replace(", ", ",\n")
        volumes[title] = (pair[0][0], pair[1][0])
        spacings[title] = transforms.voxel_sizes_mm(pair[0][1])
    figure, alt = figures.side_by_side(volumes, spacings)
    figure.savefig(folder / "knees.png", dpi=90, bbox_inches="tight", metadata={"Software": None})
    print(f"{folder}\nknees.png: {alt.replace(chr(10), chr(32))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fedkd_utils", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: object, words: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=words, description=words)
        sub.set_defaults(run=run)
        return sub

    def profile(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--profile", choices=list(PROFILES), default="quick", help="which settings (default: quick)")

    def network_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--checkpoint", type=Path, help="a teacher, or the model.safetensors of a run (default: a teacher)"
        )
        sub.add_argument("--client", help="with the checkpoint of a run in which every client has a model: whose")
        sub.add_argument(
            "--contrast",
            choices=["dess", "any"],
            default="any",
            help="teacher trained on DESS, or on random contrasts (default: any)",
        )

    command("course", _course, "execute copies of all notebooks, write them as HTML, print the comparison")
    sub = command("notebooks", _notebooks, "execute the committed notebooks in place and stamp them")
    sub.add_argument("name", nargs="*", help="only those whose file name begins so (default: all)")
    sub = command("pages", _pages, "write the committed notebooks as HTML pages, without executing anything")
    sub.add_argument("--out", type=Path, help="the folder of the pages (default: build/course)")
    sub = command("hospitals", _hospitals, "run three hospitals as processes of this machine on the engine (Flower)")
    profile(sub)
    sub.add_argument("--row", default="dual_kd", help="default: dual_kd")
    sub.add_argument("--rounds", type=int, default=3)
    sub.add_argument("--seed", type=int, default=0)
    command("glossary", _glossary, "link each term of the glossary where a notebook uses it first")
    sub = command(
        "bench",
        _bench,
        "measure everything side by side: steps, networks, simulation, engine, growth, full-size volumes",
    )
    sub.add_argument(
        "part", nargs="*", help="only these, or what is on request (viewer, engine ...): an unknown name lists them"
    )
    sub.add_argument("--quick", action="store_true", help="the smallest sizes, to see that it runs")
    sub.add_argument("--repeats", type=int, help="of what is compared (default: 7)")
    sub.add_argument("--training", type=float, help="CPU seconds in which each network is trained (default: 20)")
    sub.add_argument("--out", type=Path, help="the file to write (default: data/results/bench, for a whole run)")
    sub = command("cohort", _cohort, "make the knees as NIfTI files and say where they are")
    profile(sub)
    sub.add_argument("--setting", nargs="+", choices=SETTINGS_OF_CLIENTS, default=list(SETTINGS_OF_CLIENTS))
    sub.add_argument("--seed", type=int, default=0)
    sub = command("teacher", _teacher, "train the teacher on the repository, or read it from the cache")
    profile(sub)
    sub.add_argument("--scanner", choices=["repository_dess", "random"], default="repository_dess")
    sub.add_argument("--seed", type=int, default=0)
    sub = command("compare", _compare, "run rows of the comparison and print the table (what is done is not redone)")
    profile(sub)
    sub.add_argument("--setting", nargs="+", choices=SETTINGS_OF_CLIENTS, default=[SETTINGS_OF_CLIENTS[0]])
    sub.add_argument("--row", nargs="+", help="default: those of the course")
    sub.add_argument("--seed", type=int, nargs="+", default=[0])
    sub = command("tune", _tune, "choose each row's learning rate on validation (what is done is not redone)")
    profile(sub)
    sub.add_argument("--row", nargs="+", help="default: all")
    sub.add_argument("--workers", type=int, help="clients side by side (default: what the cores hold)")
    sub = command("run", _run, "run a grid of rows, settings and seeds into data/results (what is done is not redone)")
    profile(sub)
    sub.add_argument("--grid", default="all", help="all, rows, beyond or an ablation; an unknown name lists them")
    sub.add_argument("--setting", nargs="+", choices=SETTINGS_OF_CLIENTS, default=list(SETTINGS_OF_CLIENTS))
    sub.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    sub.add_argument("--only", nargs="+", default=[], help="names of points, * for any text")
    sub.add_argument("--part", default="1/1", help="1/2 and 2/2 for two processes that share the work")
    sub.add_argument("--workers", type=int, help="clients side by side (default: what the cores hold)")
    sub.add_argument("--again", action="store_true", help="make stale results again")
    sub.add_argument("--list", action="store_true", help="only name the points")
    sub.add_argument("--out", type=Path, help="the folder of the results (default: data/results/<profile>)")
    sub.add_argument(
        "--sites", type=Path, help="instead of a grid: rows on your own sites, one folder each in this one"
    )
    sub.add_argument("--row", nargs="+", help="with --sites: the rows (default: those of the course)")
    sub = command(
        "seconds", _seconds, "measure what a round of each row costs a client; leave the machine alone meanwhile"
    )
    profile(sub)
    sub = command("check", _check, "inspect your own sites, one folder each; exit code 1 when something must be mended")
    sub.add_argument("folder", type=Path)
    sub = command("prepare", _prepare, "bring your own sites to the common grid, with splits and a preview page")
    profile(sub)
    sub.add_argument("folder", type=Path)
    sub.add_argument("out", type=Path, help="a new folder")
    sub.add_argument("--seed", type=int, default=0, help="of the splits, where the set names none")
    sub.add_argument(
        "--centred",
        action="store_true",
        help="the joint lies in the middle of every volume: do not look for it (default: a volume larger than the grid "
        "is cut round its label or, without one, where the network of --checkpoint or a teacher sees the joint)",
    )
    network_options(sub)
    sub = command("simulate", _simulate, "make images for your own label maps of bones and cartilages, as sites")
    sub.add_argument("folder", type=Path)
    sub.add_argument("out", type=Path, help="a new folder")
    sub.add_argument("--clients", type=int, default=4, help="hospitals besides the repository (default: 4)")
    sub.add_argument("--seed", type=int, default=0, help="of who is where")
    sub = command("results", _results, "say what is done, stale and missing, and print the differences")
    profile(sub)
    sub.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    sub = command("segment", _segment, "segment a knee of your own (NIfTI or the folder of a DICOM series)")
    profile(sub)
    sub.add_argument("volume", type=Path)
    sub.add_argument("--out", type=Path, help="the label to write (default: beside you, named after the volume)")
    network_options(sub)
    sub.add_argument("--preview", type=Path, help="also write a picture (PNG)")
    sub.add_argument("--table", type=Path, help="also write volumes and mean thickness (CSV)")
    command("demo", _demo, "write data/demo again, with the picture of the README")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; an error a person can mend is one line, not a traceback."""
    chosen = _parser().parse_args(arguments)
    try:
        return chosen.run(chosen) or 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped. What was finished is kept in {cache_folder()}; the same command goes on from there.")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
