"""Who has what: the repository and the clients as NIfTI files, made on first use, checksummed, split by subject.

A **site** is a folder in the layout of the Medical Segmentation Decathlon: ``imagesTr``, ``labelsTr``, ``imagesTs``,
``labelsTs`` and ``dataset.json``. An image in ``imagesTr`` without a label is unlabelled. Any folder of that layout can
be opened, also a reader's own (:func:`open_site`).

The truth of the clients' unlabelled volumes is kept *beside* the clients, in ``hidden``: only the pooled upper bound
reads it, never a client.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from fedkd_utils import acquisition
from fedkd_utils.acquisition import SCANNERS, Scan, Scanner
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES, SETTINGS_OF_CLIENTS, Settings, cache_folder

ScanFunction = Callable[[int, Scanner, int], Scan]

#: The scanner of each client, in turn.
CLIENT_SCANNERS = {"paper_like": ("pd_fs",), "heterogeneous": ("pd_fs", "t1", "t2_fs", "gre")}


class CohortError(ValueError):
    """A cohort or site that cannot be used; the message names the folder, the fault and the remedy."""


@dataclass(frozen=True)
class Item:
    """One volume of a site. ``label`` is None when it is unlabelled."""

    name: str
    subject: int
    image: Path
    label: Path | None
    labelled_classes: tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """A repository or a client: its volumes by purpose."""

    name: str
    folder: Path
    training: tuple[Item, ...]
    unlabelled: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]

    @property
    def items(self) -> tuple[Item, ...]:
        """All volumes."""
        return (*self.training, *self.unlabelled, *self.validation, *self.test)


@dataclass(frozen=True)
class Cohort:
    """One repository and its clients."""

    repository: Site
    clients: tuple[Site, ...]
    setting: str


@dataclass(frozen=True)
class _Order:
    """One volume to be made: which subject, on which scanner, into which files of the cohort's folder."""

    subject: int
    scanner: Scanner
    scan_seed: int
    image: str
    label: str


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
    return out


def _hash(plan: object, scan: ScanFunction) -> str:
    """A short hash of what a folder depends on: its numbers and the code that makes it."""
    parts = [plan, scan.__module__, scan.__qualname__]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for name in ("anatomy", "acquisition", "cohorts"):
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:10]


def make_repository(
    settings: Settings,
    scanner: str = "repository_dess",
    seed: int = 0,
    root: Path | None = None,
    *,
    workers: int = 2,
    scan: ScanFunction = acquisition.scan,
) -> Site:
    """The labelled national repository, made on first use.

    Args:
        settings: numbers of volumes.
        scanner: "repository_dess", or "random" for the same subjects through a new random sequence each.
        seed: another seed, other subjects.
        root: where cohorts are kept; :func:`settings.cache_folder` when not given.
        workers: processes that make volumes side by side.
        scan: how a volume is made (tests put a quicker one here).

    Raises:
        CohortError: the folder cannot be written or is damaged beyond repair.
    """
    subjects = {s: n for s, n in _subjects(settings, seed).items() if s.startswith("repository/")}
    plan = {"repository": (SCANNERS[scanner], {s.split("/")[1]: n for s, n in subjects.items()})}
    folder = (root or cache_folder()) / f"repository-{scanner}-{settings.name}-s{seed}-{_hash(plan, scan)}"
    _make(folder, plan, workers, scan, f"repository ({SCANNERS[scanner].title})")
    return open_site(folder / "repository")


def make_clients(
    settings: Settings,
    setting: str,
    seed: int = 0,
    root: Path | None = None,
    *,
    workers: int = 2,
    scan: ScanFunction = acquisition.scan,
) -> tuple[Site, ...]:
    """The hospitals of a setting, made on first use: arguments as for :func:`make_repository`.

    "paper_like": all have the same scanner, another one than the repository's. "heterogeneous": each has its own. The
    subjects are the same in both.
    """
    if setting not in SETTINGS_OF_CLIENTS:
        raise CohortError(f"unknown setting {setting!r}: choose one of {', '.join(SETTINGS_OF_CLIENTS)}.")
    subjects = _subjects(settings, seed)
    plan = {}
    for k in range(1, settings.clients + 1):
        scanner = SCANNERS[CLIENT_SCANNERS[setting][(k - 1) % len(CLIENT_SCANNERS[setting])]]
        own = {s.split("/")[1]: n for s, n in subjects.items() if s.startswith(f"client_{k}/")}
        plan[f"client_{k}"] = (scanner, own)
    folder = (root or cache_folder()) / f"clients-{setting}-{settings.name}-s{seed}-{_hash(plan, scan)}"
    _make(folder, plan, workers, scan, f"hospitals ({setting.replace('_', ' ')})")
    return tuple(open_site(folder / name) for name in plan)


