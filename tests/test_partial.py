"""Classes that a source does not label are unknown there: never background."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from test_federation import SHAPE, TINY, equal, knees, site

from fedkd_utils import (
    clients,
    federation,
    losses,
    metrics,
    networks,
    server,
    site_folder,
    teacher,
    training,
    transforms,
)
from fedkd_utils.clients import FederationError, Update
from fedkd_utils.errors import CohortError
from fedkd_utils.federation import FederationResult
from fedkd_utils.methods import ROWS
from fedkd_utils.objectives import Batch, dual_distillation
from fedkd_utils.settings import PAPER, QUICK
from fedkd_utils.training import LabelledBatches, Progress
from fedkd_utils.transforms import SiteData

ALL, NO_PATELLA = (1, 2, 3), (1, 2)


def random_batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((count, 4, *SHAPE), generator=generator, dtype=torch.float64)
    return logits.requires_grad_(True), torch.randint(0, 4, (count, *SHAPE), generator=generator)


# --- losses ------------------------------------------------------------


@pytest.mark.parametrize("loss", [losses.supervised_loss, losses.cross_entropy])
def test_a_mixed_batch_is_the_mean_of_its_volumes_each_with_its_own_classes(loss) -> None:  # type: ignore[no-untyped-def]
    logits, labels = random_batch()
    classes = (ALL, NO_PATELLA, (2,), NO_PATELLA)
    alone = [loss(logits[[i]], labels[[i]], own) for i, own in enumerate(classes)]
    together = loss(logits, labels, classes)
    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-12)
    assert loss(logits, labels, [list(own) for own in classes]).item() == together.item()


@pytest.mark.parametrize("loss", [losses.supervised_loss, losses.cross_entropy])
def test_equal_classes_per_volume_are_the_classes_of_the_batch_bit_by_bit(loss) -> None:  # type: ignore[no-untyped-def]
    logits, labels = random_batch()
    for own in (ALL, NO_PATELLA):
        assert torch.equal(loss(logits, labels, (own,) * 4), loss(logits, labels, own))
    assert torch.equal(loss(logits, labels, ALL), loss(logits, labels, None))


def test_an_unlabelled_class_is_neither_punished_nor_asked_for() -> None:
    """Where a source drew nothing, background and patella may share the voxel as they like."""
    logits, labels = random_batch(1)
    labels = torch.where(labels == 3, 0, labels)
    moved = logits.detach().clone()
    both = torch.logsumexp(moved[:, [0, 3]], dim=1)
    moved[:, 0], moved[:, 3] = both + np.log(0.01), both + np.log(0.99)
    values = [losses.supervised_loss(z, labels, NO_PATELLA).item() for z in (logits, moved)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert losses.supervised_loss(moved, labels).item() > losses.supervised_loss(logits, labels).item() + 0.1


def test_as_many_entries_as_volumes_are_needed() -> None:
    logits, labels = random_batch()
    with pytest.raises(ValueError, match="3 entries for 4 volumes"):
        losses.supervised_loss(logits, labels, (ALL, ALL, NO_PATELLA))
    with pytest.raises(ValueError, match="not all among 0 to 3"):
        losses.supervised_loss(logits, labels, (ALL, ALL, ALL, (4,)))


def test_folding_adds_probabilities() -> None:
    logits, _ = random_batch()
    p = logits.softmax(1)
    folded = losses.fold_probabilities(p, NO_PATELLA)
    torch.testing.assert_close(folded, losses.fold_logits(logits, NO_PATELLA).softmax(1))
    torch.testing.assert_close(folded[:, 0], p[:, 0] + p[:, 3])
    torch.testing.assert_close(folded[:, 1:], p[:, 1:3])


def test_the_mask_ends_at_the_entropy_that_a_teacher_of_few_classes_can_have() -> None:
    """At the end of a run nothing is masked: not by a ceiling below, and not late by one out of reach."""
    network = networks.build_student(TINY, 0)
    images, labels = knees(2, 0)
    for classes, most in ((None, np.log(4)), (NO_PATELLA, np.log(3)), ((1,), np.log(2))):
        q = torch.full((2, 4, *images.shape[2:]), 0.25)
        features = network.forward_with_features(images)[1].detach()
        trusted = {}
        for entropy in (0.74 * most, 0.76 * most):  # at the start of a run three quarters of the ceiling are trusted
            h = torch.full((2, *images.shape[2:]), float(entropy))
            batch = Batch(images, labels, ALL, images, q, h, features, teacher_classes=classes)
            trusted[entropy] = float(dual_distillation(network, batch, 0.0, TINY)["trusted"])
        assert list(trusted.values()) == [1.0, 0.0]


# --- batches ------------------------------------------------------------


def test_classes_follow_their_volumes_into_the_batches() -> None:
    images, labels = knees(3, 0)
    images += 10 * torch.arange(3).view(3, 1, 1, 1, 1)  # to know them again
    own = (ALL, NO_PATELLA, (1,))
    batches = LabelledBatches(images, labels, 2, 12, 0, None, own)
    seen = {c: 0 for c in own}
    for step in range(12):
        drawn = [own[round(float(volume.mean()) / 10)] for volume in batches(step)[0]]
        assert batches.classes_of(step) == tuple(drawn)
        for classes in drawn:
            seen[classes] += 1
    assert set(seen.values()) == {8}  # every volume as often as any other, whatever it labels
    assert LabelledBatches(images, labels, 2, 1, 0, None, (ALL,) * 3).classes_of(0) == ALL
    assert LabelledBatches(images, labels, 2, 1, 0, None).classes_of(0) is None


def test_a_site_on_disk_knows_the_classes_of_every_volume(tmp_path: Path) -> None:
    folder = tmp_path / "hospital"
    affine = np.diag([4.0, 1.2, 1.2, 1.0])
    for number in range(3):
        image, label = knees(1, number)
        for kind, array in (("imagesTr", image[0, 0].numpy()), ("labelsTr", label[0].numpy().astype(np.uint8))):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), folder / kind / f"k{number}.nii.gz")
    facts = {"labelled_classes": {"k1.nii.gz": [1, 2], "k2": [2]}}
    (folder / "dataset.json").write_text(json.dumps(facts))
    data = transforms.load_site(site_folder.open_site(folder), TINY)
    assert data.classes_by_volume == (ALL, NO_PATELLA, (2,)) and data.labelled_classes == ALL
    assert data.class_shares == {1: pytest.approx(2 / 3), 3: pytest.approx(1 / 3)}
    (folder / "dataset.json").write_text(json.dumps({"labelled_classes": {"k1.nii.gz": [7]}}))
    with pytest.raises(CohortError, match=r"labelled_classes is \[7\]"):
        site_folder.open_site(folder)


# --- metrics ------------------------------------------------------------


def test_what_is_not_labelled_is_not_measured() -> None:
    one = site("south", 1)
    case = replace(one.test[0], labelled_classes=NO_PATELLA)
    network = networks.build_network(TINY, 0)
    dice = training.grid_dice(network, [case])
    assert np.isnan(dice[0, 2]) and not np.isnan(dice[0, :2]).any()
    assert set(training.evaluate_cases(network, [case])["class"]) == {1, 2}


def test_agreement_compares_what_each_volume_labels() -> None:
    network = teacher.freeze(networks.build_network(TINY, 3))
    images, labels = knees(2, 5)
    found = training.predict_probabilities(network, images).argmax(dim=1).numpy()
    by_class = {c: [metrics.dice(p == c, t == c) for p, t in zip(found, labels.numpy(), strict=True)] for c in ALL}
    expected = np.mean([np.mean(by_class[1]), np.mean(by_class[2]), by_class[3][0]])
    assert teacher.agreement(network, images, labels, (ALL, NO_PATELLA)) == pytest.approx(float(expected))
    assert teacher.agreement(network, images, labels, ((), ())) == 0.0


# --- the average ------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [QUICK, replace(QUICK, normalisation="batch"), replace(QUICK, student_shrink=2), PAPER]
)
def test_the_last_layer_is_found(settings) -> None:  # type: ignore[no-untyped-def]
    """Changing class 3 of these tensors changes the logits of the patella and of nothing else."""
    small = replace(settings, grid_shape=(16, 32, 32))
    network = networks.build_student(small, 0).eval()
    axes = networks.class_axes(network)
    image = torch.randn((1, 1, 16, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(image)
        for name, axis in axes.items():
            network.state_dict()[name].select(axis, 3).add_(1.0)
        after = network(image)
    assert len(axes) == 2 and torch.equal(before[:, :3], after[:, :3]) and not torch.equal(before[:, 3], after[:, 3])


def test_who_did_not_draw_a_class_has_no_say_in_its_weights() -> None:
    axes = {"w": 1, "b": 0}

    def state(value: float) -> dict[str, torch.Tensor]:
        return {"w": torch.full((2, 4), value), "b": torch.full((4,), value), "other": torch.full((3,), value)}

    updates = [
        Update("a", state(1.0), 2, {}),
        Update("b", state(4.0), 4, {}, class_shares={3: 0.0}),
        Update("c", state(10.0), 4, {}, class_shares={3: 0.5, 2: 0.0}),
    ]
    averaged = server.aggregate(updates, axes)
    mean = (2 * 1 + 4 * 4 + 4 * 10) / 10
    expected = torch.tensor([mean, mean, (2 * 1 + 4 * 4) / 6, (2 * 1 + 2 * 10) / 4])
    torch.testing.assert_close(averaged["b"], expected)
    torch.testing.assert_close(averaged["w"], expected.expand(2, 4))
    torch.testing.assert_close(averaged["other"], torch.full((3,), mean))
    with pytest.raises(FederationError, match="say class_axes"):
        server.aggregate(updates)
    nobody = [replace(update, class_shares={3: 0.0}) for update in updates]
    torch.testing.assert_close(server.aggregate(nobody, axes)["b"], torch.full((4,), mean))
    everybody = [replace(update, class_shares={}) for update in updates]
    assert equal(server.aggregate(everybody, axes), server.aggregate(everybody))


# --- distillation ------------------------------------------------------------


def test_a_teacher_that_never_saw_a_patella_teaches_nothing_about_it() -> None:
    student = networks.build_network(replace(TINY, dropout=0.0), 1)
    images, labels = knees(2, 0)
    q = torch.rand((2, 4, *SHAPE), generator=torch.Generator().manual_seed(1)).softmax(1)
    shifted = q.clone()  # the same teacher, who calls background what it called patella
    shifted[:, 0], shifted[:, 3] = q[:, 0] + q[:, 3], 0
    values = []
    for probabilities in (q, shifted):
        for known in (None, NO_PATELLA):
            features = student.forward_with_features(images)[1]
            batch = Batch(images, labels, ALL, images, probabilities, torch.zeros((2, *SHAPE)), features, 1.0, known)
            values.append(dual_distillation(student, batch, 1.0, TINY)["response"].item())
    told, folded, told_otherwise, folded_otherwise = values
    assert folded == pytest.approx(folded_otherwise, rel=1e-6) and abs(told - told_otherwise) > 1e-3


def test_uncertainty_is_over_what_the_teacher_knows() -> None:
    network = teacher.freeze(networks.build_network(replace(TINY, dropout=0.0), 1))
    images, _ = knees(1, 0)
    everything = teacher.teacher_signals(network, images, 3, [7])
    known = teacher.teacher_signals(network, images, 3, [7], classes=NO_PATELLA)
    assert torch.equal(everything.probabilities, known.probabilities) and known.of(torch.tensor([0])).classes == (1, 2)
    assert bool((known.entropy <= everything.entropy + 1e-6).all()) and float(known.entropy.max()) <= np.log(3)


# --- the whole ------------------------------------------------------------

LEARNS = replace(TINY, dropout=0.0, rounds=4, local_epochs=1, steps_per_epoch=15, learning_rate=2e-2)


def without_patella(one: SiteData, told: bool) -> SiteData:
    """The same client with no patella in its label files, which says so (or claims that there is none)."""
    labels = torch.where(one.labels == 3, 0, one.labels)
    return replace(one, labels=labels, labelled_classes=NO_PATELLA if told else ALL)


@pytest.fixture(scope="module")
def knows_the_patella() -> dict[str, torch.Tensor]:
    network = networks.build_network(LEARNS, 0)
    images, labels = knees(8, 77)
    training.train_supervised(
        network, images, labels, steps=80, batch=2, learning_rate=2e-2, weight_decay=0.0, seed=0, augmentation=None
    )
    return networks.copy_state(network)


def patellar_dice(state: dict[str, torch.Tensor], one: SiteData) -> float:
    network = networks.build_network(LEARNS, 0)
    networks.load_state(network, state)
    return float(training.grid_dice(network, [*one.validation, *one.test])[:, 2].mean())


def test_a_client_without_patellar_labels_does_not_unlearn_the_patella(
    knows_the_patella: dict[str, torch.Tensor],
) -> None:
    one = site("south", 5, labelled=4)
    before = patellar_dice(knows_the_patella, one)
    after = {}
    for told in (True, False):
        update = clients.client_update(
            knows_the_patella, without_patella(one, told), ROWS["fedavg"], LEARNS, 1, 0, augmentation=None
        )
        after[told] = patellar_dice(update.state, one)
    assert before > 0.7
    assert after[True] > 0.8 * before, after
    assert after[False] < 0.3 * before, after


def test_a_federation_learns_the_patella_from_the_one_client_that_draws_it() -> None:
    full, *rest = (site(name, seed, labelled=4) for name, seed in (("a", 1), ("b", 2), ("c", 3)))
    dice = {}
    for told in (True, False):
        sites = [full, *(without_patella(one, told) for one in rest)]
        result = federation.run_federation(LEARNS, "fedavg", sites, seed=0, augmentation=None)
        dice[told] = np.mean([patellar_dice(result.models["a"], one) for one in (full, *rest)])
        if told:
            scored = result.history.groupby("client")["patellar"].last()
    assert dice[True] > 0.5 and dice[True] > dice[False] + 0.2, dice
    assert not scored.isna().any()  # validation volumes of this test have all labels


class Killed(BaseException):
    """As a KeyboardInterrupt: nobody catches it."""


@pytest.mark.parametrize("row", ["dual_kd", "ssfl_published", "mean_teacher", "fedbn", "local_only"])
def test_every_kind_of_row_runs_on_mixed_clients_and_resumes(row: str, tmp_path: Path) -> None:
    """Killed in its second round and started again, a run reads the first one and ends with the same numbers."""
    mixed = replace(site("south", 1, labelled=3), volume_classes=(ALL, NO_PATELLA, NO_PATELLA))
    blind = without_patella(site("north", 2), True)
    blind.validation = [replace(case, labelled_classes=NO_PATELLA) for case in blind.validation]
    master = teacher.freeze(networks.build_network(TINY, 99))
    checkpoint, notes = tmp_path / "round.safetensors", []

    def run(folder: Path | None, first: SiteData = mixed, progress: Progress | None = None) -> FederationResult:
        known = NO_PATELLA if row == "dual_kd" else None
        short = replace(TINY, rounds=2)
        return federation.run_federation(
            short, row, [first, blind], master, 0, folder, teacher_classes=known, progress=progress, workers=1
        )

    def kill(steps: int, note: str) -> None:
        notes.append(note)
        if checkpoint.is_file():
            raise Killed

    whole = run(None)
    with pytest.raises(Killed):
        run(tmp_path, progress=kill)
    assert not any("read from its checkpoint" in note for note in notes)
    resumed = run(tmp_path, progress=lambda steps, note: notes.append(note))
    assert any("round 1 read from its checkpoint" in note for note in notes)
    assert all(equal(whole.models[name], resumed.models[name]) for name in ("south", "north"))
    assert resumed.best_round == whole.best_round and resumed.ledger == whole.ledger
    measured = [name for name in whole.history.columns if not name.endswith("seconds")]
    pd.testing.assert_frame_equal(resumed.history[measured], whole.history[measured], check_exact=True)
    by_client = resumed.history.groupby("client")["patellar"]
    assert by_client.count()["south"] == 2 and by_client.count()["north"] == 0
    other = replace(mixed, volume_classes=(ALL, ALL, NO_PATELLA))
    with pytest.raises(federation.FederationError, match="belongs to a run with other"):
        run(tmp_path, other)
