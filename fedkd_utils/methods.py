"""One local objective per row of the comparison: given a batch, a loss. Who averages is not known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedkd_utils import losses
from fedkd_utils.networks import TappedNetwork
from fedkd_utils.settings import Settings


@dataclass(frozen=True)
class Batch:
    """What a local step sees. The unlabelled half is there only for rows that distil."""

    images: Tensor  # (B, 1, D, H, W)
    labels: Tensor  # (B, D, H, W)
    labelled_classes: tuple[int, ...]
    unlabelled: Tensor | None = None  # u (B', 1, D, H, W), clean
    teacher_probabilities: Tensor | None = None  # q (B', C, D, H, W)
    teacher_entropy: Tensor | None = None  # H (B', D, H, W), nats
    teacher_features: Tensor | None = None  # f_T (B', F, d, h, w)


#: (student, batch, progress of the run in [0, 1), settings) -> scalars by name; "loss" is minimised, all are logged
Objective = Callable[[TappedNetwork, Batch, float, Settings], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """A row: its objective, and what has to travel for it."""

    name: str
    title: str
    objective: Objective | None  # None: nothing is trained
    federated: bool  # students are averaged
    distils: bool  # needs the teacher and unlabelled volumes

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher is sent to the clients: to distil from it, or to use it as it is."""
        return self.distils or self.objective is None


def supervised(network: TappedNetwork, batch: Batch, progress: float, settings: Settings) -> dict[str, Tensor]:
    """L = L_sup on the labelled volumes."""
    loss = losses.supervised_loss(network(batch.images), batch.labels, batch.labelled_classes)
    return {"loss": loss, "supervised": loss.detach()}


def dual_distillation(network: TappedNetwork, batch: Batch, progress: float, settings: Settings) -> dict[str, Tensor]:
    """L = L_sup + lambda L_resp + beta L_feat, lambda = lambda_max r(s, s_max) with s the progress of the whole run.

    (He et al., arXiv 2303.14357.) With both weights 0 the unlabelled pass is left out: L = L_sup, bit by bit.
    """
    parts = supervised(network, batch, progress, settings)
    if settings.response_weight == 0 and settings.feature_weight == 0:
        return parts
    if batch.unlabelled is None or batch.teacher_probabilities is None:
        raise ValueError("Distillation needs unlabelled volumes and the teacher's signals in the batch.")
    assert batch.teacher_entropy is not None and batch.teacher_features is not None  # they come together
    logits, features = network.forward_with_features(batch.unlabelled)
    mask = losses.uncertainty_mask(batch.teacher_entropy, progress, logits.shape[1])
    response = losses.response_distillation(logits, batch.teacher_probabilities, mask)
    feature = losses.feature_distillation(features, batch.teacher_features, settings.feature_temperature)
    response_weight = settings.response_weight * losses.sigmoid_ramp_up(progress, 1.0)
    return {
        "loss": parts["loss"] + response_weight * response + settings.feature_weight * feature,
        "supervised": parts["supervised"],
        "response": response.detach(),
        "feature": feature.detach(),
        "trusted": mask.to(logits.dtype).mean(),
    }


#: The rows of the comparison, by name, in the order of every table.
ROWS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("teacher_only", "Teacher only", None, federated=False, distils=False),
        Method("local_only", "Local only", supervised, federated=False, distils=False),
        Method("fedavg", "FedAvg, labelled only", supervised, federated=True, distils=False),
        Method("dual_kd", "Dual distillation", dual_distillation, federated=True, distils=True),
    )
}
