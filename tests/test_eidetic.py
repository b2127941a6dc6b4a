"""EideticNet: units with one owner, read by no earlier task whatever they hold, pruned within a tolerance."""

import itertools

import family_models
import pytest
import tiny
import torch
from transformers import TrainerCallback, default_data_collator

from hf_cl.errors import ConfigError, RunError
from hf_cl.layers.base import Base
from hf_cl.layers.side_network import SideNetwork
from hf_cl.layers.targets import find_head
from hf_cl.methods import eidetic
from hf_cl.methods.eidetic import Pruning
from hf_cl.ownership.owner import FREE
from hf_cl.proof import probe_digest
from hf_cl.training.method import Packed
from hf_cl.training.train_task import train_task

pytest_plugins = ["tiny"]

LABELS = ("abc", "de", "fghi")
OPTIONS = {
    "width": 12,
    "share": 1.0,
    "train_share": 0.4,
    "prunings": 3,
    "prune_step": 0.25,
    "tolerance": 0.9,
    "learning_rate": 0.05,
}


@pytest.fixture(scope="module")
def build(tiny_base):
    def make(seed=0, **changes):
        return eidetic.build(tiny_base(), eidetic.Options(**OPTIONS | changes), seed)

    return make


@pytest.fixture(scope="module")
def learn(token_task, arguments):
    def run(method, index, *callbacks, **changes):
        rows = token_task(index, len(LABELS[index]))
        args = arguments(**{"max_steps": 8, "learning_rate": 0.05} | changes)
        return train_task(method, index, tuple(LABELS[index]), rows, default_data_collator, args, callbacks=callbacks)

    return run


@pytest.fixture(scope="module", params=[True, False], ids=["transfer", "apart"])
def three(request, build, learn):
    """Three tasks, and the first two's logits right after each was learned."""
    method, before = build(transfer=request.param), []
    for index in range(3):
        learn(method, index)
        before.append((logits(method, index), method.parts(index), probe_digest(method.model)))
    return method, before


def logits(method, index):
    method.activate(index)
    return tiny.logits(method.model)


