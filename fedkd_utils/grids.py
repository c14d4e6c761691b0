"""What is run: points (a row, a setting, a seed, and what differs from the profile) and grids of them by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedkd_utils.compression import CODECS
from fedkd_utils.methods import ROWS
from fedkd_utils.networks import bottleneck_width
from fedkd_utils.settings import SETTINGS_OF_CLIENTS, Settings
from fedkd_utils.teacher import FROZEN, RELEASE, TeacherUpdate

NEAR, FAR = SETTINGS_OF_CLIENTS
BOTH = SETTINGS_OF_CLIENTS

#: At least five seeds for every point.
SEEDS = (0, 1, 2, 3, 4)

Changes = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Point:
    """One cell of a grid, and one result file."""

    row: str
    setting: str
    seed: int = 0
    changes: Changes = ()  # settings that differ from the profile
    on_disk: Changes = ()  # sizes of a larger cohort, of which the first volumes are used
    teacher_update: TeacherUpdate = FROZEN
    cohort_seed: int = 0  # whose knees
    chosen_rate: float | None = None  # the learning rate tuned for the row; not a change, so not in the name

    @property
    def label(self) -> str:
        """What differs from the profile, in words without spaces; empty for a row as it is."""
        parts = [f"{name}_{value}" for name, value in self.changes]
        if self.teacher_update != FROZEN:
            kind, rate = self.teacher_update.kind, self.teacher_update.rate
            parts.append(f"{kind}_{rate}_after_{self.teacher_update.warm_up_rounds}" if kind == "hand_over" else kind)
        if self.cohort_seed:
            parts.append(f"cohort_{self.cohort_seed}")
        return "+".join(parts)

    @property
    def name(self) -> str:
        """The name of its file."""
        return "-".join([self.row, self.setting, *([self.label] if self.label else []), f"seed{self.seed}"])

    def settings(self, profile: Settings) -> Settings:
        """The settings of the point before its row changes some."""
        rate = {} if self.chosen_rate is None else {"learning_rate": self.chosen_rate}
        return replace(profile, **(rate | dict(self.changes)))

    def disk(self, profile: Settings) -> Settings:
        """The settings of the cohort on disk."""
        return replace(self.settings(profile), **dict(self.on_disk))


def _points(
    rows: Iterable[str],
    settings: Iterable[str] = (NEAR,),
    variants: Iterable[Changes] = ((),),
    on_disk: Changes = (),
    updates: Iterable[TeacherUpdate] = (FROZEN,),
) -> list[Point]:
    return [
        Point(row, setting, 0, changes, on_disk, update)
        for row in rows
        for setting in settings
        for changes in variants
        for update in updates
    ]


def _one_by_one(name: str, values: Iterable[Any]) -> list[Changes]:
    return [((name, value),) for value in values]


def _rows(profile: Settings) -> list[Point]:
    """Every row of the paper's comparison, near and far."""
    return _points([name for name in ROWS if name not in _BEYOND], BOTH)


def _beyond(profile: Settings) -> list[Point]:
    """The rows beyond the paper, near and far."""
    return _points(_BEYOND, BOTH)


def _weights(profile: Settings) -> list[Point]:
    """Response weight, with and without its ramp, feature weight, and the other response loss."""
    variants = [
        *_one_by_one("response_weight", (1.0, 10.0)),
        *_one_by_one("feature_weight", (0.1, 10.0)),
        *_one_by_one("response_ramp", (0.0,)),
        *_one_by_one("response_loss", ("cross_entropy_dice",)),
        (("response_weight", 1.0), ("response_ramp", 0.0)),
        (("response_weight", 1.0), ("response_loss", "cross_entropy_dice")),
        # As released: its means over batch and channels, in the units of our terms (see losses.release_*).
        (("response_weight", 0.2), ("feature_weight", 1 / bottleneck_width(profile)), ("mask_classes", 2)),
    ]
    return _points(["dual_kd"], (NEAR,), variants)


def _temperature(profile: Settings) -> list[Point]:
    """The temperature of the feature term."""
    return _points(["dual_kd"], (NEAR,), _one_by_one("feature_temperature", (0.5, 2.0, 4.0)))


