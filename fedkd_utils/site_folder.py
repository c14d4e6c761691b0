"""A site: a folder in the layout of the Medical Segmentation Decathlon or nnU-Net, opened and described.

It holds ``imagesTr``, ``labelsTr``, ``imagesTs``, ``labelsTs`` and ``dataset.json``. An image in ``imagesTr`` without a
label is unlabelled. Any folder of that layout can be opened, also a reader's own (:func:`open_site`).

A **cohort** is a repository and its clients, with nobody in two places (:func:`assert_no_leakage`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd_utils.errors import CohortError, printable
from fedkd_utils.settings import CARTILAGES, CLASS_NAMES

#: What a site's volumes are for, in the order of the fields of :class:`Site`.
SPLITS = ("training", "unlabelled", "validation", "test")

#: The folders of a site's images, each with that of their labels.
HALVES = (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"))

#: Beside volumes these need no word: what converters and people write down about them.
_NOTES = (".json", ".txt", ".md", ".csv", ".tsv", ".xlsx", ".yaml", ".yml", ".bval", ".bvec")

#: Images of OAIZIB-CM as they were unpacked: its reader knows its label values, whatever ``dataset.json`` calls them.
OAIZIB_CM = "imagesT[rs]/oaizib_[0-9][0-9][0-9]_0000.nii.gz"

#: Words that name a class in the ``labels`` of a ``dataset.json``; a bone does so only beside the word cartilage.
_CLASS_OF_WORD = {**dict.fromkeys(("femoral", "fc"), 1), **dict.fromkeys(("tibial", "tc"), 2)}
_CLASS_OF_WORD |= dict.fromkeys(("patellar", "pc"), 3)
_CLASS_OF_BONE = {"femur": 1, "tibia": 2, "patella": 3}
#: Words that say nothing more, and that name a part of a class.
_EMPTY_WORDS = {"articular", "cart", "cartilage", "cartilages", "knee", "label", "of", "the"}
_PARTS = {"medial", "lateral", "central", "anterior", "posterior", "left", "right", "weight", "bearing"}

#: From here on the numbers of people whom nobody named.
_UNNAMED = 2**48


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
    left_out: tuple[Item, ...] = ()  # held out for validation or test by the site, but without a label

    @property
    def items(self) -> tuple[Item, ...]:
        """All volumes that are used."""
        return (*self.training, *self.unlabelled, *self.validation, *self.test)

    @property
    def counts(self) -> str:
        """How many volumes each split has, in words."""
        return ", ".join(f"{len(getattr(self, split))} {split}" for split in SPLITS)


@dataclass(frozen=True)
class Cohort:
    """One repository and its clients."""

    repository: Site
    clients: tuple[Site, ...]
    setting: str


def _stem(name: str) -> str:
    """File name without ``.nii[.gz]``, as it can be printed."""
    return printable(name.removesuffix(".gz").removesuffix(".nii"))


def _bare(name: str) -> str:
    """File name without ``.nii[.gz]`` and without nnU-Net's channel suffix."""
    return _stem(name).removesuffix("_0000")


def is_volume(path: Path) -> bool:
    """Whether a file is called like a NIfTI volume, and is not hidden."""
    return path.name.endswith((".nii", ".nii.gz")) and path.name[0] != "."


def _inside(folder: Path) -> list[Path]:
    """What lies in a folder, in the order of the names; nothing when there is no folder.

    Raises:
        CohortError: something of this name is there and is no folder.
    """
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise CohortError(f"{folder}: no folder, nor a link to one. Put the folder itself in its place.")
        return []
    return sorted(folder.iterdir())


def _volumes(folder: Path) -> dict[str, Path]:
    """The volumes of a folder by bare name.

    Raises:
        CohortError: two files for one name, or something of such a name that is no file.
    """
    found: dict[str, Path] = {}
    for path in filter(is_volume, _inside(folder)):
        _refuse_no_file(path)
        name = _bare(path.name)
        if name in found:
            raise CohortError(f"{path} and {found[name].name} are one volume twice. Remove one of them.")
        found[name] = path
    return found


