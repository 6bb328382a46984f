"""Configuration: where values come from, and one clear sentence for each way to get it wrong."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distloop.build import check
from distloop.build.method import Method
from distloop.build.run_directory import write_configuration
from distloop.config import Config
from distloop.errors import ConfigError
from distloop.settings import from_arguments, from_environment, from_file, from_mapping, resolve
from distloop.strategies import STRATEGIES

CONFIGS = sorted(Path(__file__).parent.parent.joinpath("configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text)
    return path


def test_layers_win_in_order_and_each_value_knows_its_source(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer:\n  name: sgd\n  lr: 1e-3\n  momentum: 0.5\ntrain:\n  seed: 1\n")
    environment = from_environment({"DISTLOOP_TRAIN__SEED": "2", "DISTLOOP_OPTIMIZER__LR": "2e-3", "HOME": "/"})
    with pytest.raises(ConfigError, match="DISTLOOP_OPTIMIZER_LR: settings have two underscores"):
        from_environment({"DISTLOOP_OPTIMIZER_LR": "2e-3"})
    resolved = resolve(from_file(path), environment, from_arguments(["--optimizer.lr=3e-3"]))
    rows = {key: (value, source) for key, value, source in resolved.rows()}
    assert rows["optimizer.lr"] == (3e-3, "command line --optimizer.lr")
    assert rows["train.seed"] == (2, "environment DISTLOOP_TRAIN__SEED")
    assert rows["optimizer.momentum"] == (0.5, f"{path}:4")
    assert rows["data.global_batch_size"] == (64, "default")


def test_yaml_1_2_numbers_and_words(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer:\n  lr: 1e-3\ntask:\n  a: no\n  b: 12:30\n  c: 010\n  d: 1_0\n")
    config = resolve(from_file(path)).config
    assert config.optimizer.lr == 1e-3
    assert config.task.options["a"] == "no"
    assert config.task.options["b"] == "12:30"
    assert config.task.options["c"] == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer:\n  lr: 1\n  momentun: 0.9\n", r"my.yaml:3: optimizer.momentun: unknown key .*'momentum'"),
        ("optimiser:\n  lr: 1\n", r"my.yaml:2: optimiser.lr: unknown section .*'optimizer'"),
        ("optimizer:\n  lr: 1\n  lr: 2\n", r'my.yaml:3: found duplicate key "lr"'),
        ("optimizer:\n  lr: abc\n", r"my.yaml:2: optimizer.lr: 'abc' is wrong: .*number"),
        ("optimizer:\n  lr: .nan\n", r"my.yaml:2: optimizer.lr: nan is wrong"),
        ("optimizer:\n  lr: true\n", r"my.yaml:2: optimizer.lr: True is wrong"),
        ("optimizer:\n  lr: -1\n", r"my.yaml:2: optimizer.lr: -1 is wrong: .*greater than 0"),
        ("data:\n  global_batch_size: 0\n", r"my.yaml:2: data.global_batch_size: 0 is wrong"),
        ("data:\n  global_batch_size: 1.5\n", r"my.yaml:2: data.global_batch_size: 1.5 is wrong"),
        ("data:\n  global_batch_size: 8\n  micro_batch_size: 9\n", r"my.yaml:3: .*9 is more than .*, which is 8"),
        ("schedule:\n  name: cosin\n", r"my.yaml:2: schedule.name: 'cosin' is wrong: .*'cosine'"),
        ("schedule:\n  name: step\n  peak: 0.2\n", r"my.yaml:3: schedule.peak: step does not read it"),
        ("strategy:\n  name: naiv\n", r"my.yaml:2: strategy.name: unknown name 'naiv' \(did you mean 'naive'\?\)"),
        ("optimizer:\n  name: adm\n", r"my.yaml:2: optimizer.name: unknown name 'adm' \(did you mean 'adam'\?\)"),
        ("optimizer:\n  name: adam\n  momentum: 0.9\n", r"my.yaml:3: optimizer.momentum: adam does not read it"),
        ("optimizer:\n  name: sgd\n  nesterov: true\n", r"my.yaml:3: optimizer.nesterov: needs optimizer.momentum"),
        ("optimizer: 3\n", r"my.yaml:1: optimizer: must be a section"),
        ("optimizer.lr: 3\n", r"my.yaml:1: optimizer.lr: must be a section"),
        ("optimiser:\n", r"my.yaml: optimiser: unknown section"),
        ("- 1\n", r"my.yaml: must hold sections"),
        ("a: [1\n", r"my.yaml:2: expected"),
        ("a: &x [1]\nb: *x\n", r"my.yaml:2: an alias"),
        ("task:\n  a: " + "[" * 40 + "]" * 40, r"my.yaml:2: nesting deeper"),
        ("a: !!python/object:os.system {}\n", r"my.yaml:1: a tag .* is not allowed"),
        ("log:\n  <<: {every: 1}\n", r"my.yaml:2: a merge key \(<<\) is not allowed"),
        ("%YAML 1.1\n---\ntask:\n  a: yes\n", r"my.yaml:2: a directive \(%\) is not allowed"),
        ("log: {every: 2}\n---\nlog: {every: 3}\n", r"my.yaml:2: expected a single document"),
        ("log:\n  ? {a: b}\n  : 1\n", r"my.yaml:2: a list or mapping is no key"),
        ("task:\n  1: a\n  '1': b\n", r'my.yaml:3: found duplicate key "1", as in line 2'),
        ("task.x:\n  y: 1\n", r"my.yaml:2: task.x.y: unknown section 'task.x'"),
        ("learners.a:\n  optimizer: {lr: 2}\n", r"my.yaml:2: learners.a.optimizer: unknown section"),
        ("learners:\n  a.optimizer: {lr: 2}\n", r"my.yaml:2: 'a.optimizer': a key has no dot here"),
        ("optimizer: 0x" + "f" * 5000, r"my.yaml:1: optimizer: a whole number of some \d+ digits is too large"),
        (
            "data:\n  global_batch_size: 1" + "0" * 400,
            r"my.yaml:2: data.global_batch_size: a whole number .* too large",
        ),
        ("data:\n  global_batch_size: 1" + "0" * 30, r"my.yaml:2: data.global_batch_size: 10+ is wrong: .*less than"),
        ("data:\n  workers: 1000000\n", r"data.workers: 1000000 is wrong"),
        ("world:\n  timeout: 1e300\n", r"world.timeout: 1e\+300 is wrong"),
        ("optimizer:\n  lr: 1e300\n", r"optimizer.lr: 1e\+300 is wrong"),
        ('log:\n  name: "a\\0b"\n', r"my.yaml:2: log.name: .* has the character U\+0000, which is no text"),
        ('log:\n  name: "\\ud800"\n', r"my.yaml:2: log.name: .* has the character U\+D800"),
        ("log:\n  name: ../../a\n", r"my.yaml:2: log.name: '../../a' is wrong: should name a folder below"),
        ("log:\n  name: ''\n", r"my.yaml:2: log.name: '' is wrong"),
        ("precision:\n  loss_scale: 8.0\n", r"my.yaml:2: precision.loss_scale: is read with precision.name fp16 alone"),
        ("train:\n  leaves: 4\n", r"my.yaml:2: train.leaves: is read with train.deterministic alone"),
    ],
)
def test_one_sentence_with_file_line_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved = resolve(from_file(write(tmp_path, text)))
        resolved.choose("strategy.name", STRATEGIES)
        check(resolved)


def test_choosing_another_method_leaves_the_files_constants_behind(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer:\n  name: adamw\n  betas: [0.9, 0.95]\n")
    Method(resolve(from_file(path), from_arguments(["--optimizer.name", "sgd"])))
    with pytest.raises(ConfigError, match=r"command line --optimizer\.betas: .*sgd does not read it"):
        Method(resolve(from_file(path), from_arguments(["--optimizer.name", "sgd", "--optimizer.betas", "[0.9, 0.9]"])))


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"my.yml: there is no such file \(did you mean 'my.yaml'\?\)"):
        from_file(tmp_path / "my.yml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.lr"], "has no value"),
        (["optimizer.lr", "1"], "not expected here"),
        (["--optimizer.lr", "1", "--optimizer.lr", "2"], "given twice"),
        (["--optimizer.rl", "1"], "unknown key 'rl'"),
        (["--optimizer", "1"], "is a section"),
        (["--optimizer.lr", "[1"], "not valid YAML"),
        (["--train.max_steps="], "command line --train.max_steps: has no value; null says"),
        (["--log.name", "--log.directory=x"], "--log.name has no value"),
        (["--log.name", "run #3"], "'run #3' has a comment in it"),
        (["--task.a", "[" * 5000], "nesting deeper than 20 levels"),
        (["--task.a", "[&a [1], *a]"], "an alias"),
        (["--task.a", "%YAML 1.1\n---\n12:30"], "a directive"),
        (["--task.a.b", "1"], "'a.b': a key has no dot"),
        (["--learners..optimizer.lr", "1"], "must be like learners.NAME.optimizer.lr"),
    ],
)
def test_arguments_that_are_wrong(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_arguments(arguments)


def test_dashes_and_equal_signs() -> None:
    settings = from_arguments(["--data.global-batch-size=12", "--task.path", "a=b"])
    assert {key: setting.value for key, setting in settings.items()} == {
        "data.global_batch_size": 12,
        "task.path": "a=b",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_supplied_configurations_are_valid_and_a_dump_of_them_is_the_same(path: Path, tmp_path: Path) -> None:
    resolved = resolve(from_file(path))
    Method(resolved)
    given = {dotted: value for dotted, value, source in resolved.rows() if source != "default"}
    assert given, "a configuration says something"
    write_configuration(tmp_path, resolved)
    assert resolve(from_file(tmp_path / "config.yaml")).config == resolved.config


def test_every_key_is_explained() -> None:
    for section, field in Config.model_fields.items():
        if section == "learners":
            continue
        for key, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
            assert inner.description, f"{section}.{key}"


LEARNERS = """
optimizer:
  name: sgd
  lr: 1
