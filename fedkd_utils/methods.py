"""The rows of the comparison: which objective, who averages what, and what has to travel for it.

A row says in ``changes`` which settings it replaces, so that everything that is not named is the same in all rows:
volumes, batches and their order, augmentation, initial weights, optimiser steps.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedkd_utils.objectives import (
    Objective,
    dual_distillation,
    proximal,
    pseudo_labels_released,
    supervised,
    weak_to_strong,
)
from fedkd_utils.settings import Settings, entry_named


@dataclass(frozen=True)
class Method:
    """A row: its objective, and what has to travel for it."""

    name: str
    title: str
    objective: Objective | None  # None: nothing is trained
    source: str = ""  # paper, or what is ours
    assumes: str = ""  # what has to be there besides the few labels of each client
    federated: bool = True  # students are averaged
    distils: bool = False  # needs the pretrained teacher and unlabelled volumes
    mean_teacher: bool = False  # each client keeps an average of its student over all steps as teacher
    pseudo_labels: bool = False  # needs unlabelled volumes, no teacher
    starts_at_teacher: bool = False  # the student begins with the pretrained teacher's weights
    weighs_trust: bool = False  # distils as much as the teacher agrees with the client's labels
    chooses_teacher: bool = False  # gets both teachers; the one that agrees more with the few labels is used
    mixes: bool = False  # after each round a client mixes its student with the average of all, by validation
    local_normalisation: bool = False  # normalisation layers never leave a client
    groups: bool = False  # averaged within random groups of clients, anew in each round
    pooled: bool = False  # one site holds everything, hidden labels too
    changes: Mapping[str, Any] = field(default_factory=dict)  # settings of this row

    @property
    def needs_teacher(self) -> bool:
        """Whether the pretrained teacher is sent to the clients: to distil from it, to start at it, or to use it."""
        return self.distils or self.starts_at_teacher or self.objective is None

    @property
    def needs_unlabelled(self) -> bool:
        """Whether a client must have unlabelled volumes."""
        return self.distils or self.mean_teacher or self.pseudo_labels

    def adapt(self, settings: Settings) -> Settings:
        """The settings of this row."""
        return replace(settings, **self.changes)

    def for_run(self, settings: Settings) -> Settings:
        """The settings of a whole run: those of the row, and for one pooled site the steps of all clients in turn."""
        settings = self.adapt(settings)
        turns = settings.clients if self.pooled else 1
        return replace(settings, steps_per_epoch=settings.steps_per_epoch * turns)

    @property
    def shares_model(self) -> bool:
        """Whether one model is chosen for all clients."""
        return self.federated and not (self.local_normalisation or self.mixes)

    def identity(self) -> str:
        """A hash of all that changes a number: a title may be reworded, and a new field at its default changes none."""
        facts: dict[str, Any] = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if isinstance(f.default, bool) and getattr(self, f.name) != f.default
        }
        facts |= {"name": self.name, "objective": getattr(self.objective, "__name__", "")}
        facts |= {"changes": sorted(self.changes.items())}
        return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()


_HE = "He et al., ISBI 2023, arXiv 2303.14357"
_UAMT = "Yu et al., MICCAI 2019, doi:10.1007/978-3-030-32245-8_67"
_FEDAVG = "McMahan et al., AISTATS 2017, arXiv 1602.05629"
_MIXING = "each client mixes its own student with the average, as validation says (after Deng et al., arXiv 2003.13461)"
_TEACHER = "a repository with labels"
_RANDOM = "a repository whose tissue maps can be scanned anew with any sequence"
_PROTOCOLS = "tissue maps of the repository that can be scanned anew with the clients' own sequences"
_SAME = "a repository with labels, no more than the paper"

#: Ours: a response that a student feels, at full weight from the first step because the teacher is frozen and ready.
_STRONG = {"response_loss": "cross_entropy_dice", "response_weight": 1.0, "response_ramp": 0.0}
_CONTRAST = {"teacher_contrast": "random"}
_OWN_CONTRAST = {"teacher_contrast": "protocols"}
_RECONTRAST = {"teacher_contrast": "recontrasted"}

#: The rows that the notebooks build up, and that ``make run`` compares.
COURSE_ROWS = ("teacher_only", "local_only", "fedavg", "dual_kd")

#: The semi-supervised rows that the paper's method is compared with: no pretrained teacher is distilled.
RIVALS = ("local_uamt", "mean_teacher", "uamt", "ssfl_released", "ssfl_published", "fedsemi")

#: The rows of the comparison, by name, in the order of every table.
ROWS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("teacher_only", "Teacher only", None, _HE, _TEACHER, federated=False),
        Method("local_only", "Local only", supervised, "the lower bound of He et al.: no federation", federated=False),
        Method(
            "local_uamt",
            "Local + UA-MT",
            dual_distillation,
            _UAMT,
            federated=False,
            mean_teacher=True,
            changes={"feature_weight": 0.0},
        ),
        Method("finetune", "Fine-tuned teacher", supervised, _FEDAVG, _TEACHER, starts_at_teacher=True),
        Method(
            "finetune_uamt",
            "Fine-tuned teacher + UA-MT",
            dual_distillation,
            _UAMT,
            _TEACHER,
            mean_teacher=True,
            starts_at_teacher=True,
            changes={"feature_weight": 0.0},
        ),
        Method(
            "finetune_local",
            "Fine-tuned teacher, each alone",
            supervised,
            "ours: what a hospital can do without a federation",
            _TEACHER,
            federated=False,
            starts_at_teacher=True,
        ),
        Method("fedavg", "FedAvg, labelled only", supervised, _FEDAVG),
        Method("fedprox", "FedProx", proximal, "Li et al., MLSys 2020, arXiv 1812.06127"),
        Method(
            "fedbn",
            "FedBN",
            supervised,
            "Li et al., ICLR 2021, arXiv 2102.07623; batch normalisation, since our own has nothing to keep",
            local_normalisation=True,
            changes={"normalisation": "batch"},
        ),
        Method(
            "fedavg_bn",
            "FedAvg, batch normalisation",
            supervised,
            f"{_FEDAVG}; what FedBN has to be compared with",
            changes={"normalisation": "batch"},
        ),
        Method(
            "mean_teacher",
            "FedAvg + mean teacher",
            dual_distillation,
            "Tarvainen and Valpola, NeurIPS 2017, arXiv 1703.01780; UA-MT without its mask",
            mean_teacher=True,
            changes={"feature_weight": 0.0, "teacher_passes": 0},
        ),
        Method("uamt", "FedAvg + UA-MT", dual_distillation, _UAMT, mean_teacher=True, changes={"feature_weight": 0.0}),
        Method("ssfl_released", "SSFL as released", pseudo_labels_released, f"the code of {_HE}", pseudo_labels=True),
        Method(
            "ssfl_published",
            "SSFL as published",
            weak_to_strong,
            "Zhang et al., arXiv 2008.11364; here every client has labels, there only the server",
            pseudo_labels=True,
            groups=True,
            changes={"normalisation": "group"},
        ),
        Method(
            "fedsemi",
            "Fed-Semi",
            weak_to_strong,
            "Yang et al., MedIA 2021, doi:10.1016/j.media.2021.101992",
            pseudo_labels=True,
            changes={"confidence": 0.5},
        ),
        Method("dual_kd", "Dual distillation", dual_distillation, _HE, _TEACHER, distils=True),
        Method(
            "feature_only",
            "Dual distillation, feature only",
            dual_distillation,
            _HE,
            _TEACHER,
            distils=True,
            changes={"response_weight": 0.0},
        ),
        Method(
            "response_only",
            "Dual distillation, response only",
            dual_distillation,
            _HE,
            _TEACHER,
            distils=True,
            changes={"feature_weight": 0.0},
        ),
        Method(
            "neither",
            "Dual distillation, neither",
            dual_distillation,
            _HE,
            _TEACHER,
            distils=True,
            changes={"response_weight": 0.0, "feature_weight": 0.0},
        ),
        Method(
            "pooled",
            "Pooled, all labels",
            supervised,
            "the upper bound: one network on all volumes of all clients, the hidden labels of the unlabelled ones too",
            "that data may leave the hospitals, and a label for every volume",
            federated=False,
            pooled=True,
        ),
        # Beyond the paper.
        Method(
            "teacher_random", "Any-contrast teacher only", None, "ours", _RANDOM, federated=False, changes=_CONTRAST
        ),
        Method(
            "finetune_random",
            "Fine-tuned any-contrast teacher",
            supervised,
            "ours",
            _RANDOM,
            starts_at_teacher=True,
            changes=_CONTRAST,
        ),
        Method(
            "finetune_random_local",
            "Fine-tuned any-contrast teacher, each alone",
            supervised,
            "ours",
            _RANDOM,
            federated=False,
            starts_at_teacher=True,
            changes=_CONTRAST,
        ),
        Method(
            "chosen_finetune",
            "Chosen teacher, fine-tuned and mixed",
            supervised,
            f"ours: the few labels choose between the two teachers; {_MIXING}",
            _RANDOM,
            starts_at_teacher=True,
            chooses_teacher=True,
            mixes=True,
        ),
        Method(
            "teacher_protocols",
            "Protocol teacher only",
            None,
            "ours: trained on the repository's tissue maps, scanned anew with the clients' sequences",
            _PROTOCOLS,
            federated=False,
            changes=_OWN_CONTRAST,
        ),
        Method(
            "finetune_protocols",
            "Fine-tuned protocol teacher",
            supervised,
            "ours",
            _PROTOCOLS,
            starts_at_teacher=True,
            changes=_OWN_CONTRAST,
        ),
        Method(
            "finetune_protocols_local",
            "Fine-tuned protocol teacher, each alone",
            supervised,
            "ours",
            _PROTOCOLS,
            federated=False,
            starts_at_teacher=True,
            changes=_OWN_CONTRAST,
        ),
        Method(
            "mixed_protocols",
            "Protocol teacher, fine-tuned and mixed",
            supervised,
            f"ours: {_MIXING}",
            _PROTOCOLS,
            starts_at_teacher=True,
            mixes=True,
            changes=_OWN_CONTRAST,
        ),
        Method(
            "dual_kd_random",
            "Dual distillation, any-contrast teacher",
            dual_distillation,
            "ours",
            _RANDOM,
            distils=True,
            changes=_CONTRAST,
        ),
        Method(
            "strong_kd",
            "Strong distillation",
            dual_distillation,
            "ours: response by cross-entropy + Dice, weight 1 from the start",
            _TEACHER,
            distils=True,
            changes=_STRONG,
        ),
        Method(
            "strong_kd_random",
            "Strong distillation, any-contrast teacher",
            dual_distillation,
            "ours",
            _RANDOM,
            distils=True,
            changes=_STRONG | _CONTRAST,
        ),
        Method(
            "trusted_kd",
            "Strong distillation, weighted by trust",
            dual_distillation,
            "ours: weighted by the teacher's Dice on each client's few labels",
            _TEACHER,
            distils=True,
            weighs_trust=True,
            changes=_STRONG,
        ),
        Method(
            "started_kd",
            "Strong distillation, started at the teacher",
            dual_distillation,
            "ours",
            _TEACHER,
            distils=True,
            starts_at_teacher=True,
            changes=_STRONG,
        ),
        Method(
            "combined_kd",
            "Combined distillation",
            dual_distillation,
            "ours: any-contrast teacher, strong response, weighted by trust, started at the teacher",
            _RANDOM,
            distils=True,
            starts_at_teacher=True,
            weighs_trust=True,
            changes=_STRONG | _CONTRAST,
        ),
        Method(
            "teacher_recontrasted",
            "Recontrasted teacher only",
            None,
            "ours: trained on the repository's images with random contrasts (see recontrast.py)",
            _SAME,
            federated=False,
            changes=_RECONTRAST,
        ),
        Method(
            "finetune_recontrasted",
            "Fine-tuned recontrasted teacher",
            supervised,
            "ours",
            _SAME,
            starts_at_teacher=True,
            changes=_RECONTRAST,
        ),
        Method(
            "combined_kd_recontrasted",
            "Combined distillation, recontrasted teacher",
            dual_distillation,
            "ours: recontrasted teacher, strong response, weighted by trust, started at the teacher",
            _SAME,
            distils=True,
            starts_at_teacher=True,
            weighs_trust=True,
            changes=_STRONG | _RECONTRAST,
        ),
        Method(
            "small_fedavg",
            "FedAvg, small student",
            supervised,
            "ours: channels a quarter of the teacher's",
            changes={"student_shrink": 4},
        ),
        Method(
            "small_kd",
            "Strong response, small student",
            dual_distillation,
            "ours: no feature term, since the widths differ",
            _TEACHER,
            distils=True,
            changes=_STRONG | {"student_shrink": 4, "feature_weight": 0.0},
        ),
        Method(
            "small_kd_random",
            "Strong response weighted by trust, small student, any-contrast teacher",
            dual_distillation,
            "ours",
            _RANDOM,
            distils=True,
            weighs_trust=True,
            changes=_STRONG | _CONTRAST | {"student_shrink": 4, "feature_weight": 0.0},
        ),
    )
}


def row_named(name: str) -> Method:
    """A row of the comparison.

    Raises:
        ValueError: there is none of this name.
    """
    return entry_named(ROWS, name, "row")
