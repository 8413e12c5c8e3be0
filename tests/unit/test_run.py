"""The run directory: what is in it, who may write to it, and what a resume needs."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

from adapt_pruner.config import PruneConfig
from adapt_pruner.run import RunDirectory, environment


def make_config(**changes) -> PruneConfig:
    return PruneConfig(**({"model": "some/model", "target": 0.8, "output": "out"} | changes))


@pytest.fixture
def start(tmp_path):
    """Opens the run directory tmp_path/run; closes what is still open at the end."""
    opened = []

    def open_run(*, resume=False, **changes) -> RunDirectory:
        opened.append(RunDirectory.open(tmp_path / "run", make_config(**changes), resume=resume))
        return opened[-1]

    yield open_run
    for run in opened:
        run.close()


def names(path) -> set[str]:
    return {file.name for file in path.iterdir() if not file.name.startswith(".")}


# Opening


def test_a_new_run_has_its_settings_and_environment(start, tmp_path):
    run = start(amplitude=0.1 + 0.2, calibration_column=None, target="108M")
    assert names(run.path) == {"config.yaml", "environment.json"}
    saved = yaml.safe_load((run.path / "config.yaml").read_text())
    assert saved == dataclasses.asdict(make_config(amplitude=0.1 + 0.2, target="108M"))
    assert json.loads((run.path / "environment.json").read_text()).keys() == environment().keys()
    assert run.path == tmp_path / "run"


def test_an_empty_directory_may_be_used_and_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    RunDirectory.open(tmp_path / "empty", make_config(), resume=False).close()
    RunDirectory.open(tmp_path / "a" / "b" / "c", make_config(), resume=False).close()
    assert (tmp_path / "a" / "b" / "c" / "config.yaml").exists()


def test_a_directory_with_something_in_it_is_refused_and_left_alone(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"is not empty$"):
        start()
    assert names(tmp_path / "run") == {"thesis.txt"}


def test_a_file_in_the_place_of_the_directory_is_refused(start, tmp_path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(FileExistsError):
        start()
    assert (tmp_path / "run").read_text() == "precious"


def test_an_earlier_run_is_refused_with_a_hint(start):
    start().close()
    with pytest.raises(FileExistsError, match="is not empty; --resume goes on with the run in it"):
        start()


def test_resuming_what_is_no_run_is_refused(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"is not a run directory: it has no config\.yaml"):
        start(resume=True)
    assert names(tmp_path / "run") == {"thesis.txt"}


def test_resuming_nothing_starts_a_run(start):
    run = start(resume=True)
    assert run.load_state() is None
    assert names(run.path) == {"config.yaml", "environment.json"}


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "config.yaml"]])
def test_a_run_that_was_killed_while_it_began_can_be_resumed(start, left):
    run = start()
    run.close()
    for file in run.path.iterdir():
        if file.name not in left:
            file.unlink()
    run = start(resume=True)
    assert names(run.path) == {"config.yaml", "environment.json"}


@pytest.mark.parametrize(
    ("change", "now", "before"),
    [
        ({"amplitude": 0.03}, "0.03", "0.02"),
        ({"target": "108M"}, "'108M'", "0.8"),
        ({"pack": True}, "True", "False"),
        ({"calibration_column": "body"}, "'body'", "None"),
        ({"seed": 7}, "7", "0"),
    ],
)
def test_resuming_with_another_setting_names_it_and_both_values(start, change, now, before):
    start().close()
    key = next(iter(change))
    with pytest.raises(ValueError, match=f"cannot resume .*: {key} is {now}, .* started with {before}"):
        start(resume=True, **change)
    start(resume=True).close()  # the refusal changed nothing


def test_where_a_run_lies_may_change(start):
    start(output="first").close()
    start(resume=True, output="second").close()


def test_every_float_setting_survives_to_a_resume(start):
    for amplitude in (1e-7, 0.1 + 0.2, 1 / 3):
        config = make_config(amplitude=amplitude)
        assert yaml.safe_load(yaml.safe_dump(dataclasses.asdict(config)))["amplitude"] == amplitude
    start(amplitude=1 / 3, target=2 / 3).close()
    start(amplitude=1 / 3, target=2 / 3, resume=True)


def test_a_run_without_a_setting_that_came_later_has_its_default(start):
    run = start()
    run.close()
    path = run.path / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    del settings["gradients"]
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match="gradients is 'materialised', the run was started with 'auto'"):
        start(resume=True, gradients="materialised")
    start(resume=True).close()
    del settings["target"]  # every run was given one
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=r"target is 0\.8, the run was started with None"):
        start(resume=True)


def test_a_damaged_config_is_refused(start):
    run = start()
    run.close()
    (run.path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        start(resume=True)


# One writer


def test_a_second_writer_is_refused_until_the_first_is_done(start):
    first = start()
    with pytest.raises(BlockingIOError, match="another process is writing to the run"):
        start(resume=True)
    first.close()
    start(resume=True)


def test_the_lock_holds_between_processes_and_dies_with_them(start, tmp_path):
    ready = tmp_path / "ready"
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from adapt_pruner.config import PruneConfig\n"
        "from adapt_pruner.run import RunDirectory\n"
        "import adapt_pruner.run\n"
        "adapt_pruner.run.environment = dict\n"
        "config = PruneConfig('some/model', 0.8, 'out')\n"
        "run = RunDirectory.open(sys.argv[1], config, resume=False)\n"
        "Path(sys.argv[2]).touch()\n"
        "time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "run"), str(ready)])
    try:
        while not ready.exists():
            assert other.poll() is None
            time.sleep(0.02)
        with pytest.raises(BlockingIOError):
            start(resume=True)
    finally:
        other.kill()
        other.wait()
    start(resume=True)


# Progress


def test_state_comes_back_exactly(start):
    rng = np.random.default_rng(0)
    sparsity = [*rng.random(200), 0.1 + 0.2, 1 / 3, 5e-324, math.nextafter(1, 0), 0.0]
    run = start()
    assert run.load_state() is None
    run.save_iteration(3, {"iteration": 3}, {"sparsity": sparsity, "plan": 'a "plan"\n'})
    run.close()
    state = start(resume=True).load_state()
    assert state == {"iteration": 3, "sparsity": sparsity, "plan": 'a "plan"\n'}


def test_iterations_are_kept_in_order_and_the_last_state_counts(start):
    run = start()
    for number in (1, 2, 10, 11):
        run.save_iteration(number, {"iteration": number, "loss": 1 / number}, {"sparsity": [0.1 * number]})
    assert [record["iteration"] for record in run.iterations()] == [1, 2, 10, 11]
    assert {file.name for file in (run.path / "iterations").iterdir()} == {
        "001.json",
        "002.json",
        "010.json",
        "011.json",
    }
    assert run.load_state() == {"iteration": 11, "sparsity": [0.1 * 11]}


def test_a_repeated_iteration_replaces_its_record(start):
    run = start()
    run.save_iteration(1, {"loss": 1.0}, {})
    run.save_iteration(1, {"loss": 2.0}, {})
    assert run.iterations() == [{"loss": 2.0}]


def test_the_log_is_one_json_line_per_event(start):
    run = start()
    before = time.time()
    run.log("started", parameters=7)
    run.log("finished", note="two\nlines")
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [(line["event"], line.get("parameters"), line.get("note")) for line in lines] == [
        ("started", 7, None),
        ("finished", None, "two\nlines"),
    ]
    assert all(before - 1 < line["time"] < time.time() + 1 for line in lines)


def test_a_run_is_complete_with_a_model_and_without_state(start):
    run = start()
    assert not run.complete
    run.save_iteration(1, {}, {})
    assert not run.complete
    run.model.mkdir()
    assert not run.complete
    run.finish()
    assert run.complete
    assert names(run.path) == {"config.yaml", "environment.json", "iterations", "model"}


def test_a_kill_while_the_state_is_removed_leaves_a_complete_run(start, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    run = start()
    run.save_iteration(1, {}, {}, {"kept": torch.zeros(2)})
    run.model.mkdir()
    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    assert run.complete


def test_finishing_without_any_iteration(start):
    run = start()
    run.finish()
    run.model.mkdir()
    assert run.complete


# Environment


def test_the_environment_tells_versions_source_and_hardware():
    import torch
    import transformers

    found = environment()
    assert set(found) == {
        "versions",
        "python",
        "revision",
        "machine",
        "processor",
        "threads",
        "cuda_devices",
    }
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["threads"] == torch.get_num_threads()
    assert len(found["cuda_devices"]) == torch.cuda.device_count()
    json.dumps(found)