learners:
  critic:
    optimizer:
      lr: 2
    schedule: {name: step, every: 5}
"""


def test_a_learner_may_have_settings_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, LEARNERS)
    resolved = resolve(from_file(path))
    actor, critic = resolved.for_learner("actor").config, resolved.for_learner("critic").config
    assert (actor.optimizer.lr, critic.optimizer.lr) == (1, 2)
    assert (actor.schedule.name, critic.schedule.name, critic.schedule.every) == ("constant", "step", 5)
    assert critic.optimizer.name == "sgd", "what is not said of it alone is as for all"
    rows = {key: (value, source) for key, value, source in resolved.rows()}
    assert rows["learners.critic.optimizer.lr"] == (2, f"{path}:6")
    Method(resolved.for_learner("critic"))
    write_configuration(tmp_path, resolved)
    again = resolve(from_file(tmp_path / "config.yaml"))
    assert again.for_learner("critic").config == critic


@pytest.mark.parametrize(
    ("arguments", "lr"),
    [
        (["--optimizer.lr", "3"], 3),  # the command line wins over the file, whichever of them names the learner
        (["--learners.critic.optimizer.lr", "4"], 4),
        (["--optimizer.lr", "3", "--learners.critic.optimizer.lr", "4"], 4),
    ],
)
def test_later_layers_win_over_earlier_ones_of_a_learner(tmp_path: Path, arguments: list[str], lr: float) -> None:
    resolved = resolve(from_file(write(tmp_path, LEARNERS)), from_arguments(arguments))
    assert resolved.for_learner("critic").config.optimizer.lr == lr
    write_configuration(tmp_path, resolved)
    assert resolve(from_file(tmp_path / "config.yaml")).for_learner("critic").config.optimizer.lr == lr


def test_what_a_run_writes_can_be_read_again_after_a_method_was_overruled(tmp_path: Path) -> None:
    text = """
