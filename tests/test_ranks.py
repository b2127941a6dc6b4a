"""Several processes are one job: equal bits, one writer, and an error on every rank when something is wrong on one."""

from pathlib import Path

import pytest
import tiny
import torch
from test_stream_run import task_files

from hf_cl import ranks, train_stream
from hf_cl.errors import ConfigError
from hf_cl.storage.run_folder import RunFolder
from hf_cl.training.agreement import Agreement, checksum
from hf_cl.training.guards import refuse_sharding

pytest_plugins = ["tiny", "jobs"]

STEP = {"where": "hf_cl.training.keeping:Keeper.on_step_end"}
EVERY = ["training.save_strategy=steps", "training.save_steps=1"]
QUICK = ["training.ddp_timeout=60", "check_steps=2"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_folder):
    """Two tasks; on two ranks, three steps each with six epochs of half the batches."""
    return tiny.write_recipe(
        tmp_path_factory.mktemp("ranks"), base_folder, method={"name": "exssnet", "density": 0.3, "start": "fresh"}
    )


@pytest.fixture(scope="module")
def whole(jobs, recipe, tmp_path_factory):
    """An uninterrupted run of two ranks: its folder, and what they said."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = jobs.run(recipe, run, 2, *QUICK)
    require(done, 0, 0)
    return run, done


def said(done):
    return "\n".join(done["said"])


def require(done, *codes):
    assert tuple(done["codes"]) == codes, said(done)[-3000:]


# --- one process ------------------------------------------------------------------------------------------------------


def test_one_process_asks_nobody():
    assert (ranks.rank(), ranks.world(), ranks.gather(3), ranks.broadcast(4)) == (0, 1, [3], 4)
    assert ranks.any_rank([True, False]) == [True, False]
    assert ranks.on_first(lambda: 5) == 5
    ranks.require_equal({"a": "1"}, "now")
    ranks.leave(3)


def test_a_run_folder_that_a_rank_does_not_see_is_told(tmp_path, monkeypatch):
    """What ranks hold is compared between processes; here, one after the other says what it would hold."""
    told = []
    monkeypatch.setattr(ranks, "require_equal", lambda held, when: told.append((held, when)))
    folder = RunFolder(tmp_path / "run", {})
    folder.path.mkdir()
    (folder.path / "run.json").write_text("{}")
    train_stream._require_shared(folder)  # as rank 0, which sees it
    (folder.path / "run.json").unlink()
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(train_stream, "SEEN_WITHIN", 0)
    train_stream._require_shared(folder)
    (first, _), (other, when) = told
    assert when == "before training" and first != other
    assert list(other) == list(first) == [f"{folder.path / 'run.json'}, which must lie where all machines see it"]
    assert list(other.values()) == ["missing"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.bool, torch.uint8, torch.int64])
def test_a_checksum_sees_every_single_bit(dtype):
    tensor = (torch.rand(9, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    before, raw = checksum(tensor), tensor.view(torch.uint8)
    assert checksum(tensor.clone()) == before
    for place in range(raw.numel()):
        for bit in range(1 if dtype == torch.bool else 8):
            raw[place] ^= 1 << bit
            assert checksum(tensor) != before
            raw[place] ^= 1 << bit
    assert checksum(tensor) == before


def test_a_checksum_sees_an_exchange_and_a_far_place():
    long = torch.zeros(200_000)
    long[150_000] = 1
    other = long.clone()
    other[150_000], other[150_001] = 0, 1
    assert checksum(long) != checksum(other)
    assert checksum(torch.tensor([1.0, 2.0])) != checksum(torch.tensor([2.0, 1.0]))
    assert checksum(torch.zeros(0)) == 0


def test_an_interval_without_a_step_is_refused():
    with pytest.raises(ConfigError, match="check_steps: expected at least 1"):
        Agreement(0)


LAUNCHED = {
    "deepspeed": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "fsdp": {"ACCELERATE_USE_FSDP": "true"},
    "megatron": {"ACCELERATE_USE_MEGATRON_LM": "1"},
    "parallelism_config": {"PARALLELISM_CONFIG_TP_SIZE": "2"},
}


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_a_launcher_shards_is_refused_by_name_on_a_cpu_too(monkeypatch, tmp_path, name):
    args = tiny.arguments(tmp_path)
    refuse_sharding(args)
    for key, value in LAUNCHED[name].items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=f"^{name}.*shards parameters.*torchrun --nproc_per_node N"):
        refuse_sharding(args)


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = tiny.arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ConfigError, match=r"2 GPUs in one process.*torchrun --nproc_per_node 2"):
        refuse_sharding(args)


def test_a_child_that_is_no_rank_gets_nothing_of_a_rank(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "here")
    left = ranks.environment()
    assert left["HF_HOME"] == "here"
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & set(left)


# --- two ranks --------------------------------------------------------------------------------------------------------


def test_two_ranks_speak_with_each_other(jobs, tmp_path):
    done = jobs.call(tmp_path / "basics", 2, "rank_checks:basics")
    require(done, 0, 0)
    first, other = done["found"]
    own = ("alone", "failed")
    assert {key: value for key, value in first.items() if key not in own} == {
        key: value for key, value in other.items() if key not in own
    }
    assert first["world"] == 2
    assert (first["broadcast"], first["gather"]) == (["of", 0], [0, 10])
    assert (first["any"], first["first"], first["nested"]) == ([False, True, True], "of 0", [1, 0, [0]])
    assert (first["slow"], other["slow"]) == ("done", "done")
    assert (first["alone"], other["alone"]) == ([0], []), "rank 0 alone does the work"
    assert first["failed"].startswith("OSError: [Errno 28]")
    assert other["failed"].startswith("RankError: rank 1 stops, because rank 0 failed: OSError: [Errno 28] No space")
    assert first["equal"] == ""
    assert first["different"].startswith(
        "RankError: rank 1 differs from rank 0 at step 4: b and 1 more. All ranks stop"
    )
    assert "rank 1 differs from rank 0 now: b." in first["lacking"]
    assert (first["after"], first["environment"]) == ([0, 1], [])


def test_two_ranks_train_stop_and_go_on_to_the_same_bits(jobs, recipe, whole, tmp_path):
    run, done = whole
    first, other = done["found"]
    assert first == other and first["exact"], "what is gathered is the same on all ranks"
    assert [line for line in done["said"][0].splitlines() if line.startswith("[2/2]")]
    assert not [line for line in done["said"][1].splitlines() if "accuracy" in line], "progress is told once"
    # 4,096 masked weights in 12 layers of two sizes; 30 % of them may train; the head; 4 bytes each.
    scores, values = 4 * 4096, 4 * sum([77] * 8 + [154] * 4)
    for sent, labels in zip(first["sent"], (2, 3), strict=True):
        head = 4 * 17 * labels
        assert [step - head for step in sent] == [scores] * 3 + [values]
    stopped = jobs.run(recipe, tmp_path / "run", 2, *QUICK, **STEP, what="term", at=6, on=1)
    require(stopped, 75, 75)
    assert len(list((tmp_path / "run" / "state").iterdir())) == 1
    require(jobs.run(recipe, tmp_path / "run", 1, *QUICK, resume=True), 2)
    require(jobs.run(recipe, tmp_path / "run", 2, *QUICK, resume=True), 0, 0)
    assert task_files(tmp_path / "run") == task_files(run)


def test_one_bit_on_one_rank_stops_all_and_is_named(jobs, recipe, tmp_path):
    done = jobs.run(recipe, tmp_path / "run", 2, *QUICK, **STEP, what="bit:owner:3", at=5, on=1)
    require(done, 2, 2)
    for text in done["said"]:
        assert "RankError: rank 1 differs from rank 0 at" in text and ".store.owner" in text
    assert len(RunFolder.open(tmp_path / "run").tasks) == 1, "the task before it is kept"


# --- more of it, slowly ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluation_and_kkt_features_are_sharded_and_gathered_whole(jobs, base_folder, tmp_path):
    args = [str(base_folder), str(tmp_path)]
    both = jobs.call(tmp_path / "two", 2, "rank_checks:measured", args)
    require(both, 0, 0)
    first, other = both["found"]
    assert first == other
    assert first["features"] == [[22, 16], True]
    assert (len(first["correct"]), len(first["other"])) == (11, 13)
    assert first["accuracy"] == sum(first["other"]) / 13


@pytest.mark.slow
def test_what_is_not_sent_changes_no_bit(jobs, recipe, whole, tmp_path):
    order = [str(recipe), str(tmp_path / "run"), QUICK, False]
    require(jobs.call(tmp_path / "run", 2, "rank_checks:train_without_hook", order), 0, 0)
    assert task_files(tmp_path / "run") == task_files(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["supsup", "lora", "finetune"])
def test_a_base_without_a_head_may_have_another_on_each_rank(jobs, base_folder, tmp_path, method):
    done = jobs.call(tmp_path / "run", 2, "rank_checks:other_heads", [str(base_folder), str(tmp_path), method])
    require(done, 0, 0)
    (equal, parts), other = done["found"]
    assert not equal and other == [False, parts]


@pytest.mark.slow
def test_a_users_own_trainer_is_warned_and_watched(jobs, base_folder, tmp_path):
    done = jobs.call(tmp_path / "own", 2, "rank_checks:own_trainer", [str(base_folder), str(tmp_path)])
    require(done, 0, 0)
    first, other = done["found"]
    assert first["phases"] == other["phases"] == ["committed", "committed"]
    assert (first["quiet"], other["warned"]) == ([], [])
    assert len(first["warned"]) == 1 and "ddp_broadcast_buffers is on" in first["warned"][0]
    for found in (first, other):
        assert "rank 1 differs from rank 0 before training" in found["unlike"] and ".hfcl_scores." in found["unlike"]
        assert "rank 1 differs from rank 0 before training: option weight_decay" in found["options"]


WRONG = {
    "no room for the bank": {"where": "hf_cl.storage.bank_folder:write_new", "what": "full", "at": 2},
    "no room for a state": {"where": "hf_cl.storage.state_folder:write_new", "what": "full", "at": 7},
    "a loss that is no number": {"where": "transformers.trainer:Trainer.compute_loss", "what": "nan", "at": 3, "on": 1},
    "a dead rank": {**STEP, "what": "die", "at": 5, "on": 1},
    "a dead rank 0": {**STEP, "what": "die", "at": 5, "on": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", WRONG)
def test_what_goes_wrong_on_one_rank_ends_all_and_the_run_goes_on(jobs, recipe, whole, tmp_path, what):
    run, _ = whole
    done = jobs.run(recipe, tmp_path / "run", 2, *QUICK, *EVERY, **WRONG[what], limit=60)
    assert all(code not in (0, 75) for code in done["codes"]), said(done)
    assert max(done["ended"]) - min(done["ended"]) < 30
    if "number" in what:
        assert all("the loss or its gradient is not finite" in text for text in done["said"])
    require(jobs.run(recipe, tmp_path / "run", 2, *QUICK, *EVERY, resume=True), 0, 0)
    assert task_files(tmp_path / "run") == task_files(run)


@pytest.mark.slow
def test_a_hung_rank_ends_the_job_after_the_timeout(jobs, recipe, tmp_path):
    quick = ["training.ddp_timeout=10"]
    done = jobs.run(recipe, tmp_path / "run", 2, *quick, **STEP, what="hang", at=5, on=1, limit=120)
    assert done["codes"][0] not in (0, 75)
    assert done["codes"][1] == -9, "ended by its launcher, since it hangs"
    assert "imed out" in done["said"][0], said(done)[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_repeat_gives_the_same_bits(jobs, recipe, tmp_path, world):
    for name in ("one", "other"):
        require(jobs.run(recipe, tmp_path / name, world, *QUICK), *[0] * world)
    assert task_files(tmp_path / "one") == task_files(tmp_path / "other")
    assert Path(tmp_path / "one" / "results.json").is_file()


def test_two_ranks_train_values_so_few_that_their_gradients_are_taken_one_by_one(jobs, recipe, tmp_path):
    """DDP waits for whatever requires a gradient: also for the scores, which such a weight phase does not read."""
    sparse = ["method.density=0.02", "training.num_train_epochs=12"]
    require(jobs.run(recipe, tmp_path / "run", 2, *QUICK, *sparse), 0, 0)
