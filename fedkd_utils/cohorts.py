"""Who has what: the repository and the clients as NIfTI files, made on first use, checksummed, split by subject.

Each is a site (:mod:`site_folder`). The truth of the clients' unlabelled volumes is kept *beside* the clients, in
``hidden``: only the pooled upper bound reads it, never a client.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import current_process, get_context
from pathlib import Path

import torch
from tqdm import tqdm

from fedkd_utils import acquisition
from fedkd_utils.acquisition import CLIENT_SCANNERS, SCANNERS, Scan, Scanner, protocols_of
from fedkd_utils.errors import CohortError
from fedkd_utils.files import folder_in_one_step, nifti_bytes, write_atomically
from fedkd_utils.provenance import code_hash
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES, SETTINGS_OF_CLIENTS, Settings, cache_folder
from fedkd_utils.site_folder import SPLITS, Cohort, Item, Site, assert_no_leakage, open_site

ScanFunction = Callable[[int, Scanner, int], Scan]
Plan = dict[str, tuple[Scanner, dict[str, list[int]]]]  # site -> its scanner, split -> subjects

#: The modules that make the files; their hash as they were at import, since a kernel may outlive an edit.
DATA_CODE = ("anatomy", "recontrast", "acquisition", "files", "cohorts")
_CODE = code_hash(DATA_CODE)

#: Beside the clients: the truth of their unlabelled volumes.
HIDDEN = "hidden"

#: The visit: every volume of a cohort is a subject's first scan, and no subject is scanned twice in one cohort.
SCAN_SEED = 1


@dataclass(frozen=True)
class _Order:
    """One volume to be made: which subject, on which scanner, into which files of the cohort's folder."""

    subject: int
    scanner: Scanner
    scan_seed: int
    image: str
    label: str


#: The settings that say how many volumes there are.
_SIZES = (
    *(f"repository_{split}" for split in ("training", "validation", "test")),
    "clients",
    *(f"client_{split}" for split in ("labelled", "unlabelled", "validation", "test")),
)


def sizes(settings: Settings) -> dict[str, int]:
    """How many volumes a cohort has, by the name of the setting."""
    return {name: getattr(settings, name) for name in _SIZES}


def _subjects(settings: Settings, seed: int) -> dict[str, list[int]]:
    """Subject numbers of every split, by "repository/training", "client_1/test" and so on; no number twice."""
    counts = {
        "repository/training": settings.repository_training,
        "repository/validation": settings.repository_validation,
        "repository/test": settings.repository_test,
    }
    for k in range(1, settings.clients + 1):
        counts[f"client_{k}/training"] = settings.client_labelled
        counts[f"client_{k}/unlabelled"] = settings.client_unlabelled
        counts[f"client_{k}/validation"] = settings.client_validation
        counts[f"client_{k}/test"] = settings.client_test
    first = 10_000 * (seed + 1)
    out: dict[str, list[int]] = {}
    for split, count in counts.items():
        if split.startswith("client_1/training"):
            first = 10_000 * (seed + 1) + 5_000  # clients keep their subjects whatever the repository holds
        out[split] = list(range(first, first + count))
        first += count
    numbers = [n for split in out.values() for n in split]
    if len(set(numbers)) != len(numbers) or max(numbers) >= 10_000 * (seed + 2):
        raise CohortError(
            f"profile {settings.name!r} asks for too many volumes: at most 5000 in the repository and 5000 at clients."
        )
    return out


def _hash(plan: object, scan: ScanFunction) -> str:
    """A short hash of what a folder depends on: its numbers and the code that makes it."""
    parts = [plan, scan.__module__, getattr(scan, "__qualname__", repr(scan)), _CODE]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:10]


