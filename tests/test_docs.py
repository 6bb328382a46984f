"""What the documents show is what the code does."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def blocks(path: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_loop_in_the_readme_is_the_loop() -> None:
    (listing,) = [block for block in blocks(ROOT / "README.md") if block.startswith("for epoch in epochs")]
    assert textwrap.indent(listing, "    ") in (ROOT / "distloop" / "loop.py").read_text()


def test_the_readmes_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTLOOP_LOG__PICTURE", "false")
    (example,) = [block for block in blocks(ROOT / "README.md") if "distloop.fit" in block]
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["result"].metrics["accuracy"] > 0.8


def test_the_examples_on_tasks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import distloop

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTLOOP_LOG__PICTURE", "false")
    _, denoising, acting, own_loop = blocks(ROOT / "docs" / "tasks.md")
    names: dict[str, Any] = {}
    exec(denoising, names)
    result = distloop.fit(names["task"], optimizer={"lr": 0.03}, train={"epochs": 5})
    assert result.metrics["loss"] < 1.0
    acted: dict[str, Any] = {}
    exec(acting, acted)
    assert int(acted["bandit"].model(torch.ones(1)).argmax()) == 3, "the arm that pays most"
    capsys.readouterr()
    exec(own_loop, names)
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(("name", "least"), [("collectives", 20), ("zero", 3), ("reliability", -1)])
def test_the_pages_with_figures_are_current(name: str, least: int) -> None:
    script = load(ROOT / "docs" / "figures.py")
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert script.document(page) == page, "run make docs"
    assert page.count("moonshot") > least, "the tables are there"


def test_the_page_on_kinds_is_current() -> None:
    script = load(ROOT / "docs" / "kinds.py")
    page = (ROOT / "docs" / "kinds.md").read_text()
    assert page == script.document(page), "run make docs"
    for kind in script.KINDS:
        assert f"`{kind}`" in page and (ROOT / "configs" / f"{kind}.yaml").exists()


def test_the_page_on_configuration_is_current() -> None:
    script = load(ROOT / "docs" / "configuration.py")
    assert (ROOT / "docs" / "configuration.md").read_text() == script.document(), "run make docs"


def test_the_readme_quotes_what_the_benchmark_wrote() -> None:
    benchmark = load(ROOT / "benchmarks" / "loop_overhead.py")
    results = json.loads((ROOT / "benchmarks" / "results" / "loop_overhead.json").read_text())
    table = benchmark.table(results)
    readme = (ROOT / "README.md").read_text()
    quoted = re.search(r"<!-- loop_overhead -->\n(.*?)\n<!-- /loop_overhead -->", readme, re.DOTALL)
    assert quoted is not None and quoted.group(1) == table


def test_the_gallery_quotes_what_its_runs_gave() -> None:
    gallery = load(ROOT / "docs" / "gallery.py")
    results = json.loads(gallery.RESULTS.read_text())
    page = (ROOT / "docs" / "gallery.md").read_text()
    quoted = re.search(r"<!-- gallery -->\n(.*?)\n<!-- /gallery -->", page, re.DOTALL)
    assert quoted is not None and quoted.group(1) == gallery.table(results)
    assert (results["optimizers"], results["schedules"]) == (gallery.OPTIMIZERS, gallery.SCHEDULES), "run make gallery"


def test_a_cell_of_the_gallery_can_be_run_and_drawn() -> None:
    gallery = load(ROOT / "docs" / "gallery.py")
    results = json.loads(gallery.RESULTS.read_text())
    run = gallery.measure("AdamW, decay 0.1", "one-cycle", seed=0, epochs=2)
    assert run["steps"][-1] == 46 and run["training_loss"][-1] < run["training_loss"][0]
    shape = gallery.shape_of("one-cycle")
    assert shape == results["shapes"]["one-cycle"] and len(shape["updates"]) == gallery.STEPS
    axes = gallery.draw(results).axes
    assert len(axes) == 30
    assert [axis.get_title() for axis in axes[:5]] == list(gallery.SCHEDULES)


def test_links_in_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.slow
def test_the_benchmark_runs_and_its_sides_agree() -> None:
    benchmark = load(ROOT / "benchmarks" / "loop_overhead.py")
    result = benchmark.measure(benchmark.Row("tiny", 2, "naive", 200, 50, 1))
    assert result["loss_difference"] < 1e-4
    assert result["cpu"]["ratio"] > 0
