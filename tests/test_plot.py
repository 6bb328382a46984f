"""Pictures of runs and of schedules: what is in them, and one sentence for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is an extra")

from distloop import schedules
from distloop.errors import ConfigError, DataError, StorageError
from distloop.observers.curves import Curves, draw, panels
from distloop.plot import check_request
from distloop.plot.runs import differences, name_by_differences, plot_runs, read_run
from distloop.plot.schedule import draw_schedule, plan_rates, plot_schedule
from distloop.records import Record
from distloop.settings import Resolved, from_mapping, resolve
from tests.ranks import run_command

ROOT = Path(__file__).parent.parent
BATCH = "64 samples = 1 rank x 1 micro-batch of at most 64; 1280 samples in 20 steps per epoch"
LOSSES = [2.0, 1.0, 0.5, 0.25, 0.125]


def line(kind: str, step: int, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, "epoch": max(step - 1, 0) // 20, "time": 1000.0 + step / 2, **values}


def records(scale: float = 1.0) -> list[dict[str, Any]]:
    """Return what a run of two epochs writes."""
    training = [line("train", 10 * i, loss=scale * loss, lr=0.1 / (i + 1)) for i, loss in enumerate(LOSSES)]
    evaluations = [
        line("evaluate", 20, loss=scale * 0.75, accuracy=0.5, best=True),
        line("evaluate", 40, loss=scale * 0.375, accuracy=0.75, best=True),
    ]
    middle = sorted([*training, *evaluations], key=lambda one: one["step"])
    end = line("end", 40, best_metric="accuracy", best=0.75, best_step=40)
    return [line("start", 0, batch=BATCH, world="1 rank on cpu, 1 thread each"), *middle, end]


def write_run(folder: Path, told: list[dict[str, Any]], config: str = "", tail: str = "") -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told) + tail)
    if config:
        (folder / "config.yaml").write_text(config)
    return str(folder)


def panel(figure: Any, title: str) -> Any:
    (axes,) = [axes for axes in figure.axes if axes.get_title() == title]
    return axes


def data(axes: Any, name: str) -> list[list[tuple[float, float]]]:
    """Return the points of the lines of a name."""
    found = [lines for lines in axes.lines if lines.get_label() == name]
    return [[(float(x), float(y)) for x, y in zip(*one.get_data(), strict=True)] for one in found]


def legends(figure: Any) -> list[str]:
    figure.draw_without_rendering()
    return [" ".join(text.get_text().split()) for legend in figure.legends for text in legend.get_texts()]


def curves(folder: Path) -> Curves:
    return read_run(folder).curves


def test_the_lines_of_one_run_are_its_records(tmp_path: Path) -> None:
    write_run(tmp_path / "a", records())
    run = curves(tmp_path / "a")
    figure = draw([run], title="a")
    assert [axes.get_title() for axes in figure.axes] == ["loss", "accuracy", "learning rate"]
    loss = panel(figure, "loss")
    assert data(loss, "training") == [[(10 * i, value) for i, value in enumerate(LOSSES)]]
    assert data(loss, "evaluation") == [[(20, 0.75), (40, 0.375)]]
    assert loss.get_yscale() == "log", "from 2 to 0.125 is more than a decade"
    accuracy = panel(figure, "accuracy")
    assert data(accuracy, "evaluation") == [[(20, 0.5), (40, 0.75)]]
    assert data(accuracy, "best") == [[(40, 0.75)]]
    assert accuracy.get_yscale() == "linear"
    assert data(panel(figure, "learning rate"), "training")[0][1] == (10, 0.05)


@pytest.mark.parametrize(("x", "at"), [("step", [20, 40]), ("epoch", [1.0, 2.0]), ("seconds", [10.0, 20.0])])
def test_what_curves_are_drawn_over(tmp_path: Path, x: str, at: list[float]) -> None:
    write_run(tmp_path / "a", records())
    ((first, second),) = data(panel(draw([curves(tmp_path / "a")], x=x), "accuracy"), "evaluation")
    assert [first[0], second[0]] == at


def test_epochs_of_unknown_length_are_over_when_they_are_counted(tmp_path: Path) -> None:
    write_run(tmp_path / "a", records()[1:])
    points = curves(tmp_path / "a").series["evaluate", "accuracy"]
    assert [point.epoch for point in points] == [1, 2]


def test_the_real_facts_tell_the_length_of_an_epoch() -> None:
    from distloop.build.facts import _batch
    from distloop.plan import Plan

    run = Curves()
    run.add(Record("start", 0, 0, {"batch": _batch(Plan(12800, 64, 16), 2)}), 0.0)
    run.add(Record("train", 50, 0, {"loss": 1.0}), 1.0)
    assert run.series["train", "loss"][0].epoch == 0.25


def test_several_runs_have_a_colour_each_and_pale_training(tmp_path: Path) -> None:
    for name, scale in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        write_run(tmp_path / name, records(scale))
    figure = draw([curves(tmp_path / name) for name in "abc"])
    loss = panel(figure, "loss")
    assert [points[-1] for points in data(loss, "evaluation")] == [(40, 0.375), (40, 0.75), (40, 1.125)]
    training, evaluation = (
        [one for one in loss.lines if one.get_label() == name] for name in ("training", "evaluation")
    )
    assert [one.get_color() for one in training] == [one.get_color() for one in evaluation] == ["C0", "C1", "C2"]
    assert all(one.get_alpha() < 1 for one in training) and all(one.get_alpha() == 1 for one in evaluation)
    rates = panel(figure, "learning rate").lines
    assert all(one.get_alpha() == 1 for one in rates), "nothing stands beside them that they could be mistaken for"
    many = draw([curves(tmp_path / "a") for _ in range(12)])
    assert len({str(one.get_color()) for one in panel(many, "learning rate").lines}) == 12


def test_the_legend_says_in_which_settings_runs_differ(tmp_path: Path) -> None:
    config = "optimizer: {{lr: {lr}, name: {name}}}\nlog: {{name: {run}}}\ndata: {{micro_batch_size: {micro}}}\n"
    write_run(tmp_path / "a", records(), config.format(lr=0.1, name="sgd", run="a", micro="null"))
    told = records()
    told[0]["world"] = "4 ranks started by torchrun on cpu, 1 thread each"
    write_run(tmp_path / "b", told, config.format(lr=0.002, name="adamw", run="b", micro=16))
    write_run(tmp_path / "_c$x$", records()[:-1], config.format(lr=0.1, name="sgd", run="c", micro="null"))
    runs = [read_run(tmp_path / name) for name in ("a", "b", "_c$x$")]
    name_by_differences(runs)
    figure = draw([run.curves for run in runs])
    assert legends(figure) == [
        "a: ranks 1, optimizer sgd, lr 0.1, micro batch size none",
        "b: ranks 4, optimizer adamw, lr 0.002, micro batch size 16",
        r"_c\$x\$ (not finished): ranks 1, optimizer sgd, lr 0.1, micro batch size none",
        "training",
        "evaluation",
        "best",
    ]


def test_settings_are_told_apart_with_the_shortest_names() -> None:
    one = {"optimizer.name": "sgd", "schedule.gamma": 0.1, "task.name": "x", "task.deep": True}
    other = {"optimizer.name": "sgd", "schedule.gamma": 0.2, "optimizer.gamma": 3, "task.name": "y", "task.deep": 1}
    assert differences([one, other]) == {
        "task.name": "task",
        "task.deep": "deep",
        "optimizer.gamma": "optimizer.gamma",
        "schedule.gamma": "schedule.gamma",
    }


def test_many_differences_and_equal_names_fit(tmp_path: Path) -> None:
    for number in (1, 2):
        keys = ", ".join(f"k{i}: {number}" for i in range(20))
        write_run(tmp_path / str(number) / "run", records(), f"task: {{{keys}}}\n")
    runs = [read_run(tmp_path / str(number) / "run") for number in (1, 2)]
    name_by_differences(runs)
    assert runs[0].curves.name.startswith(str(tmp_path / "1" / "run") + ": k0 1, k1 1, ")
    assert runs[0].curves.name.endswith(", and 12 more")


def test_a_run_that_was_killed_in_the_middle_of_a_line(tmp_path: Path) -> None:
    write_run(tmp_path / "a", records()[:-3], tail='{"kind": "train", "step": 4')
    run = read_run(tmp_path / "a")
    assert run.state == " (not finished)"
    assert [point.step for point in run.curves.series["train", "loss"]] == [0, 10, 20, 30]
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps(line("train", 50, loss=0.1)) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:7: is no record of a run"):
        read_run(tmp_path / "a")


def test_a_failed_run_says_so_and_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    told = [line("train", 1, loss=1.0), line("train", 2, loss=None), line("failure", 2, error="NonFiniteError")]
    write_run(tmp_path / "a", told)
    run = read_run(tmp_path / "a")
    assert run.state == " (failed)"
    assert [point.step for point in run.curves.series["train", "loss"]] == [1]


def test_metrics_choose_panels() -> None:
    run = Curves()
    for step in (1, 2):
        values = {"generator/loss": 1.0, "critic/loss": 2.0, "samples_per_second": 9.0}
        run.add(Record("train", step, 0, values), float(step))
    assert panels([run]) == {"loss": [("train", "generator/loss"), ("train", "critic/loss")]}
    chosen = panels([run], ["samples_per_second", "critic/loss"])
    assert chosen == {
        "samples_per_second": [("train", "samples_per_second")],
        "critic/loss": [("train", "critic/loss")],
    }
    with pytest.raises(ConfigError, match=r"no metric|has a metric 'los' \(did you mean 'loss'\?\)"):
        panels([run], ["los"])
    two = draw([run, run])
    assert len({one.get_linestyle() for one in panel(two, "loss").lines}) == 2, "a line for each role"
    assert legends(two)[-2:] == ["generator", "critic"]


def test_smoothing_is_a_mean_over_training_records(tmp_path: Path) -> None:
    write_run(tmp_path / "a", records())
    figure = draw([curves(tmp_path / "a")], smooth=2)
    loss = panel(figure, "loss")
    assert [value for _, value in data(loss, "training")[0]] == [2.0, 1.5, 0.75, 0.375, 0.1875]
    assert data(loss, "evaluation") == [[(20, 0.75), (40, 0.375)]]
    assert data(panel(figure, "learning rate"), "training")[0][1] == (10, 0.05)


def test_nine_panels_stand_in_rows() -> None:
    run = Curves()
    run.add(Record("evaluate", 1, 0, {f"metric_{i}": float(i) for i in range(9)}), 0.0)
    figure = draw([run])
    assert figure.get_figwidth() < 17
    assert sum(axes.get_visible() for axes in figure.axes) == 9


def test_mistakes_with_runs_are_one_sentence(tmp_path: Path) -> None:
    def plot(*paths: str, output: Path = tmp_path / "out.png", metrics: tuple[str, ...] = ()) -> str:
        return plot_runs(paths, output, x="step", metrics=metrics, smooth=1)

    good = write_run(tmp_path / "runs" / "a", records())
    empty = write_run(tmp_path / "runs" / "b", records()[:1])
    with pytest.raises(ConfigError, match=r"runs: is no run directory, it has no metrics\.jsonl \(in it are: a, b\)"):
        plot(str(tmp_path / "runs"))
    with pytest.raises(ConfigError, match="nowhere: there is no such folder"):
        plot(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="has no record of training or evaluation"):
        plot(empty)
    with pytest.raises(ConfigError, match=r"no run has a metric 'acuracy' \(did you mean 'accuracy'\?\)"):
        plot(good, metrics=("acuracy",))
    with pytest.raises(StorageError, match="cannot be written: No such file or directory"):
        plot(good, output=tmp_path / "no" / "out.png")
    assert plot(good, empty, good).endswith(f"of 1 run; without {empty}, which has no record to draw")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("targets", "schedule", "output", "for_runs", "message"),
    [
        ([], None, "a.png", [], "give run directories"),
        (["a"], None, "a.bmp", [], r"a\.bmp: a picture's name ends in \.png"),
        (["a"], None, "a", [], "a picture's name ends in"),
        (["a", "--outptu", "b"], None, "a.png", [], r"no option '--outptu' \(did you mean '--output'\?\)"),
        (["--optimizer.lr", "1"], None, "a.png", [], "settings are for --schedule"),
        (["a"], "digits", "a.png", [], "'a' and --schedule are two pictures"),
        ([], "digits", "a.png", ["--metric"], "--metric is for the curves of runs"),
    ],
)
def test_requests_that_contradict_themselves(
    targets: list[str], schedule: str | None, output: str, for_runs: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_request(targets, schedule, Path(output), for_runs)


def test_without_matplotlib_there_is_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"plot: needs matplotlib: pip install 'distloop\[plots\]'"):
        check_request(["a"], None, Path("a.png"), [])


def config(**sections: Any) -> Resolved:
    return resolve(from_mapping({"task": {"name": "tests.user_tasks:Fine"}} | sections))


def test_the_schedule_is_the_one_that_training_uses(tmp_path: Path) -> None:
    import distloop
    from tests.user_tasks import Fine

    chosen: dict[str, Any] = {
        "data": {"global_batch_size": 3},
        "optimizer": {"lr": 0.5},
        "schedule": {"name": "cosine", "warmup_steps": 5, "final": 0.1},
        "train": {"epochs": 4},
    }
    planned = plan_rates(config(**chosen))
    assert planned.steps_per_epoch == 7 and planned.updates == list(range(1, 29)), "20 samples in batches of 3"
    factor = schedules.WarmUp(schedules.Cosine(28, 0.1), 5)
    assert planned.rates[""] == [0.5 * factor(step) for step in range(28)]

    seen: list[tuple[int, float]] = []
    log = {"every": 1, "directory": str(tmp_path), "picture": False, "tensorboard": False}
    distloop.fit(
        Fine(),
        observers=[lambda r: seen.append((r.step, r.values["lr"])) if r.kind == "train" else None],
        log=log,
        **chosen,
    )
    assert seen == list(zip(planned.updates, planned.rates[""], strict=True))

    figure = draw_schedule(config(**chosen).config, planned)
    axes = figure.axes[0]
    ((xs, ys),) = [one.get_data() for one in axes.lines]
    assert (list(xs), list(ys)) == (planned.updates, planned.rates[""])
    assert "adamw, lr 0.5, cosine with 5 steps of warm-up" in axes.get_title()
    (epochs,) = axes.child_axes
    assert epochs.get_xlabel() == "epoch"
    figure.draw_without_rendering()
    assert epochs.get_xlim()[1] == pytest.approx(axes.get_xlim()[1] / 7)


@pytest.mark.parametrize(
    ("sections", "updates", "last"),
    [
        ({"train": {"max_steps": 30}, "schedule": {"name": "linear"}}, 30, 1e-3 / 30),
        ({"train": {"max_steps": 3, "epochs": 2}, "data": {"global_batch_size": 4}}, 3, 1e-3),
        ({"train": {"max_seconds": 9.0}, "schedule": {"name": "cosine", "steps": 50}}, 50, None),
        ({"train": {"max_seconds": 9.0}, "schedule": {"name": "step", "every": 5}}, 20, 1e-6),
        ({"train": {"max_seconds": 9.0}, "schedule": {"name": "plateau"}}, 1000, 1e-3),
        ({"train": {"max_seconds": 9.0}, "schedule": {"warmup_steps": 400}}, 1600, 1e-3),
        ({}, 10, 1e-3),
        ({"task": {"name": "tests.user_tasks:NoLength"}, "schedule": {"name": "cosine", "steps": 9}}, 9, None),
        ({"train": {"max_steps": 123456}}, 123456, 1e-3),
    ],
)
def test_how_many_updates_are_drawn(sections: dict[str, Any], updates: int, last: float | None) -> None:
    planned = plan_rates(config(**sections))
    assert planned.updates[0] == 1 and planned.updates[-1] == updates and len(planned.updates) <= 20_001
    if last is not None:
        assert planned.rates[""][-1] == pytest.approx(last)
    assert draw_schedule(config(**sections).config, planned).axes


def test_an_end_that_cannot_be_told_is_a_sentence_with_the_key_to_set(tmp_path: Path) -> None:
    endless = config(train={"max_seconds": 9.0}, schedule={"name": "one_cycle"})
    with pytest.raises(ConfigError, match=r"one_cycle must know its end: set schedule\.steps or train\.max_steps"):
        plot_schedule(endless, tmp_path / "a.png")
    with pytest.raises(DataError, match="has no length"):
        plot_schedule(config(task={"name": "tests.user_tasks:NoLength"}), tmp_path / "a.png")
    plateau = config(schedule={"name": "plateau"}, train={"max_steps": 5})
    assert "not known beforehand" in draw_schedule(plateau.config, plan_rates(plateau)).axes[0].get_title()


def test_the_commands(tmp_path: Path) -> None:
    for name, lr in (("a", 0.1), ("b", 0.2)):
        write_run(tmp_path / "runs" / name, records(lr), f"optimizer: {{lr: {lr}}}\n")
    variables = {"PYTHONPATH": str(ROOT)}
    (end,) = run_command("plot", "runs/a", "runs/b", "--output", "both.svg", folder=tmp_path, **variables)
    assert (end.code, end.err) == (0, "")
    assert end.out == "both.svg: loss, accuracy, learning rate of 2 runs\n"
    assert (tmp_path / "both.svg").read_text().startswith("<?xml")
    arguments = ("--schedule", "digits", "--schedule.name", "cosine", "--train.epochs=2")
    (end,) = run_command("plot", *arguments, folder=tmp_path, **variables)
    assert (end.code, end.err) == (0, "")
    assert end.out == "schedule.png: learning rate of 46 updates (23 per epoch), at most 0.001, at last 1.17e-06\n"
    assert (tmp_path / "schedule.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["runs"], 2, "runs: there is no such folder"),
        ([".", "--schedule", "digits"], 2, "two pictures"),
        (["--schedule", "digits", "--smooth", "3"], 2, "--smooth is for the curves of runs"),
        (["--schedule", "digit"], 2, "did you mean 'digits'?"),
        (["--schedule", "digits", "--schedule.nam", "x"], 2, "unknown key 'nam'"),
        (["--schedule", "digits", "--output", "no/a.png"], 21, "no/a.png: cannot be written"),
        (["."], 4, "has no record of training"),
    ],
)
def test_a_mistake_is_one_sentence_and_an_exit_code(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (end,) = run_command("plot", *arguments, folder=tmp_path, PYTHONPATH=str(ROOT))
    assert end.code == code, end.err
    assert end.out == "" and message in end.err
    assert end.err.startswith("distloop: ") and end.err.count("\n") == 1


def test_curves_need_neither_torch_nor_the_schema(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", records())
    code = (
        "import sys; from pathlib import Path; from distloop.plot.runs import plot_runs\n"
        f"plot_runs([{run!r}], Path({str(tmp_path / 'a.png')!r}), x='step', metrics=(), smooth=1)\n"
        "print([name for name in ('torch', 'pydantic', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"
