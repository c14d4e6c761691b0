"""The losses of dual knowledge distillation, one function per equation.

Notation of the paper (He et al., ISBI 2023, arXiv 2303.14357): z logits, p = softmax(z), q the teacher's
probabilities, f features at the bottleneck, C classes, v voxels. Tensors are (B, C, D, H, W) or, for labels,
masks and entropies, (B, D, H, W); every function works for any number of spatial axes. All losses are
scalars.

Whatever comes from the teacher is detached here, so a gradient can only reach the student. The equations
follow the paper and, where the paper is silent, the authors' released code; our corrections are named in the
docstrings, and the functions ``release_*`` keep the released form for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

#: The foreground classes that were drawn: of all volumes of a batch, or one entry per volume. None: all classes.
LabelledClasses = Sequence[int] | Sequence[Sequence[int]] | None

#: Keeps the masked mean finite when no voxel is certain (UA-MT, doi:10.1007/978-3-030-32245-8_67).
EMPTY_MASK_GUARD = 1e-16


def supervised_loss(logits: Tensor, labels: Tensor, labelled_classes: LabelledClasses = None) -> Tensor:
    """L_sup = 1/2 CE + 1/2 (1/C) sum_c [1 - (2 sum_v p_c y_c + 1) / (sum_v p_c + sum_v y_c + 1)].

    The background is one of the C classes. CE is the mean over voxels; the sums of the Dice term run over the
    voxels of one volume, so the loss of a batch is the mean of the losses of its volumes (and FedAvg,
    weighted by examples, averages exactly the gradients of the pooled loss).

    ``labelled_classes`` names the foreground classes that the source of these labels drew, e.g. ``(1, 2)``
    when the patella was left out; None means all. A voxel that such a source calls background is *background
    or an unlabelled class*: the probabilities of those classes are added up and take part as one class, so
    predicting an unlabelled cartilage is never punished (the marginal loss of Shi et al., arXiv 2007.03868).
    With one entry per volume, e.g. ``((1, 2, 3), (1, 2))``, every volume is judged by the classes of its own.

    Args:
        logits: (B, C, ...) float.
        labels: (B, ...) integer, values 0..C-1.

    Raises:
        ValueError: shapes do not fit, a label outside 0..C-1, or a labelled class that the network does not
        have.
    """
    groups = class_groups(labelled_classes, len(logits))
    if len(groups) > 1:
        return _mean_of_groups(supervised_loss, logits, labels, groups)
    labelled_classes = groups[0][1]
    log_p, y = _log_probabilities_and_truth(logits, labels, labelled_classes)
    cross_entropy = -(log_p * y).sum() / labels.numel()
    p, y = log_p.exp().flatten(2), y.flatten(2)  # (B, C, V)
    overlap, size = (p * y).sum(2), p.sum(2) + y.sum(2)  # (B, C)
    dice_loss = (1 - (2 * overlap + 1) / (size + 1)).mean()
    return 0.5 * cross_entropy + 0.5 * dice_loss


def cross_entropy(logits: Tensor, labels: Tensor, labelled_classes: LabelledClasses = None) -> Tensor:
    """CE = -mean_v ln p_y alone, with the arguments and errors of :func:`supervised_loss`."""
    groups = class_groups(labelled_classes, len(logits))
    if len(groups) > 1:
        return _mean_of_groups(cross_entropy, logits, labels, groups)
    labelled_classes = groups[0][1]
    log_p, y = _log_probabilities_and_truth(logits, labels, labelled_classes)
    return -(log_p * y).sum() / labels.numel()


ClassGroups = list[tuple[list[int], tuple[int, ...] | None]]


def class_groups(labelled_classes: LabelledClasses, batch: int) -> ClassGroups:
    """The volumes of a batch by the classes that their sources drew: (numbers of the volumes, classes).

    Raises:
        ValueError: there are not as many entries as volumes.
    """
    everything = list(range(batch))
    if labelled_classes is None:
        return [(everything, None)]
    flat = [entry for entry in labelled_classes if not isinstance(entry, Sequence)]
    if len(flat) == len(labelled_classes):
        return [(everything, tuple(flat))]
    if flat or len(labelled_classes) != batch:
        raise ValueError(
            f"labelled_classes has {len(labelled_classes)} entries for {batch} volumes: give one for each."
        )
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, entry in enumerate(labelled_classes):
        assert isinstance(entry, Sequence)
        groups.setdefault(tuple(entry), []).append(number)
    return [(numbers, classes) for classes, numbers in groups.items()]


def _mean_of_groups(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor, groups: ClassGroups) -> Tensor:
    """The mean over the volumes of a batch of a loss that is itself a mean over volumes."""
    if len(labels) != len(logits):
        raise ValueError(f"{len(labels)} label volumes do not fit {len(logits)} volumes of logits.")
    parts = [loss(logits[rows], labels[rows], classes) * len(rows) for rows, classes in groups]
    return torch.stack(parts).sum() / len(logits)


def _log_probabilities_and_truth(
    logits: Tensor, labels: Tensor, labelled_classes: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """ln p and one-hot labels, (B, C, ...) each, with unlabelled classes merged into the background."""
    if logits.ndim < 2 or labels.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"Labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}: "
            "expected (B, ...) labels for (B, C, ...) logits."
        )
    n_classes = logits.shape[1]
    lowest, highest = (int(value) for value in torch.aminmax(labels))
    if lowest < 0 or highest >= n_classes:
        raise ValueError(
            f"Labels hold values from {lowest} to {highest}, but the network has the classes 0 to "
            f"{n_classes - 1}: map the label file to the course's classes first."
        )
    if labelled_classes is not None:
        logits, labels = _merge_unlabelled_into_background(logits, labels, labelled_classes)
        n_classes = logits.shape[1]
    log_p = functional.log_softmax(logits, dim=1)
    classes = torch.arange(n_classes, device=labels.device).view(1, -1, *([1] * (labels.ndim - 1)))
    return log_p, (labels.unsqueeze(1) == classes).to(log_p.dtype)


def _merge_unlabelled_into_background(
    logits: Tensor, labels: Tensor, labelled_classes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Logits and labels with one class less for each unlabelled one: ln(sum of exp) of the merged logits."""
    n_classes = logits.shape[1]
    labelled, merged = _labelled_and_merged(labelled_classes, n_classes)
    if len(merged) == 1:
        return logits, labels
    position = torch.zeros(n_classes, dtype=torch.long, device=labels.device)
    position[labelled] = torch.arange(1, len(labelled) + 1, device=labels.device)
    return fold_logits(logits, labelled), position[labels.long()]


