"""The teacher: cached and remade, frozen, its signals against a slow version, and what the updates leave of it."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from fedkd_utils import cohorts, losses, networks, teacher, training
from fedkd_utils.seeds import generator_of, seed_of
from fedkd_utils.teacher import TeacherUpdate

TINY = replace(tiny.TINY, dropout=0.2, client_test=1, teacher_passes=5)
VNET = replace(TINY, architecture="vnet", grid_shape=(16, 16, 16))


@pytest.fixture()
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    quick = functools.partial(cohorts.make_cohort, workers=1, scan=tiny.blobs)
    monkeypatch.setattr(cohorts, "make_cohort", quick)
    return tmp_path


def count_trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = teacher.pretrain_teacher

    def counted(*args: object) -> object:
        calls.append(1)
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(teacher, "pretrain_teacher", counted)
    return calls


def test_teacher_is_trained_once_and_read_back_bit_by_bit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_trainings(monkeypatch)
    steps: list[int] = []
    first = teacher.teacher_for(TINY, "paper_like", 0, cache, lambda n, note: steps.append(n))
    assert sum(steps) == TINY.teacher_steps and len(calls) == 1
    steps.clear()
    again = teacher.teacher_for(TINY, "paper_like", 0, cache, lambda n, note: steps.append(n))
    other_setting = teacher.teacher_for(TINY, "heterogeneous", 0, cache)  # the same repository
    assert len(calls) == 1 and sum(steps) == TINY.teacher_steps
    a = first.network.state_dict()
    for one in (again, other_setting):
        assert all(torch.equal(a[k], v) for k, v in one.network.state_dict().items())
        assert one.validation.equals(first.validation) and one.best_dice == first.best_dice
    assert first.path.is_relative_to(cache) and first.bytes == networks.nbytes(a)
    for one in (first, again):
        assert not one.network.training and not any(p.requires_grad for p in one.network.parameters())


def test_teacher_is_made_anew_when_damaged_or_when_something_it_depends_on_changed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_trainings(monkeypatch)
    first = teacher.teacher_for(TINY, "paper_like", 0, cache)
    whole = first.path.read_bytes()
    for damage in (whole[:-1], b"", whole[:-5] + b"x" + whole[-4:]):
        first.path.write_bytes(damage)
        again = teacher.teacher_for(TINY, "paper_like", 0, cache)
        assert again.path == first.path
        a, b = first.network.state_dict(), again.network.state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert len(calls) == 4
    unrelated = replace(TINY, rounds=99, response_weight=0.7)
    assert teacher.teacher_for(unrelated, "paper_like", 0, cache).path == first.path
    more_steps = replace(TINY, teacher_steps=7)
    paths = {
        first.path,
        teacher.teacher_for(more_steps, "paper_like", 0, cache).path,
        teacher.teacher_for(TINY, "paper_like", 1, cache).path,
    }
    monkeypatch.setattr(teacher, "code_hash", lambda modules: "another code")
    paths.add(teacher.teacher_for(TINY, "paper_like", 0, cache).path)
    assert len(paths) == 4 and len(calls) == 7


def test_a_teacher_that_nothing_could_validate_is_kept_all_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_trainings(monkeypatch)
    monkeypatch.setattr(training, "validate", lambda network, cases: float("nan"))
    made, read = (teacher.teacher_for(TINY, "paper_like", 0, cache) for _ in range(2))
    assert len(calls) == 1 and np.isnan(made.best_dice) and np.isnan(read.best_dice)
    assert read.validation["dice"].isna().all() and read.validation.equals(made.validation)


def test_code_hash_sees_code_and_not_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedkd_utils import provenance

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    hashes = []
    for text in (
        "def f():\n    'doc'\n    return 1\n",
        "# new\ndef f():\n\n    return 1\n",
        "def f():\n    return 2\n",
    ):
        (tmp_path / "a.py").write_text(text)
        provenance.code_hash.cache_clear()
        hashes.append(provenance.code_hash(("a",)))
    provenance.code_hash.cache_clear()
    assert hashes[0] == hashes[1] != hashes[2]


def images(count: int, settings: object = TINY) -> torch.Tensor:
    shape = settings.grid_shape  # type: ignore[attr-defined]
    return torch.randn((count, 1, *shape), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", [TINY, VNET], ids=["unet", "vnet"])
def test_signals_equal_the_equations_one_pass_at_a_time(settings: object) -> None:
    """q, H and f_T in float64, with masks applied by hand from the same draws."""
    network = teacher.freeze(networks.build_network(settings, 0)).double()  # type: ignore[arg-type]
    if settings is VNET:  # statistics other than 0 and 1
        network.train()
        network(images(3, settings).double())
        network.eval()
    before = networks.copy_state(network)
    u = images(2, settings).double()
    seeds, passes = [11, 12], 5
    signals = teacher.teacher_signals(network, u, passes, seeds)
    for index, seed in enumerate(seeds):
        noise = generator_of(seed, "noise")
        shape = (1, *u.shape[1:])
        xi = losses.clipped_noise(shape, noise)
        assert xi.abs().max() <= 0.2
        q = torch.softmax(network(u[[index]] + xi), 1)
        features = network.forward_with_features(u[[index]] + xi)[1]
        network.seed_dropout(seed_of(seed, "dropout"))
        total = torch.zeros_like(q)
        done = 0
        while done < passes:
            size = min(teacher._PASSES_AT_ONCE, passes - done)
            noisy = u[[index]] + losses.clipped_noise((size, *u.shape[1:]), noise)
            for module in network.modules():
                module.training = isinstance(module, networks.ChannelDropout)
            total = total + torch.softmax(network(noisy), 1).sum(0, keepdim=True)
            network.eval()
            done += size
        q_bar = total / passes
        h = -(q_bar * q_bar.log()).sum(1)
        assert torch.allclose(signals.probabilities[index], q[0].detach(), rtol=0, atol=1e-12)
        assert torch.allclose(signals.entropy[index], h[0].detach(), rtol=0, atol=1e-12)
        assert torch.allclose(signals.features[index], features[0].detach(), rtol=0, atol=1e-12)
    after = network.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)  # batch statistics too
    assert not network.training and not signals.probabilities.is_inference()


def test_cached_signals_equal_those_computed_again_and_do_not_depend_on_company() -> None:
    network = teacher.freeze(networks.build_network(TINY, 0))
    u = images(3)
    state = torch.get_rng_state()
    first = teacher.teacher_signals(network, u, 5, [1, 2, 3])
    again = teacher.teacher_signals(network, u, 5, [1, 2, 3])
    alone = teacher.teacher_signals(network, u[[2]], 5, [3])
    other = teacher.teacher_signals(network, u[[2]], 5, [4])
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("probabilities", "entropy", "features"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.equal(getattr(first, name)[2], getattr(alone, name)[0])
        assert not torch.equal(getattr(alone, name), getattr(other, name))
    voxels, positions = 4 * 16 * 16, 4 * 8 * 8
    assert first.bytes == 3 * 4 * ((4 + 1) * voxels + 8 * positions)
    assert first.entropy.min() >= 0 and first.entropy.max() <= np.log(4) + 1e-6


def test_stochastic_passes_raise_the_entropy_of_the_mean() -> None:
    """Jensen: the entropy of the mean is at least the mean entropy; with dropout the passes do differ."""
    network = teacher.freeze(networks.build_network(replace(TINY, dropout=0.5), 0))
    u = images(1)
    one = [teacher.teacher_signals(network, u, 1, [seed]).entropy for seed in range(20)]
    many = teacher.teacher_signals(network, u, 40, [0]).entropy
    assert many.mean() > torch.stack(one).mean() + 1e-3
    assert torch.stack(one).std(0).mean() > 1e-3


def test_bad_signal_requests_are_refused() -> None:
    network = teacher.freeze(networks.build_network(TINY, 0))
    for volumes, passes, seeds in ((images(2), -1, [1, 2]), (images(2), 3, [1]), (images(0), 3, [])):
        with pytest.raises(ValueError, match="a seed for each"):
            teacher.teacher_signals(network, volumes, passes, seeds)


def test_the_released_counter_leaves_nothing_of_the_teacher_after_one_round() -> None:
    """24! / 30^24 = 2.2e-12, by the counter and by blending a real state."""
    rates = [teacher.release_rate(epoch, 30) for epoch in range(30)]
    assert rates[:6] == [0.0] * 6 and rates[6] == 0.2 and rates[29] == 29 / 30
    left = np.prod([1 - rate for rate in rates])
    exact = 1.0
    for k in range(1, 25):
        exact *= k / 30
    assert left == pytest.approx(exact, rel=1e-12) and 2e-12 < left < 3e-12
    assert teacher.release_rate(30, 30) == 0.99
    student = {"w": torch.zeros(3), "n": torch.tensor(7)}
    state = {"w": torch.ones(3), "n": torch.tensor(5)}
    for rate in rates:
        state = teacher.blend(state, student, rate)
    assert state["w"].double().numpy() == pytest.approx(np.full(3, exact), rel=1e-5)
    assert state["n"].item() == 5


def test_blend_is_the_weighted_mean_at_its_ends_and_between() -> None:
    a, b = ({"w": torch.tensor(v)} for v in ([1.0, -2.0], [3.0, 6.0]))
    assert teacher.blend(a, b, 0.0)["w"].tolist() == [1.0, -2.0]
    assert teacher.blend(a, b, 1.0)["w"].tolist() == [3.0, 6.0]
    assert teacher.blend(a, b, 0.25)["w"].tolist() == [1.5, 0.0]
    assert a["w"].tolist() == [1.0, -2.0]
    with pytest.raises(ValueError, match="'frozen', 'hand_over' or 'release'"):
        TeacherUpdate("sometimes")
    for bad in ({"rate": 1.5}, {"warm_up_rounds": -1}):
        with pytest.raises(ValueError, match="rate"):
            TeacherUpdate("hand_over", **bad)  # type: ignore[arg-type]


def test_pretraining_learns_the_repository(cache: Path) -> None:
    longer = replace(TINY, teacher_steps=80)
    made = teacher.teacher_for(longer, "paper_like", 0, cache)
    assert made.best_dice > 0.5 and made.best_dice == made.validation["dice"].max()
    assert 0 <= made.data_share < 1 and made.seconds > 0
    repository = cohorts.make_cohort(longer, "paper_like", root=cache).repository
    from fedkd_utils.transforms import load_site

    assert training.validate(made.network, load_site(repository, longer).validation) == made.best_dice


def test_without_passes_the_teacher_is_trusted_everywhere() -> None:
    network = teacher.freeze(networks.build_network(TINY, 0))
    none, some = (teacher.teacher_signals(network, images(2), passes, [1, 2]) for passes in (0, 3))
    assert none.entropy.abs().max() == 0 and losses.uncertainty_mask(none.entropy, 0.0, 4).all()
    assert torch.equal(none.probabilities, some.probabilities) and torch.equal(none.features, some.features)


def test_another_contrast_is_another_teacher_of_the_same_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(teacher.cohorts, "make_repository", lambda s, scanner, root=None: asked.append(scanner))
    monkeypatch.setattr(teacher, "teacher_on", lambda *a: None)
    teacher.teacher_for(replace(TINY, teacher_contrast="random"), "paper_like")
    assert asked == ["random"]
