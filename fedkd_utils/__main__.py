"""The course from the command line: ``python -m fedkd_utils --help``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedkd_utils.settings import PROFILES, SETTINGS_OF_CLIENTS, cache_folder

PROJECT = Path(__file__).resolve().parent.parent


def _course(arguments: argparse.Namespace) -> None:
    from fedkd_utils import publish

    page = publish.run_course(PROJECT / "notebooks", PROJECT / "build" / "course")
    print("\nComparison on the test volumes (quick profile, seed 0; every digit has the spread of one seed):\n")
    _compare(argparse.Namespace(profile="quick", setting=[SETTINGS_OF_CLIENTS[0]], row=None, seed=[0]))
    print(f"\nRead the course in a browser: {page}")


def _notebooks(arguments: argparse.Namespace) -> None:
    from fedkd_utils import publish

    publish.stamp_all(PROJECT / "notebooks", arguments.name)


def _bench(arguments: argparse.Namespace) -> None:
    from fedkd_utils import bench

    bench.report()


def _cohort(arguments: argparse.Namespace) -> None:
    from fedkd_utils import cohorts

    settings = PROFILES[arguments.profile]
    for setting in arguments.setting:
        cohort = cohorts.make_cohort(settings, setting, arguments.seed)
        cohorts.assert_no_leakage(cohort)
        for site in (cohort.repository, *cohort.clients):
            sizes = ", ".join(f"{len(getattr(site, p))} {p}" for p in ("training", "unlabelled", "validation", "test"))
            print(f"{setting:14s} {site.name:12s} {cohorts.scanner_title(site):40s} {sizes}\n{'':15s}{site.folder}")


def _teacher(arguments: argparse.Namespace) -> None:
    from fedkd_utils import cohorts, teacher, training

    settings = PROFILES[arguments.profile]
    site = cohorts.make_repository(settings, arguments.scanner)
    with training.progress_bar(settings.teacher_steps, "teacher") as advance:
        taught = teacher.teacher_on(site, settings, arguments.seed, progress=advance)
    print(f"{taught.path}\nvalidation Dice {taught.best_dice:.3f} at step {taught.best_step}")
    print(f"training took {taught.seconds:.0f} s, {taught.data_share:.0%} of it waiting for data")


def _compare(arguments: argparse.Namespace) -> None:
    from fedkd_utils import cohorts, experiments
    from fedkd_utils.methods import ROWS

    settings = PROFILES[arguments.profile]
    results = []
    for setting in arguments.setting:
        sites = experiments.load_clients(cohorts.make_cohort(settings, setting), settings)
        for row in arguments.row or list(ROWS):
            for seed in arguments.seed:
                results.append(experiments.run_row(row, setting, seed, settings, sites=sites))
    table = experiments.comparison_table(results)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))


def _segment(arguments: argparse.Namespace) -> None:
    from fedkd_utils import cohorts, networks, segment, teacher, training

    settings = PROFILES[arguments.profile]
    if arguments.checkpoint:
        network = networks.build_network(settings, 0)
        state, _ = networks.load_checkpoint(arguments.checkpoint)
        networks.load_state(network, state, str(arguments.checkpoint))
    else:
        scanner = "random" if arguments.contrast == "any" else "repository_dess"
        site = cohorts.make_repository(settings, scanner)
        with training.progress_bar(settings.teacher_steps, "teacher") as advance:
            network = teacher.teacher_on(site, settings, progress=advance).network
    result = segment.segment_volume(arguments.volume, network, settings, arguments.out)
    print(result.report())
    if arguments.preview:
        segment.preview(arguments.volume, result.path, arguments.preview)
        print(f"preview: {arguments.preview}")


def _demo(arguments: argparse.Namespace) -> None:
    from fedkd_utils import cohorts

    cohorts.write_demonstration(PROJECT / "data" / "demo")
    print(PROJECT / "data" / "demo")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fedkd_utils", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: object, words: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=words, description=words)
        sub.set_defaults(run=run)
        return sub

    def profile(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--profile", choices=list(PROFILES), default="quick", help="which settings (default: quick)")

    command("course", _course, "execute the course in order, write it as HTML, print the comparison")
    sub = command("notebooks", _notebooks, "execute the committed notebooks in place and stamp them")
    sub.add_argument("name", nargs="*", help="only those whose file name begins so (default: all)")
    sub = command("bench", _bench, "measure how fast the viewer answers, in a headless browser")
    sub.add_argument("what", choices=["viewer"])
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
    sub.add_argument("--row", nargs="+", help="default: all")
    sub.add_argument("--seed", type=int, nargs="+", default=[0])
    sub = command("segment", _segment, "segment a knee of your own (NIfTI, any orientation and spacing)")
    profile(sub)
    sub.add_argument("volume", type=Path)
    sub.add_argument("--out", type=Path, help="the label to write (default: beside you, named after the volume)")
    sub.add_argument("--checkpoint", type=Path, help="a safetensors file (default: the course's teacher)")
    sub.add_argument(
        "--contrast",
        choices=["dess", "any"],
        default="any",
        help="teacher trained on DESS, or on random contrasts (default: any)",
    )
    sub.add_argument("--preview", type=Path, help="also write a picture (PNG)")
    command("demo", _demo, "write data/demo again")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; an error a person can mend is one line, not a traceback."""
    chosen = _parser().parse_args(arguments)
    try:
        chosen.run(chosen)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped. What was finished is kept in {cache_folder()}; the same command goes on from there.")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