def _labelled(profile: Settings) -> list[Point]:
    """1, 2, 4 and 8 labelled volumes a client, of one cohort that has 8."""
    variants = _one_by_one("client_labelled", (1, 2, 4, 8))
    return _points(["fedavg", "finetune", "dual_kd", "combined_kd"], (NEAR,), variants, (("client_labelled", 8),))


def _unlabelled(profile: Settings) -> list[Point]:
    """4, 8, 16 and 32 unlabelled volumes a client, of one cohort that has 32."""
    variants = _one_by_one("client_unlabelled", (4, 8, 16, 32))
    return _points(["fedsemi", "dual_kd", "strong_kd"], (NEAR,), variants, (("client_unlabelled", 32),))


def _clients(profile: Settings) -> list[Point]:
    """2 and 8 clients, the first two the same; four are the rows themselves."""
    return _points(["fedavg", "dual_kd"], BOTH, _one_by_one("clients", (2, 8)))


def _local_epochs(profile: Settings) -> list[Point]:
    """Fewer rounds with more local epochs, and the other way round, at the same number of steps."""
    whole = profile.rounds * profile.local_epochs
    chosen = [epochs for epochs in (1, 2, 4, 8) if whole % epochs == 0 and epochs != profile.local_epochs]
    variants: list[Changes] = [(("local_epochs", epochs), ("rounds", whole // epochs)) for epochs in chosen]
    return _points(["fedavg", "dual_kd"], (NEAR,), variants)


def _teacher_updates(profile: Settings) -> list[Point]:
    """The teacher handed over slowly, handed over at once, and erased as in the release; frozen are the rows."""
    third = max(profile.rounds // 3, 1)
    updates = [TeacherUpdate("hand_over", third, 0.1), TeacherUpdate("hand_over", third, 1.0), RELEASE]
    return _points(["dual_kd"], BOTH, updates=updates)


def _teacher_quality(profile: Settings) -> list[Point]:
    """Teachers trained for less long, or on fewer volumes of the repository."""
    variants = [
        *_one_by_one("teacher_steps", (profile.teacher_steps // 10, profile.teacher_steps // 3)),
        *_one_by_one("repository_training", (4, 12)),
    ]
    return _points(["teacher_only", "finetune", "dual_kd"], (NEAR,), variants)


def _distance(profile: Settings) -> list[Point]:
    """A repository on the near clinics' own scanner (no distance), and on T1; any contrast are rows of their own."""
    variants = _one_by_one("teacher_contrast", ("pd_fs", "t1"))
    return _points(["teacher_only", "finetune", "dual_kd"], BOTH, variants)


def _mask(profile: Settings) -> list[Point]:
    """Without the uncertainty mask, and with the released code's, which is stricter; with ours are the rows."""
    variants = [*_one_by_one("teacher_passes", (0,)), *_one_by_one("mask_classes", (2,))]
    return _points(["dual_kd", "strong_kd"], BOTH, variants)


def _normalisation(profile: Settings) -> list[Point]:
    """Batch and group normalisation, of teacher and student; instance normalisation are the rows."""
    return _points(["fedavg", "dual_kd"], BOTH, _one_by_one("normalisation", ("batch", "group")))


def _compression(profile: Settings) -> list[Point]:
    """Updates in fewer bytes, with and without memory of what was cut off; whole updates are the rows."""
    return _points(["fedavg", "dual_kd"], (NEAR,), _one_by_one("compression", CODECS))


def _privacy(profile: Settings) -> list[Point]:
    """Updates clipped, and clipped and blurred; plain ones are the row."""
    clip = ("clip_norm", 10.0)
    noises = [(clip, ("noise_multiplier", noise)) for noise in (0.01, 0.03, 0.1)]
    return _points(["fedavg"], (NEAR,), [(clip,), *noises])


def _rival_weights(profile: Settings) -> list[Point]:
    """What our rows were given, given to the best rival: ten times the weight, and the strong response term."""
    strong = (("response_weight", 1.0), ("response_ramp", 0.0), ("response_loss", "cross_entropy_dice"))
    return _points(["mean_teacher"], BOTH, [*_one_by_one("response_weight", (1.0,)), strong])


def _new_knees(profile: Settings) -> list[Point]:
    """What is said of the improved row and of distillation, asked again of knees that nobody had looked at."""
    asked = ["fedavg", "mean_teacher", "dual_kd", "trusted_kd", "dual_kd_random", "mixed_protocols"]
    points = _points([*asked, "finetune"]) + _points([*asked, "pooled"], (FAR,))
    return [replace(point, cohort_seed=1) for point in points]


def _live(profile: Settings) -> list[Point]:
    """A piece of a run that is small enough for a notebook: FedAvg, two rounds."""
    return _points(["fedavg"], (NEAR,), [(("rounds", 2),)])


def _project(profile: Settings) -> list[Point]:
    """What the final project is scored against, near: rows as they are, and rows with less to send."""
    fewer: Changes = (("rounds", profile.rounds // 2), ("local_epochs", 2 * profile.local_epochs))
    whole = ["local_only", "fedavg", "dual_kd", "finetune", "finetune_local", "small_fedavg", "small_kd", "pooled"]
    return (
        _points(whole)
        + _points(["small_fedavg"], (NEAR,), [fewer])
        + _points(["small_fedavg", "fedavg"], (NEAR,), [(("compression", "int8"),)])
    )


_BEYOND = (
    "teacher_recontrasted",
    "finetune_recontrasted",
    "combined_kd_recontrasted",
    "teacher_random",
    "finetune_random",
    "finetune_random_local",
    "chosen_finetune",
    "teacher_protocols",
    "finetune_protocols",
    "finetune_protocols_local",
    "mixed_protocols",
    "dual_kd_random",
    "strong_kd",
    "strong_kd_random",
    "trusted_kd",
    "started_kd",
    "combined_kd",
    "small_fedavg",
    "small_kd",
    "small_kd_random",
)

#: Named grids: what a profile runs, without seeds.
GRIDS: dict[str, Callable[[Settings], list[Point]]] = {
    "rows": _rows,
    "beyond": _beyond,
    "weights": _weights,
    "temperature": _temperature,
    "labelled": _labelled,
    "unlabelled": _unlabelled,
    "clients": _clients,
    "local_epochs": _local_epochs,
    "teacher_updates": _teacher_updates,
    "teacher_quality": _teacher_quality,
    "distance": _distance,
    "mask": _mask,
    "normalisation": _normalisation,
    "compression": _compression,
    "privacy": _privacy,
    "rival_weights": _rival_weights,
    "new_knees": _new_knees,
    "live": _live,
    "project": _project,
}

#: What differs from a row as it is, where the name of a setting and its value do not say it to a reader.
_IN_WORDS = {
    "response_weight_0.2+feature_weight_0.0078125+mask_classes_2": "weights and mask as released",  # the UNet's width
    "response_ramp_0.0": "no ramp",
    "teacher_passes_0": "no mask",
    "mask_classes_2": "mask as released",
    "hand_over_0.1": "handed over slowly",
    "hand_over_1.0": "handed over at once",
    "release": "erased as released",
    "cohort_1": "new knees",
}

#: No ablation: what was asked when results had been seen, what notebook 07 runs again, the rivals of the final project.
APART = ("rival_weights", "new_knees", "live", "project")


def in_words(label: str) -> str:
    """The label of a point (:attr:`Point.label`) as a reader says it."""
    parts = [_IN_WORDS.get(part.partition("_after_")[0], part.replace("_", " ")) for part in label.split("+")]
    return _IN_WORDS.get(label, ", ".join(parts))


def grid(name: str, profile: Settings, seeds: Sequence[int] = SEEDS) -> list[Point]:
    """The points of a grid, or of all that belong to the comparison in turn.

    All points of a seed come before the next seed, so any stop is balanced.

    Raises:
        ValueError: an unknown grid.
    """
    if name != "all" and name not in GRIDS:
        raise ValueError(f"There is no grid {name!r}: choose all or one of {', '.join(GRIDS)}.")
    chosen = [key for key in GRIDS if name == key or (name == "all" and key not in APART)]
    once = [point for key in chosen for point in GRIDS[key](profile)]
    return [replace(point, seed=seed) for seed in seeds for point in dict.fromkeys(once)]
