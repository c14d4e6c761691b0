"""The local objectives: given a network and a batch, a loss. Who averages, and which row it is, is not known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkd_utils import losses
from fedkd_utils.networks import TappedNetwork
from fedkd_utils.seeds import generator_of
from fedkd_utils.settings import Settings


@dataclass(frozen=True)
class Batch:
    """What a local step sees. The unlabelled half is there only for rows that use it, the teacher's where one is."""

    images: Tensor  # (B, 1, D, H, W)
    labels: Tensor  # (B, D, H, W)
    labelled_classes: tuple[int, ...] | tuple[tuple[int, ...], ...]  # of the batch, or of each of its volumes
    unlabelled: Tensor | None = None  # u (B', 1, D, H, W), clean
    teacher_probabilities: Tensor | None = None  # q (B', C, D, H, W)
    teacher_entropy: Tensor | None = None  # H (B', D, H, W), nats
    teacher_features: Tensor | None = None  # f_T (B', F, d, h, w)
    trust: float = 1.0  # multiplies what is distilled
    teacher_classes: tuple[int, ...] | None = None  # that the teacher was taught; None: all
    received: Mapping[str, Tensor] | None = None  # the student's parameters at the start of the round
    seed: int = 0  # of every draw of the objective


#: (student, batch, progress of the run in [0, 1), settings) -> scalars by name; "loss" is minimised, all are logged
Objective = Callable[[TappedNetwork, Batch, float, Settings], Mapping[str, Tensor]]


def supervised(network: TappedNetwork, batch: Batch, progress: float, settings: Settings) -> dict[str, Tensor]:
    """L = L_sup on the labelled volumes, cross-entropy and soft Dice (:func:`losses.supervised_loss`).

    What a client of FedAvg minimises (McMahan et al., AISTATS 2017, arXiv 1602.05629).
    """
    loss = losses.supervised_loss(network(batch.images), batch.labels, batch.labelled_classes)
    return {"loss": loss, "supervised": loss.detach()}


def proximal(network: TappedNetwork, batch: Batch, progress: float, settings: Settings) -> dict[str, Tensor]:
    """L = L_sup + mu/2 sum (theta - theta_received)^2 (FedProx: Li et al., MLSys 2020, arXiv 1812.06127, equation 2).

    With mu = 0 the term is left out: L = L_sup, bit by bit.
    """
    parts = supervised(network, batch, progress, settings)
    if settings.proximal_weight == 0:
        return parts
    if batch.received is None:
        raise ValueError("FedProx needs the parameters that the client received in the batch.")
    own = dict(network.named_parameters())
    squares = torch.stack([(own[name] - start).square().sum() for name, start in batch.received.items()])
    distance = squares.sum()
    loss = parts["loss"] + settings.proximal_weight / 2 * distance
    return {"loss": loss, "supervised": parts["supervised"], "distance": distance.detach()}


_RESPONSES = {
    "squares": losses.response_distillation,
    "cross_entropy_dice": losses.response_cross_entropy_dice,
}