def make_repository(
    settings: Settings,
    scanner: str = "repository_dess",
    seed: int = 0,
    root: Path | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
    scan: ScanFunction = acquisition.scan,
) -> Site:
    """The labelled national repository, made on first use.

    Args:
        settings: numbers of volumes.
        scanner: "repository_dess"; "random" for the same subjects through a new random sequence each; "recontrasted"
            for the DESS images with a new random contrast each, made from image and label alone; or another of
            ``acquisition.SCANNERS``.
        seed: another seed, other subjects.
        root: where cohorts are kept; :func:`settings.cache_folder` when not given.
        workers: processes that make volumes side by side, by default one per core; 1 makes them in this one.
        progress: show a bar while volumes are made, when the error stream is a terminal.
        scan: how a volume is made (tests put a quicker one here).

    Raises:
        CohortError: an unknown scanner, or the folder cannot be written.
    """
    if scanner not in SCANNERS:
        raise CohortError(f"unknown scanner {scanner!r}: choose one of {', '.join(SCANNERS)}.")
    subjects = {s: n for s, n in _subjects(settings, seed).items() if s.startswith("repository/")}
    own = {s.split("/")[1]: n for s, n in subjects.items()}
    plan: Plan = {"repository": (scanner_for(settings, scanner), own)}
    folder = (root or cache_folder()) / f"repository-{scanner}-{settings.name}-s{seed}-{_hash(plan, scan)}"
    _make(folder, plan, workers, scan, f"repository ({SCANNERS[scanner].title})" if progress else None)
    return open_site(folder / "repository")


def teacher_scanner(settings: Settings, setting: str) -> str:
    """The scanner of the repository that the teacher of a setting learns from (``settings.teacher_contrast``)."""
    return protocols_of(setting) if settings.teacher_contrast == "protocols" else settings.teacher_contrast


def scanner_for(settings: Settings, name: str) -> Scanner:
    """The scanner of a name; in the plane it resolves at least what the grid of the settings asks for.

    Slices stay as thick as they are. Scanners of the course are as coarse as its quick grid; on the paper's grid their
    images would be blurred ones.
    """
    scanner = SCANNERS[name]
    if max(scanner.spacing_mm[1:]) <= min(settings.grid_spacing_mm[1:]):
        return scanner
    shape, spacing = settings.grid_shape[1:], settings.grid_spacing_mm[1:]
    return replace(scanner, shape=(scanner.shape[0], *shape), spacing_mm=(scanner.spacing_mm[0], *spacing))


def make_clients(
    settings: Settings,
    setting: str,
    seed: int = 0,
    root: Path | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
    scan: ScanFunction = acquisition.scan,
) -> tuple[Site, ...]:
    """The hospitals of a setting, made on first use: arguments as for :func:`make_repository`.

    "paper_like": all have the same scanner, another one than the repository's. "heterogeneous": each has its own. The
    subjects are the same in both.
    """
    if setting not in SETTINGS_OF_CLIENTS:
        raise CohortError(f"unknown setting {setting!r}: choose one of {', '.join(SETTINGS_OF_CLIENTS)}.")
    subjects = _subjects(settings, seed)
    plan: Plan = {}
    for k in range(1, settings.clients + 1):
        scanner = scanner_for(settings, CLIENT_SCANNERS[setting][(k - 1) % len(CLIENT_SCANNERS[setting])])
        own = {s.split("/")[1]: n for s, n in subjects.items() if s.startswith(f"client_{k}/")}
        plan[f"client_{k}"] = (scanner, own)
    folder = (root or cache_folder()) / f"clients-{setting}-{settings.name}-s{seed}-{_hash(plan, scan)}"
    _make(folder, plan, workers, scan, f"hospitals ({setting.replace('_', ' ')})" if progress else None)
    return tuple(open_site(folder / name) for name in plan)


def make_cohort(
    settings: Settings,
    setting: str,
    seed: int = 0,
    root: Path | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
    scan: ScanFunction = acquisition.scan,
) -> Cohort:
    """Repository and clients of a setting, proved free of leakage. Both settings share one repository."""
    repository = make_repository(settings, seed=seed, root=root, workers=workers, progress=progress, scan=scan)
    clients = make_clients(settings, setting, seed, root, workers=workers, progress=progress, scan=scan)
    cohort = Cohort(repository, clients, setting)
    assert_no_leakage(cohort)
    return cohort


def hidden_label(item: Item) -> Path:
    """Where the truth of an unlabelled volume of a made cohort is: for :mod:`shares` only."""
    own = item.image.parents[1] / "labelsTr" / item.image.name  # when the site did label it, and a run leaves it out
    return own if own.is_file() else item.image.parents[2] / HIDDEN / "labelsTr" / item.image.name


# --- making ------------------------------------------------------------