def _labelled_and_merged(labelled_classes: Sequence[int], n_classes: int) -> tuple[list[int], list[int]]:
    labelled = sorted({int(c) for c in labelled_classes} - {0})
    if any(c < 0 or c >= n_classes for c in labelled):
        raise ValueError(f"labelled_classes {tuple(labelled_classes)} are not all among 0 to {n_classes - 1}.")
    return labelled, [c for c in range(n_classes) if c not in labelled]  # the latter always holds the background


def fold_logits(logits: Tensor, known_classes: Sequence[int]) -> Tensor:
    """Logits (B, C, ...) -> (B, 1 + known, ...): background and classes that are not known become one, ln sum exp z."""
    labelled, merged = _labelled_and_merged(known_classes, logits.shape[1])
    background = torch.logsumexp(logits[:, merged], dim=1, keepdim=True)
    return torch.cat([background, logits[:, labelled]], dim=1)


def fold_probabilities(probabilities: Tensor, known_classes: Sequence[int]) -> Tensor:
    """The same for probabilities: those of the background and of the classes that are not known are added up."""
    labelled, merged = _labelled_and_merged(known_classes, probabilities.shape[1])
    background = probabilities[:, merged].sum(dim=1, keepdim=True)
    return torch.cat([background, probabilities[:, labelled]], dim=1)