def _refuse_no_file(path: Path) -> None:
    """Refuse what is called like a volume and is none: a folder, a link to nowhere, a pipe (:class:`CohortError`)."""
    if path.is_file():
        return
    if path.is_dir():
        raise CohortError(f"{path}: a folder, though called like a file. Put the file in its place, or rename it.")
    if path.is_symlink() and not path.exists():
        raise CohortError(f"{path}: a link to {os.readlink(path)}, where no file is. Put the file itself in its place.")
    raise CohortError(f"{path}: neither a file nor a link to one (a pipe or a device?). Put the file in its place.")


def _refuse_channels(images: Mapping[str, Path], labels: Mapping[str, Path]) -> None:
    """Refuse nnU-Net's further channels, which would count as people: ``k_0001`` beside ``k_0000``, or alone.

    A number of four digits is part of a name and no channel where a label has it, too, or where nothing shows nnU-Net's
    suffix: a label without the number, or several cases that end in ``_0000``.

    Raises:
        CohortError: names the first one.
    """
    drawn = {_stem(path.name) for path in labels.values()}
    stems = {_stem(path.name): path for path in images.values()}
    suffixed = sum(stem.endswith("_0000") and stem not in drawn for stem in stems) > 1
    for stem, path in stems.items():
        case = re.sub(r"_\d{4}$", "", stem)
        if stem not in drawn and not stem.endswith("_0000") and case != stem and (suffixed or case in drawn):
            raise CohortError(
                f"{path}: one of several channels of {case}, but a network here sees one. Keep the one to work with as "
                f"{case}_0000 and move the others away. (If it is a knee of its own, end its name in another way.)"
            )


def _unread(folder: Path, name: str) -> str:
    """In brackets a file of this name that was not read, as ``k0_0000.NII.GZ``; nothing when there is none."""
    alike = [p.name for p in _inside(folder) if not is_volume(p) and _bare(p.name.lower()) == name.lower()]
    return f" ({printable(alike[0])} is not read: write its ending in small letters)" if alike else ""


def passed_over(folder: Path) -> list[Path]:
    """What lies among a site's images and labels and is not read: other formats, folders, ``.NII.GZ``."""
    inside = [path for half in HALVES for part in half for path in _inside(folder / part)]
    return [p for p in inside if not is_volume(p) and p.name[0] != "." and not p.name.lower().endswith(_NOTES)]