def _orders(plan: Plan) -> list[_Order]:
    orders = []
    for site, (scanner, splits) in plan.items():
        for split, subjects in splits.items():
            for subject in subjects:
                file = f"knee_{subject:05d}.nii.gz"
                half = "Ts" if split == "test" else "Tr"
                label = f"{HIDDEN}/labelsTr/{file}" if split == "unlabelled" else f"{site}/labels{half}/{file}"
                orders.append(_Order(subject, scanner, SCAN_SEED, f"{site}/images{half}/{file}", label))
    return orders


def _fill(order: _Order, scan: ScanFunction, folder: Path) -> dict[str, str]:
    """Make one volume; returns the checksums of its two files."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    try:
        made = scan(order.subject, order.scanner, order.scan_seed)
    finally:
        torch.set_num_threads(threads)
    sums = {}
    for name, array in ((order.image, made.image), (order.label, made.label)):
        content = nifti_bytes(array, made.affine)
        write_atomically(folder / name, content)
        sums[name] = hashlib.sha256(content).hexdigest()
    return sums


def _fill_all(
    orders: list[_Order], scan: ScanFunction, folder: Path, workers: int, label: str | None
) -> dict[str, str]:
    """Make volumes side by side; returns the checksums of their files."""
    sums: dict[str, str] = {}
    quiet = label is None or not sys.stderr.isatty()
    with tqdm(total=len(orders), desc=label, file=sys.stderr, disable=quiet, leave=False) as bar:
        if workers > 1 and len(orders) >= 4:
            try:
                with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                    for made in pool.map(_fill, orders, [scan] * len(orders), [folder] * len(orders)):
                        sums |= made
                        bar.update()
            except BrokenProcessPool:  # killed for memory, or a script that cannot be imported: go on in this process
                pass
        for order in orders:
            if order.image not in sums:
                sums |= _fill(order, scan, folder)
                bar.update()
    return sums


@contextmanager
def _lock(path: Path, patience_s: float = 1800.0) -> Iterator[None]:
    """One maker at a time. The system drops the lock of a process that ends, however it ends; the file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        waited = 0.0
        while not _grab(handle):
            if waited > patience_s:
                raise CohortError(f"{path}: another process has been making this cohort for long. Stop it first.")
            time.sleep(0.2)
            waited += 0.2
        yield
    finally:
        os.close(handle)