def make_cohort(
    settings: Settings,
    setting: str,
    seed: int = 0,
    root: Path | None = None,
    *,
    workers: int = 2,
    scan: ScanFunction = acquisition.scan,
) -> Cohort:
    """Repository and clients of a setting. Both settings share one repository."""
    repository = make_repository(settings, seed=seed, root=root, workers=workers, scan=scan)
    clients = make_clients(settings, setting, seed, root, workers=workers, scan=scan)
    return Cohort(repository, clients, setting)


def hidden_label(item: Item) -> Path:
    """The truth of an unlabelled volume of a made cohort, for the pooled upper bound only."""
    return item.image.parents[2] / "hidden" / "labelsTr" / item.image.name


# --- making ------------------------------------------------------------


def _orders(plan: dict[str, tuple[Scanner, dict[str, list[int]]]]) -> list[_Order]:
    orders = []
    for site, (scanner, splits) in plan.items():
        for split, subjects in splits.items():
            for subject in subjects:
                file = f"knee_{subject:05d}.nii.gz"
                half = "Ts" if split == "test" else "Tr"
                label = f"hidden/labelsTr/{file}" if split == "unlabelled" else f"{site}/labels{half}/{file}"
                orders.append(_Order(subject, scanner, 1, f"{site}/images{half}/{file}", label))
    return orders


def _nifti_bytes(array: np.ndarray, affine: np.ndarray) -> bytes:
    """A gzipped NIfTI file in memory; equal arrays give equal bytes."""
    if array.dtype == np.uint8:
        image = nib.Nifti1Image(array, affine)
    else:
        slope = max(float(array.max()), 1e-6) / 32767
        image = nib.Nifti1Image(np.round(array / slope).astype(np.int16), affine)
        image.header.set_slope_inter(slope, 0.0)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0, filename="") as zipped:
        zipped.write(image.to_bytes())
    return out.getvalue()


def _fill(order: _Order, scan: ScanFunction, folder: Path) -> dict[str, str]:
    """Make one volume; returns the checksums of its two files."""
    import torch

    torch.set_num_threads(1)
    made = scan(order.subject, order.scanner, order.scan_seed)
    sums = {}
    for name, array in ((order.image, made.image), (order.label, made.label)):
        content = _nifti_bytes(array, made.affine)
        write_file(folder / name, content)
        sums[name] = hashlib.sha256(content).hexdigest()
    return sums