def sigmoid_ramp_up(a: float, b: float) -> float:
    """r(a, b) = exp(-5 (1 - clip(a/b, 0, 1))^2): e^-5 at a <= 0, 1 at a >= b (Laine and Aila, arXiv
    1610.02242).

    b = 0 is a ramp without length: 1. The release counts a and b within a round and so restarts the ramp each
    round; here a is global progress.
    """
    if not (math.isfinite(a) and math.isfinite(b)) or b < 0:
        raise ValueError(f"A ramp needs finite numbers and a length of at least 0, not r({a}, {b}).")
    if b == 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(max(a / b, 0.0), 1.0)) ** 2)


def clipped_noise(shape: Sequence[int], generator: torch.Generator, sigma: float = 0.1, bound: float = 0.2) -> Tensor:
    """xi = clip(sigma n, -bound, bound), n ~ N(0, I): float32 of ``shape`` on the generator's device
    (UA-MT).
    """
    noise = torch.randn(tuple(shape), generator=generator, device=generator.device)
    return noise.mul_(sigma).clamp_(-bound, bound)


def entropy(probabilities: Tensor) -> Tensor:
    """H = -sum_c q_c ln q_c in nats: (B, C, ...) -> (B, ...), between 0 and ln C; 0 ln 0 = 0, gradient
    finite.
    """
    tiny = torch.finfo(probabilities.dtype).tiny
    return -(probabilities * probabilities.clamp_min(tiny).log()).sum(dim=1)


def uncertainty_threshold(progress: float, n_classes: int) -> float:
    """(0.75 + 0.25 r(t, 1)) ln C in nats, t in [0, 1] the progress of the whole run (UA-MT; the release: ln
    2).
    """
    return (0.75 + 0.25 * sigmoid_ramp_up(progress, 1.0)) * math.log(n_classes)


def uncertainty_mask(entropy: Tensor, progress: float, n_classes: int) -> Tensor:
    """m = 1[H < (0.75 + 0.25 r(t, 1)) ln C]: (B, ...) nats -> (B, ...) bool, True where the teacher is
    trusted.
    """
    return entropy < uncertainty_threshold(progress, n_classes)


def response_distillation(student_logits: Tensor, teacher_probabilities: Tensor, mask: Tensor) -> Tensor:
    """L_resp = sum_v m_v sum_c (p_c - q_c)^2 / (C sum_v m_v + 1e-16): the mean over trusted voxels and
    classes.

    0, with zero gradient, when the mask is empty. v runs over the voxels of the whole batch.

    Args:
        student_logits: (B, C, ...), the student on the clean volume.
        teacher_probabilities: (B, C, ...), q, the teacher on the noisy volume.
        mask: (B, ...) bool, m.
    """
    squares = _masked_squares(student_logits, teacher_probabilities, mask)
    weight = mask.detach().to(squares.dtype).sum()
    return squares.sum() / (student_logits.shape[1] * weight + EMPTY_MASK_GUARD)


def response_cross_entropy_dice(student_logits: Tensor, teacher_probabilities: Tensor, mask: Tensor) -> Tensor:
    """L_resp = 1/2 CE(q, p) + 1/2 (1/C) sum_c [1 - (2 sum_v p_c q_c + 1) / (sum_v p_c^2 + sum_v q_c^2 + 1)].

    Sums and means run over trusted voxels. Ours: squares of probabilities have next to no gradient where a student is
    sure and wrong, and thin cartilage is lost in a mean over voxels. CE = -mean_v sum_c q_c ln p_c. The squares in the
    Dice term (Milletari et al., arXiv 1606.04797) make p = q its minimum, 0, also for a soft q. Arguments as for
    :func:`response_distillation`; 0 when the mask is empty.
    """
    _check_response(student_logits, teacher_probabilities, mask)
    q, m = teacher_probabilities.detach(), mask.detach().unsqueeze(1).to(student_logits.dtype)
    log_p = functional.log_softmax(student_logits, dim=1)
    cross_entropy = -(q * log_p * m).sum() / (m.sum() + EMPTY_MASK_GUARD)
    p, q = (log_p.exp() * m).flatten(2), (q * m).flatten(2)
    size = p.square().sum(2) + q.square().sum(2)  # (B, C)
    return 0.5 * cross_entropy + 0.5 * (1 - (2 * (p * q).sum(2) + 1) / (size + 1)).mean()