def inputs(rows=5):
    ids = torch.randint(50, (rows, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# --- the promise ----------------------------------------------------------------------------------------------


def test_earlier_tasks_stay_bit_identical(three):
    method, before = three
    for index, (held, parts, probe) in enumerate(before):
        assert torch.equal(logits(method, index), held)
        assert (method.parts(index), probe_digest(method.model)) == (parts, probe)
        assert int((method.side.owner == index).count_nonzero()) > 0


def overwrite(side, units, value=1e6):
    """Set all weights and biases of some units; return what takes it back."""
    kept = side.weight.clone(), side.bias.clone()
    side.weight[units], side.bias[units] = value, value

    def restore():
        side.weight.copy_(kept[0])
        side.bias.copy_(kept[1])

    return restore


@pytest.mark.parametrize("task", [0, 1, 2])
def test_every_later_unit_may_be_a_million_and_earlier_logits_have_the_same_bits(three, task):
    method, before = three
    later = (method.side.owner == FREE) | (method.side.owner > task)
    restore = overwrite(method.side, later)
    try:
        assert torch.equal(logits(method, task), before[task][0])
        # Not for want of reach: they answer, at the top of their range.
        method.activate(task)
        method.model(**inputs())
        units = method._units.detach().view(5, *method.side.owner.shape)[:, later]
        assert float(units.max()) == pytest.approx(6, rel=1e-5)  # a mean over tokens
    finally:
        restore()


def test_the_same_check_sees_a_tasks_own_unit_and_where_transfer_is_on_an_earlier_one(three):
    method, before = three
    side = method.side
    for owner, seen in ((1, True), (0, side.transfer)):
        restore = overwrite(side, side.owner == owner)
        try:
            assert (not torch.equal(logits(method, 1), before[1][0])) is seen
        finally:
            restore()


def test_a_stray_weight_from_a_later_unit_would_be_seen(three):
    method, before = three
    side = method.side
    column = side.inputs + int((side.owner[0] != 0).nonzero()[0])
    row = int((side.owner[1] == 0).nonzero()[0])
    assert side.weight[1, row, column] == 0
    restore = overwrite(side, (side.owner == FREE) | (side.owner > 0))
    try:
        side.weight[1, row, column] = 1.0
        assert not torch.equal(logits(method, 0), before[0][0])
    finally:
        restore()


def test_owned_weights_hold_nothing_of_units_that_they_may_not_read(three):
    method, _ = three
    side = method.side
    for layer in range(1, side.owner.shape[0]):
        for unit in (side.owner[layer] != FREE).nonzero()[:, 0].tolist():
            below, own = side.owner[layer - 1], side.owner[layer, unit]
            barred = (below == FREE) | (below > own) if side.transfer else below != own
            assert not side.weight[layer, unit, side.inputs :][barred].any()


def test_one_forward_answers_every_task_with_the_bits_of_one_at_a_time(three):
    method, before = three
    calls = []
    handle = method.model.bert.register_forward_hook(lambda *_: calls.append(1))
    method.model.eval()
    with torch.no_grad():
        found = method.answers(**inputs())
    handle.remove()
    assert len(calls) == 1
    assert list(found) == [0, 1, 2]
    ids = torch.randint(len(tiny.vocabulary()), (5, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        again = method.answers(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert all(torch.equal(again[index], before[index][0]) for index in range(3))


@pytest.mark.parametrize("family", family_models.CONFIGS)
def test_every_family_of_the_table_answers_all_tasks_in_one_forward(family):
    model = family_models.make(family)
    base = Base(model, None, family, tuple(find_head(model, None, ())))
    method, single = eidetic.build(base, eidetic.Options(**OPTIONS), 0), []
    inputs = family_models.batch()
    generator = torch.Generator().manual_seed(0)
    for index in range(2):
        method.begin(index, tuple(LABELS[index]))
        with torch.no_grad():
            method.side.readouts[f"task{index}"].normal_(generator=generator)
        method.side.alive[:, index::2] = False
        method.commit(index)
    method.model.eval()
    with torch.no_grad():
        for index in range(2):
            method.activate(index)
            single.append(method.model(**inputs).logits)
        found = method.answers(**inputs)
        assert all(torch.equal(found[index], single[index]) for index in range(2))
        method.side.weight[method.side.owner != 0] = 1e6
        method.activate(0)
        assert torch.equal(method.model(**inputs).logits, single[0])
        method.side.weight[method.side.owner == 0] = 1e6
        assert not torch.equal(method.model(**inputs).logits, single[0])


# --- a unit's life ----------------------------------------------------------------------------------------------


def test_owners_are_never_taken_back_and_free_units_begin_afresh(build, learn):
    method, owners, first = build(), [], []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            first.append(method.side.rows[f"task{method.side.task}"].detach().clone())

    for index in range(3):
        learn(method, index, Look())
        owners.append(method.side.owner.clone())
    for one, later in itertools.pairwise(owners):
        held = one != FREE
        assert torch.equal(one[held], later[held])
        assert bool((later[~held] != FREE).any())
    assert not method.side.weight[method.side.owner == FREE].any()
    bound = (16 + 12) ** -0.5
    for index, rows in enumerate(first):
        assert len(rows) == (24 if not index else int((owners[index - 1] == FREE).count_nonzero()))
        assert float(rows.abs().max()) <= bound
        assert float(rows.std()) == pytest.approx(bound / 3**0.5, rel=0.1)  # of a uniform draw


def test_before_training_a_task_adds_nothing_to_its_heads_logits(build):
    method = build()
    method.begin(0, tuple("abc"))
    head = method.heads.layers["classifier"].copies["task0"]
    method.model.eval()
    with torch.no_grad():
        output = method.model(**inputs(), output_hidden_states=True)
        assert torch.equal(output.logits, head(method.model.bert.pooler(output.hidden_states[-1])))


def test_importance_is_the_mean_of_gradient_times_output():
    side = SideNetwork(1, 4, 3, transfer=True, seed=0)
    side.begin(0, 2)
    with torch.no_grad():
        side.readouts["task0"].normal_(generator=torch.Generator().manual_seed(0))
    state = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    weights = torch.tensor([[1.0, -1.0], [2.0, 0.5]])
    (side.read(0, side([state], mask)) * weights).sum().backward()
    rows, bias = side.rows["task0"].detach(), side.biases["task0"].detach()
    outputs = (state @ rows[:, :4].T + bias).clamp(0, 6)
    share = (mask / mask.sum(1, keepdim=True))[..., None]
    grad = (weights @ side.readouts["task0"].detach())[:, None] * share
    assert torch.allclose(side.importance[0], (grad * outputs).abs().mean((0, 1)), rtol=1e-5)  # another order


def test_the_least_important_units_go_first_each_layer_of_one_length_and_one_stays():
    side = SideNetwork(2, 4, 3, transfer=True, seed=0)
    side.begin(0, 2)
    importance = torch.tensor([[3.0, 0.0, 4.0], [30.0, 40.0, 0.1]])
    side.importance.copy_(importance)
    assert side.prune(3) == 3
    # As shares of their layers' lengths .6, 0, .8 and .599, .799, .002.
    assert side.alive.tolist() == [[True, False, True], [False, True, False]]
    assert not side.importance.any()
    side.importance.copy_(importance)
    assert side.prune(99) == 2
    assert side.alive.tolist() == [[False, False, True], [False, False, False]]
    assert side.prune(1) == 0


def test_padding_is_not_read():
    side = SideNetwork(2, 4, 3, transfer=True, seed=0)
    side.begin(0, 2)
    states = [torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    with torch.no_grad():
        found = side(states, mask)
        states[0][:, 3:] = states[1][:, 3:] = 9.0
        assert torch.equal(side(states, mask), found)
        assert not torch.equal(side(states, None), found)


def test_a_task_trains_its_share_of_what_is_free_in_each_layer(build, learn):
    method = build(share=0.3, prunings=0)
    for index, own in enumerate((4, 3, 2)):  # of 12, 8 and 5, rounded up
        learn(method, index)
        assert (method.side.owner == index).sum(1).tolist() == [own, own]


# --- pruning -----------------------------------------------------------------------------------------------------


def accuracies(method, monkeypatch, figures):
    """Let evaluation during training find these accuracies, and return what is alive after each."""
    alive, real, left = [], Pruning.on_evaluate, list(figures)

    def told(self, args, state, control, **kwargs):
        asked = self._asked
        kwargs["metrics"] = {**kwargs["metrics"], "eval_accuracy": left.pop(0)} if asked else kwargs["metrics"]
        real(self, args, state, control, **kwargs)
        if asked:
            alive.append(int(method.side.alive.count_nonzero()))

    monkeypatch.setattr(Pruning, "on_evaluate", told)
    return alive


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ([0.8, 0.8, 0.8, 0.8], [18, 12, 6, 6]),
        ([0.8, 0.793, 0.792, 0.7921], [18, 12, 6, 6]),  # within a hundredth of the best
        ([0.8, 0.9, 0.89], [18, 12, 18]),  # the best rises: a hundredth of .9 is the bar now
        ([0.8, 0.79], [18, 24]),
        ([0.8, 0.8, 0.8, 0.1], [18, 12, 6, 12]),  # the last look is at the last step
    ],
)
def test_it_prunes_while_accuracy_holds_and_undoes_the_pruning_that_cost_too_much(
    build, learn, monkeypatch, figures, expected
):
    method = build(tolerance=0.01)
    alive = accuracies(method, monkeypatch, figures)
    learn(method, 0)
    assert alive == expected
    assert method.facts(0)["units"] == expected[-1]


def test_what_is_undone_is_the_state_before_the_pruning_bit_for_bit(build, learn, monkeypatch):
    method, kept = build(tolerance=0.01), []
    accuracies(method, monkeypatch, [0.8, 0.1])
    real = SideNetwork.prune

    def prune(self, count):
        kept.append([p.detach().clone() for p in method.model.parameters() if p.requires_grad])
        return real(self, count)

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            now = [p for p in method.model.parameters() if p.requires_grad]
            same.append(all(map(torch.equal, now, kept[0])))

    same = []
    monkeypatch.setattr(SideNetwork, "prune", prune)
    learn(method, 0, Look())
    assert same == [True, True]
    assert len(kept) == 1


def test_without_prunings_a_task_keeps_all_it_had_and_the_next_has_its_head_alone(build, learn, caplog):
    method = build(prunings=0)
    learn(method, 0)
    assert method.facts(0)["capacity_used"] == 1.0
    before = logits(method, 0)
    learn(method, 1)
    assert "task 1: no unit is free" in caplog.text
    assert method.facts(1)["units"] == 0
    assert torch.equal(logits(method, 0), before)


# --- files, bad input --------------------------------------------------------------------------------------------


def test_a_task_stores_its_own_units_and_only_what_they_read(three, build):
    method, before = three
    side = method.side
    again = build(transfer=side.transfer)
    for index in range(3):
        packed = method.pack(index)
        owned = side.owner == index
        reads = [16 + (int(side.read_by(index)[layer - 1].count_nonzero()) if layer else 0) for layer in range(2)]
        count = sum(int(owned[layer].count_nonzero()) * reads[layer] for layer in range(2))
        assert packed.task["weight"].shape == (count,)
        assert packed.task["weight"].dtype == torch.bfloat16
        again.restore(index, tuple(LABELS[index]), packed)
    for index in range(3):
        assert torch.equal(logits(again, index), before[index][0])


@pytest.mark.parametrize("name", ["units", "weight", "bias", "readout"])
def test_a_damaged_file_is_refused_by_name(three, build, name):
    method, _ = three
    packed = method.pack(0)
    task, head = dict(packed.task), dict(packed.head)
    held = task if name in task else head
    held[name] = held[name][..., :-1]
    with pytest.raises(RunError, match="task 0: "):
        build(transfer=method.side.transfer).restore(0, tuple(LABELS[0]), Packed(task, head))


def test_a_best_model_that_nobody_could_restore_is_refused(build, learn):
    with pytest.raises(ConfigError, match="load_best_model_at_end: it would bring pruned units back"):
        learn(build(), 0, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True)