optimizer: {name: sgd, lr: 0.1, momentum: 0.9}
schedule: {name: cosine, final: 0.5}
learners:
  a: {optimizer: {name: rmsprop, alpha: 0.8}}
  b: {optimizer: {name: sgd}}
"""
    overruled = resolve(
        from_file(write(tmp_path, text)), from_arguments(["--optimizer.name=adam", "--schedule.name=step"])
    )
    write_configuration(tmp_path, overruled)
    again = resolve(from_file(tmp_path / "config.yaml"))
    for name in ("a", "b", "c"):
        Method(again.for_learner(name))
        first, second = (one.for_learner(name).config.optimizer for one in (overruled, again))
        assert (first.name, first.lr) == (second.name, second.lr) == ("adam", 0.1)
    own = resolve(
        from_file(write(tmp_path, text)), from_arguments(["--optimizer.momentum=0.7", "--learners.b.optimizer.lr=2"])
    )
    write_configuration(tmp_path, own)
    again = resolve(from_file(tmp_path / "config.yaml"))
    for name in ("a", "b", "c"):
        Method(again.for_learner(name))
    assert again.for_learner("b").config.optimizer == own.for_learner("b").config.optimizer
    kept = again.for_learner("a").config.optimizer
    assert (kept.name, kept.alpha, kept.lr) == ("rmsprop", 0.8, 0.1)


def test_a_learner_is_called_as_its_task_calls_it() -> None:
    arguments = from_arguments(["--learners.My-Actor.optimizer.weight-decay", "0.5"])
    assert resolve(arguments).for_learner("My-Actor").config.optimizer.weight_decay == 0.5


def test_learners_by_environment_and_from_python() -> None:
    environment = from_environment({"DISTLOOP_LEARNERS__MY_CRITIC__OPTIMIZER__WEIGHT_DECAY": "0.5"})
    python = from_mapping({"learners": {"my_critic": {"gradients": {"clip_norm": 1.0}}}})
    config = resolve(environment, python).for_learner("my_critic").config
    assert (config.optimizer.weight_decay, config.gradients.clip_norm) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "learners:\n  a:\n    optimizer: {lrr: 1}\n",
            "my.yaml:2: learners.a: optimizer.lrr: unknown key 'lrr' .*'lr'",
        ),
        ("learners:\n  a:\n    optimizer: {lr: x}\n", "my.yaml:2: learners.a: optimizer.lr: 'x' is wrong"),
        (
            "learners:\n  a:\n    optimiser: {lr: 1}\n",
            "learners.a.optimiser.lr: .* no section 'optimiser' .*'optimizer'",
        ),
        ("learners:\n  a:\n    data: {workers: 1}\n", "learners.a.data.workers: a learner has no section 'data'"),
        ("learners:\n  a: 3\n", "learners.a: must be like learners.a.optimizer.lr"),
        ("learners:\n  a:\n    optimizer: 3\n", "learners.a.optimizer: must be like"),
    ],
)
def test_bad_settings_of_a_learner(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(from_file(write(tmp_path, text)))


@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_one_clear_error(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "my.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            resolve(from_file(path))
        except ConfigError as failure:
            assert "my.yaml" in str(failure)


def test_python_values_are_taken_as_a_file_would_say_them() -> None:
    config = resolve(from_mapping({"optimizer": {"betas": (0.9, 0.95)}, "log": {"directory": Path("runs")}})).config
    assert (config.optimizer.betas, config.log.directory) == ([0.9, 0.95], "runs")
    with pytest.raises(ConfigError, match="a Thread is no number, text, list or mapping"):
        resolve(from_mapping({"task": {"name": "digits", "model": threading.Thread()}}))


def test_python_callers_are_told_too() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.rl: unknown key"):
        resolve(from_mapping({"optimizer": {"rl": 1}}))
    with pytest.raises(ConfigError, match="must be a mapping"):
        resolve(from_mapping({"optimizer": 3}))


def test_environment_variables_that_are_wrong() -> None:
    for environment, message in [
        ({"DISTLOOP_TRAIN__MAX_STEPS": ""}, "DISTLOOP_TRAIN__MAX_STEPS: train.max_steps: has no value"),
        ({"distloop_train__max_steps": "3"}, "settings are in capitals"),
        (
            {"DISTLOOP_LOG__EVERY": "1", "DISTLOOP_LOG__every": "2"},
            "log.every is given twice, by environment DISTLOOP_",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            from_environment(environment)


def test_values_from_python_are_bounded_too() -> None:
    own: list[object] = []
    own.append(own)
    for value, message in [
        (own, "nesting deeper than 20 levels"),
        ([1] * 20_000, "more than 5000 values"),
        ({1: 2}, "1: a key must be text"),
        ("a\0", r"U\+0000"),
        (10**5000, "is too large"),
    ]:
        with pytest.raises(ConfigError, match=f"argument task: task.a: .*{message}"):
            resolve(from_mapping({"task": {"a": value}}))
    for sections in (
        {"task.a": {"b": 1}},
        {"learners": {"a.optimizer": {"lr": 1}}},
        {"task": {1: 2}},
        {"log": {"a.b": 1}},
    ):
        with pytest.raises(ConfigError, match="argument"):
            resolve(from_mapping(sections))


def test_what_is_overruled_must_be_right_too(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer:\n  lr: abc\n")
    with pytest.raises(ConfigError, match=r"my.yaml:2: optimizer.lr: 'abc' is wrong"):
        resolve(from_file(path), from_arguments(["--optimizer.lr", "1"]))


@pytest.mark.parametrize(
    "text",
    [
        "optimizer: {lr: " + "x" * 90_000 + "}",
        "optimizer: {" + "x" * 900 + ": 1}",
        "log: {observers: [1" + ", 1" * 3000,
    ],
)
def test_sentences_are_of_bounded_length(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml:1") as caught:
        resolve(from_file(write(tmp_path, text + ("]}" if "[" in text else ""))))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "task:\n  a: [" + "1," * 120_000 + "]\n",
        "task:\n" + "".join(f"  k{n}: 1\n" for n in range(20_000)),
        "# x\n" * 300_000,
    ],
)
def test_a_large_file_costs_little(tmp_path: Path, text: str) -> None:
    path, began = write(tmp_path, text), time.process_time()
    with pytest.raises(ConfigError, match=r"more than 5000 values|larger than 256 KiB"):
        from_file(path)
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "\udcff.yaml", ".", "/dev/zero", "no/such/file.yaml"])
def test_paths_that_are_none(path: str) -> None:
    from distloop.targets import resolve as resolve_target

    with pytest.raises(ConfigError):
        from_file(Path(path))
    with pytest.raises(ConfigError):
        resolve_target(path, [])


def test_dates_are_words() -> None:
    assert resolve(from_arguments(["--log.name", "2024-01-01"])).config.log.name == "2024-01-01"


@pytest.mark.parametrize("name", ["2024", "true", "a #1", "[a]", "*a", "1e3"])
def test_a_run_may_be_called_anything_when_it_is_resumed(tmp_path: Path, name: str) -> None:
    from distloop.targets import resumed

    run = tmp_path / name
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    target, arguments = resumed(None, str(run), [])
    config = resolve(from_file(Path(target)), from_arguments(arguments)).config
    assert (config.log.name, config.log.directory, config.checkpoint.resume) == (name, str(tmp_path), str(run))


def test_what_a_run_writes_has_no_keys_that_its_methods_do_not_read(tmp_path: Path) -> None:
    text = "strategy: {name: auto, calibration: fresh}\nprecision: {name: fp16, loss_scale: 8.0}\n"
    resolved = resolve(
        from_file(write(tmp_path, text)), from_arguments(["--strategy.name", "ring", "--precision.name=fp32"])
    )
    check(resolved)
    write_configuration(tmp_path, resolved)
    again = resolve(from_file(tmp_path / "config.yaml"))
    check(again)
    assert (again.config.strategy.name, again.config.precision.name) == ("ring", "fp32")