def pseudo_label_loss(logits: Tensor, probabilities: Tensor, confidence: float) -> Tensor:
    """mean_v 1[max_c p_c >= confidence] CE(z, argmax_c p_c): p names the class, the gradient goes through z only.

    The mean is over all voxels, sure or not.

    Args:
        logits: z (B, C, ...), to be taught.
        probabilities: p (B, C, ...), of the same or of a less disturbed volume.
    """
    surest, classes = probabilities.detach().max(dim=1)
    wrong = functional.cross_entropy(logits, classes, reduction="none")
    return (wrong * (surest >= confidence)).mean()


def _check_response(student_logits: Tensor, teacher_probabilities: Tensor, mask: Tensor) -> None:
    if student_logits.shape != teacher_probabilities.shape:
        raise ValueError(
            f"Student {tuple(student_logits.shape)} and teacher {tuple(teacher_probabilities.shape)} differ in shape."
        )
    if mask.shape != (student_logits.shape[0], *student_logits.shape[2:]):
        raise ValueError(f"A mask of shape {tuple(mask.shape)} does not fit logits {tuple(student_logits.shape)}.")


def _masked_squares(student_logits: Tensor, teacher_probabilities: Tensor, mask: Tensor) -> Tensor:
    """m_v sum_c (p_c - q_c)^2 of every voxel, (B, ...)."""
    _check_response(student_logits, teacher_probabilities, mask)
    squares = (student_logits.softmax(dim=1) - teacher_probabilities.detach()).square().sum(dim=1)
    return squares * mask.detach().to(squares.dtype)


def feature_distillation(
    student_features: Tensor,
    teacher_features: Tensor,
    temperature: float = 1.0,
    projection: nn.Module | None = None,
) -> Tensor:
    """L_feat = tau^2 KL(a || b), a = softmax over channels of f_T / tau, b of f_S / tau; mean over positions,
    in nats.

    tau^2 keeps the gradient's size when tau grows (Hinton et al., arXiv 1503.02531). The release has tau = 1
    and averages over the channels too (:func:`release_feature_distillation`).

    Args:
        student_features: (B, F_S, ...) at the bottleneck.
        teacher_features: (B, F_T, ...); F_T = F_S unless a projection is given.
        projection: a module from F_S to F_T channels (a 1x1x1 convolution), trained with the student.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"The temperature must be a positive number, not {temperature}.")
    if projection is not None:
        student_features = projection(student_features)
    if student_features.shape != teacher_features.shape:
        raise ValueError(
            f"Student features {tuple(student_features.shape)} and teacher features "
            f"{tuple(teacher_features.shape)} differ in shape: give a projection to the teacher's width."
        )
    log_a = functional.log_softmax(teacher_features.detach() / temperature, dim=1)
    log_b = functional.log_softmax(student_features / temperature, dim=1)
    divergence = (log_a.exp() * (log_a - log_b)).sum(dim=1)  # (B, ...)
    return temperature**2 * divergence.mean()


def release_uncertainty_threshold(progress: float) -> float:
    """The threshold as released: ln 2, the two-class value, although there are four classes."""
    return uncertainty_threshold(progress, 2)


def release_response_distillation(student_logits: Tensor, teacher_probabilities: Tensor, mask: Tensor) -> Tensor:
    """L_resp as released: 2 in the place of C, so C / 2 times the mean."""
    squares = _masked_squares(student_logits, teacher_probabilities, mask)
    return squares.sum() / (2 * mask.detach().to(squares.dtype).sum() + EMPTY_MASK_GUARD)


def release_feature_distillation(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """L_feat as released: the mean over every element, channels too, F times smaller than the mean over
    positions.
    """
    return feature_distillation(student_features, teacher_features) / student_features.shape[1]