def _grab(handle: int) -> bool:
    """Try to lock an open file; False when another holds it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _make(folder: Path, plan: Plan, workers: int | None, scan: ScanFunction, label: str | None) -> None:
    """Make a folder of sites, or check it and remake what is damaged or missing."""
    workers = workers or os.cpu_count() or 1
    orders = _orders(plan)
    try:
        if _damaged(folder, orders) == set():
            return  # whole: nothing to write, so that a read-only cache can be used
        if workers > 1 and getattr(current_process(), "_inheriting", False):
            # A worker imports the script that started it and would now wait for the lock of its own parent.
            raise CohortError(
                "a script that makes cohorts must be guarded by `if __name__ == '__main__':`, or use workers=1."
            )
        with _lock(folder.parent / f".{folder.name}.lock"):
            damaged = _damaged(folder, orders)  # again: another process may have made it meanwhile
            if damaged and not _mend(folder, damaged, orders, plan, scan, workers, label):
                damaged = None  # other bytes than before (another version of a library): all of it anew
            if damaged is None:
                _build(folder, orders, plan, scan, workers, label)
    except OSError as error:
        raise CohortError(
            f"{folder}: cannot be made or checked ({error}). Free some space, or name another folder in FEDKD_CACHE."
        ) from error


def _build(folder: Path, orders: list[_Order], plan: Plan, scan: ScanFunction, workers: int, label: str | None) -> None:
    """Make everything beside its place and move it there when it is whole."""
    with folder_in_one_step(folder, replace=True) as building:
        sums = _fill_all(orders, scan, building, workers, label)
        for name, content in _descriptions(plan).items():
            write_atomically(building / name, content)
            sums[name] = hashlib.sha256(content).hexdigest()
        write_atomically(building / "checksums.json", json.dumps(sums, indent=1, sort_keys=True).encode())


def _mend(
    folder: Path,
    damaged: set[str],
    orders: list[_Order],
    plan: Plan,
    scan: ScanFunction,
    workers: int,
    label: str | None,
) -> bool:
    """Make damaged files again; False when their bytes are not those of before."""
    again = [o for o in orders if o.image in damaged or o.label in damaged]
    _fill_all(again, scan, folder, workers, f"{label}, mending" if label else None)
    for name, content in _descriptions(plan).items():
        if name in damaged:
            write_atomically(folder / name, content)
    return not _damaged(folder, orders)


def _damaged(folder: Path, orders: list[_Order]) -> set[str] | None:
    """The files that are missing or differ from their checksum; None when there is no list of checksums to trust."""
    try:
        sums = json.loads((folder / "checksums.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    expected = {name for order in orders for name in (order.image, order.label)}
    if not isinstance(sums, dict) or not expected < set(sums):
        return None
    return {name for name, value in sums.items() if _sha256(folder / name) != value}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _descriptions(plan: Plan) -> dict[str, bytes]:
    """The content of every site's ``dataset.json``, by its path in the cohort's folder."""
    out = {}
    for site, (scanner, splits) in plan.items():
        files = {split: {f"knee_{s:05d}.nii.gz": s for s in subjects} for split, subjects in splits.items()}
        out[f"{site}/dataset.json"] = dataset_json(
            site,
            f"Made knees on one scanner: {scanner.title}",
            {split: list(names) for split, names in files.items()},
            list(CARTILAGES),
            {name: subject for names in files.values() for name, subject in names.items()},
            reference="fedkd_utils.anatomy and fedkd_utils.acquisition",
            licence="Apache-2.0",
            provenance={"scanner": asdict(scanner), "scan_seed": SCAN_SEED, "code_sha256": _CODE},
        )
    return out


def dataset_json(
    name: str,
    description: str,
    files: Mapping[str, Sequence[str]],
    labelled_classes: list[int] | Mapping[str, list[int]],
    subjects: Mapping[str, int],
    **more: object,
) -> bytes:
    """A site's ``dataset.json``: the keys of the Decathlon, and those that :func:`site_folder.open_site` reads.

    Args:
        files: file names by split (:data:`site_folder.SPLITS`).
        labelled_classes: of all volumes, or by file name.
        subjects: numbers by file name.
        more: further keys.
    """

    def entry(split: str, file: str) -> str | dict[str, str]:
        half = "Ts" if split == "test" else "Tr"
        image = f"./images{half}/{file}"
        return image if split == "unlabelled" else {"image": image, "label": f"./labels{half}/{file}"}

    entries = {split: [entry(split, file) for file in files.get(split, ())] for split in SPLITS}
    facts = {
        "name": name,
        "description": description,
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(i): word for i, word in enumerate(CLASS_NAMES)},
        "numTraining": len(entries["training"]),
        "numTest": len(entries["test"]),
        **entries,
        "labelled_classes": labelled_classes,
        "subjects": subjects,
        **more,
    }
    return json.dumps(facts, indent=1).encode()


# --- the committed demonstration ------------------------------------------------------------

#: Name in ``data/demo`` -> scanner.
DEMONSTRATION = {"dess": "repository_dess", "pd_fs": "pd_fs", "t1": "t1", "t2_fs": "t2_fs", "gre": "gre"}
DEMONSTRATION_SUBJECT = 4


def write_demonstration(folder: Path) -> None:
    """Write ``data/demo``: one subject through every scanner, with labels and checksums, in 12 bits as scanners do."""
    sums = {}
    for name, scanner in DEMONSTRATION.items():
        made = acquisition.scan(DEMONSTRATION_SUBJECT, SCANNERS[scanner], SCAN_SEED)
        for kind, array in (("knee", made.image), ("label", made.label)):
            content = nifti_bytes(array, made.affine, levels=4095)
            write_atomically(folder / f"{kind}_{name}.nii.gz", content)
            sums[f"{kind}_{name}.nii.gz"] = hashlib.sha256(content).hexdigest()
    facts = {
        "command": "python -m fedkd_utils demo",
        "code": ["fedkd_utils/anatomy.py", "fedkd_utils/acquisition.py"],
        "subject_seed": DEMONSTRATION_SUBJECT,
        "scan_seed": SCAN_SEED,
        "scanners": DEMONSTRATION,
        "licence": "Apache-2.0",
        "sha256": sums,
    }
    write_atomically(folder / "provenance.json", (json.dumps(facts, indent=1) + "\n").encode())