def dual_distillation(network: TappedNetwork, batch: Batch, progress: float, settings: Settings) -> dict[str, Tensor]:
    """L = L_sup + w (lambda L_resp + beta L_feat), lambda = lambda_max r(s, s_max), s the progress of the whole run.

    (He et al., ISBI 2023, arXiv 2303.14357.) The paper has w = 1. s_max is ``settings.response_ramp``, 1 in the
    paper: the whole run. A term without weight is left out, and without both the unlabelled pass: L = L_sup, bit by
    bit. Classes that the teacher was never taught are background to it, and in L_resp to the student too. With beta = 0
    and a teacher that is the average of the student, this is UA-MT (Yu et al., MICCAI 2019,
    doi:10.1007/978-3-030-32245-8_67, equation 1).
    """
    parts = supervised(network, batch, progress, settings)
    if settings.response_weight == 0 and settings.feature_weight == 0:
        return parts
    if batch.unlabelled is None or batch.teacher_probabilities is None:
        raise ValueError("Distillation needs unlabelled volumes and the teacher's signals in the batch.")
    assert batch.teacher_entropy is not None and batch.teacher_features is not None  # they come together
    if settings.response_loss not in _RESPONSES:
        raise ValueError(f"response_loss must be one of {', '.join(_RESPONSES)}, not {settings.response_loss!r}.")
    logits, features = network.forward_with_features(batch.unlabelled)
    ceiling, q = settings.mask_classes, batch.teacher_probabilities
    if batch.teacher_classes is not None:  # its entropy cannot exceed ln of what it tells apart
        ceiling = min(ceiling, len(batch.teacher_classes) + 1)
    mask = losses.uncertainty_mask(batch.teacher_entropy, progress, ceiling)
    if batch.teacher_classes is not None:
        logits, q = (
            losses.fold_logits(logits, batch.teacher_classes),
            losses.fold_probabilities(q, batch.teacher_classes),
        )
    response = _RESPONSES[settings.response_loss](logits, q, mask)
    weight = batch.trust * settings.response_weight * losses.sigmoid_ramp_up(progress, settings.response_ramp)
    loss = parts["loss"] + weight * response
    parts |= {"response": response.detach(), "trusted": mask.to(logits.dtype).mean()}
    if settings.feature_weight != 0:
        feature = losses.feature_distillation(features, batch.teacher_features, settings.feature_temperature)
        loss = loss + batch.trust * settings.feature_weight * feature
        parts["feature"] = feature.detach()
    return parts | {"loss": loss}


#: Noise of the pseudo-label rows, clip(sigma n, -2 sigma, 2 sigma): of the release, and weak and strong of Fed-Semi.
RELEASE_NOISE, WEAK_NOISE, STRONG_NOISE = 0.1, 0.25, 0.75


def pseudo_labels_released(
    network: TappedNetwork, batch: Batch, progress: float, settings: Settings
) -> dict[str, Tensor]:
    """L = CE + P(u, u) + P(u + xi, u + xi), P(a, b) = mean_v 1[max p(b) >= tau] CE(z(a), argmax p(b)), tau = 0.95.

    SSFL (Zhang et al., arXiv 2008.11364) in the release of He et al. (ISBI 2023, arXiv 2303.14357): the clean and the
    noisy volume each follow their own pseudo-label, which only makes the student surer of what it says already; the
    published method (:func:`weak_to_strong`) goes from weak to strong.
    """
    ce = losses.cross_entropy(network(batch.images), batch.labels, batch.labelled_classes)
    clean = network(_unlabelled(batch))
    noisy = network(_disturbed(batch, "noisy", RELEASE_NOISE))
    pseudo = [losses.pseudo_label_loss(z, z.softmax(dim=1), settings.confidence) for z in (clean, noisy)]
    return {"loss": ce + pseudo[0] + pseudo[1], "supervised": ce.detach(), "pseudo": (pseudo[0] + pseudo[1]).detach()}


def weak_to_strong(network: TappedNetwork, batch: Batch, progress: float, settings: Settings) -> dict[str, Tensor]:
    """L = L_sup + mean_v 1[max p(u_w) >= tau] CE(z(u_s), argmax p(u_w)): weak noise names the class, strong learns it.

    Fed-Semi (Yang et al., MedIA 2021, doi:10.1016/j.media.2021.101992) with tau = 0.5, and the consistency loss of
    SSFL (Zhang et al., arXiv 2008.11364) with tau = 0.95; the noise is Fed-Semi's in both.
    """
    parts = supervised(network, batch, progress, settings)
    with torch.no_grad():
        named = network(_disturbed(batch, "weak", WEAK_NOISE)).softmax(dim=1)
    pseudo = losses.pseudo_label_loss(network(_disturbed(batch, "strong", STRONG_NOISE)), named, settings.confidence)
    return {"loss": parts["loss"] + pseudo, "supervised": parts["supervised"], "pseudo": pseudo.detach()}


def _unlabelled(batch: Batch) -> Tensor:
    if batch.unlabelled is None:
        raise ValueError("Pseudo-labels need unlabelled volumes in the batch.")
    return batch.unlabelled


def _disturbed(batch: Batch, name: str, sigma: float) -> Tensor:
    clean = _unlabelled(batch)
    return clean + losses.clipped_noise(clean.shape, generator_of(batch.seed, name), sigma, 2 * sigma).to(clean)