def _facts(described: Path) -> dict[str, Any]:
    """The content of a ``dataset.json``, or nothing when there is none."""
    if not os.path.lexists(described):
        return {}
    _refuse_no_file(described)
    try:
        facts = json.loads(described.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CohortError(f"{described}: not readable as JSON ({error}). Repair or delete it.") from error
    if not isinstance(facts, dict):
        raise CohortError(f"{described}: holds no JSON object. Repair or delete it.")
    return facts


def _short(value: object) -> str:
    """A value of a ``dataset.json`` for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


#: What to do where hospitals number their patients apart.
NUMBERED = "Numbers in `subjects` count over all sites: where a hospital counts its own, call its 7 P7."


def name_of(folder: Path) -> str:
    """What a site's folder is called where it lies, also when it is a link to another one."""
    return printable(Path(os.path.abspath(folder)).name)


def number_of(person: str) -> int:
    """A number for a person's name: always the same, and hardly ever that of another one."""
    return int(hashlib.sha256(person.encode("utf-8", "surrogatepass")).hexdigest()[:12], 16)


def _listed(facts: Mapping[str, Any], part: str, described: Path) -> list[str]:
    """The files that ``dataset.json`` lists in a part: images, and labels where it names them.

    Raises:
        CohortError: the part is no list of file names, or of objects with an image and perhaps a label.
    """
    entries = facts.get(part, [])
    files: list[str] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        named = [entry[kind] for kind in ("image", "label") if kind in entry] if isinstance(entry, dict) else [entry]
        if not isinstance(entries, list) or not named or not all(isinstance(file, str) and file for file in named):
            raise CohortError(
                f'{described}: {part} holds {_short(entry)}. Make it a list of file names, or of {{"image": file name, '
                '"label": file name}.'
            )
        files += named
    return files


def _is_there(path: Path) -> bool:
    """Whether there is such a file, or such a volume under another ending or with nnU-Net's suffix."""
    try:
        return path.is_file() or _bare(path.name) in {_bare(other.name) for other in _inside(path.parent)}
    except (OSError, ValueError):  # no name that a file can have
        return False


def _by_file(values: Mapping[str, Any]) -> dict[str, Any]:
    """What ``dataset.json`` says of files, by their bare names."""
    return {_bare(Path(file).name): value for file, value in values.items()}


def _named_classes(facts: Mapping[str, Any], described: Path) -> tuple[int, ...]:
    """The cartilages that ``labels`` names (nnU-Net: name -> number; Decathlon: number -> name); without it all.

    Raises:
        CohortError: no such object, names that are no class, a class with two numbers, numbers that are not the
            course's, or no class at all; says how the label files have to be changed.
    """
    if "labels" not in facts:
        return CARTILAGES
    named = facts["labels"]
    numbers: list[tuple[str, int]] = []
    for key, value in named.items() if isinstance(named, dict) else [("", named)]:
        name, number = (value, key) if isinstance(value, str) and key.isdecimal() else (key, value)
        if not isinstance(named, dict) or not re.fullmatch(r"[0-9]{1,9}", _short(number).strip('"')):
            raise CohortError(
                f"{described}: labels is {_short(named)}. Make it name -> number, as "
                '{"background": 0, "femoral cartilage": 1}, or number -> name.'
            )
        numbers.append((name, int(number)))
    found: dict[int, tuple[str, int]] = {}
    for name, number in numbers:
        c = _class_named(name)
        if c == 0 and number != 0:
            raise CohortError(f"{described}: labels names {_short(name)} ({number}), {_no_class(name)}")
        if c in found:
            raise CohortError(
                f"{described}: labels names {CLASS_NAMES[c]} cartilage twice ({_short(found[c][0])}, {_short(name)}). "
                f"Change the label files so that each class has one value, and bone has 0: {_codes()}."
            )
        found |= {c: (name, number)} if c else {}
    if not found:
        raise CohortError(f"{described}: labels is {_short(named)}, without a cartilage. Name those drawn: {_codes()}.")
    if changes := [f"{number} to {c} ({name})" for c, (name, number) in sorted(found.items()) if number != c]:
        raise CohortError(
            f"{described}: labels has other numbers than the course ({_codes()}). In all label files change "
            f"{', '.join(changes)}, at once, and then the numbers in labels."
        )
    return tuple(sorted(found))


def _words(name: str) -> set[str]:
    """The words of a name in small letters; "femoralcartilage" has two."""
    return set(re.findall(r"[^\W_]+", re.sub("(cartilages?)", r" \1 ", name.lower())))


def _class_named(name: str) -> int:
    """The class that a name of ``labels`` means, 0 when it means none."""
    words = _words(name)
    meanings = _CLASS_OF_WORD | (_CLASS_OF_BONE if words & {"cartilage", "cartilages", "cart"} else {})
    found = {meanings.get(word, 0) for word in words - _EMPTY_WORDS}
    return found.pop() if len(found) == 1 else 0


def _no_class(name: str) -> str:
    """Why a name of ``labels`` is no class, and what to do."""
    words = _words(name)
    if "ignore" in words:
        return "but a label cannot say that a voxel is unknown here. Take the label away, or draw what is there."
    if words & _PARTS and words & {*_CLASS_OF_WORD, *_CLASS_OF_BONE}:
        return f"a part of a class: in the label files give all parts of a cartilage its one value ({_codes()})."
    return (
        f"which is no class here. If it is one of {_codes()} cartilage, name it so; if it is anything else, set its "
        "voxels to 0 in the label files and drop the name."
    )


def _codes() -> str:
    """The numbers and names of the classes, in words."""
    return ", ".join(f"{c} {CLASS_NAMES[c]}" for c in CARTILAGES)


def _labelled_classes(facts: Mapping[str, Any], described: Path) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """The classes that volumes have labelled, and those of the volumes that ``labelled_classes`` names, by bare name.

    Raises:
        CohortError: no lists of numbers of classes, or a class that ``labels`` does not name.
    """
    named = CARTILAGES if any(described.parent.glob(OAIZIB_CM)) else _named_classes(facts, described)
    drawn = facts.get("labelled_classes", list(named))
    by_name = _by_file(drawn) if isinstance(drawn, dict) else {"": drawn}
    for own in by_name.values():
        if not isinstance(own, list) or not all(type(c) is int for c in own):
            raise CohortError(
                f"{described}: labelled_classes must be a list of numbers, or file name -> list of numbers, but holds "
                f"{_short(own)}."
            )
        if not own or not set(own) <= set(CARTILAGES):
            raise CohortError(f"{described}: labelled_classes is {_short(own)}. Use some of {list(CARTILAGES)}.")
        if not set(own) <= set(named):
            raise CohortError(
                f"{described}: labelled_classes is {_short(own)}, but labels names only {_short(named)}. Correct "
                "one of them."
            )
    classes = {name: tuple(dict.fromkeys(own)) for name, own in by_name.items()}
    return (named, classes) if isinstance(drawn, dict) else (classes[""], {})


def _subjects_named(facts: Mapping[str, Any], described: Path) -> dict[str, int]:
    """The number of the person of each bare name in ``subjects``: as given, or that of a pseudonym at this site.

    Raises:
        CohortError: no object of file names with numbers or names.
    """
    given = facts.get("subjects", {})
    people: dict[str, int] = {}
    for name, person in _by_file(given).items() if isinstance(given, dict) else [("", given)]:
        text = person.strip() if isinstance(person, str) else ""
        if not isinstance(given, dict) or (type(person) is not int and not text):
            raise CohortError(
                f"{described}: subjects must be file name -> number or pseudonym, but holds {_short(person)}."
            )
        written = re.fullmatch("[0-9]{1,18}", text)
        own = f"{name_of(described.parent)}/{text}"  # hospitals count their patients apart
        people[name] = int(person) if type(person) is int or written else number_of(own)
    return people


def open_site(folder: str | Path) -> Site:
    """Open any folder in the Decathlon or nnU-Net layout.

    ``dataset.json`` may name ``validation`` and ``test`` cases, the ``labels`` (nnU-Net: name -> number; Decathlon:
    number -> name; a cartilage that is not named is not labelled), the ``labelled_classes`` (a list for the site, or
    file name -> list where volumes differ; a volume that is not named has all that ``labels`` names) and the
    ``subjects`` (file name -> number or pseudonym). Without it every labelled volume of ``imagesTr`` is training data,
    those of ``imagesTs`` are for test, all cartilages count as labelled, and every volume as a subject of its own. An
    image in ``imagesTr`` without a label is unlabelled. One without a label that is named for validation or test, or
    lies in ``imagesTs``, can be neither scored nor, since it was held out, trained on: it is ``left_out``.

    Raises:
        CohortError: no volume, something called like one that is no file, a second channel, a label without an image,
            an unreadable ``dataset.json``, or one that lists a file that is not there or in two splits, or names
            classes or subjects that are none or of no file, or numbers the classes in another way.
    """
    folder = Path(folder)
    (images, labels), (tests, test_labels) = ((_volumes(folder / a), _volumes(folder / b)) for a, b in HALVES)
    if not images and not tests:
        others = ", ".join(path.name for path in passed_over(folder)[:3])
        found = f" (not read: {others})" if others else ""
        raise CohortError(
            f"{folder}: no volume in imagesTr{found}. Put .nii.gz files there, and their labels in labelsTr."
        )
    described = folder / "dataset.json"
    facts = _facts(described)
    listed = {part: _listed(facts, part, described) for part in SPLITS}
    for file in (file for files in listed.values() for file in files):
        if not _is_there(folder / file):
            raise CohortError(f"{described}: lists {file}, which is not there. Add the file or drop the entry.")
    parts_of: dict[str, str] = {}
    for part, files in listed.items():
        for name in sorted({_bare(Path(file).name) for file in files}):
            if (other := parts_of.setdefault(name, part)) != part:
                raise CohortError(f"{described}: lists {name} in {other} and in {part}. Keep it in one of them.")
    for kind, owners, owned in (("imagesTr", images, labels), ("imagesTs", tests, test_labels)):
        _refuse_channels(owners, owned)
        for name in owned.keys() - owners.keys():
            unread = _unread(folder / kind, name)
            raise CohortError(f"{owned[name]}: no image of this name in {kind}{unread}. Add it or remove the label.")
    for name in images.keys() & tests.keys():
        raise CohortError(f"{tests[name]}: also in imagesTr. Keep a volume for training or for test, not for both.")
    classes, classes_of = _labelled_classes(facts, described)
    subjects = _subjects_named(facts, described)
    for key, names in (("labelled_classes", classes_of), ("subjects", subjects)):
        for name in sorted(names.keys() - images.keys() - tests.keys()):
            raise CohortError(f"{described}: {key} names {name}, but no image is called so. Correct the name.")

    def named(part: str) -> set[str]:
        return {_bare(Path(file).name) for file in listed[part]}

    split_of = dict.fromkeys(images, "training") | dict.fromkeys(tests, "test")
    split_of |= dict.fromkeys(named("validation") & images.keys(), "validation")
    split_of |= dict.fromkeys(named("test") & images.keys(), "test")
    known = labels | test_labels
    split_of = {
        name: split if name in known else "unlabelled" if split == "training" else "left_out"
        for name, split in split_of.items()
    }

    def items(split: str) -> tuple[Item, ...]:
        out = []
        for name, image in (images | tests).items():
            if split_of[name] == split:
                number = subjects[name] if name in subjects else own_number(folder, name)
                out.append(Item(name, number, image, known.get(name), classes_of.get(name, classes)))
        return tuple(out)

    return Site(name_of(folder), folder, *(items(split) for split in (*SPLITS, "left_out")))


def own_number(folder: Path, name: str) -> int:
    """The subject of a volume whose subject nobody names: nobody else, also among sites of other names.

    Of the site's name and not its place: a folder that is moved keeps its people, and with them its splits.
    """
    return number_of(f"{name_of(folder)}/{name}") + _UNNAMED


def number_kept(subject: str) -> int:
    """A number for a subject of another site that still says whether somebody named it (:func:`is_named`)."""
    return number_of(subject) + (0 if is_named(subject) else _UNNAMED)


def is_named(subject: str) -> bool:
    """Whether somebody gave a subject its number: False for a volume that counts as a person of its own."""
    return not (subject.isdecimal() and int(subject) >= _UNNAMED)


def scanner_title(site: Site) -> str:
    """What a site is scanned with, from its ``dataset.json``; of a reader's own site, its description."""
    facts = _facts(site.folder / "dataset.json")
    try:
        return str(facts["provenance"]["scanner"]["title"])
    except (KeyError, TypeError):
        return str(facts.get("description") or "unknown scanner")


def _content(path: Path) -> str:
    """A checksum of the voxels as stored: the same for a copy that was renamed or compressed again."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise CohortError(f"{path}: damaged ({error}). Copy it again; a made cohort mends itself.") from error
    return hashlib.sha256(raw[352:]).hexdigest()  # behind the NIfTI-1 header


def assert_no_leakage(cohort: Cohort) -> None:
    """No subject in two sites or splits, and no image content twice.

    A subject may be scanned twice in one split; unlabelled volumes are training data, too.

    Raises:
        CohortError: names both places.
    """
    seen: dict[tuple[str, object], tuple[tuple[str, str], str]] = {}
    for site in (cohort.repository, *cohort.clients):
        for split in SPLITS:
            for item in getattr(site, split):
                words = f"{site.name} {split} ({item.image})"
                place = (site.name, "training" if split == "unlabelled" else split)
                for key in (("subject", item.subject), ("content", _content(item.image))):
                    there, other = seen.setdefault(key, (place, words))
                    if other != words and (key[0] == "content" or there != place):
                        text = f"the same {key[0]} twice: {other} and {words}. Keep one of them."
                        elsewhere = key[0] == "subject" and there[0] != site.name
                        raise CohortError(f"{text} {NUMBERED}" if elsewhere else text)
