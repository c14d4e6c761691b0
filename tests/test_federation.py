"""The federation: oracles of averaging, the ledger against tensor sizes, resume after kills, and bad clients."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd_utils import checkpoints, clients, federation, losses, networks, server, teacher, training
from fedkd_utils.clients import FederationError, Update
from fedkd_utils.federation import FederationResult
from fedkd_utils.methods import ROWS
from fedkd_utils.networks import CheckpointError, State
from fedkd_utils.provenance import state_hash
from fedkd_utils.seeds import seed_of
from fedkd_utils.teacher import TeacherUpdate
from fedkd_utils.transforms import Case, SiteData

TINY = replace(tiny.TINY, dropout=0.2, rounds=3, local_epochs=2, steps_per_epoch=2, teacher_passes=3)
SHAPE = TINY.grid_shape
VNET = replace(TINY, architecture="vnet", grid_shape=(16, 16, 16), rounds=1)


def knees(count: int, seed: int, shape: tuple[int, int, int] = SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros((count, *shape), dtype=torch.long)
    for volume in labels:
        for c in (1, 2, 3):
            row, column = 4 * c - 3, int(torch.randint(1, 9, (1,), generator=generator))
            volume[1:3, row : row + 3, column : column + 6] = c
    return labels[:, None].float() + 0.3 * torch.randn((count, 1, *shape), generator=generator), labels


def site(name: str, seed: int, labelled: int = 2, unlabelled: int = 3, shape: tuple[int, int, int] = SHAPE) -> SiteData:
    images, labels = knees(labelled, seed, shape)
    cases = []
    for i in range(2):
        image, label = knees(1, 1000 + 10 * seed + i, shape)
        affine = np.diag([4.0, 1.2, 1.2, 1.0])
        native = label[0].numpy().astype(np.uint8)
        cases.append(Case(f"{name} {i}", image[0], label[0], affine, native, shape, affine, (1, 2, 3)))
    pool = knees(max(unlabelled, 1), seed + 500, shape)[0][:unlabelled]
    return SiteData(name, images, labels, pool, cases[:1], cases[1:], (1, 2, 3))


SITES = [site("south", 1), site("north", 2, labelled=3, unlabelled=5), site("east", 3)]
TEACHER = teacher.freeze(networks.build_network(TINY, 99))


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def numbers(result: FederationResult) -> list[dict[str, Any]]:
    """The history without what a clock measured."""
    return result.history.drop(
        columns=["seconds", "data_seconds", "cpu_seconds", "teacher_cpu_seconds"], errors="ignore"
    ).to_dict("records")


def same(a: FederationResult, b: FederationResult) -> bool:
    models = all(equal(a.models[k], b.models[k]) for k in a.models)
    return models and numbers(a) == numbers(b) and a.best_round == b.best_round and a.ledger == b.ledger


def run(row: str = "dual_kd", **more: Any) -> FederationResult:
    chosen = more.pop("settings", TINY)
    sites = more.pop("sites", SITES)
    if row == "pooled":
        sites = sites[:1]
    return federation.run_federation(chosen, row, sites, TEACHER, 0, more.pop("folder", None), **more)


@functools.cache
def undisturbed(row: str = "dual_kd") -> FederationResult:
    """A plain run to compare with, once."""
    return run(row)


# --- averaging --------------------------------------------------------------------------------------------------


def state(*values: float, count: int = 0) -> State:
    return {"w": torch.tensor(values), "steps": torch.tensor(count), "half": torch.tensor(values[:1]).half()}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100, width=32), st.integers(1, 1000)), min_size=1, max_size=5))
def test_averaging_is_the_weighted_mean_in_any_order(clients: list[tuple[float, int]]) -> None:
    updates = [Update(f"c{i}", state(v, -v, count=i), n, {}) for i, (v, n) in enumerate(clients)]
    averaged = server.aggregate(updates)
    exact = sum(n * v for v, n in clients) / sum(n for _, n in clients)
    assert averaged["w"].tolist() == pytest.approx([exact, -exact], rel=1e-6, abs=1e-5)
    assert averaged["w"].dtype == torch.float32 and averaged["half"].dtype == torch.float16
    assert averaged["steps"].item() == 0 and averaged["steps"].dtype == torch.int64  # copied from the first name
    for order in itertools.islice(itertools.permutations(updates), 20):
        assert equal(server.aggregate(order), averaged)


def test_an_average_of_equal_states_is_that_state_and_its_own() -> None:
    start = networks.copy_state(networks.build_network(TINY, 0))
    averaged = server.aggregate([Update(n, start, 3, {}) for n in ("a", "b", "c", "d")])
    assert all(torch.allclose(averaged[k], start[k], rtol=1e-7, atol=0) for k in start)
    next(iter(averaged.values())).zero_()
    assert next(iter(start.values())).abs().sum() > 0


@pytest.mark.parametrize("partial", [False, True])
def test_an_average_keeps_no_update(partial: bool) -> None:
    axes = {"w": 0} if partial else {}
    running, seen = server.FedAvg(axes), list[weakref.ref[torch.Tensor]]()
    for k in range(5):
        update = Update(
            f"c{k}", state(float(k), 2.0 * k, count=k), k + 1, {}, class_shares={1: 0.5} if partial and k else {}
        )
        running.add(update)
        seen.extend(weakref.ref(tensor) for tensor in update.state.values())
        del update
        assert all(there() is None for there in seen)
    counts, shares = torch.arange(1.0, 6), torch.tensor([1.0, *[0.5 if partial else 1.0] * 4])
    values = torch.arange(5.0)
    expected = [(counts * values).sum() / 15, (counts * shares * 2 * values).sum() / (counts * shares).sum()]
    torch.testing.assert_close(running.average()["w"], torch.stack(expected))


@pytest.mark.parametrize(("workers", "held"), [(1, 2), (2, 6)])
def test_a_round_holds_few_updates_however_many_clients_there_are(workers: int, held: int, monkeypatch: Any) -> None:
    seen, most = list[weakref.ref[torch.Tensor]](), list[int]()

    def update(global_state: State, one: SiteData, *rest: Any, **more: Any) -> Update:
        trained = {name: tensor.clone() for name, tensor in global_state.items()}
        seen.append(weakref.ref(next(iter(trained.values()))))
        most.append(sum(there() is not None for there in seen))
        return Update(one.name, trained, 2, {"loss": 0.0})

    monkeypatch.setattr(federation, "client_update", update)
    many = [replace(SITES[0], name=f"c{k:02d}") for k in range(20)]
    federation.run_federation(replace(TINY, rounds=1), "fedavg", many, workers=workers)
    assert len(most) == 20 and max(most) <= held


def test_bad_updates_are_refused_with_the_clients_name() -> None:
    good = Update("a", state(1, 2), 1, {})
    faults: list[tuple[Update, type[Exception], str]] = [
        (Update("b", state(1, float("nan")), 1, {}), CheckpointError, "client b.*w holds NaN"),
        (Update("b", state(1, float("inf")), 1, {}), CheckpointError, "client b"),
        (Update("b", state(1, 2, 3), 1, {}), CheckpointError, "client b.*shape"),
        (Update("b", {"w": torch.zeros(2)}, 1, {}), CheckpointError, "client b.*missing"),
        (Update("b", state(1, 2), 0, {}), FederationError, "client b counts 0"),
        (Update("a", state(1, 2), 1, {}), FederationError, "Two updates of one client"),
    ]
    for bad, kind, text in faults:
        with pytest.raises(kind, match=text):
            server.aggregate([good, bad])
    with pytest.raises(FederationError, match="No client"):
        server.aggregate([])
    with pytest.raises(CheckpointError, match="client a"):
        server.server_step({"other": torch.zeros(2)}, [good])


# --- oracles ----------------------------------------------------------------------------------------------------


def test_one_client_equals_plain_training_bit_by_bit() -> None:
    once = replace(TINY, rounds=1)
    result = federation.run_federation(once, "fedavg", SITES[:1], seed=7)
    network = networks.build_network(once, seed_of(7, "student"))
    training.train_supervised(
        network,
        SITES[0].labelled_images,
        SITES[0].labels,
        steps=clients.steps_per_round(once),
        batch=once.batch_labelled,
        learning_rate=once.learning_rate,
        weight_decay=once.weight_decay,
        seed=seed_of(7, "client", SITES[0].name, 1),
        labelled_classes=SITES[0].classes_by_volume,
    )
    assert equal(result.models["south"], networks.copy_state(network))


def sgd(parameters: Any, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=learning_rate)


def test_one_full_batch_step_of_all_clients_equals_one_centralised_step() -> None:
    """In float64: equal counts, a loss that is a mean over volumes, no dropout, no augmentation."""
    plain = replace(TINY, dropout=0.0, local_epochs=1, steps_per_epoch=1, rounds=1, batch_labelled=3)
    sites = [site(f"c{i}", 20 + i, labelled=3) for i in range(4)]
    for one in sites:
        one.labelled_images = one.labelled_images.double()
    start = {k: v.double() for k, v in networks.copy_state(networks.build_network(plain, 5)).items()}
    updates = [
        clients.client_update(start, s, ROWS["fedavg"], plain, 1, 0, augmentation=None, make_optimiser=sgd)
        for s in sites
    ]
    averaged = server.server_step(start, updates)
    central = networks.build_network(plain, 0)
    networks.load_state(central, start)
    loss = losses.supervised_loss(
        central(torch.cat([s.labelled_images for s in sites])), torch.cat([s.labels for s in sites])
    )
    loss.backward()
    moved = 0.0
    for name, parameter in central.named_parameters():
        assert parameter.grad is not None and averaged[name].dtype == torch.float64
        expected = parameter.detach() - plain.learning_rate * parameter.grad
        moved = max(moved, (expected - start[name]).abs().max().item())
        assert torch.allclose(averaged[name], expected, rtol=0, atol=1e-12), name
    assert moved > 1e-5


def test_unequal_clients_weigh_by_their_examples() -> None:
    once = replace(TINY, rounds=1)
    result = federation.run_federation(once, "fedavg", SITES, seed=3)
    start = networks.copy_state(networks.build_network(once, seed_of(3, "student")))
    updates = [clients.client_update(start, s, ROWS["fedavg"], once, 1, 3) for s in SITES]
    assert {u.client: u.n_examples for u in updates} == {"south": 5, "north": 8, "east": 5}
    for name, tensor in result.models["north"].items():
        exact = sum(u.state[name].double() * u.n_examples for u in updates) / 18
        assert torch.allclose(tensor.double(), exact, rtol=0, atol=1e-6)


def test_dual_distillation_without_weights_is_fedavg_bit_by_bit() -> None:
    """So all rows share initial weights, batches, augmentation and dropout masks."""
    none = replace(TINY, response_weight=0.0, feature_weight=0.0)
    a, b = run("dual_kd", settings=none), undisturbed("fedavg")
    assert equal(a.models["east"], b.models["east"])
    assert not equal(undisturbed().models["east"], b.models["east"])


def test_a_client_update_depends_on_its_arguments_only() -> None:
    start = networks.copy_state(networks.build_network(TINY, 0))
    before = {k: v.clone() for k, v in start.items()}
    torch.manual_seed(1)
    a = clients.client_update(start, SITES[0], ROWS["dual_kd"], TINY, 2, 0, teacher=TEACHER)
    torch.manual_seed(2)
    signals = clients.signals_for(TEACHER, SITES[0], TINY, 0)
    b = clients.client_update(start, SITES[0], ROWS["dual_kd"], TINY, 2, 0, signals=signals)
    other_round = clients.client_update(start, SITES[0], ROWS["dual_kd"], TINY, 3, 0, signals=signals)
    assert equal(a.state, b.state) and not equal(a.state, other_round.state) and equal(start, before)
    assert a.metrics["steps"] == 4 and {"loss", "supervised", "response", "feature", "trusted"} <= a.metrics.keys()


def test_batch_statistics_are_averaged_and_counters_copied() -> None:
    sites = [site(n, i, 2, 2, VNET.grid_shape) for i, n in enumerate(("a", "b"))]
    start = networks.copy_state(networks.build_network(VNET, 0))
    updates = [clients.client_update(start, s, ROWS["fedavg"], VNET, 1, 0) for s in sites]
    averaged = server.server_step(start, updates)
    mean = next(k for k in averaged if k.endswith("running_mean"))
    counter = next(k for k in averaged if k.endswith("num_batches_tracked"))
    first, second = (u.state[mean] for u in updates)
    assert not torch.equal(first, second)
    assert torch.allclose(averaged[mean], (first + second) / 2, rtol=0, atol=1e-6)
    assert averaged[counter].item() == updates[0].state[counter].item() == 4


# --- rounds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ["dual_kd", "uamt", "fedbn", "ssfl_published", "combined_kd", "mixed_protocols"])
def test_numbers_do_not_depend_on_workers_or_on_the_order_of_clients(row: str) -> None:
    four = [*SITES, site("west", 4)]
    one = run(row, sites=four, workers=1)
    assert same(one, run(row, sites=four[::-1], workers=3)) and same(one, run(row, sites=four))
    assert not same(one, federation.run_federation(TINY, row, four, TEACHER, 1))


def test_the_frozen_teacher_is_never_changed() -> None:
    before = networks.copy_state(TEACHER)
    generator = TEACHER.dropout_generator.get_state()
    run("dual_kd")
    run("teacher_only")
    assert equal(networks.copy_state(TEACHER), before)
    assert torch.equal(TEACHER.dropout_generator.get_state(), generator) and not TEACHER.training


@pytest.mark.parametrize("row", list(ROWS))
def test_the_model_is_the_best_on_validation(row: str) -> None:
    result = undisturbed(row)
    history = result.history
    assert list(history.columns[:6]) == ["round", "client", "validation", "femoral", "tibial", "patellar"]
    by_round = result.validation_by_round()
    method = ROWS[row]
    sites = SITES[:1] if method.pooled else SITES
    for one in sites:
        own = history[history["client"] == one.name].set_index("round")["validation"]
        together = (method.federated and not method.mixes) or method.objective is None
        scores = by_round if together else own
        assert result.best_round[one.name] == scores.idxmax()  # the first of equals
        network = networks.build_student(method.adapt(TINY), 0)
        networks.load_state(network, result.models[one.name])
        assert training.validate(network, one.validation) == own[result.best_round[one.name]]
    assert result.steps == (0 if method.objective is None else 3 * len(sites) * 4)  # the same for every row


def test_local_only_is_each_client_without_the_others() -> None:
    together = undisturbed("local_only")
    alone = federation.run_federation(TINY, "local_only", SITES[:1], seed=0)
    assert equal(together.models["south"], alone.models["south"])
    assert together.ledger.entries == [] and not equal(together.models["south"], together.models["east"])


def test_the_ledger_counts_every_tensor_once_per_message() -> None:
    model = sum(p.numel() * 4 for p in TEACHER.parameters())
    rounds, clients = TINY.rounds, len(SITES)
    shared, teachers = ((rounds + 1) * clients * model, rounds * clients * model), clients * model
    expected = {
        "teacher_only": (teachers, 0),
        "teacher_random": (teachers, 0),
        "teacher_protocols": (teachers, 0),
        "teacher_recontrasted": (teachers, 0),
        "local_only": (0, 0),
        "local_uamt": (0, 0),
        "pooled": (0, 0),
        "finetune_local": (teachers, 0),
        "finetune_random_local": (teachers, 0),
        "finetune_protocols_local": (teachers, 0),
    }
    for row, method in ROWS.items():
        ledger = undisturbed(row).ledger
        assert ledger.total() == sum(ledger.total(d) for d in ("down", "up")) == ledger.frame()["bytes"].sum()
        if not {"normalisation", "student_shrink"} & set(method.changes):  # students of the same size
            # A pretrained teacher costs one message a client; where the student starts at it, it is the first student.
            more = teachers if method.needs_teacher and not method.starts_at_teacher else 0
            down, up = expected.get(row, (shared[0] + more, shared[1]))
            assert (ledger.total("down"), ledger.total("up")) == (down, up), row
    small = networks.nbytes(networks.build_student(ROWS["small_kd"].adapt(TINY), 0).state_dict())
    assert small < model / 4
    assert undisturbed("small_fedavg").ledger.total("up") == rounds * clients * small
    batch = networks.nbytes(networks.build_student(ROWS["fedavg_bn"].adapt(TINY), 0).state_dict())
    assert undisturbed("fedavg_bn").ledger.total() == (2 * rounds + 1) * clients * batch
    assert undisturbed("small_kd").ledger.total("down") == (rounds + 1) * clients * small + teachers
    table = undisturbed().ledger.frame()
    teachers = table[table["what"] == "teacher"]
    assert sorted(teachers["client"]) == ["east", "north", "south"]  # once each, before training
    assert set(teachers["round"]) == {0} and set(teachers["direction"]) == {"down"}
    keys = table[["round", "direction", "client", "what"]]
    assert not keys.duplicated().any()


def test_progress_adds_up_to_what_was_announced() -> None:
    updates = [teacher.FROZEN, TeacherUpdate("hand_over", 1, 0.5), teacher.RELEASE]
    for row, update in [*((row, teacher.FROZEN) for row in ROWS), *(("dual_kd", update) for update in updates)]:
        steps: list[int] = []
        run(row, teacher_update=update, progress=lambda n, note: steps.append(n))  # noqa: B023
        sites = SITES[:1] if ROWS[row].pooled else SITES
        assert sum(steps) == federation.total_progress(TINY, row, sites, update), (row, update)


# --- the other rows ---------------------------------------------------------------------------------------------


def updated(row: str, settings: Any = TINY, number: int = 1, **more: Any) -> Update:
    """One round of one client, all rows from the same student."""
    method = more.pop("method", ROWS[row])
    own = method.adapt(settings)
    start = networks.copy_state(networks.build_student(own, 0))
    local = clients.local_names(method, networks.build_student(own, 0))
    start = {name: tensor for name, tensor in start.items() if name not in local}
    return clients.client_update(start, SITES[0], method, settings, number, 0, teacher=TEACHER, **more)


TRAINED = [row for row, method in ROWS.items() if method.objective is not None]


def test_every_row_sees_the_same_volumes_in_the_same_order_from_the_same_start() -> None:
    """Fair play: labelled batches, the seeds of their augmentation, and the weights at the start."""
    seen: dict[str, list[str]] = {}

    def watch(row: str) -> Any:
        def augment(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> Any:
            seen.setdefault(row, []).append(state_hash({"x": images, "y": labels, "g": generator.get_state()}))
            return images, labels

        return augment

    for row in TRAINED:
        updated(row, augmentation=watch(row))
    assert all(lines == seen["fedavg"] and len(lines) == 4 for lines in seen.values()) and set(seen) == set(TRAINED)
    plain = federation.begin(TINY, ROWS["fedavg"], SITES, TEACHER, 0).students[""]
    for row in TRAINED:
        settings_ = ROWS[row].adapt(TINY)
        first = next(iter(federation.begin(settings_, ROWS[row], SITES, TEACHER, 0).students.values()))
        if ROWS[row].starts_at_teacher:
            assert equal(first, networks.copy_state(TEACHER))
        elif settings_.student_shrink == 1:
            assert all(torch.equal(first[name], tensor) for name, tensor in plain.items()), row


def test_every_row_that_looks_at_unlabelled_volumes_sees_the_same_ones_in_the_same_order() -> None:
    seen: dict[str, list[str]] = {}

    def watch(row: str) -> Any:
        def objective(network: Any, batch: Any, progress: float, settings: Any) -> Any:
            if batch.unlabelled is not None:
                seen.setdefault(row, []).append(state_hash({"x": batch.unlabelled}))
            assert ROWS[row].objective is not None
            return ROWS[row].objective(network, batch, progress, settings)

        return objective

    for row in TRAINED:
        updated(row, method=replace(ROWS[row], objective=watch(row)))
    assert {"uamt", "local_uamt", "ssfl_released", "ssfl_published", "fedsemi", "dual_kd", "trusted_kd"} <= set(seen)
    assert all(lines == seen["dual_kd"] and len(lines) == 4 for lines in seen.values())
    assert len(set(seen["dual_kd"])) > 1


@pytest.mark.parametrize("row", TRAINED)
def test_no_row_draws_from_the_state_that_was_left_behind(row: str) -> None:
    torch.manual_seed(1)
    one = updated(row)
    torch.manual_seed(2)
    torch.rand(7)
    other = updated(row)
    assert equal(one.state, other.state) and equal(one.kept, other.kept)


def test_the_limiting_cases_of_every_row_are_fedavg_bit_by_bit() -> None:
    fedavg = undisturbed("fedavg")
    assert equal(undisturbed("neither").models["east"], fedavg.models["east"])
    assert list(undisturbed("neither").history["validation"]) == list(fedavg.history["validation"])
    no_mu = run("fedprox", settings=replace(TINY, proximal_weight=0.0))
    assert same(no_mu, fedavg) and not same(undisturbed("fedprox"), fedavg)
    for row in ("uamt", "mean_teacher"):
        weightless = run(row, settings=replace(TINY, response_weight=0.0))
        assert equal(weightless.models["east"], fedavg.models["east"]) and weightless.ledger == fedavg.ledger
        assert not equal(undisturbed(row).models["east"], fedavg.models["east"])
    tuned = run("finetune_uamt", settings=replace(TINY, response_weight=0.0))
    assert equal(tuned.models["east"], undisturbed("finetune").models["east"])
    assert not equal(undisturbed("finetune_uamt").models["east"], tuned.models["east"])
    alone = run("local_uamt", settings=replace(TINY, response_weight=0.0))
    assert equal(alone.models["east"], undisturbed("local_only").models["east"])
    pooled = federation.run_federation(TINY, "pooled", SITES[:1], seed=0)  # one hospital, all labelled: nothing to pool
    assert equal(pooled.models["south"], federation.run_federation(TINY, "fedavg", SITES[:1], seed=0).models["south"])


def cross_entropy_alone(network: Any, batch: Any, progress: float, settings: Any) -> dict[str, torch.Tensor]:
    return {"loss": torch.nn.functional.cross_entropy(network(batch.images), batch.labels.squeeze(1).long())}


def test_a_threshold_that_nobody_reaches_removes_pseudo_labels() -> None:
    """1 is never reached by these students; in the rows of SSFL the supervised part alone is left."""
    never = ROWS["fedsemi"].changes | {"confidence": 1.0}
    assert equal(updated("fedsemi", method=replace(ROWS["fedsemi"], changes=never)).state, updated("fedavg").state)
    assert not equal(updated("fedsemi").state, updated("fedavg").state)
    released = replace(ROWS["ssfl_released"], changes=ROWS["ssfl_released"].changes | {"confidence": 1.0})
    plain = replace(ROWS["fedavg"], objective=cross_entropy_alone, changes=ROWS["ssfl_released"].changes)
    assert equal(updated("ssfl_released", method=released).state, updated("fedavg", method=plain).state)
    assert not equal(updated("ssfl_released").state, updated("fedavg", method=plain).state)
    published = replace(ROWS["ssfl_published"], changes={"confidence": 1.0}, groups=False)
    assert equal(updated("ssfl_published", method=published).state, updated("fedavg").state)


def test_finetuning_is_fedavg_from_the_teacher() -> None:
    tuned = run("finetune", settings=replace(TINY, learning_rate=0.0, weight_decay=0.0))
    for one in SITES:
        assert equal(tuned.models[one.name], networks.copy_state(TEACHER))
    table = undisturbed("finetune").ledger.frame()
    assert set(table[table["round"] == 0]["what"]) == {"teacher"}  # no other first student
    assert undisturbed("finetune").ledger.total() == undisturbed("fedavg").ledger.total()


def test_the_mean_teacher_is_the_average_over_all_steps_and_never_restarts() -> None:
    """Against the average of the students after every step, over two rounds, in float64."""
    settings_ = replace(TINY, local_epochs=1, steps_per_epoch=3, average_decay=0.6)
    seen: list[list[torch.Tensor]] = []

    def record(parameters: Any, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        own = list(parameters)
        optimiser = torch.optim.SGD(own, lr=learning_rate)
        optimiser.register_step_post_hook(lambda *_: seen.append([p.detach().clone().double() for p in own]))
        return optimiser

    method = ROWS["uamt"]
    start = networks.copy_state(networks.build_network(settings_, 0))
    first = clients.client_update(start, SITES[0], method, settings_, 1, 0, make_optimiser=record)
    other = networks.copy_state(networks.build_network(settings_, 5))  # as if the others had moved it far
    second = clients.client_update(other, SITES[0], method, settings_, 2, 0, make_optimiser=record, kept=first.kept)
    assert len(seen) == 6
    names = [f"average/{name}" for name, _ in networks.build_network(settings_, 0).named_parameters()]
    expected = [torch.zeros_like(value) for value in seen[0]]
    for t, student in enumerate(seen):
        a = min(1 - 1 / (t + 1), 0.6)
        expected = [a * old + (1 - a) * new for old, new in zip(expected, student, strict=True)]
        for name, value in zip(names, expected, strict=True):
            if t in (2, 5):
                assert torch.allclose((first, second)[t // 3].kept[name].double(), value, rtol=0, atol=1e-6)
    assert not any(name.startswith("average") for name in second.state)


def test_uamt_asks_the_average_and_not_the_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is asked in a step is the average after the step before: after the first it is the student, then no more."""
    asked, students = [], []
    original, follow = clients.teacher_signals, clients.follow

    def signals(network: Any, *args: Any, **more: Any) -> Any:
        asked.append(networks.copy_state(network))
        return original(network, *args, **more)

    def following(average: Any, student: Any, done: int, decay: float) -> None:
        follow(average, student, done, decay)
        students.append((networks.copy_state(average), networks.copy_state(student)))

    monkeypatch.setattr(clients, "teacher_signals", signals)
    monkeypatch.setattr(clients, "follow", following)
    updated("uamt")
    assert len(asked) == len(students) > 2
    for seen, (average, student) in list(zip(asked[1:], students, strict=False))[1:]:
        assert equal(seen, average) and not equal(seen, student)