def write_file(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _fill_all(orders: list[_Order], scan: ScanFunction, folder: Path, workers: int, label: str) -> dict[str, str]:
    sums: dict[str, str] = {}
    with tqdm(total=len(orders), desc=label, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False) as bar:
        if workers <= 1 or len(orders) < 4:
            for order in orders:
                sums |= _fill(order, scan, folder)
                bar.update()
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for made in pool.map(_fill, orders, [scan] * len(orders), [folder] * len(orders)):
                    sums |= made
                    bar.update()
    return sums


@contextmanager
def _lock(path: Path, patience_s: float = 900.0) -> Iterator[None]:
    """One maker at a time; a lock left by a killed process is taken over once its process is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = 0.0
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            os.write(handle, str(os.getpid()).encode())
            os.close(handle)
            break
        except FileExistsError:
            if _abandoned(path):
                path.unlink(missing_ok=True)
                continue
            if waited > patience_s:
                raise CohortError(
                    f"{path}: another process has held this lock for long. Stop it, or delete it."
                ) from None
            time.sleep(0.2)
            waited += 0.2
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _abandoned(path: Path) -> bool:
    try:
        text = path.read_text()
        age_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    if not text.isdigit():
        return age_s > 10
    try:
        os.kill(int(text), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _make(
    folder: Path, plan: dict[str, tuple[Scanner, dict[str, list[int]]]], workers: int, scan: ScanFunction, label: str
) -> None:
    """Make a folder of sites, or check it and remake what is damaged or missing."""
    orders = _orders(plan)
    try:
        with _lock(folder.parent / f".{folder.name}.lock"):
            if not (folder / "checksums.json").is_file():
                building = folder.parent / f".{folder.name}.building"
                shutil.rmtree(building, ignore_errors=True)
                sums = _fill_all(orders, scan, building, workers, label)
                for site, (scanner, splits) in plan.items():
                    content = json.dumps(_description(site, scanner, splits), indent=1).encode()
                    write_file(building / site / "dataset.json", content)
                    sums[f"{site}/dataset.json"] = hashlib.sha256(content).hexdigest()
                write_file(building / "checksums.json", json.dumps(sums, indent=1, sort_keys=True).encode())
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(building, folder)
                return
            _mend(folder, orders, plan, scan, workers, label)
    except OSError as error:
        raise CohortError(
            f"{folder}: cannot be written ({error}). Free some space, or name another folder in FEDKD_CACHE."
        ) from error


def _mend(
    folder: Path,
    orders: list[_Order],
    plan: dict[str, tuple[Scanner, dict[str, list[int]]]],
    scan: ScanFunction,
    workers: int,
    label: str,
) -> None:
    """Compare every file with its checksum and make the wrong ones again, with the same bytes."""
    sums = json.loads((folder / "checksums.json").read_text())
    bad = {name for name, value in sums.items() if _sha256(folder / name) != value}
    if not bad:
        return
    _fill_all([o for o in orders if o.image in bad or o.label in bad], scan, folder, workers, f"{label}, mending")
    for site, (scanner, splits) in plan.items():
        if f"{site}/dataset.json" in bad:
            content = json.dumps(_description(site, scanner, splits), indent=1).encode()
            write_file(folder / site / "dataset.json", content)
    still = sorted(name for name in bad if _sha256(folder / name) != sums[name])
    if still:
        raise CohortError(
            f"{folder / still[0]}: differs from its checksum even after it was made again. Delete {folder}."
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _description(site: str, scanner: Scanner, splits: dict[str, list[int]]) -> dict[str, Any]:
    """``dataset.json``: the keys of the Decathlon, and ours for validation, subjects and provenance."""

    def pair(subject: int, half: str) -> dict[str, str]:
        file = f"knee_{subject:05d}.nii.gz"
        return {"image": f"./images{half}/{file}", "label": f"./labels{half}/{file}"}

    training = [pair(s, "Tr") for s in splits["training"]]
    test = [pair(s, "Ts") for s in splits["test"]]
    subjects = {f"knee_{s:05d}.nii.gz": s for numbers in splits.values() for s in numbers}
    return {
        "name": site,
        "description": f"Made knees on one scanner: {scanner.title}",
        "reference": "fedkd_utils.anatomy and fedkd_utils.acquisition",
        "licence": "Apache-2.0",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(i): name for i, name in enumerate(CLASS_NAMES)},
        "numTraining": len(training),
        "numTest": len(test),
        "training": training,
        "validation": [pair(s, "Tr") for s in splits["validation"]],
        "unlabelled": [pair(s, "Tr")["image"] for s in splits.get("unlabelled", [])],
        "test": test,
        "labelled_classes": list(CARTILAGES),
        "subjects": subjects,
        "provenance": {"scanner": asdict(scanner), "scan_seed": 1},
    }


# --- opening ------------------------------------------------------------


def _bare(name: str) -> str:
    """File name without ``.nii[.gz]`` and without nnU-Net's channel suffix."""
    stem = name.removesuffix(".gz").removesuffix(".nii")
    return stem.removesuffix("_0000")


def _volumes(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    return {
        _bare(p.name): p for p in sorted(folder.iterdir()) if p.name.endswith((".nii", ".nii.gz")) and p.name[0] != "."
    }


def open_site(folder: str | Path) -> Site:
    """Open any folder in the Decathlon or nnU-Net layout.

    ``dataset.json`` may name validation cases, subjects and the classes that are labelled; without it every labelled
    volume of ``imagesTr`` is training data. A volume without a label is unlabelled.

    Raises:
        CohortError: no volume, an unreadable ``dataset.json``, or one that lists a file that is not there.
    """
    folder = Path(folder)
    images, labels = _volumes(folder / "imagesTr"), _volumes(folder / "labelsTr")
    if not images:
        raise CohortError(f"{folder}: no volume in imagesTr. Put .nii.gz files there, and their labels in labelsTr.")
    facts: dict[str, Any] = {}
    described = folder / "dataset.json"
    if described.is_file():
        try:
            facts = json.loads(described.read_text())
        except ValueError as error:
            raise CohortError(f"{described}: not readable as JSON ({error}). Repair or delete it.") from error
    for part in ("training", "validation", "test", "unlabelled"):
        for entry in facts.get(part, []):
            for listed in entry.values() if isinstance(entry, dict) else [entry]:
                path = folder / listed
                if not path.is_file() and not _volumes(path.parent).get(_bare(path.name)):
                    raise CohortError(
                        f"{described}: lists {listed}, which is not there. Add the file or drop the entry."
                    )
    classes = tuple(int(c) for c in facts.get("labelled_classes", CARTILAGES))
    subjects = {_bare(name): int(number) for name, number in facts.get("subjects", {}).items()}
    validating = {_bare(Path(e["image"]).name) for e in facts.get("validation", []) if isinstance(e, dict)}
    everything = sorted({*images, *_volumes(folder / "imagesTs")})
    number = {name: subjects.get(name, i) for i, name in enumerate(everything)}

    def item(name: str, image: Path, label: Path | None) -> Item:
        return Item(name, number[name], image, label, classes)

    labelled = {n: item(n, p, labels[n]) for n, p in images.items() if n in labels}
    tests, test_labels = _volumes(folder / "imagesTs"), _volumes(folder / "labelsTs")
    return Site(
        name=folder.name,
        folder=folder,
        training=tuple(i for n, i in labelled.items() if n not in validating),
        unlabelled=tuple(item(n, p, None) for n, p in images.items() if n not in labels),
        validation=tuple(i for n, i in labelled.items() if n in validating),
        test=tuple(item(n, p, test_labels[n]) for n, p in tests.items() if n in test_labels),
    )


def scanner_title(site: Site) -> str:
    """What a made site is scanned with, from its ``dataset.json``."""
    facts = json.loads((site.folder / "dataset.json").read_text())
    return str(facts["provenance"]["scanner"]["title"])


def assert_no_leakage(cohort: Cohort) -> None:
    """No subject in two sites or splits, and no image content twice.

    Raises:
        CohortError: names both places.
    """
    seen: dict[object, str] = {}
    for site in (cohort.repository, *cohort.clients):
        for split in ("training", "unlabelled", "validation", "test"):
            for item in getattr(site, split):
                place = f"{site.name} {split} ({item.image})"
                for key in (("subject", item.subject), ("content", _sha256(item.image))):
                    if key in seen:
                        raise CohortError(f"the same {key[0]} twice: {seen[key]} and {place}. Split by subject.")
                    seen[key] = place


# --- the committed demonstration ------------------------------------------------------------

#: Name in ``data/demo`` -> scanner.
DEMONSTRATION = {"dess": "repository_dess", "pd_fs": "pd_fs", "t1": "t1", "t2_fs": "t2_fs", "gre": "gre"}
DEMONSTRATION_SUBJECT = 4


def write_demonstration(folder: Path) -> None:
    """Write ``data/demo``: one subject through every scanner, with labels and checksums."""
    sums = {}
    for name, scanner in DEMONSTRATION.items():
        made = acquisition.scan(DEMONSTRATION_SUBJECT, SCANNERS[scanner], 1)
        for kind, array in (("knee", made.image), ("label", made.label)):
            content = _nifti_bytes(array, made.affine)
            write_file(folder / f"{kind}_{name}.nii.gz", content)
            sums[f"{kind}_{name}.nii.gz"] = hashlib.sha256(content).hexdigest()
    facts = {
        "command": "python -m fedkd_utils demo",
        "subject": DEMONSTRATION_SUBJECT,
        "scanners": DEMONSTRATION,
        "licence": "Apache-2.0",
        "sha256": sums,
    }
    write_file(folder / "provenance.json", (json.dumps(facts, indent=1) + "\n").encode())