def test_the_mean_teacher_stays_with_its_client() -> None:
    assert undisturbed("uamt").ledger == undisturbed("fedavg").ledger
    assert undisturbed("local_uamt").ledger.entries == []


def test_fedbn_keeps_normalisation_at_home_and_sends_the_rest() -> None:
    result, batch = undisturbed("fedbn"), ROWS["fedbn"].adapt(TINY)
    network = networks.build_student(batch, 0)
    local = networks.normalisation_names(network)
    assert {name.rsplit(".", 1)[1] for name in local} == {
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    shared = networks.nbytes({k: v for k, v in network.state_dict().items() if k not in local})
    assert shared < networks.nbytes(network.state_dict())
    assert {entry["bytes"] for entry in result.ledger.entries} == {shared}
    assert result.ledger.total("up") == TINY.rounds * len(SITES) * shared
    south, east = result.models["south"], result.models["east"]
    for name in network.state_dict():
        if name not in local:
            assert torch.equal(south[name], east[name]), name
        elif name.endswith("running_mean"):
            assert not torch.equal(south[name], east[name]), name
    update = updated("fedbn")
    assert set(update.state).isdisjoint(local) and set(update.kept) == {f"own/{name}" for name in local}


def test_with_instance_normalisation_fedbn_has_nothing_to_keep() -> None:
    """Why the row has batch normalisation: our instance normalisation has neither parameters nor statistics."""
    assert networks.normalisation_names(networks.build_network(TINY, 0)) == frozenset()
    plain = replace(ROWS["fedbn"], changes={})
    assert equal(updated("fedbn", method=plain).state, updated("fedavg").state)


def test_groups_are_pairs_that_change_and_three_clients_are_one() -> None:
    names = [f"c{i}" for i in range(5)]
    for number in range(1, 20):
        groups = server.random_groups(names[:4], 0, number)
        assert sorted(map(len, groups)) == [2, 2] and sorted(sum(groups, [])) == names[:4]
    assert sorted(map(len, server.random_groups(names, 0, 1))) == [2, 3]
    assert [sorted(g) for g in server.random_groups(names[:3], 0, 1)] == [names[:3]]
    assert len({str(server.random_groups(names, 0, number)) for number in range(10)}) > 1
    updates = [Update(n, state(float(i)), i + 1, {}) for i, n in enumerate(names[:4])]
    sent = server.group_step(updates, 0, 1)
    for group in server.random_groups(names[:4], 0, 1):
        mean = server.aggregate([u for u in updates if u.client in group])
        assert all(equal(sent[name], mean) for name in group)


def test_group_averaging_of_four_differs_from_fedavg_and_validates_the_average_of_all() -> None:
    four = [*SITES, site("west", 4)]
    grouped = run("ssfl_published", sites=four)
    assert equal(grouped.models["west"], grouped.models["east"])  # the average of all clients
    assert grouped.ledger.total("up") == grouped.ledger.total("down") * TINY.rounds // (TINY.rounds + 1)


def test_distillation_is_weighted_by_the_agreement_of_the_teacher_with_a_clients_labels() -> None:
    signals = clients.signals_for(TEACHER, SITES[0], TINY, 0)
    cases = [
        Case("x", image, label, np.eye(4), None, SHAPE, np.eye(4), (1, 2, 3))
        for image, label in zip(SITES[0].labelled_images, SITES[0].labels, strict=True)
    ]
    assert signals.trust == pytest.approx(training.validate(TEACHER, cases))
    distrusted = updated("trusted_kd", signals=replace(signals, trust=0.0))
    assert equal(distrusted.state, updated("fedavg").state)
    started = updated("combined_kd", signals=replace(signals, trust=0.0))  # both from the same weights
    assert equal(started.state, updated("finetune_random").state)
    full = updated("trusted_kd", signals=replace(signals, trust=1.0))
    assert equal(full.state, updated("strong_kd", signals=signals).state)
    assert teacher.agreement(TEACHER, torch.zeros((0, 1, *SHAPE)), torch.zeros((0, *SHAPE)), ()) == 0.0


def test_a_small_student_learns_but_cannot_start_at_the_teacher() -> None:
    small = replace(TINY, student_shrink=2)
    assert next(iter(run("fedavg", settings=small).models.values()))["body.model.0.conv.weight"].shape[0] == 2
    with pytest.raises(FederationError, match="student_shrink must be 1 and not 2"):
        run("finetune", settings=small)
    with pytest.raises(FederationError, match="student_shrink must be 1"):
        run("dual_kd", settings=small, teacher_update=TeacherUpdate("hand_over", 1, 0.5))
    with pytest.raises(ValueError, match="student_shrink 3 does not divide"):
        networks.build_student(replace(TINY, student_shrink=3), 0)


def test_each_of_two_clients_side_by_side_is_validated_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, scores_on = run("local_only", sites=SITES[:2], workers=1), federation.scores_on
    both, used = threading.Barrier(2, timeout=60), list[dict[str, str]]()

    def together(network: networks.TappedNetwork, cases: Any) -> dict[str, float]:
        both.wait()  # both clients have loaded their weights
        used.append({"network": str(id(network)), "weights": state_hash(network.state_dict())})
        return scores_on(network, cases)

    monkeypatch.setattr(federation, "scores_on", together)
    assert same(run("local_only", sites=SITES[:2], workers=2), expected)
    assert len(used) == 2 * TINY.rounds
    for first, second in zip(used[::2], used[1::2], strict=True):
        assert first["network"] != second["network"] and first["weights"] != second["weights"]


def test_a_client_goes_on_with_the_mixture_that_it_validates_best() -> None:
    mixed = run("mixed_protocols")
    owned = dict.fromkeys((one.name for one in SITES), networks.copy_state(TEACHER))
    best: dict[str, tuple[float, State]] = {}
    for number in range(1, TINY.rounds + 1):
        sent = [clients.client_update(owned[s.name], s, ROWS["finetune"], TINY, number, 0) for s in SITES]
        average = server.aggregate(sent)
        for one, update in zip(SITES, sent, strict=True):
            scores, states = [], []
            for share in (0.0, 0.25, 0.5, 0.75, 1.0):
                state = {
                    name: (tensor.double() * (1 - share) + average[name].double() * share).float()
                    for name, tensor in update.state.items()
                }
                network = networks.build_network(TINY, 0)
                networks.load_state(network, state)
                scores.append(training.validate(network, one.validation))
                states.append(state)
            chosen = int(np.argmax(scores))
            owned[one.name] = states[chosen]
            if scores[chosen] > best.get(one.name, (-1.0,))[0]:
                best[one.name] = scores[chosen], states[chosen]
            logged = mixed.history[(mixed.history["client"] == one.name) & (mixed.history["round"] == number)]
            assert logged["validation"].item() == scores[chosen]
            assert logged["common_share"].item() == (0.0, 0.25, 0.5, 0.75, 1.0)[chosen]
    for one in SITES:
        assert equal(mixed.models[one.name], best[one.name][1])
    assert mixed.ledger.frame().equals(run("finetune").ledger.frame())  # the mixture itself does not travel


@pytest.mark.parametrize(("share", "row"), [(0.0, "finetune_local"), (1.0, "finetune")])
def test_a_mixture_of_one_alone_is_that_one(share: float, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = run(row)
    monkeypatch.setattr(federation, "MIXTURES", (share,))
    mixed = numbers(run("mixed_protocols"))
    assert [line.pop("common_share") for line in mixed] == [share] * len(mixed)
    assert mixed == numbers(other)


def test_what_a_client_never_draws_it_takes_from_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "MIXTURES", (0.0,))
    once = replace(TINY, rounds=1)
    first = SITES[0]
    partial = replace(first, labelled_classes=(1, 2))
    sites = [partial, *SITES[1:]]
    mixed = run("mixed_protocols", settings=once, sites=sites)
    sent = [
        clients.client_update(networks.copy_state(TEACHER), one, ROWS["finetune"], once, 1, 0, teacher=TEACHER)
        for one in sites
    ]
    axes = networks.class_axes(networks.build_network(once, 0))
    average = server.aggregate(sent, axes)
    model, own = mixed.models[partial.name], sent[0].state
    for name, axis in axes.items():
        for c in range(4):
            expected = average if c == 3 else own
            assert torch.equal(model[name].select(axis, c), expected[name].select(axis, c))
        assert not torch.equal(average[name].select(axis, 3), own[name].select(axis, 3))
    assert all(torch.equal(model[name], own[name]) for name in own if name not in axes)


def test_who_can_score_nothing_goes_on_with_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = federation.scores_on

    def blind(network: networks.TappedNetwork, cases: Any) -> dict[str, float]:
        found = scored(network, cases)
        return {**found, "validation": float("nan")} if cases is SITES[0].validation else found

    monkeypatch.setattr(federation, "scores_on", blind)
    mixed = run("mixed_protocols")
    own = mixed.history[mixed.history["client"] == SITES[0].name]
    assert list(own["common_share"]) == [1.0] * TINY.rounds
    assert mixed.best_round[SITES[0].name] == mixed.validation_by_round().idxmax()  # the mean of those who can


def test_what_would_not_do_what_it_says_is_refused_before_training() -> None:
    refused = [
        ("local_only", {"clip_norm": 1.0}, "sends no update"),
        ("mixed_protocols", {"clip_norm": 1.0}, "a mixture that the server does not know"),
        ("chosen_finetune", {"compression": "int8"}, "a mixture that the server does not know"),
        ("fedavg", {"clip_norm": 0.0}, "clip_norm must be above 0"),
        ("fedavg", {"clip_norm": 1.0, "noise_multiplier": -1.0}, "noise_multiplier at least 0"),
        ("fedavg", {"noise_multiplier": 1.0}, "needs clip_norm"),
        ("fedavg_bn", {"compression": "top_1"}, "Batch statistics must not"),
        ("fedavg_bn", {"clip_norm": 1.0}, "Batch statistics must not"),
        ("fedavg", {"compression": "zip"}, "no compression 'zip': choose one of half"),
    ]
    steps = 0

    def count(done: int, note: str) -> None:
        nonlocal steps
        steps += done

    for row, changes, text in refused:
        with pytest.raises(ValueError, match=text):
            run(row, settings=replace(TINY, **changes), progress=count)
    assert steps == 0
    run("fedbn", settings=replace(TINY, compression="int8"))  # its statistics stay at home


def test_pooled_takes_one_site() -> None:
    with pytest.raises(FederationError, match="one site with everything"):
        federation.run_federation(TINY, "pooled", SITES)


# --- a teacher that moves ---------------------------------------------------------------------------------------


def test_hand_over_moves_the_teacher_after_the_warm_up_and_sends_nothing() -> None:
    frozen = undisturbed()
    late = run(teacher_update=TeacherUpdate("hand_over", TINY.rounds, 0.5))
    assert same(frozen, late)
    still = run(teacher_update=TeacherUpdate("hand_over", 1, 0.0))
    assert same(frozen, still)
    moved = run(teacher_update=TeacherUpdate("hand_over", 2, 0.5))
    assert moved.ledger == frozen.ledger
    a, b = numbers(frozen), numbers(moved)
    assert a[:6] == b[:6] and a[6:] != b[6:]  # two rounds alike, three clients each


def test_the_released_counter_ships_and_erases_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one round of 30 epochs 2e-12 of a teacher is left: whoever started as teacher, the same one ends."""
    long = replace(TINY, local_epochs=30, steps_per_epoch=1, rounds=1, batch_labelled=1, batch_unlabelled=1)
    start = networks.copy_state(networks.build_network(long, 0))
    signals = clients.signals_for(TEACHER, SITES[0], long, 0)
    monkeypatch.setattr(clients, "signals_for", lambda *a, **k: signals)  # so that both have the same students
    ends = []
    for seed in (99, 100):
        master = teacher.freeze(networks.build_network(long, seed))
        update = clients.client_update(
            start, SITES[0], ROWS["dual_kd"], long, 1, 0, teacher=master, teacher_update=teacher.RELEASE
        )
        assert update.teacher_state is not None
        ends.append(update.teacher_state)
    other = networks.build_network(long, 100).state_dict()
    apart = max((TEACHER.state_dict()[k] - other[k]).abs().max().item() for k in other)
    left = max((ends[0][k] - ends[1][k]).abs().max().item() for k in other)
    assert apart > 0.1 and left < 1e-6  # float32 cannot show 2e-12


def test_released_teachers_travel_in_both_directions_every_round() -> None:
    result = run("dual_kd", teacher_update=teacher.RELEASE)
    model = networks.nbytes(TEACHER.state_dict())
    assert result.ledger.total(what="teacher") == (1 + 2 * TINY.rounds) * len(SITES) * model


# --- resume -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a KeyboardInterrupt: nobody catches it."""


@pytest.mark.parametrize(
    ("row", "workers"),
    [
        ("local_only", 1),
        ("local_only", 2),
        ("dual_kd", 1),
        ("dual_kd", 2),
        ("uamt", 2),
        ("local_uamt", 1),
        ("finetune_uamt", 1),
        ("fedbn", 1),
        ("ssfl_published", 1),
        ("combined_kd", 1),
        ("mixed_protocols", 1),
        ("small_kd", 1),
    ],
)
def test_a_killed_run_goes_on_with_the_same_numbers(row: str, workers: int, tmp_path: Path) -> None:
    """Killed inside the first round, inside the second, and once more soon after it was resumed."""
    whole = undisturbed(row)
    looks = 11 if ROWS[row].distils else 0
    for kill_after in (looks + 2, looks + 15, looks + 13):
        steps = 0

        def kill(n: int, note: str, limit: int = kill_after) -> None:
            nonlocal steps
            steps += n
            if steps >= limit:
                raise Killed

        with pytest.raises(Killed):
            run(row, folder=tmp_path, workers=workers, progress=kill)
    assert (tmp_path / "round.safetensors").is_file()
    assert same(run(row, folder=tmp_path, workers=workers), whole)
    again = run(row, folder=tmp_path, workers=workers)  # finished: only read
    assert same(again, whole)


@pytest.mark.parametrize("update", [TeacherUpdate("hand_over", 1, 0.5), teacher.RELEASE], ids=["hand_over", "release"])
def test_a_kill_while_writing_and_a_moving_teacher(
    update: TeacherUpdate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between rounds, in the middle of writing the second checkpoint: the first one counts."""
    many_epochs = replace(TINY, local_epochs=4, steps_per_epoch=1)
    whole = run(settings=many_epochs, teacher_update=update)
    real, writes = os.replace, []

    def killed(source: Any, target: Any) -> None:
        writes.append(target)
        if len(writes) == 2:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        run(settings=many_epochs, teacher_update=update, folder=tmp_path)
    monkeypatch.setattr(os, "replace", real)
    assert [p.name for p in tmp_path.iterdir()] == ["round.safetensors"]
    _, facts = networks.load_checkpoint(tmp_path / "round.safetensors")
    assert facts["finished"] == 1
    assert same(run(settings=many_epochs, teacher_update=update, folder=tmp_path), whole)


def test_a_damaged_checkpoint_begins_again_and_one_of_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = undisturbed()
    run(folder=tmp_path)
    path = tmp_path / "round.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert same(run(folder=tmp_path), whole)
    kept = path.read_bytes()
    others: list[dict[str, Any]] = [
        {"settings": replace(TINY, learning_rate=0.5)},
        {"row": "fedavg"},
        {"sites": [*SITES[:2], site("east", 4)]},
        {"teacher_update": TeacherUpdate("hand_over", 1, 0.5)},
    ]
    for other in others:
        with pytest.raises(FederationError, match="round.safetensors belongs to a run with other.*delete"):
            run(folder=tmp_path, **other)
    assert path.read_bytes() == kept
    monkeypatch.setattr(checkpoints, "surroundings", lambda: {"device": "another"})
    with pytest.raises(FederationError, match="versions or device"):
        run(folder=tmp_path)
    assert path.read_bytes() == kept


# --- bad input --------------------------------------------------------------------------------------------------


def test_clients_that_cannot_take_part_are_named() -> None:
    broken = site("west", 4)
    broken.unlabelled_images[0, 0, 0, 0, 0] = float("nan")
    no_validation = replace(site("west", 4), validation=[])
    cases = [
        ("fedavg", site("west", 4, labelled=0), "west has no labelled training volume"),
        ("dual_kd", site("west", 4, unlabelled=0), "west has no unlabelled volume"),
        ("fedavg", no_validation, "west has no validation volume"),
        ("dual_kd", broken, "west: an unlabelled volume holds NaN"),
    ]
    for row, bad, text in cases:
        with pytest.raises(FederationError, match=text):
            run(row, sites=[*SITES, bad])
    run("fedavg", sites=[SITES[0], site("west", 4, unlabelled=0)])  # needs none
    with pytest.raises(FederationError, match="names of their own"):
        run(sites=[SITES[0], SITES[0]])
    with pytest.raises(FederationError, match="names of their own"):
        run(sites=[])
    with pytest.raises(ValueError, match="no row 'fedsgd': choose one of teacher_only"):
        run("fedsgd")
    for row in ("dual_kd", "teacher_only"):
        with pytest.raises(FederationError, match="needs a teacher"):
            federation.run_federation(TINY, row, SITES)
    start = networks.copy_state(networks.build_network(TINY, 0))
    with pytest.raises(FederationError, match="needs the teacher: send it to client south"):
        clients.client_update(start, SITES[0], ROWS["dual_kd"], TINY, 1, 0)
    with pytest.raises(FederationError, match="no local training"):
        clients.client_update(start, SITES[0], ROWS["teacher_only"], TINY, 1, 0)
    with pytest.raises(CheckpointError, match="The student sent to client south"):
        clients.client_update({}, SITES[0], ROWS["fedavg"], TINY, 1, 0)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_client_that_fails_ends_the_round_with_its_own_error(workers: int) -> None:
    def fail(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> Any:
        if len(images) == 2 and torch.equal(images.sort(0)[0], SITES[0].labelled_images.sort(0)[0]):
            raise RuntimeError("the disk of south is full")
        return images, labels

    with pytest.raises(RuntimeError, match="the disk of south is full"):
        run("fedavg", augmentation=fail, workers=workers)
